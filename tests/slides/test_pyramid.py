"""Pyramids of any size: other readers open them, level 0 is the input, smaller levels are its means."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core.slides.pyramid import MASK, Layout, level_sizes, write_pyramid
from stas_core.slides.source import open_slide
from tests.slides.made import noise

SIZE = (701, 1003)
SMALL = Layout(tile_px=64)


def strips(pixels: np.ndarray, height: int) -> Iterator[np.ndarray]:
    return (pixels[top : top + height] for top in range(0, len(pixels), height))


def blobs(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.where(noise(height, width, seed)[..., 0] > 160, 255, 0).astype(np.uint8)


def levels_in(path: Path) -> list[np.ndarray]:
    with tifffile.TiffFile(path) as file:
        return [page.asarray() for page in file.pages]


def shares(pixels: np.ndarray, num_halvings: int) -> np.ndarray:
    """Return the mean of the level-0 pixels under each pixel of a level, in plain numpy."""
    step = 2**num_halvings
    rows, cols = (np.arange(0, length, step) for length in pixels.shape[:2])
    sums = np.add.reduceat(np.add.reduceat(pixels.astype(np.float64), rows, axis=0), cols, axis=1)
    counts = np.outer(*(np.minimum(step, length - np.arange(0, length, step)) for length in pixels.shape[:2]))
    return np.asarray(sums / (counts[..., None] if pixels.ndim == 3 else counts))


def test_openslide_reads_levels_resolution_and_pixels(tmp_path: Path) -> None:
    pixels = noise(*SIZE)
    write_pyramid(tmp_path / "a.tif", SIZE, strips(pixels, 64), mpp=0.25, layout=SMALL)
    with openslide.OpenSlide(str(tmp_path / "a.tif")) as slide:
        assert slide.level_dimensions == ((1003, 701), (502, 351), (251, 176), (126, 88), (63, 44))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.25)
        read = np.asarray(slide.read_region((0, 0), 0, (1003, 701)))
        assert np.array_equal(read[..., :3], pixels) and (read[..., 3] == 255).all()
        small = np.asarray(slide.read_region((0, 0), 2, (251, 176)))[..., :3]
        assert np.abs(small - shares(pixels, 2)).max() <= 2


@pytest.mark.parametrize("layout", [SMALL, Layout(tile_px=64, smooth=False)], ids=["map", "mask"])
def test_openslide_reads_grey_files(tmp_path: Path, layout: Layout) -> None:
    pixels = blobs(*SIZE)
    write_pyramid(tmp_path / "a.tif", SIZE, [pixels], mpp=0.5, layout=layout)
    with openslide.OpenSlide(str(tmp_path / "a.tif")) as slide:
        for level, expected in enumerate(levels_in(tmp_path / "a.tif")):
            read = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))
            assert np.array_equal(read[..., 0], expected)


def test_slides_of_this_project_open(tmp_path: Path) -> None:
    pixels = noise(*SIZE)
    write_pyramid(tmp_path / "a.tif", SIZE, strips(pixels, 256), mpp=0.5, layout=Layout(tile_px=256))
    with open_slide(tmp_path / "a.tif") as slide:
        assert [(level.width, level.height) for level in slide.info.levels] == [(1003, 701), (502, 351), (251, 176)]
        assert [level.downsample for level in slide.info.levels] == [1, 2, 4]
        assert slide.info.mpp_x == slide.info.mpp_y == pytest.approx(0.5)
        assert np.array_equal(slide.read(0, 0, 0, 1003, 701), pixels)


def test_a_file_need_not_say_its_resolution(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.tif", (40, 50), [noise(40, 50)], mpp=None)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.info.mpp_x is None and slide.info.mpp_y is None
    with openslide.OpenSlide(str(tmp_path / "a.tif")) as slide:
        assert "openslide.mpp-x" not in slide.properties


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([16, 32, 48, 512]), st.integers(1, 4), st.booleans())
def test_any_size_keeps_its_pixels_and_their_means(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, tile_px: int, num_rows: int, colours: bool
) -> None:
    path = tmp_path_factory.mktemp("pyramid") / "a.tif"
    pixels = noise(height, width) if colours else noise(height, width)[..., 0].copy()
    layout = Layout(tile_px=tile_px)
    write_pyramid(path, (height, width), strips(pixels, num_rows * tile_px), mpp=0.5, layout=layout)
    levels = levels_in(path)
    assert np.array_equal(levels[0], pixels)
    assert [level.shape[:2] for level in levels] == level_sizes((height, width), tile_px)
    assert max(levels[-1].shape[:2]) <= tile_px or min(levels[-1].shape[:2]) == 1
    for above, below in pairwise(levels):
        even = np.pad(above, [(0, above.shape[0] % 2), (0, above.shape[1] % 2)] + [(0, 0)] * colours, mode="edge")
        four = [even[y::2, x::2].astype(int) for y in (0, 1) for x in (0, 1)]
        assert np.array_equal(below, (sum(four) + 2) // 4)


@settings(max_examples=30)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 99))
def test_a_smaller_mask_has_what_covers_half_of_a_pixel(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("pyramid") / "a.tif"
    mask = blobs(height, width, seed)
    write_pyramid(path, mask.shape, [mask], mpp=0.5, layout=Layout(tile_px=16, smooth=False))
    levels = levels_in(path)
    assert np.array_equal(levels[0], mask)
    for number, level in enumerate(levels[1:], start=1):
        assert set(np.unique(level)) <= {0, 255}
        share = shares(mask, number)
        inner = tuple(slice(0, length >> number) for length in mask.shape)  # elsewhere edges count more than once
        clear = np.abs(share - 127.5) > number
        assert np.array_equal(level[inner][clear[inner]] > 0, share[inner][clear[inner]] > 127.5)


def test_rows_may_come_in_any_portions(tmp_path: Path) -> None:
    pixels = noise(*SIZE)
    portions = [pixels[:192], pixels[192:256], pixels[256:701]]
    write_pyramid(tmp_path / "a.tif", SIZE, portions, mpp=0.5, layout=SMALL)
    write_pyramid(tmp_path / "b.tif", SIZE, iter([pixels]), mpp=0.5, layout=SMALL)
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        tags = {tag.name for page in file.pages for tag in page.tags}
    assert not tags & {"DateTime", "Software", "ImageDescription"}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.tif", "b.tif"]


@pytest.mark.parametrize("grey", [False, True])
def test_jpeg_on_request(tmp_path: Path, grey: bool) -> None:
    pixels = np.asarray(cv2.GaussianBlur(noise(*SIZE), (0, 0), 4), np.uint8)
    pixels = pixels[..., 0].copy() if grey else pixels
    write_pyramid(tmp_path / "a.tif", SIZE, [pixels], mpp=0.5, layout=Layout(tile_px=64, jpeg_quality=90))
    with openslide.OpenSlide(str(tmp_path / "a.tif")) as slide:
        read = np.asarray(slide.read_region((0, 0), 0, (1003, 701)))[..., :3]
    assert np.abs(read.astype(int) - (pixels[..., None] if grey else pixels)).mean() < 2
    assert np.abs(levels_in(tmp_path / "a.tif")[0].astype(int) - pixels).mean() < 2
    if not grey:
        with open_slide(tmp_path / "a.tif") as ours:
            assert np.abs(ours.read(0, 0, 0, 1003, 701).astype(int) - pixels).mean() < 2


@pytest.mark.parametrize(
    ("portions", "said"),
    [
        ([], "no strips"),
        ([np.zeros((64, 100), np.uint8)], "64 rows, expected 130"),
        ([np.zeros((65, 100), np.uint8)], r"row 0 .*\(65, 100\).*multiple of 64"),
        ([np.zeros((64, 100), np.uint8), np.zeros((66, 99), np.uint8)], r"row 64 .*\(66, 99\); expected .*\(66, 100\)"),
        ([np.zeros((130, 100), np.uint8), np.zeros((64, 100), np.uint8)], "row 130"),
        ([np.zeros((130, 100), bool)], "bool"),
        ([np.zeros((130, 100, 4), np.uint8)], r"\(130, 100, 4\)"),
        ([np.zeros((64, 100), np.uint8), np.zeros((66, 100, 3), np.uint8)], r"\(66, 100, 3\)"),
    ],
)
def test_strips_that_do_not_fit_are_named(tmp_path: Path, portions: list[np.ndarray], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        write_pyramid(tmp_path / "a.tif", (130, 100), iter(portions), mpp=0.5, layout=SMALL)


@pytest.mark.parametrize(("wrong", "said"), [({"tile_px": 100}, "16"), ({"jpeg_quality": 0}, "1 to 100")])
def test_layouts_that_tiff_has_not_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Layout(**wrong)


def test_masks_have_a_layout_of_their_own(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.tif", (600, 601), [np.eye(600, 601, dtype=np.uint8) * 255], mpp=0.5, layout=MASK)
    assert [np.unique(level).tolist() for level in levels_in(tmp_path / "a.tif")] == [[0, 255], [0, 255]]


MEASURED = """
import resource, sys
import numpy as np
from stas_core.slides.pyramid import write_pyramid

def used_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before, side = used_mb(), int(sys.argv[2])
strip = np.zeros((512, side), np.uint8)
write_pyramid(sys.argv[1], (side, side), (strip for _ in range(side // 512)), mpp=0.5)
print(used_mb() - before)
"""


def test_memory_grows_with_the_width_not_with_the_area(tmp_path: Path) -> None:
    side = 16_384
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "a.tif"), str(side)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < side * side / 2**20 / 4  # a quarter of level 0; strips of all levels are a sixteenth
