"""score_slides on a made slide with a trivial network: its costs beside the bare forward, and its memory.

    python -m tests.bench.slides [--sides 4096 8192 16384] [--model published] [--curve memory.png]

Stained tissue over the whole of a pyramidal TIFF, a tiny network at a tenth of the resolution (or the published one,
with no weights learned, at half of it), one actor of one thread, tiles of 2048 px with a halo of 256. `forward`:
seconds that the same predictor takes in this process for the same tiles held in memory, over those in the actor. CPU
seconds are those of the driver, of all that it starts and of their children, Ray itself included, less what Ray takes
to start and to stop; TIAToolbox 2.1 needs 1 CPU s for 1.3 Mpx of such a slide, and 2.0 GB for 40 Mpx (measured apart,
two cores).
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from stas_core import config, tables
from stas_core.networks import checkpoints
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.checkpoints import CheckpointRecord
from stas_core.networks.model import build_model
from stas_core.predict import ensemble as ensembles
from stas_core.predict.inference import InferenceConfig
from stas_core.predict.predictor import Predictor
from stas_core.slides.blocks import TileConfig
from stas_core.slides.prediction import predict_tiles
from stas_core.slides.regions import RegionReader
from stas_core.slides.resolution import Mpp, MppSource
from stas_core.slides.source import open_slide
from tests.conftest import ROOT, TINY_MODEL
from tests.slides.made import make_slide

TILE = TileConfig()
FLIPS = InferenceConfig(flips=("identity",))


MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "tiny": (TINY_MODEL | {"norm": "batch"}, 0.1),
    "published": ({"encoder_weights": "none"}, 0.5),
}
"""Settings, and what tiles are shrunk by before the network."""


def make_model(folder: Path, kind: str = "tiny") -> str:
    torch.manual_seed(0)
    given, scale = MODELS[kind]
    settings = config.build(ModelConfig, given)
    record = CheckpointRecord(settings.model_dump(mode="json"), scale, 0, 1, False, {}, {}, mpp=0.5)
    checkpoints.save_checkpoint(str(folder), build_model(settings).state_dict(), record)
    return str(folder)


def forward_s_per_mpx(slide_path: Path, checkpoint: str) -> float:
    """Time the bare forward on tiles in memory."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    predictor = Predictor(ensembles.load_members([checkpoint], cpu), device=cpu, config=FLIPS)
    seconds = []
    with open_slide(slide_path) as slide:
        reader = RegionReader(slide, Mpp(0.5, MppSource.METADATA), 0.5)
        grid = TILE.grid(reader.height, reader.width)
        for block in list(grid.blocks(TILE.block))[:4]:
            pixels = reader.read(block.read)
            start = time.perf_counter()
            predict_tiles(predictor, pixels, block.read, block.tiles, blended=False, with_members=False)
            seconds.append((time.perf_counter() - start) / (block.core.height * block.core.width / 1e6))
    return statistics.median(seconds)


class Watch:
    """Follows the processes of a command: CPU seconds, and the largest memory of each kind."""

    def __init__(self, line: list[str]) -> None:
        self._process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._tree = psutil.Process(self._process.pid)
        self.cpu_s: dict[int, float] = {}
        self.peak_mb: dict[str, float] = {}

    def follow(self) -> str:
        while self._process.poll() is None:
            for one in [self._tree, *self._tree.children(recursive=True)]:
                try:
                    times, mb = one.cpu_times(), one.memory_info().rss / 2**20 - one.memory_info().shared / 2**20
                    kind = kind_of(" ".join(one.cmdline()))
                except (psutil.Error, IndexError):  # it ended between two calls
                    continue
                self.cpu_s[one.pid] = times.user + times.system
                self.peak_mb[kind] = max(self.peak_mb.get(kind, 0.0), mb)
            time.sleep(0.3)
        assert self._process.stdout is not None
        text = self._process.stdout.read()
        if self._process.returncode:
            raise SystemExit(text)
        return text


def kind_of(line: str) -> str:
    names = {"MapWorker": "actor", "guarded_reader": "reader", "score_slides.py": "driver", "finish": "finishing"}
    return next((kind for part, kind in names.items() if part in line), "ray worker" if "ray::" in line else "ray")


def run_stage(folder: Path, slide: Path, checkpoint: str) -> dict[str, float]:
    out = folder / "out"
    line = [
        sys.executable,
        str(ROOT / "workflows" / "score_slides.py"),
        f"slides={slide}",
        f"ensemble.uri={checkpoint}",
    ]
    line += [f"out={out}", "inference.flips=[identity]", "resources.actors=1", "tile.measure=false"]
    start = time.monotonic()
    watch = Watch(line)
    text = watch.follow()
    wall_s = time.monotonic() - start
    record = json.loads((out / "records" / f"{slide.stem}.json").read_text())
    (row,) = tables.read_table(str(out / "slides.parquet")).to_pylist()
    mpx = row["frame_width"] * row["frame_height"] / 1e6
    predicting = re.search(r"predict ([\d.]+) s", text)
    assert predicting is not None, text
    ratio = forward_s_per_mpx(slide, checkpoint) * mpx / float(predicting[1])
    finish_s = sum(record["seconds"].values())
    largest = max(mb for kind, mb in watch.peak_mb.items() if kind != "ray")
    peak = ", ".join(f"{kind} {mb:.0f}" for kind, mb in sorted(watch.peak_mb.items()))
    print(f"{mpx:.0f} Mpx: {wall_s:.1f} s wall, finishing {finish_s:.1f} s {record['seconds']}")
    print(f"  forward: {ratio:.2f} of the actor's time is the bare forward; in the actor its file is encoded, too")
    print(f"  MB without shared pages: {peak}")
    return {"mpx": mpx, "cpu_s": sum(watch.cpu_s.values()), "wall_s": wall_s, "mb": largest, "finish_s": finish_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--curve", type=Path, default=None, help="draw memory against area as a PNG")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, found = make_model(folder / "model", arguments.model), []
        for side in arguments.sides:
            work = folder / str(side)
            work.mkdir()
            slide = make_slide(work / "slide.tif", side)
            found.append(run_stage(work, slide, checkpoint))
            slide.unlink()
        small, large = found[0], found[-1]
        per_cpu_s = (large["mpx"] - small["mpx"]) / max(1e-9, large["cpu_s"] - small["cpu_s"])
        print(f"{per_cpu_s:.2f} Mpx per CPU s beyond start-up: {per_cpu_s / 1.3:.1f} times TIAToolbox 2.1")
        for one in found:
            print(f"{one['mpx']:.0f} Mpx: largest process {one['mb']:.0f} MB, {one['mpx'] / one['wall_s']:.2f} Mpx/s")
        if arguments.curve is not None:
            draw(found, arguments.curve)


def draw(found: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot(xlabel="Slide (Mpx)", ylabel="Largest process (MB, without shared pages)", xscale="log")
    axes.plot([one["mpx"] for one in found], [one["mb"] for one in found], "o-")
    axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
