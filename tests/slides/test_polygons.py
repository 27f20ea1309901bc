"""Outlines of a slide's targets do not depend on its tiles."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from stas_core.predict.polygons import trace
from stas_core.predict.postprocess import PostprocessConfig, StepConfig
from stas_core.slides import polygons
from stas_core.slides.polygons import trace_targets
from stas_core.slides.stitching import ArraySource, postprocess_slide
from tests.slides.test_stitching import comb, rings, spiral

STEP = StepConfig(drop=128, high=128, core=128, ratio=0, low=128)
AS_IT_IS = PostprocessConfig(
    steps=(STEP,), closing_count=0, border_fill="none", max_hole_px=0, min_target_px=0, max_foreground_share=None
)


def assert_equal_to_the_whole_array(mask: np.ndarray, tile_px: int, config: PostprocessConfig = AS_IT_IS) -> None:
    stitched = postprocess_slide(ArraySource(mask.astype(np.uint8) * 255), config, tile_px=tile_px)
    whole = np.zeros(mask.shape, np.int32)
    for tile, labels in stitched.labels():
        whole[tile.core.slices] = labels
    found: dict[int, shapely.Geometry] = {}
    for shapes in trace_targets(stitched):
        numbers = shapes.numbers.tolist()
        assert numbers == sorted(numbers) and not found.keys() & numbers
        found |= dict(zip(numbers, shapes.geometry, strict=True))
    numbers, expected = trace(whole)
    assert sorted(found) == numbers.tolist() == list(range(1, len(stitched.targets) + 1))
    assert [shapely.to_wkt(found[number]) for number in sorted(found)] == shapely.to_wkt(expected).tolist()
    assert shapely.area(expected).tolist() == stitched.targets.area_px.tolist()


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    size = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    y, x = np.indices(size)
    kinds: dict[str, Callable[[], np.ndarray]] = {
        "noise": lambda: rng.random(size) < draw(st.floats(0, 1)),
        "smooth": lambda: ndimage.gaussian_filter(rng.random(size), 1) < draw(st.floats(0.4, 0.6)),
        "full": lambda: np.ones(size, bool),
        "comb": lambda: comb(size),
        "spiral": lambda: spiral(size),
        "rings": lambda: rings(size),
        "checks": lambda: (y + x) % 2 == 0,
        "lattice": lambda: (y + x) % draw(st.integers(2, 5)) == 0,
    }
    mask = kinds[draw(st.sampled_from(sorted(kinds)))]()
    if draw(st.booleans()):
        mask = mask[::-1, ::-1]
    return mask ^ (rng.random(size) < draw(st.sampled_from([0, 0, 0.02, 0.1])))


@settings(max_examples=100)
@given(masks(), st.one_of(st.integers(1, 6), st.integers(1, 30)))
def test_any_mask_on_any_tiles(mask: np.ndarray, tile_px: int) -> None:
    assert_equal_to_the_whole_array(mask, tile_px)


@pytest.mark.parametrize("tile_px", [1, 7, 16, 100])
@pytest.mark.parametrize("name", ["spiral", "checks", "islands", "slide"])
def test_targets_over_all_tiles(name: str, tile_px: int) -> None:
    size = height, width = (50, 61) if tile_px > 1 else (13, 12)
    y, x = np.indices(size)
    kinds = {
        "spiral": spiral(size),
        "checks": (y + x) % 2 == 0,
        "islands": np.minimum(np.minimum(y, height - 1 - y), np.minimum(x, width - 1 - x)) % 6 < 2,
        "slide": np.ones(size, bool),
    }
    assert_equal_to_the_whole_array(kinds[name], tile_px)


@pytest.mark.parametrize("num_before", [2**31 - 500, 2**40])
def test_the_largest_slides_have_more_parts_than_32_bits(num_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polygons, "NUM_BEFORE", num_before)
    assert_equal_to_the_whole_array(spiral((50, 61)), 7)
    assert_equal_to_the_whole_array(np.random.default_rng(0).random((40, 50)) < 0.5, 9)


def test_what_the_cascade_fills_and_removes() -> None:
    mask = np.random.default_rng(0).random((90, 80)) < 0.45
    config = AS_IT_IS.model_copy(update={"closing_count": 1, "closing_px": 3, "max_hole_px": 8, "min_target_px": 9})
    for tile_px in (5, 31, 100):
        assert_equal_to_the_whole_array(mask, tile_px, config)


def test_a_slide_without_targets_gives_nothing() -> None:
    assert_equal_to_the_whole_array(np.zeros((20, 30), bool), 8)


BOUNDED = """
import pathlib
import cv2
import numpy as np
import shapely
from stas_core.predict.postprocess import PostprocessConfig, StepConfig
from stas_core.slides.polygons import trace_targets
from stas_core.slides.stitching import postprocess_slide

cv2.setNumThreads(1)

class Made:
    def __init__(self, side):
        self.size = (side, side)

    def is_blank(self, y0, x0, height, width):
        return y0 // 512 % 2 == 1

    def read(self, y0, x0, height, width):
        y, x = np.arange(y0, y0 + height)[:, None], np.arange(x0, x0 + width)
        return ((y % 64 < 40) & ((x + y // 512) % 50 < 30)).astype(np.uint8) * 255

step = StepConfig(drop=128, high=128, core=128, ratio=0, low=128)
config = PostprocessConfig(steps=(step,), border_fill="none", max_hole_px=0, closing_count=0, max_foreground_share=None)

def peak_mb():  # of this program alone: that of getrusage includes the process that started it
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

for side in (2048, 8192):
    found = postprocess_slide(Made(side), config, tile_px=512)
    before = peak_mb()
    num, area = 0, 0
    for shapes in trace_targets(found):
        num += len(shapes)
        area += shapely.area(shapes.geometry).sum()
    assert num == len(found.targets) and area == found.targets.area_px.sum()
    print(num, peak_mb() - before)
"""


def test_a_slide_is_outlined_in_less_memory_than_its_labels_take() -> None:
    done = subprocess.run([sys.executable, "-c", BOUNDED], capture_output=True, text=True, check=True)
    (few, _), (many, grown_mb) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert many > 15 * few
    assert grown_mb < 40  # of labels of 268 MB
