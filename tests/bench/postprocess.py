"""Post-processing: ms per map, against plain scikit-image / scipy and against two of the OpenCV calls it takes.

    python -m tests.bench.postprocess [FOLDER of 8-bit probability maps]

One thread; without a folder, on maps made from made fields. Maps of other sizes than 1716 x 942 px are left out.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from stas_core import config
from stas_core.arrays import ProbMapU8
from stas_core.data import images
from stas_core.data.phantom import PhantomConfig, make_phantom
from stas_core.predict.postprocess import PostprocessConfig, run_cascade
from tests.predict import postprocess_plain as plain

SIZE = (942, 1716)
CONFIGS = Path(__file__).parents[2] / "configs" / "postprocess"


def made_map(index: int) -> ProbMapU8:
    """A field's truth as an unsure network might see it: blurred, weakened, with ripples everywhere."""
    rng = np.random.default_rng(index)
    truth = make_phantom(PhantomConfig(), index).mask.astype(np.float32)
    ripples = cv2.GaussianBlur(rng.standard_normal(SIZE).astype(np.float32), (0, 0), 9) * 3
    prob = cv2.GaussianBlur(truth, (0, 0), rng.uniform(2, 8)) * rng.uniform(0.3, 1) + 0.1 * ripples
    return np.asarray(np.clip(prob * 255, 0, 255), np.uint8)


def opencv_calls(prob_u8: ProbMapU8) -> None:
    """One labelling with statistics and one closing: what no implementation with OpenCV does without."""
    mask = (prob_u8 >= 26).view(np.uint8)
    cv2.connectedComponentsWithStats(mask, connectivity=8)
    cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))


def median_ms(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    cv2.setNumThreads(1)
    if len(sys.argv) > 1:
        paths = sorted(Path(sys.argv[1]).glob("*.png"))
        maps = [images.decode_map(path.read_bytes(), path.name) for path in paths]
    else:
        maps = [made_map(index) for index in range(20)]
    maps = [prob_u8 for prob_u8 in maps if prob_u8.shape == SIZE]
    settings = config.load_config(PostprocessConfig, CONFIGS / "reference.yaml")
    rows = []
    for prob_u8 in maps:
        mask, _ = plain.postprocess(prob_u8, settings)
        assert (run_cascade(prob_u8, settings).mask == mask).all(), "not equal to the plain definition"
        ours = median_ms(lambda prob_u8=prob_u8: run_cascade(prob_u8, settings), 7)  # type: ignore[misc]
        calls = median_ms(lambda prob_u8=prob_u8: opencv_calls(prob_u8), 7)  # type: ignore[misc]
        slow = median_ms(lambda prob_u8=prob_u8: plain.postprocess(prob_u8, settings), 1)  # type: ignore[misc]
        rows.append((ours, calls, slow))
    ours, calls, slow = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"{len(maps)} maps of {SIZE[0]} x {SIZE[1]} px, one thread, medians; masks equal")
    print(f"ours {ours:.1f} ms; two OpenCV calls {calls:.1f} ms; plain scikit-image / scipy {slow:.0f} ms")
    print(f"ours / OpenCV calls {ours / calls:.2f} (bar: <= 2); plain / ours {slow / ours:.1f} (bar: >= 8)")


if __name__ == "__main__":
    main()
