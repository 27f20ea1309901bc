"""Check STAS-on-Ray on an NVIDIA GPU, once, in about five minutes, and print a table to paste into an issue.

    python -m tests.gpu.check [--minutes 5]
    python -m tests.gpu.check --smoke      # tries the script out in a minute, without a GPU too

Needs no data, no weights and no Ray: phantom fields of 1716 x 942 px and the published U-Net on efficientnet_b3 with
random weights. What it looks at:

  equality   maps of the GPU against the CPU's, in float32 and in bfloat16: the largest and the mean difference of
             8-bit levels, and the share of pixels on the other side of one half. The same maps in a second run.
  scoring    images/s of one and of four members, without flips and with all four; busy share, memory (bar: busy 90 %).
  training   images/s of a fold with augmentation on the CPU cores; busy share, memory (bar: busy 90 %).
  sharing    two processes that score on the GPU at once, against one.

Ends with status 1 where maps differ by more than a level in float32, or between two runs.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from stas_core import config, markdown
from stas_core.arrays import ProbMapU8, RgbImage
from stas_core.data.cohort import read_cohort
from stas_core.data.phantom import PhantomConfig, make_phantom
from stas_core.predict.inference import ALL_FLIPS, Amp, InferenceConfig
from stas_core.predict.predictor import Member, Predictor
from stas_core.train import loop
from stas_core.train.context import LocalContext
from stas_core.train.recipe import FoldRecipe, FoldTask
from tests import made_cohort
from tests.bench import score_gpu, train_gpu

SMOKE_SIZE = {"height": 96, "width": 128}


class Row(NamedTuple):
    """A line of the table."""

    what: str
    found: str
    bar: str = ""


def maps_of(fields: Sequence[RgbImage], settings: Mapping[str, Any], device: torch.device, amp: Amp) -> list[ProbMapU8]:
    """Return the maps of fields with one model made from a fixed seed."""
    model = score_gpu.build_models(dict(settings), 1, torch.device("cpu"))[0]
    inference = InferenceConfig(flips=ALL_FLIPS, amp=amp)
    predictor = Predictor([Member("a", model)], device=device, config=inference)
    return [predictor.predict_u8(field) for field in fields]


def check_equality(
    fields: Sequence[RgbImage], settings: Mapping[str, Any], device: torch.device
) -> tuple[list[Row], bool]:
    """Compare the device's maps with the CPU's; tell whether they are as equal as they must be."""
    reference = maps_of(fields, settings, torch.device("cpu"), "none")
    rows, is_good = [], True
    for amp in ("none", "bf16"):
        found, again = (maps_of(fields, settings, device, amp) for _ in range(2))
        apart = [np.abs(a.astype(int) - b) for a, b in zip(found, reference, strict=True)]
        flipped = float(np.mean([(a >= 128) != (b >= 128) for a, b in zip(found, reference, strict=True)]))
        largest, same = int(max(one.max() for one in apart)), all(map(np.array_equal, found, again))
        mean = float(np.mean([one.mean() for one in apart]))
        words = f"largest {largest}, mean {mean:.4f} levels; {flipped:.4%} of pixels cross one half"
        name = "float32" if amp == "none" else "bfloat16"
        rows.append(Row(f"maps in {name} against the CPU's float32", words, "largest <= 1" if amp == "none" else ""))
        rows.append(Row(f"maps in {name}, a second run", "equal" if same else "NOT EQUAL", "equal"))
        is_good &= same and (amp != "none" or largest <= 1)
    return rows, is_good


def check_scoring(bench: score_gpu.Bench, batch_sizes: Sequence[int]) -> list[Row]:
    """Measure scoring: the best batch size of each number of members and flips."""
    rows = []
    for members, flips in ((1, 1), (1, 4), (4, 4)):
        cases = [score_gpu.Case(min(members, len(bench.models)), flips, size) for size in batch_sizes]
        best = max(score_gpu.run_cases(bench, cases), key=lambda result: result.images_per_s)
        ratio = best.images_per_s * best.case.passes / best.bare_per_s
        words = f"{best.images_per_s:.2f} images/s, {ratio:.2f} of the bare forward, batch {best.case.batch_size}"
        rows.append(
            Row(f"scoring, {best.case.members} member(s), {flips} flip(s)", words + gpu_words(best), "busy >= 90 %")
        )
    return rows


def gpu_words(result: score_gpu.Result) -> str:
    if result.busy is None or result.memory_gib is None:
        return "; no GPU"
    return f"; busy {result.busy:.0%}, {result.memory_gib:.1f} GiB"


def check_training(phantom: PhantomConfig, model: Mapping[str, Any], seconds: float, threads: int) -> Row:
    """Train a fold of phantom fields for a while."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cohort = made_cohort.prepare(made_cohort.write_fields(folder, phantom), folder)
        settings = {"model": {**model, "encoder_weights": "none"}, "training": {"deterministic": False, "epochs": 1000}}
        recipe = config.build(FoldRecipe, settings | {"data": {"crop_px": 64} if phantom.height < 100 else {}})
        task = FoldTask(0, read_cohort(cohort), str(folder / "fold"), {})
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            context = LocalContext(folder / "state", num_threads=threads)
            busy, rate = train_gpu.busy_share(recipe, task, context, num_steps=max(5, round(seconds)))
            memory = torch.cuda.max_memory_allocated() / 2**30
            return Row(
                "training", f"{rate:.1f} images/s, {threads} threads; busy {busy:.0%}, {memory:.1f} GiB", "busy >= 90 %"
            )
        context = train_gpu.TimedContext(folder, num_threads=threads)
        context.end = time.monotonic()
        with contextlib.suppress(train_gpu.OutOfTime):  # one epoch shows that it runs
            loop.train_fold(context, recipe, task)
        return Row("training", "an epoch was trained; no GPU, not measured")


def check_sharing(arguments: argparse.Namespace) -> Row:
    """Score in one process, then in two at once, each started anew."""

    def rates(number: int) -> list[float]:
        line = [sys.executable, "-m", "tests.gpu.check", "--rate", str(arguments.seconds)]
        line += ["--smoke"] if arguments.smoke else []
        started = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(number)]
        return [float(process.communicate()[0].split()[-1]) for process in started]

    one, two = sum(rates(1)), rates(2)
    return Row(
        "two processes on one device", f"{sum(two):.2f} images/s together, {one:.2f} alone, ratio {sum(two) / one:.2f}"
    )


def describe(device: torch.device) -> Row:
    """Name the device and the versions."""
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    if device.type != "cuda":
        return Row("device", f"no CUDA device, {os.cpu_count()} CPU cores; {versions}")
    found = torch.cuda.get_device_properties(device)
    size = f"{found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
    return Row("device", f"{found.name}, {size}, {os.cpu_count()} CPU cores; {versions}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="about how long all of it may take")
    parser.add_argument("--smoke", action="store_true", help="a small network on small fields; its rates mean nothing")
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    has_cuda = torch.cuda.is_available()
    if not has_cuda and not arguments.smoke:
        print("no CUDA device: this checks an NVIDIA GPU; --smoke tries the script out without", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", 0) if has_cuda else torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))
    arguments.seconds = 0.2 if arguments.smoke else arguments.minutes  # seconds of each of about 60 measurements
    model: dict[str, Any] = {**score_gpu.SMOKE_MODEL} if arguments.smoke else {"encoder": "efficientnet_b3"}
    phantom = config.build(PhantomConfig, {"num_images": 8, **(SMOKE_SIZE if arguments.smoke else {})})
    fields = [make_phantom(phantom, index).image for index in range(4)]
    bench = score_gpu.Bench(
        device, score_gpu.build_models(model, 1 if arguments.rate else 4, device), fields, arguments.seconds
    )
    if arguments.rate:
        print(score_gpu.measure(bench, score_gpu.Case(1, 4, 1)).images_per_s)
        return
    equality, is_good = check_equality(fields[:2], model, device)
    rows = [describe(device), *equality, *check_scoring(bench, [1] if arguments.smoke else [1, 2, 4, 8])]
    rows += [
        check_training(phantom, model, arguments.seconds, max(1, (os.cpu_count() or 1) - 1)),
        check_sharing(arguments),
    ]
    print("\n" + markdown.table(["What", "Found", "Bar"], rows))
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
