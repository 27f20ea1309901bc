"""Score whole images with `stas_core` alone (no Ray) on an NVIDIA GPU: images/s, memory, and how busy the GPU is.

    python -m tests.bench.score_gpu [FOLDER of images] [--members 1 4] [--flips 1 4] [--batch-sizes 1 2 4 8]
    python -m tests.bench.score_gpu --smoke

Works where there is a torch image and `stas_core`'s dependencies (Python 3.12, torch 2.11). The published U-Net on
efficientnet_b3 with random weights, bfloat16, at full size; phantom fields of 1716 x 942 px, or the images of a folder
that have the first one's size. Per number of members and flips, and batch size:

  images/s  `Predictor.predict`, and the 8-bit map and the mean disagreement brought to the host, as scoring takes them.
            Images lie decoded in host memory: in the pipeline other processes decode. Batches follow one another with
            nothing in between, so the host's share of the work shows.
  bare      forward passes/s of channels-last copies of the same models on a batch that lies normalised on the GPU: what
            the images/s times passes per image are held against.
  busy      share of the wall time of predicting in which a kernel or copy runs (profiler, overlaps count once).
  memory    the most that torch allocated while predicting.

The best batch size of each is shown again at the end. --smoke tries the script out in seconds, on the GPU or without
one: a small network, small fields; its numbers mean nothing. Without CUDA anything else ends with status 2.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from stas_core import config
from stas_core.arrays import RgbImage
from stas_core.data import images
from stas_core.data.phantom import PhantomConfig, make_phantom
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.model import SegmentationModel, build_model
from stas_core.predict import predictor as predictors
from stas_core.predict.inference import ALL_FLIPS, InferenceConfig
from stas_core.predict.predictor import Member, Predictor

BAR = 0.9
NUM_FIELDS = 8
SMOKE_MODEL = {"encoder": "mobilenetv3_small_050", "decoder_channels": [16, 16, 8, 8, 8]}


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    device: torch.device
    models: Sequence[SegmentationModel]
    fields: Sequence[RgbImage]
    seconds: float

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def rate(self, call: Callable[[], object]) -> float:
        """Return calls/s after two to warm up, over at least three and at least `seconds`."""
        for _ in range(2):
            call()
        self.synchronise()
        start, num_calls = time.perf_counter(), 0
        while num_calls < 3 or time.perf_counter() - start < self.seconds:
            call()
            num_calls += 1
            if num_calls % 4 == 0:
                self.synchronise()  # calls are only queued: unchecked, the queue would outrun the clock
        self.synchronise()
        return num_calls / (time.perf_counter() - start)


class Case(NamedTuple):
    """How many models and flips an image goes through, and how many images at a time."""

    members: int
    flips: int
    batch_size: int

    @property
    def passes(self) -> int:
        return self.members * self.flips


class Result(NamedTuple):
    """Images/s, bare forward passes/s, and on a GPU the busy share and GiB."""

    case: Case
    images_per_s: float
    bare_per_s: float
    busy: float | None
    memory_gib: float | None

    def __str__(self) -> str:
        case = self.case
        ratio = self.images_per_s * case.passes / self.bare_per_s
        line = (
            f"{case.members} members, {case.flips} flips, batch {case.batch_size}: {self.images_per_s:.2f} images/s"
            f" x passes = {self.images_per_s * case.passes:.1f}, bare {self.bare_per_s:.1f} passes/s, ratio {ratio:.3f}"
        )
        if self.busy is None or self.memory_gib is None:
            return f"{line}; busy and memory: no CUDA, not measured"
        return f"{line}; busy {self.busy:.1%}, memory {self.memory_gib:.1f} GiB"


def batches(fields: Sequence[RgbImage], batch_size: int) -> Iterator[list[RgbImage]]:
    """Go through the fields again and again."""
    start = 0
    while True:
        yield [fields[(start + offset) % len(fields)] for offset in range(batch_size)]
        start = (start + batch_size) % len(fields)


def measure(bench: Bench, case: Case) -> Result:
    """Measure a case; the predictor first, while its memory is alone.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    settings = InferenceConfig(flips=ALL_FLIPS[: case.flips], batch_size=case.batch_size, amp="bf16")
    chosen = bench.models[: case.members]
    members = [Member(f"member_{index}", model) for index, model in enumerate(chosen)]
    predictor = Predictor(members, device=bench.device, config=settings)
    source = batches(bench.fields, case.batch_size)

    def predict() -> None:
        for prediction in predictor.predict(next(source)):
            prediction.prob_u8()
            float(prediction.std.mean(dtype=torch.float64))

    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    images_per_s = case.batch_size * bench.rate(predict)
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    busy = busy_share(predict, num_calls=max(3, min(20, 40 // case.batch_size))) if on_gpu else None
    return Result(case, images_per_s, bare_rate(bench, case, next(source)), busy, memory)


@torch.inference_mode()
def bare_rate(bench: Bench, case: Case, batch: Sequence[RgbImage]) -> float:
    """Return passes/s of the models alone: the batch, all flips at once, lies ready for them."""
    models = [copy.deepcopy(m).to(memory_format=torch.channels_last) for m in bench.models[: case.members]]
    resident = ready([*batch] * case.flips, models[0], bench.device)

    def forward() -> None:
        with predictors.autocast(bench.device, "bf16"):
            for model in models:
                model(resident)

    return case.batch_size * case.passes * bench.rate(forward)


def ready(batch: Sequence[RgbImage], model: SegmentationModel, device: torch.device) -> Tensor:
    """Reflect-pad images to the stride, normalise them, and put them on the device."""
    pixels = torch.stack([torch.from_numpy(image) for image in batch]).to(device).permute(0, 3, 1, 2)
    height, width = pixels.shape[-2:]
    rim = (0, -width % model.stride, 0, -height % model.stride)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (model.mean, model.std))
    padded = torch.nn.functional.pad(predictors.normalise(pixels, mean, std), rim, mode="reflect")
    return padded.contiguous(memory_format=torch.channels_last)


def busy_share(call: Callable[[], object], num_calls: int) -> float:
    """Return the share of the wall time in which the GPU runs a kernel or a copy."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        for _ in range(num_calls):
            call()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    # By type, not by index: events of the host carry the process id as their index.
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    )
    return union_us(spans) / 1e6 / wall


def union_us(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of what sorted spans cover."""
    covered, last = 0.0, 0.0
    for begin, end in spans:
        covered += max(0.0, end - max(begin, last))
        last = max(last, end)
    return covered


def load_fields(folder: Path | None, phantom: PhantomConfig) -> list[RgbImage]:
    if folder is None:
        return [make_phantom(phantom, index).image for index in range(phantom.num_images)]
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in images.IMAGE_SUFFIXES)[: 4 * NUM_FIELDS]
    if not paths:
        sys.exit(f"{folder} holds no images ({', '.join(images.IMAGE_SUFFIXES)})")
    found = [images.decode_image(path.read_bytes(), path.name) for path in paths]
    return [image for image in found if image.shape == found[0].shape]


def build_models(settings: dict[str, Any], number: int, device: torch.device) -> list[SegmentationModel]:
    models = []
    for seed in range(number):
        torch.manual_seed(seed)
        model = build_model(config.build(ModelConfig, settings | {"encoder_weights": "none"}))
        models.append(model.to(device).eval())
    return models


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--flips", type=int, nargs="+", default=[1, 4], choices=range(1, len(ALL_FLIPS) + 1))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--encoder", default="efficientnet_b3")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement, after warm-up")
    parser.add_argument("--threads", type=int, default=1, help="of the host's arithmetic, as an actor has")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN time its algorithms, for both sides")
    parser.add_argument("--smoke", action="store_true", help="a small network on small fields; CPU where no GPU is")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.members, arguments.batch_sizes, arguments.seconds = [1, 2], [1, 2], 0.2
    return arguments


def run_cases(bench: Bench, cases: Sequence[Case]) -> list[Result]:
    """Measure and print each case that fits."""
    results = []
    for case in cases:
        try:
            results.append(measure(bench, case))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            print(f"{case}: out of GPU memory", flush=True)
            continue
        print(results[-1], flush=True)
    return results


def summarise(results: Sequence[Result]) -> None:
    print("\nbest batch size of each")
    for work in sorted({(result.case.members, result.case.flips) for result in results}):
        best = max((r for r in results if (r.case.members, r.case.flips) == work), key=lambda r: r.images_per_s)
        verdict = "" if best.busy is None else f" (bar: busy >= {BAR:.0%}: {'met' if best.busy >= BAR else 'missed'})"
        print(f"{best}{verdict}")


def main() -> None:
    arguments = parse()
    has_cuda = torch.cuda.is_available()
    if not has_cuda and not arguments.smoke:
        print(
            "no CUDA device: this bench measures an NVIDIA GPU; --smoke tries the script out without", file=sys.stderr
        )
        sys.exit(2)
    device = torch.device("cuda" if has_cuda else "cpu")
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
    size = {"height": 94, "width": 170} if arguments.smoke else {}
    fields = load_fields(arguments.folder, config.build(PhantomConfig, {"num_images": NUM_FIELDS, **size}))
    settings = SMOKE_MODEL if arguments.smoke else {"encoder": arguments.encoder}
    bench = Bench(device, build_models(settings, max(arguments.members), device), fields, arguments.seconds)
    name = torch.cuda.get_device_name() if has_cuda else "no CUDA device, CPU"
    height, width = fields[0].shape[:2]
    print(f"{name}, torch {torch.__version__}; {settings['encoder']}, {len(fields)} images of {width} x {height} px")
    if arguments.smoke:
        print("smoke mode: these numbers mean nothing")
    works = [(members, flips) for members in arguments.members for flips in arguments.flips]
    cases = [Case(*work, batch_size) for work in works for batch_size in arguments.batch_sizes]
    summarise(run_cases(bench, cases))


if __name__ == "__main__":
    main()
