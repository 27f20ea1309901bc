"""Which targets are shown one by one, and what is cut out for them."""

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from shapely.geometry import Polygon, box

from stas_core.arrays import RgbImage
from stas_core.errors import SlowInput
from stas_core.figures import slide_pages
from stas_core.figures.slides import GalleryItem, GalleryRow, draw_gallery
from stas_core.slides.finish import FoundTargets, SlideToFinish
from stas_core.slides.gallery import CROP_PX, blank_crop, choose_targets, crop_target, describe_target
from stas_core.slides.regions import RegionReader
from stas_core.slides.resolution import Mpp, MppSource
from stas_core.slides.run import GALLERIES
from stas_core.slides.scores import PlacedTargets, place_targets
from stas_core.slides.section import Section, Tumour
from stas_core.slides.source import open_slide
from stas_core.slides.tiling import Box
from tests.slides.made import noise, write_pyramid
from tests.slides.test_scores import FRAME, made_targets, made_tissue


def placed(number: int, outline: Polygon | None = None) -> PlacedTargets:
    """Return targets in a row, ever farther from the next, the larger the farther to the right."""
    places = [(2000 + 3.0 * step**2, 5000.0) for step in range(number)]
    targets = made_targets(places, [100.0 * (step + 1) for step in range(number)])
    tumour = None if outline is None else Tumour(outline, FRAME)
    return place_targets(targets, frame=FRAME, section=Section.of(made_tissue()), tumour=tumour)


def test_each_group_has_its_own_targets() -> None:
    disagreement = np.zeros(40)
    disagreement[[7, 3, 39]] = 0.3, 0.2, 0.9
    to_the_left = box(3000, 9000, 4006, 11_000)  # the first two are in it
    groups = {one.why: list(one.rows) for one in choose_targets(placed(40, to_the_left), disagreement)}
    assert groups == {
        "Largest": [39, 38, 37, 36, 35, 34, 33, 32],
        "Farthest from the tumour's edge": [31, 30, 29, 28, 27, 26, 25, 24],
        "Members differ most": [7, 3],
    }
    groups = {one.why: list(one.rows) for one in choose_targets(placed(40), None)}
    assert groups["Largest"][-1] == 28 and groups["Most isolated"] == list(range(27, 15, -1))
    assert choose_targets(placed(0), None) == []
    assert [list(one.rows) for one in choose_targets(placed(1), np.zeros(1))] == [[0]]


def test_what_is_said_of_a_target() -> None:
    outline = box(3000, 9000, 4006, 11_000)
    inside, outside = (describe_target(placed(40, outline), row, None) for row in (0, 39))
    assert inside == ["100 µm²", "in the tumour", "1.00 mm from the section's edge"]
    assert outside[:2] == ["4,000 µm²", "4.56 mm from the tumour"]
    assert describe_target(placed(40), 1, np.full(40, 0.25))[-1] == "members differ by 0.25"


def test_a_crop_is_cut_at_the_frames_resolution_or_shrunk_to_fit(tmp_path: Path) -> None:
    with open_slide(write_pyramid(tmp_path / "a.tif", noise(1500, 1500), mpp=0.5)) as slide:
        reader = RegionReader(slide, Mpp(0.5, MppSource.OVERRIDE), 0.5)
        small = crop_target(reader, (700, 800, 720, 830), box(700, 800, 720, 830))
        left, top = 710 - CROP_PX // 2, 815 - CROP_PX // 2
        np.testing.assert_array_equal(small.image, reader.read(Box(top, left, top + CROP_PX, left + CROP_PX)))
        assert small.um_per_px == 0.5
        assert small.outline.bounds == (59, 56.5, 69, 71.5)
        large = crop_target(reader, (100, 100, 900, 500), box(100, 100, 900, 500))
        assert large.image.shape == (CROP_PX, CROP_PX, 3)
        assert large.um_per_px * CROP_PX == pytest.approx(1000 * 0.5, abs=1)
        assert large.outline.bounds == pytest.approx((50, 150, 450, 350), abs=1.5)
        corner = crop_target(reader, (0, 0, 10, 10), box(0, 0, 10, 10))
        assert (corner.image[: CROP_PX // 2 - 5] == 255).all() and not (corner.image[CROP_PX // 2 :, -9:] == 255).all()


@pytest.mark.parametrize("place", [(400, 700), (413, 801)])
def test_a_crop_of_a_large_target_shows_what_lies_there(tmp_path: Path, place: tuple[int, int]) -> None:
    x, y = place
    pixels = np.full((1800, 1900, 3), 250, np.uint8)
    pixels[y : y + 600, x : x + 900] = 90
    with open_slide(write_pyramid(tmp_path / "a.tif", pixels, mpp=0.25, num_levels=3)) as slide:
        reader = RegionReader(slide, Mpp(0.25, MppSource.OVERRIDE), 0.25)
        crop = crop_target(reader, (x, y, x + 900, y + 600), box(x, y, x + 900, y + 600))
    dark = np.argwhere(crop.image[..., 0] < 170)
    (top, left), (bottom, right) = dark.min(axis=0), dark.max(axis=0) + 1
    assert np.array([left, top, right, bottom]) * crop.um_per_px == pytest.approx(crop.outline.bounds, abs=1.2)


class Recorder:
    """Reads white, and keeps how much."""

    mpp = 0.5

    def __init__(self) -> None:
        self.most_px = 0

    def read_at(self, box: Box, mpp: float) -> RgbImage:
        self.most_px = max(self.most_px, box.width * box.height)
        return np.full((box.height, box.width, 3), 255, np.uint8)


@pytest.mark.parametrize("side", [1, 255, 257, 25_000, 200_000])
def test_a_crop_takes_few_pixels_whatever_its_size(side: int) -> None:
    reader = Recorder()
    crop = crop_target(reader, (0, 0, side, side), box(0, 0, side, side))
    assert crop.image.shape == (CROP_PX, CROP_PX, 3) and reader.most_px <= (2 * CROP_PX) ** 2
    x0, y0, x1, y1 = crop.outline.bounds
    assert min(x0, y0) >= 0 and max(x1, y1) <= crop.um_per_px * CROP_PX
    assert blank_crop(0.5, (0, 0, side, side), box(0, 0, side, side)).outline == crop.outline


def test_a_crop_that_cannot_be_read_is_a_blank_cell_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[GalleryItem] = []

    class Failing(Recorder):
        def read_at(self, box: Box, mpp: float) -> RgbImage:
            if not self.most_px:
                self.most_px = 1
                raise SlowInput("a.svs took longer than 60 s")
            return super().read_at(box, mpp)

    def kept(rows: Sequence[GalleryRow], *, title: str) -> bytes:
        drawn.extend(item for row in rows for item in row.items)
        return draw_gallery(rows, title=title)

    monkeypatch.setattr(slide_pages, "draw_gallery", kept)
    targets = placed(20)
    given = Mock(SlideToFinish, id="a", uri="a.svs", pixels=Failing())
    found = Mock(
        FoundTargets,
        placed=targets,
        chosen=choose_targets(targets, None, most=4),
        outlines={row: box(*targets.targets.bbox[row]) for row in range(20)},
        disagreement=None,
    )
    files = slide_pages.write_pages(given, found, [GALLERIES], tmp_path)
    assert files[GALLERIES].read_bytes().startswith(b"\x89PNG")
    assert [item.lines[-1] == "not read: slow" for item in drawn] == [True, False, False, False]
