"""Post-processing of whole slides: Mpx/s on one core against the whole array, and memory as the slide grows.

    python -m tests.bench.stitching [SIDE of the map that the whole array takes, 8192]

Both sides give the mask and the measured targets of a made map with a tenth of foreground; the whole array also traces
outlines, so its time is given without them too. Memory: made slides of 1, 4, 16 and 64 times the area, two thirds of
them blank, each in a process of its own.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from stas_core.arrays import ProbMapU8
from stas_core.predict.postprocess import find_targets, run_cascade
from stas_core.slides.stitching import ArraySource, MapSource, StitchedMask, postprocess_slide
from stas_core.slides.thresholds import SlidePostprocessConfig

PERIOD_PX = 4096
TILE_PX = 2048
SETTINGS = SlidePostprocessConfig().in_pixels(mpp=0.5)


def made_map(side: int) -> ProbMapU8:
    """Smooth blobs over a tenth of the map, with the noise of a network."""
    rng = np.random.default_rng(0)
    blobs = cv2.GaussianBlur(rng.standard_normal((side, side), np.float32), (0, 0), 12)
    noise = 3 * rng.standard_normal((side, side), np.float32)
    return np.asarray(np.clip((blobs / blobs.std() - 0.4) * 90 + noise, 0, 255), np.uint8)


class MadeSlide:
    """A slide of any size that repeats one map where it is not blank."""

    def __init__(self, side: int, period: ProbMapU8) -> None:
        self.size = (side, side)
        self._period = period

    def is_blank(self, y0: int, x0: int, height: int, width: int) -> bool:
        return (y0 // TILE_PX + x0 // TILE_PX) % 3 > 0

    def read(self, y0: int, x0: int, height: int, width: int) -> ProbMapU8:
        y, x = y0 % PERIOD_PX, x0 % PERIOD_PX
        return self._period[y : y + height, x : x + width]


def stitched(source: MapSource) -> StitchedMask:
    found = postprocess_slide(source, SETTINGS, tile_px=TILE_PX)
    painted = sum(int(np.count_nonzero(mask)) for _, mask in found.masks())
    assert painted == found.targets.area_px.sum()
    return found


def seconds(done: list[float], start: float) -> float:
    done.append(time.perf_counter() - start)
    return time.perf_counter()


def side_by_side(side: int, repeats: int = 5) -> None:
    prob_u8 = made_map(side)
    tiles, cascade, targets = list[float](), list[float](), list[float]()
    for _ in range(repeats):
        start = time.perf_counter()
        found = stitched(ArraySource(prob_u8))
        start = seconds(tiles, start)
        mask = run_cascade(prob_u8, SETTINGS).mask
        start = seconds(cascade, start)
        _, expected = find_targets(mask, prob_u8)
        seconds(targets, start)
    for tile, part in found.masks():
        assert (part == mask[tile.core.slices]).all(), "not equal to the whole array"
    assert found.targets.mean_prob.tolist() == expected.mean_prob.tolist()
    ours, masks, measured = (statistics.median(times) for times in (tiles, cascade, targets))
    mpx = side**2 / 1e6
    print(f"{side} px square, {mask.mean():.1%} foreground, {len(expected)} targets, one thread, medians of {repeats}")
    print(f"tile by tile, mask and targets: {mpx / ours:.0f} Mpx/s (bar: >= 25)")
    print(f"whole array: mask alone {mpx / masks:.0f} Mpx/s, with its targets {mpx / (masks + measured):.0f} Mpx/s")
    print(f"time of the whole array / ours: {masks / ours:.2f}, with its targets {(masks + measured) / ours:.2f}")


def peak_mb() -> float:
    """Return the peak of this program alone: that of getrusage includes the process that started it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def grow(side: int, period_file: str) -> None:
    period = np.load(period_file)
    loaded_mb = peak_mb()
    start = time.perf_counter()
    found = stitched(MadeSlide(side, period))
    took = time.perf_counter() - start
    print(
        f"{side} px square: {side**2 / 1e6 / took:.0f} Mpx/s, {len(found.targets)} targets, "
        f"peak {peak_mb():.0f} MB, {peak_mb() - loaded_mb:.0f} MB of it above imports and the repeated map",
        flush=True,
    )


def main() -> None:
    cv2.setNumThreads(1)
    if sys.argv[1:2] == ["grow"]:
        return grow(int(sys.argv[2]), sys.argv[3])
    side_by_side(int(sys.argv[1]) if len(sys.argv) > 1 else 8192)
    with tempfile.TemporaryDirectory() as folder:
        period_file = f"{folder}/map.npy"
        np.save(period_file, made_map(PERIOD_PX))
        for factor in (1, 2, 4, 8):
            command = [sys.executable, "-m", "tests.bench.stitching", "grow", str(factor * PERIOD_PX), period_file]
            subprocess.run(command, check=True)
    return None


if __name__ == "__main__":
    main()
