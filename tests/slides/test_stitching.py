"""Post-processing tile by tile gives what the whole array gives, to the bit."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from stas_core.predict.postprocess import BorderFill, PostprocessConfig, StepConfig, find_targets, run_cascade
from stas_core.slides import stitching
from stas_core.slides.stitching import ArraySource, StitchedMask, postprocess_slide

SURE = StepConfig(drop=26, high=200, core=26, ratio=0, low=26)
PLAIN = PostprocessConfig(
    steps=(SURE,), closing_px=1, border_fill="none", min_target_px=0, min_foreground_px=1, max_foreground_share=None
)


class Blanks(ArraySource):
    """A map that knows which boxes are blank, and refuses to read them."""

    def is_blank(self, y0: int, x0: int, height: int, width: int) -> bool:
        return not self.levels[y0 : y0 + height, x0 : x0 + width].any()

    def read(self, y0: int, x0: int, height: int, width: int) -> np.ndarray:
        assert not self.is_blank(y0, x0, height, width)
        return super().read(y0, x0, height, width)


def assert_equal_to_the_whole_array(prob_u8: np.ndarray, config: PostprocessConfig, tile_px: int) -> StitchedMask:
    whole = run_cascade(prob_u8, config)
    found = postprocess_slide(Blanks(prob_u8), config, tile_px=tile_px)
    mask, labels = np.zeros(prob_u8.shape, bool), np.zeros(prob_u8.shape, np.int32)
    for tile, part in found.masks():
        mask[tile.core.slices] = part
    for tile, numbers in found.labels():
        labels[tile.core.slices] = numbers
    assert (mask == whole.mask).all()
    assert found.step == whole.step
    expected_labels, expected = find_targets(whole.mask, prob_u8)
    targets = found.targets
    assert len(targets) == len(expected)
    for name, column in vars(expected).items():
        assert getattr(targets, name).tolist() == column.tolist(), name
    counted, _ = ndimage.label(whole.mask, np.ones((3, 3)))  # numbered by their first pixels
    assert (labels == counted).all() and (labels == expected_labels).all()
    return found


def comb(size: tuple[int, int]) -> np.ndarray:
    teeth = np.zeros(size, bool)
    teeth[0], teeth[:, ::2] = True, True
    return teeth


def spiral(size: tuple[int, int]) -> np.ndarray:
    """A path of one pixel that winds to the middle, with a gap of one pixel between its turns."""
    free = np.zeros((size[0] + 2, size[1] + 2), bool)
    free[1:-1, 1:-1] = True
    path = np.zeros_like(free)
    y, x, turn = 1, 1, 0
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
    path[y, x] = True
    for _ in range(free.size):
        for _ in range(2):
            dy, dx = steps[turn % 4]
            ahead = (y + 2 * dy, x + 2 * dx)
            inside = 0 <= ahead[0] < free.shape[0] and 0 <= ahead[1] < free.shape[1]
            if free[y + dy, x + dx] and not path[y + dy, x + dx] and not (inside and path[ahead]):
                break
            turn += 1
        else:
            break
        y, x = y + dy, x + dx
        path[y, x] = True
    return path[1:-1, 1:-1]


def rings(size: tuple[int, int]) -> np.ndarray:
    y, x = np.indices(size)
    away = np.minimum(np.minimum(y, size[0] - 1 - y), np.minimum(x, size[1] - 1 - x))
    return np.asarray(away % 3 == 0)


@st.composite
def maps(draw: st.DrawFn) -> np.ndarray:
    size = (draw(st.integers(1, 24)), draw(st.integers(1, 24)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["levels", "smooth", "specks", "full", "comb", "spiral", "rings", "checks", "lattice"]))
    if kind == "levels":
        return draw(hnp.arrays(np.uint8, size, elements=st.sampled_from([0, 0, 0, 13, 26, 64, 81, 90, 255])))
    if kind == "smooth":
        noise = ndimage.gaussian_filter(rng.random(size), draw(st.floats(0.5, 4)), mode="wrap")
        return np.asarray(255 * (noise - noise.min()) / max(np.ptp(noise), 1e-9), np.uint8)
    y, x = np.indices(size)
    shapes: dict[str, Callable[[], np.ndarray]] = {
        "specks": lambda: rng.random(size) < draw(st.floats(0, 0.5)),
        "full": lambda: np.ones(size, bool),
        "comb": lambda: comb(size),
        "spiral": lambda: spiral(size),
        "rings": lambda: rings(size),
        "checks": lambda: (y + x) % 2 == 0,
        "lattice": lambda: (y + x) % draw(st.integers(2, 5)) == 0,
    }
    shape = shapes[kind]()
    if draw(st.booleans()):
        shape = shape[::-1, ::-1]
    shape = shape ^ (rng.random(size) < draw(st.sampled_from([0, 0, 0.02, 0.1])))
    levels = np.where(shape, draw(st.sampled_from([26, 64, 255])), draw(st.sampled_from([0, 0, 13])))
    peaks = rng.random(size) < draw(st.sampled_from([0, 0.002, 0.02]))
    return np.where(peaks, 255, levels).astype(np.uint8)


@st.composite
def configs(draw: st.DrawFn) -> PostprocessConfig:
    level = st.one_of(st.sampled_from([0, 13, 26, 64, 81, 90, 255]), st.integers(0, 255))
    step = st.builds(StepConfig, drop=level, high=level, core=level, ratio=st.floats(0, 1), low=level)
    usual = st.just(StepConfig(drop=26, high=90, core=81, ratio=0.2, low=64))
    return PostprocessConfig(
        steps=tuple(draw(st.lists(st.one_of(usual, step, st.just(SURE)), min_size=1, max_size=2))),
        closing_px=draw(st.sampled_from([1, 3, 5, 9])),
        closing_count=draw(st.integers(0, 2)),
        border_fill=draw(st.sampled_from(["each", "first", "none"])),
        max_hole_px=draw(st.sampled_from([None, None, 0, 1, 4, 40, 400])),
        min_target_px=draw(st.sampled_from([0, 1, 2, 8, 60])),
        min_foreground_px=draw(st.sampled_from([1, 60, 1000])),
        max_foreground_share=draw(st.sampled_from([None, None, 0.3, 1.0])),
        max_foreground_px=draw(st.sampled_from([None, None, 0, 500])),
    )


@settings(max_examples=100)
@given(maps(), configs(), st.one_of(st.integers(1, 6), st.integers(1, 30)), st.sampled_from([0, 40, 1 << 20]))
def test_any_map_with_any_settings_on_any_tiles(
    prob_u8: np.ndarray, config: PostprocessConfig, tile_px: int, room: int
) -> None:
    before = prob_u8.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stitching, "CLEANED_BYTES", room)  # masks that find none are made again
        assert_equal_to_the_whole_array(prob_u8, config, tile_px)
    assert (prob_u8 == before).all()


def test_a_spiral_whose_only_peak_is_at_its_end_is_kept_on_tiles_of_a_pixel() -> None:
    prob_u8 = spiral((21, 17)).astype(np.uint8) * 100
    assert not assert_equal_to_the_whole_array(prob_u8, PLAIN, 1).targets.area_px.size
    prob_u8[0, 0] = 255
    (area_px,) = assert_equal_to_the_whole_array(prob_u8, PLAIN, 1).targets.area_px
    assert area_px == np.count_nonzero(prob_u8)


@pytest.mark.parametrize("max_hole_px", [None, 3499, 3500, 0])
def test_a_hole_over_all_tiles_with_an_island_inside(max_hole_px: int | None) -> None:
    prob_u8 = np.full((64, 64), 255, np.uint8)
    prob_u8[2:62, 2:62] = 0
    prob_u8[27:37, 27:37] = 255  # 3,600 px less an island of 100
    found = assert_equal_to_the_whole_array(prob_u8, PLAIN.model_copy(update={"max_hole_px": max_hole_px}), 7)
    filled = max_hole_px in (None, 3500)
    assert found.targets.area_px.tolist() == ([64 * 64] if filled else [64 * 64 - 3600, 100])


@pytest.mark.parametrize("tile_px", [5, 16, 40, 100])
@pytest.mark.parametrize("border_fill", ["each", "first", "none"])
def test_bays_at_each_side(border_fill: BorderFill, tile_px: int) -> None:
    prob_u8 = np.zeros((48, 48), np.uint8)
    for turn in range(4):
        side = np.rot90(prob_u8, turn)
        side[12:36, :10] = 255
        side[15:33, :7] = 0  # open to one side of the slide
    config = PLAIN.model_copy(update={"border_fill": border_fill})
    areas = assert_equal_to_the_whole_array(prob_u8, config, tile_px).targets.area_px.tolist()
    assert areas.count(240) == {"each": 4, "first": 1, "none": 0}[border_fill]


@pytest.mark.parametrize("closing_count", [1, 2])
def test_gaps_are_closed_over_seams_and_corners(closing_count: int) -> None:
    prob_u8 = np.zeros((33, 33), np.uint8)
    prob_u8[::10], prob_u8[:, ::10] = 255, 255
    config = PLAIN.model_copy(update={"closing_px": 9, "closing_count": closing_count, "max_hole_px": 0})
    for tile_px in (4, 10, 17):
        assert_equal_to_the_whole_array(prob_u8, config, tile_px)


def test_a_component_as_large_as_the_slide() -> None:
    prob_u8 = np.full((50, 70), 200, np.uint8)
    found = assert_equal_to_the_whole_array(prob_u8, PLAIN, 16)
    assert found.targets.area_px.tolist() == [3500]
    assert found.targets.sides.all()


@pytest.mark.parametrize(("limit", "step"), [(None, 1), (1200, 1), (1199, 0)])
def test_a_selection_over_the_limit_empties_the_slide(limit: int | None, step: int) -> None:
    prob_u8 = np.zeros((60, 60), np.uint8)
    prob_u8[20:40] = 255
    found = assert_equal_to_the_whole_array(prob_u8, PLAIN.model_copy(update={"max_foreground_px": limit}), 16)
    assert found.step == step


def test_tiles_that_cannot_hold_a_target_are_not_read_again() -> None:
    reads: list[tuple[int, int]] = []

    class Counted(ArraySource):
        def read(self, y0: int, x0: int, height: int, width: int) -> np.ndarray:
            reads.append((y0, x0))
            return super().read(y0, x0, height, width)

    prob_u8 = np.full((100, 100), 20, np.uint8)
    prob_u8[55:65, 55:65] = 255
    config = PLAIN.model_copy(update={"max_hole_px": 50})
    found = postprocess_slide(Counted(prob_u8), config, tile_px=10)
    assert sum(int(mask.sum()) for _, mask in found.masks()) == 100
    assert {place: reads.count(place) for place in reads if reads.count(place) > 1} == {
        (50, 50): 3, (50, 60): 3, (60, 50): 3, (60, 60): 3,
    }  # fmt: skip


def test_a_map_on_disk_gives_the_same(tmp_path: Path) -> None:
    prob_u8 = rings((60, 50)).astype(np.uint8) * 255
    np.save(tmp_path / "map.npy", prob_u8)
    on_disk = ArraySource(np.load(tmp_path / "map.npy", mmap_mode="r"))
    found = postprocess_slide(on_disk, PLAIN.model_copy(update={"max_hole_px": 0}), tile_px=16)
    assert found.targets.area_px.tolist() == find_targets(prob_u8 > 0, prob_u8)[1].area_px.tolist()


@pytest.mark.parametrize("wrong", [np.ones((5, 5), np.float32), np.ones((5, 5, 1), np.uint8)])
def test_a_map_that_is_not_8_bit_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 of shape \(h, w\)"):
        ArraySource(wrong)


BOUNDED = """
import pathlib
import cv2
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stas_core.predict.postprocess import PostprocessConfig, StepConfig
from stas_core.slides import stitching
from stas_core.slides.stitching import postprocess_slide

cv2.setNumThreads(1)

class Made:
    def __init__(self, side):
        self.size = (side, side)

    def is_blank(self, y0, x0, height, width):
        return y0 // 512 % 2 == 1

    def read(self, y0, x0, height, width):
        y, x = np.arange(y0, y0 + height)[:, None], np.arange(x0, x0 + width)
        return ((y % 256 < 40) & ((x + y // 512) % 200 < 90)).astype(np.uint8) * 218 + 2

step = StepConfig(drop=26, high=90, core=81, ratio=0.4, low=64)
config = PostprocessConfig(steps=(step,), border_fill="none", max_hole_px=5000, max_foreground_share=None)

def peak_mb():  # of this program alone: that of getrusage includes the process that started it
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

print(0, peak_mb())
for side in (2048, 12288):
    found = postprocess_slide(Made(side), config, tile_px=512)
    painted = sum(int(mask.sum()) for _, mask in found.masks())
    assert painted == found.targets.area_px.sum() > 0
    print(len(found.targets), peak_mb())
"""


def test_a_map_larger_than_the_memory_it_takes() -> None:
    done = subprocess.run([sys.executable, "-c", BOUNDED], capture_output=True, text=True, check=True)
    (_, start_mb), (few, small_mb), (many, large_mb) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert many > 30 * few
    assert large_mb - start_mb < 100  # of a map of 151 MB, whose labels alone are 604 MB
    assert large_mb - small_mb < 40
