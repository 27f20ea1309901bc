"""Images/s of score_images through Ray against a bare loop of processes that do the same to every image.

    python -m tests.bench.score_throughput [--cores 2] [--repeats 2] [--real 40] [--trivial 200]

Both sides run on the same cores (the process is pinned to them before Ray starts): read and decode with Pillow, predict
with one thread, post-process, and write mask, map, overlay, outlines and record; their files are compared byte for
byte. The bare loop is a multiprocessing pool of one process per core, each with its own models, that takes the next
image when done with one; nothing of Ray or of `workflows` runs in it. Fields are phantoms of 1716 x 942 px, each under
many names; models have random weights, their last layer set so that about a fifteenth of a field is foreground.

What is timed: on both sides the records, written last, say when an image was done (modification time). The clock runs
from the record with which the first wave ends to the last record of all, and the images of the first wave do not
count. A wave is what the side works on at once: an image per process in the bare loop; actors x images per block in
Ray, which hands on whole blocks, so that counting from the first record would give it a block for nothing. Left out
are start-up, loading, calibration, and the tables and archives that score_images makes at the end; the time in which
the last block of one actor runs alone is in.

Rates hang on what else the machine does, processor time less so: beside them stand the seconds of a core per image that
the whole process tree (Ray's services included) spends in the same time, sampled once a second.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import cv2
import numpy as np
import psutil
import torch

from stas_core import config, process, storage
from stas_core.data import images, overlay
from stas_core.data.phantom import PhantomConfig, make_phantom
from stas_core.networks import checkpoints
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.checkpoints import CheckpointRecord
from stas_core.networks.model import build_model
from stas_core.predict import ensemble, exports, geojson, postprocess
from stas_core.predict import predictor as predictors
from stas_core.predict.inference import InferenceConfig
from stas_core.predict.placement import TargetFacts
from stas_core.predict.polygons import trace_shapes
from stas_core.predict.postprocess import PostprocessConfig
from stas_core.predict.predictor import Predictor
from stas_core.scored_runs import GEOJSON, MAPS, MASKS, OVERLAYS, RECORDS, ScoredRun

NUM_DISTINCT = 6
FOREGROUND = 0.02
BAR = 0.95
KINDS = (MASKS, MAPS, OVERLAYS, GEOJSON)


class Setup(NamedTuple):
    """A model, how it is applied, and the number of images it is timed on."""

    name: str
    model: dict[str, Any]
    scale: float
    flips: tuple[str, ...]
    num_images: int

    def inference(self) -> dict[str, Any]:
        return {"flips": list(self.flips)}


def setups(num_real: int, num_trivial: int) -> list[Setup]:
    real = {"encoder": "tf_efficientnet_lite0"}
    trivial = {"encoder": "mobilenetv3_small_050", "decoder_channels": [16, 16, 8, 8, 8]}
    return [
        Setup("real", real, 0.5, ("identity", "lr", "ud", "both"), num_real),
        Setup("trivial", trivial, 0.1, ("identity",), num_trivial),
    ]


def write_fields(folder: Path, num_images: int, distinct: list[bytes]) -> Path:
    folder.mkdir()
    for index in range(num_images):
        (folder / f"field_{index:04d}.jpg").write_bytes(distinct[index % len(distinct)])
    return folder


@torch.inference_mode()
def write_checkpoint(folder: Path, setup: Setup, field: bytes) -> str:
    """Save a model of random weights whose maps are as full as those of a trained one."""
    torch.manual_seed(0)
    settings = config.build(ModelConfig, setup.model | {"encoder_weights": "none"})
    model = build_model(settings).eval()
    small = images.resize(images.decode_image(field, "field"), setup.scale)
    height, width = (side // model.stride * model.stride for side in small.shape[:2])
    pixels = torch.from_numpy(np.array(small[:height, :width])).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (model.mean, model.std))
    logits = model(predictors.normalise(pixels, mean, std))[0][0]
    margin = logits[1] - logits[0]
    head = model.network.get_submodule("heads.0")
    assert isinstance(head, torch.nn.Conv2d) and head.bias is not None
    gain = 8 / margin.std()
    head.weight *= gain
    head.bias *= gain
    head.bias[1] -= gain * float(np.quantile(margin.numpy(), 1 - FOREGROUND))
    record = CheckpointRecord(settings.model_dump(mode="json"), setup.scale, 0, 1, False, {"dice": 0.0}, {})
    checkpoints.save_checkpoint(str(folder), model.state_dict(), record)
    return str(folder)


class Timing(NamedTuple):
    """Images/s and seconds of a core per image at steady state, and the images that the first wave held."""

    rate: float
    core_s: float
    wave: int


class CoreClock(threading.Thread):
    """Notes once a second how much processor time this process and all below it have taken."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._end = threading.Event()
        self._samples: list[tuple[float, float]] = []

    def __enter__(self) -> "CoreClock":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        mine = psutil.Process()
        taken: dict[psutil.Process, float] = {}  # of those that ended, what was last seen: Ray ends idle workers
        while True:
            for one in (mine, *mine.children(recursive=True)):
                with suppress(psutil.Error):
                    times = one.cpu_times()
                    taken[one] = times.user + times.system
            self._samples.append((time.time(), sum(taken.values())))
            if self._end.wait(1.0):
                return

    def between(self, start: float, end: float) -> float:
        """Return the seconds of a core spent between two times."""
        at, taken = np.array(self._samples).T
        return float(np.interp(end, at, taken) - np.interp(start, at, taken))


def at_steady_state(out: Path, wave: int, clock: CoreClock) -> Timing:
    times = sorted(path.stat().st_mtime_ns / 1e9 for path in (out / RECORDS).glob("*.json"))
    wave = min(wave, len(times) - 1)
    start, end, num_images = times[wave - 1], times[-1], len(times) - wave
    return Timing(num_images / (end - start), clock.between(start, end) / num_images, wave)


def through_ray(setup: Setup, source: Path, checkpoint: str, out: Path) -> Timing:
    """Run the stage as its command line does, inside this process's Ray session."""
    from workflows import score_images
    from workflows.scoring import pipeline  # here, so that the bare loop's processes never import Ray
    from workflows.scoring.plan import ScorePlan
    from workflows.scoring.tasks import FinishedRow

    plans: list[ScorePlan] = []

    def noting(*arguments: Any) -> Iterator[FinishedRow]:
        plans.append(arguments[3])
        return score(*arguments)

    score = pipeline.score
    settings = config.build(
        score_images.ScoreConfig,
        {
            "out": str(out),
            "data": {"images": str(source)},
            "ensemble": {"uri": checkpoint},
            "inference": setup.inference(),
        },
    )
    with mock.patch.object(pipeline, "score", noting), CoreClock() as clock:
        assert score_images.run(settings, False) == 0
    (plan,) = plans
    print(f"Ray: {plan.actors} actor(s), blocks of {plan.images_per_block} images", flush=True)
    return at_steady_state(out, plan.actors * plan.images_per_block, clock)


class _Loop:
    """What a process of the bare loop keeps."""

    predictor: Predictor
    out: Path


def start_process(checkpoint: str, settings: dict[str, Any], out: Path) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    process.keep_freed_memory()  # as the actors do: it is the work that is compared, not the allocator
    device = torch.device("cpu")
    members = ensemble.load_members([checkpoint], device)
    _Loop.predictor = Predictor(members, device=device, config=config.build(InferenceConfig, settings))
    _Loop.out = out


def score_one(path: Path) -> None:
    """Score an image and write what score_images writes for it."""
    image = images.decode_image(path.read_bytes(), path.name)
    (prediction,) = _Loop.predictor.predict([image])
    prob = prediction.prob_u8()
    cascade = postprocess.run_cascade(prob, PostprocessConfig())
    labels, targets = postprocess.find_targets(cascade.mask, prob)
    files = {
        MASKS: images.encode_map(cascade.mask.astype(np.uint8) * 255),
        MAPS: images.encode_map(prob),
        OVERLAYS: images.encode_jpeg(overlay.draw(image, truth=None, prediction=cascade.mask)),
        GEOJSON: geojson.to_geojson(trace_shapes(labels), TargetFacts(path.stem, targets)),
    }
    run = ScoredRun(str(_Loop.out))
    for folder, data in files.items():
        storage.write_bytes(run.file(folder, path.stem), data)
    record = {
        "id": path.stem,
        "foreground_share": float(cascade.mask.mean()),
        "mean_disagreement": float(prediction.std.mean(dtype=torch.float64)),
        "targets": [asdict(target) for target in exports.target_rows(path.stem, targets)],
    }
    storage.write_json(run.file(RECORDS, path.stem), record)


def bare_loop(setup: Setup, source: Path, checkpoint: str, out: Path, num_processes: int) -> Timing:
    context = multiprocessing.get_context("spawn")
    settings = setup.inference()
    with CoreClock() as clock, context.Pool(num_processes, start_process, (checkpoint, settings, out)) as pool:
        for _ in pool.imap_unordered(score_one, sorted(source.iterdir())):
            pass
    return at_steady_state(out, num_processes, clock)


def compare_files(one: Path, other: Path) -> int:
    """Return how many files were compared; all are equal."""
    names = [path.relative_to(one) for kind in KINDS for path in sorted((one / kind).iterdir())]
    assert names, "nothing was written"
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), f"{name} differs"
    return len(names)


@dataclasses.dataclass
class Result:
    """Rates of repeats, in pairs."""

    setup: Setup
    ray: list[Timing]
    bare: list[Timing]

    def show(self, cores: int) -> None:
        ray, bare = (statistics.median(timing.rate for timing in side) for side in (self.ray, self.bare))
        ratios = [a.rate / b.rate for a, b in zip(self.ray, self.bare, strict=True)]
        overheads = [1000 * (1 / a.rate - 1 / b.rate) for a, b in zip(self.ray, self.bare, strict=True)]
        name, num, dropped = self.setup.name, self.setup.num_images, (self.ray[0].wave, self.bare[0].wave)
        print(f"\n{name} model, {num} images (first wave: Ray {dropped[0]}, bare {dropped[1]}), {len(ratios)} repeats")
        print(f"  images/s, medians: Ray {ray:.2f}, bare loop {bare:.2f}")
        pairs = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        bar = f" (bar: >= {BAR})" if name == "real" else ""
        print(f"  Ray / bare loop, median of pairs {statistics.median(ratios):.3f}{bar}; pairs {pairs}")
        print(f"  Ray's overhead per image by the clock: {statistics.median(overheads):.1f} ms with {cores} core(s)")
        ray_s, bare_s = (statistics.median(timing.core_s for timing in side) for side in (self.ray, self.bare))
        print(
            f"  processor time per image: Ray {1000 * ray_s:.0f} ms, bare loop {1000 * bare_s:.0f} ms, overhead "
            f"{1000 * (ray_s - bare_s):.1f} ms; bare loop / Ray {bare_s / ray_s:.3f}"
        )


def measure(setup: Setup, folder: Path, distinct: list[bytes], cores: int, repeats: int) -> Result:
    source = write_fields(folder / f"{setup.name}_fields", setup.num_images, distinct)
    checkpoint = write_checkpoint(folder / f"{setup.name}_model", setup, distinct[0])
    result = Result(setup, [], [])
    for repeat in range(repeats):
        ray_out, bare_out = folder / f"{setup.name}_ray_{repeat}", folder / f"{setup.name}_bare_{repeat}"
        for side in ("ray", "bare") if repeat % 2 == 0 else ("bare", "ray"):
            start = time.monotonic()
            if side == "ray":
                result.ray.append(through_ray(setup, source, checkpoint, ray_out))
            else:
                result.bare.append(bare_loop(setup, source, checkpoint, bare_out, cores))
            timing = (result.ray if side == "ray" else result.bare)[-1]
            load, took = os.getloadavg()[0], time.monotonic() - start
            print(
                f"{setup.name} {side}: {timing.rate:.2f} images/s, {1000 * timing.core_s:.0f} ms of a core per image; "
                f"{took:.0f} s in all; load {load:.1f}",
                flush=True,
            )
        compared = compare_files(ray_out, bare_out)
        print(f"{compared} files equal; {describe(bare_out / 'records')}", flush=True)
    return result


def describe(records: Path) -> str:
    rows = [json.loads(path.read_text()) for path in records.iterdir()]
    share = statistics.mean(row["foreground_share"] for row in rows)
    return f"foreground {share:.1%}, {statistics.mean(len(row['targets']) for row in rows):.0f} targets per image"


def pin(cores: int) -> int:
    """Keep this process and all it starts on so many cores; return how many there are."""
    usable = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, usable[:cores])
    return min(cores, len(usable))


def processor() -> str:
    lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--real", type=int, default=40, help="images for the real model; 0 leaves it out")
    parser.add_argument("--trivial", type=int, default=200, help="images for the trivial model; 0 leaves it out")
    arguments = parser.parse_args()
    from workflows.cluster import ray_session

    total, cores = os.cpu_count(), pin(arguments.cores)
    print(f"{processor()}: {cores} of {total} cores; load {os.getloadavg()[0]:.1f} before; torch {torch.__version__}")
    distinct = [images.encode_jpeg(make_phantom(PhantomConfig(), index).image) for index in range(NUM_DISTINCT)]
    chosen = [setup for setup in setups(arguments.real, arguments.trivial) if setup.num_images]
    with tempfile.TemporaryDirectory() as name, ray_session(num_cpus=cores):
        results = [measure(setup, Path(name), distinct, cores, arguments.repeats) for setup in chosen]
    for result in results:
        result.show(cores)


if __name__ == "__main__":
    main()
