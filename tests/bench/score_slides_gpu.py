"""Slides through one NVIDIA GPU without Ray: how busy it is, and seconds per mm2 of tissue.

    python -m tests.bench.score_slides_gpu [--side 16384] [--members 1] [--flips identity] [--encoder efficientnet_b3]

Needs stas_core only. A made slide of stained tissue all over, 0.5 um/px; blocks are read and encoded by threads beside
the GPU, as tasks do in score_slides. Bars: busy for 90 % of the time or more, 1.0 s/mm2 or less for one b3 without
flips. An untrained network: its weights do not matter for the time.
"""

import argparse
import statistics
import tempfile
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from stas_core.arrays import RgbImage
from stas_core.config import build
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.model import build_model
from stas_core.predict.inference import InferenceConfig
from stas_core.predict.predictor import Member, Predictor
from stas_core.slides.blocks import TileConfig, encode_block
from stas_core.slides.prediction import predict_tiles
from stas_core.slides.regions import RegionReader
from stas_core.slides.resolution import Mpp, MppSource
from stas_core.slides.source import open_slide
from stas_core.slides.tiling import Block
from tests.slides.made import make_slide

RUNS = 3
AHEAD = 4
"""Blocks that are read before they are needed."""


def make_predictor(encoder: str, members: int, flips: str, device: torch.device) -> Predictor:
    made = []
    for number in range(members):
        torch.manual_seed(number)
        model = build_model(build(ModelConfig, {"encoder": encoder, "encoder_weights": "none", "norm": "batch"}))
        made.append(Member(str(number), model))
    config = build(InferenceConfig, {"flips": flips.split(",")})
    return Predictor(made, device=device, config=config)


def score(slide_path: Path, predictor: Predictor, tile: TileConfig) -> tuple[float, float, float]:
    """Return wall seconds, seconds in which the device worked, and mm2."""
    local_mpp = Mpp(0.5, MppSource.METADATA)
    with open_slide(slide_path) as slide:
        frame = RegionReader(slide, local_mpp, 0.5)
        grid = tile.grid(frame.height, frame.width)

    def read(block: Block) -> RgbImage:
        with open_slide(slide_path) as slide:  # a slide is not for several threads at once
            return RegionReader(slide, local_mpp, 0.5).read(block.read)

    blocks, busy_s, start = deque(grid.blocks(tile.block)), 0.0, time.perf_counter()
    with ThreadPoolExecutor(AHEAD) as readers, ThreadPoolExecutor(2) as writers:
        waiting: deque[tuple[Block, Future[RgbImage]]] = deque()
        written = []
        while blocks or waiting:
            while blocks and len(waiting) < AHEAD:
                block = blocks.popleft()
                waiting.append((block, readers.submit(read, block)))
            block, pixels = waiting.popleft()
            given = pixels.result()
            begun = time.perf_counter()
            planes = predict_tiles(predictor, given, block.read, block.tiles, blended=False, with_members=False)
            busy_s += time.perf_counter() - begun
            written.append(writers.submit(encode_block, planes))
        for one in written:
            one.result()
    return time.perf_counter() - start, busy_s, grid.height * grid.width * 0.25e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=16384)
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--flips", default="identity")
    parser.add_argument("--encoder", default="efficientnet_b3")
    parser.add_argument("--tile", type=int, default=2048)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    predictor = make_predictor(arguments.encoder, arguments.members, arguments.flips, device)
    with tempfile.TemporaryDirectory() as folder:
        slide = make_slide(Path(folder) / "slide.tif", arguments.side)
        tile = TileConfig(px=arguments.tile)
        score(slide, predictor, tile)  # compiles kernels, fills caches
        found = [score(slide, predictor, tile) for _ in range(RUNS)]
    wall_s = statistics.median(wall for wall, _, _ in found)
    busy = statistics.median(busy / wall for wall, busy, _ in found)
    area_mm2 = found[0][2]
    if device.type == "cuda":
        print(f"largest memory on the device: {torch.cuda.max_memory_allocated() / 2**30:.1f} GB")
    print(
        f"{name}: {arguments.members} x {arguments.encoder}, flips {arguments.flips}, {area_mm2:.1f} mm2: "
        f"{wall_s / area_mm2:.3f} s/mm2, in the predictor for {busy:.0%} of the time (medians of {RUNS} runs)"
    )


if __name__ == "__main__":
    main()
