"""A slide on a page: what is given is drawn, in its place; equal values give equal bytes."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from shapely.geometry import Polygon, box

from stas_core.arrays import RgbImage
from stas_core.errors import ConfigError
from stas_core.figures.slides import (
    GalleryItem,
    GalleryRow,
    Layers,
    draw_gallery,
    draw_overview,
    key_figures,
    round_length,
)
from stas_core.slides.gallery import Crop
from tests.slides.test_scores import scored

THUMBNAIL = np.full((600, 400, 3), 230, np.uint8)
UM_PER_PX = 20.0
SCORES = dataclasses.replace(scored([(3000, 3000), (6000, 9000)], box(2000, 2000, 7000, 7000)), warnings=["a $warning"])


def decode(data: bytes) -> RgbImage:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def overview(layers: Layers) -> RgbImage:
    bare = dataclasses.replace(SCORES, densest_x_um=None, densest_y_um=None)
    return decode(draw_overview(THUMBNAIL, um_per_px=UM_PER_PX, layers=layers, scores=bare))


def slide_of(page: RgbImage) -> RgbImage:
    """Return the part of a page that shows the slide: 800x1200 px, above the key."""
    return page[-64 - 1200 : -64, 24 : 24 + 800]


@pytest.mark.parametrize(
    ("layers", "place"),
    [
        (Layers(targets_um=np.array([[6000.0, 9000.0]])), (900, 600)),
        (Layers(tumour=Polygon([(5000, 8000), (7000, 8000), (6000, 10_000)])), (800, 600)),
        (Layers(heat=np.pad(np.full((2, 2), 255, np.uint8), ((44, 14), (29, 9)))), (900, 600)),
        (Layers(section=np.pad(np.ones((15, 10), bool), ((45, 0), (30, 0)))), (900, 700)),
    ],
    ids=["targets", "tumour", "heat", "section"],
)
def test_what_is_given_is_drawn_in_its_place(layers: Layers, place: tuple[int, int]) -> None:
    changed = (slide_of(overview(layers)) != slide_of(overview(Layers()))).any(axis=2)
    y, x = place
    assert changed[y - 12 : y + 12, x - 12 : x + 12].any()
    assert changed.mean() < 0.06 and not changed[:600].any()


def test_probability_0_leaves_the_slide_as_it_is() -> None:
    blank = Layers(heat=np.zeros((60, 40), np.uint8), section=np.ones((30, 20), bool), targets_um=np.zeros((0, 2)))
    np.testing.assert_array_equal(slide_of(overview(blank)), slide_of(overview(Layers())))


def test_the_densest_field_is_a_circle_of_its_size() -> None:
    drawn = decode(draw_overview(THUMBNAIL, um_per_px=UM_PER_PX, layers=Layers(), scores=SCORES))
    rows, columns = np.nonzero((slide_of(drawn) != slide_of(overview(Layers()))).any(axis=2))
    found = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
    assert found == pytest.approx((300, 300), abs=2)
    assert np.ptp(columns) == pytest.approx(2 * 550 / 10, abs=5)


def test_pages_are_equal_for_equal_values_and_as_large_as_needed() -> None:
    one, other = (draw_overview(THUMBNAIL, um_per_px=UM_PER_PX, layers=Layers(), scores=SCORES) for _ in range(2))
    assert one == other
    height, width = decode(one).shape[:2]
    assert (width, height) == (1548, 24 + 30 * 3 + 1200 + 64)
    wide = np.full((300, 2048, 3), 230, np.uint8)
    assert decode(draw_overview(wide, um_per_px=9, layers=Layers(), scores=SCORES)).shape[1] == 2048 + 48


def test_the_title_has_the_figures() -> None:
    assert key_figures(SCORES) == (
        "2 targets  ·  0.0003 of 63.8 mm² tissue  ·  0.0313 per mm²  ·  1 in the densest 20x field (class 1-4)  ·  "
        "up to 6 mm from the tumour (class >=2 mm)"
    )
    assert "tumour" not in key_figures(scored([]))


def test_scale_bars_have_round_lengths() -> None:
    assert [round_length(most) for most in (1, 1.99, 4999, 5000, 0.03)] == pytest.approx([1, 1, 2000, 5000, 0.02])


def test_a_gallery_shows_each_crop_with_its_outline() -> None:
    image = np.full((256, 256, 3), 200, np.uint8)
    holed = Polygon(box(20, 20, 100, 100).exterior, [box(40, 40, 60, 60).exterior])
    items = [
        GalleryItem(Crop(image, 0.5, holed), number, f"{number:032x}", ["5,230 µm²", "in the tumour"])
        for number in range(1, 13)
    ]
    rows = [GalleryRow("Largest", items), GalleryRow("Most isolated", items[:2])]
    page = decode(draw_gallery(rows, title="0007"))
    assert page.shape[1] == 2 * 24 + 6 * 270 - 14
    first = page[64 + 36 : 64 + 36 + 256, 24 : 24 + 256]
    assert (first[70, 120] == 200).all()
    for x_um in (20, 40, 100):  # black on white, outside and round the hole
        near = first[100, 2 * x_um - 3 : 2 * x_um + 4]
        assert near.min() < 80 and near.max() > 220
    assert draw_gallery(rows, title="0007") == draw_gallery(rows, title="0007")
    with pytest.raises(ConfigError, match="gallery is empty"):
        draw_gallery([], title="0007")
