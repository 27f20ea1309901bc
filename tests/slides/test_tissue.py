"""Tissue is found on slides of every kind, and a user's own outlines take its place."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core.arrays import Mask, RgbImage
from stas_core.data import images
from stas_core.errors import InputError, NoTissue
from stas_core.slides.outlines import mask_of_outlines
from stas_core.slides.resolution import Mpp, MppSource
from stas_core.slides.slide import BlockSlide, Bounds, Level, SlideInfo
from stas_core.slides.source import open_slide
from stas_core.slides.tiling import Box
from stas_core.slides.tissue import (
    Tissue,
    TissueConfig,
    find_tissue,
    measure_sharpness,
    tissue_of_image,
    tissue_of_outlines,
)
from tests.slides.made import write_pyramid

MPP = Mpp(4.0, MppSource.OVERRIDE)
CONFIG = TissueConfig()
GLASS, TISSUE, FAINT = (243, 241, 244), (205, 140, 185), (232, 215, 230)
SIZE = 800


def glass(seed: int = 0) -> RgbImage:
    """Return glass with the noise of a scanner."""
    noise = np.random.default_rng(seed).normal(0, 3, (SIZE, SIZE, 3))
    return np.clip(np.array(GLASS) + noise, 0, 255).astype(np.uint8)


def disc(x: int, y: int, radius: int) -> Mask:
    return cv2.circle(np.zeros((SIZE, SIZE), np.uint8), (x, y), radius, 1, -1).view(bool)


def paint(pixels: RgbImage, where: Mask, colour: tuple[int, int, int]) -> RgbImage:
    pixels[where] = np.clip(np.array(colour) + (pixels[where].astype(int) - GLASS), 0, 255)
    return pixels


def open_made(folder: Path, pixels: RgbImage) -> BlockSlide:
    return open_slide(write_pyramid(folder / "a.tif", pixels, mpp=4.0, num_levels=2))


def found(folder: Path, pixels: RgbImage) -> Tissue:
    with open_made(folder, pixels) as slide:
        return find_tissue(slide, MPP, CONFIG)


def overlap(mask: Mask, truth: Mask) -> float:
    small = truth.reshape(SIZE // 2, 2, SIZE // 2, 2).mean((1, 3)) >= 0.5
    return float((mask & small).sum() / (mask | small).sum())


@pytest.mark.parametrize("side", [40, 100, 400])
def test_a_small_blank_slide_has_no_tissue(tmp_path: Path, side: int) -> None:
    path = write_pyramid(tmp_path / "a.tif", np.full((side, side, 3), 243, np.uint8), mpp=4.0, num_levels=1)
    with open_slide(path) as slide, pytest.raises(NoTissue):
        find_tissue(slide, MPP, CONFIG)


@pytest.mark.parametrize("colour", [TISSUE, FAINT, (120, 70, 140), (235, 180, 205)], ids=str)
def test_tissue_of_any_strength_is_found_to_its_edge(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    truth = disc(350, 400, 220) & ~disc(350, 400, 60)
    tissue = found(tmp_path, paint(glass(), truth, colour))
    assert overlap(tissue.mask, truth) > 0.95
    assert tissue.area_mm2 == pytest.approx(truth.sum() * 16e-6, rel=0.03)
    assert (tissue.pen_share, tissue.fill_share) == (0, 0)


@pytest.mark.parametrize("level", [255, 243, 215, 128, 0])
def test_a_blank_slide_has_no_tissue(tmp_path: Path, level: int) -> None:
    blank = np.clip(glass().astype(int) - 243 + level, 0, 255).astype(np.uint8)
    with open_made(tmp_path, blank) as slide, pytest.raises(InputError, match=r"a\.tif.*; ") as caught:
        find_tissue(slide, MPP, CONFIG)
    assert caught.value.reason == "no_tissue"


@pytest.mark.parametrize("colour", [TISSUE, FAINT], ids=str)
def test_a_slide_that_is_all_tissue_is_all_tissue(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    assert found(tmp_path, paint(glass(), np.ones((SIZE, SIZE), bool), colour)).share > 0.99


@pytest.mark.parametrize(
    "ink", [(20, 120, 60), (30, 60, 170), (40, 40, 45), (200, 30, 40)], ids=["green", "blue", "black", "red"]
)
def test_pen_marks_are_no_tissue(tmp_path: Path, ink: tuple[int, int, int]) -> None:
    pixels, truth = paint(glass(), disc(300, 400, 150), TISSUE), disc(300, 400, 150)
    cv2.line(pixels, (550, 100), (700, 700), ink, 25)
    tissue = found(tmp_path, pixels)
    assert overlap(tissue.mask, truth) > 0.95
    assert 0.01 < tissue.pen_share < 0.05


def test_black_and_white_fill_are_no_tissue(tmp_path: Path) -> None:
    truth = disc(400, 400, 200)
    pixels = paint(glass(), truth, TISSUE)
    pixels[:, :120], pixels[:100, 300:] = 0, 255
    tissue = found(tmp_path, pixels)
    assert overlap(tissue.mask, truth) > 0.95
    assert tissue.fill_share == pytest.approx(120 / 800, abs=0.01)


def test_nests_are_kept_and_dust_is_not(tmp_path: Path) -> None:
    pixels = paint(glass(), disc(300, 300, 150), TISSUE)
    pixels = paint(pixels, disc(650, 650, 9), (150, 90, 150))  # a nest of 72 um
    pixels = paint(pixels, disc(650, 150, 12), (120, 119, 121))  # dust is grey
    pixels = paint(pixels, disc(150, 700, 2), (150, 90, 150))
    mask = found(tmp_path, pixels).mask
    assert mask[325, 325] and not mask[75, 325] and not mask[350, 75]


def test_a_vignette_and_a_tinted_lamp_are_glass(tmp_path: Path) -> None:
    x = np.linspace(-1, 1, SIZE)
    light = 1 - 0.04 * (x[None] ** 2 + x[:, None] ** 2)[..., None]
    truth = disc(400, 400, 150)
    tinted = (paint(glass(), truth, TISSUE) * light * (1.0, 0.97, 0.93)).astype(np.uint8)
    assert overlap(found(tmp_path, tinted).mask, truth) > 0.95


boxes = st.tuples(st.integers(-50, 3300), st.integers(-50, 3300), st.integers(1, 400), st.integers(1, 400))


@settings(max_examples=100)
@given(boxes, st.sampled_from([0.5, 1.0, 4.0, 8.0]))
def test_boxes_with_tissue_or_near_it_are_chosen(box: tuple[int, int, int, int], mpp: float) -> None:
    mask = np.zeros((200, 200), bool)
    mask[60:100, 30:90] = True
    tissue = Tissue(mask, 8.0, 50.0, "computed")
    y, x, height, width = box
    place = Box(y, x, y + height, x + width)
    top, bottom = (60 * 8 - 50) / mpp, (100 * 8 + 50) / mpp
    left, right = (30 * 8 - 50) / mpp, (90 * 8 + 50) / mpp
    inside = y + height > top and y < bottom and x + width > left and x < right
    far = y + height < top - 8 / mpp or y > bottom + 8 / mpp or x + width < left - 8 / mpp or x > right + 8 / mpp
    assert tissue.tissue_in(place, mpp) or not inside
    assert not (tissue.tissue_in(place, mpp) and far)


def test_sharpness_falls_with_focus(tmp_path: Path) -> None:
    texture = np.random.default_rng(0).integers(120, 220, (SIZE, SIZE, 3), np.uint8)
    tissue = Tissue(np.ones((100, 100), bool), 8.0, 50.0, "computed")
    values = []
    for sigma in (0.8, 2.0, 5.0):
        soft_texture = cv2.GaussianBlur(texture.astype(np.float32), (0, 0), sigma)
        pixels = np.clip(170 + (soft_texture - 170) * 30 / soft_texture.std(), 0, 255).astype(np.uint8)
        with open_slide(write_pyramid(tmp_path / f"{sigma}.tif", pixels, mpp=1.0, num_levels=1)) as slide:
            values.append(measure_sharpness(slide, Mpp(1.0, MppSource.OVERRIDE), tissue))
            assert measure_sharpness(slide, Mpp(4.0, MppSource.OVERRIDE), tissue) is None
    sharp, soft, blurred = (value or 0 for value in values)
    assert sharp > 2 * soft > 4 * blurred


# A user's own masks


def info(bounds: Bounds | None = None) -> SlideInfo:
    return SlideInfo("a.svs", "v", (Level(4000, 2000, 1.0),), bounds=bounds)


def feature(kind: str, coordinates: Any) -> dict[str, Any]:
    return {"type": "Feature", "properties": {}, "geometry": {"type": kind, "coordinates": coordinates}}


def square(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def draw(value: Any, bounds: Bounds | None = None) -> Mask:
    return mask_of_outlines(json.dumps(value).encode(), "roi.geojson", info(bounds), (200, 400))


def test_outlines_are_drawn_with_their_holes_and_islands() -> None:
    ring = [square(400, 200, 2000, 1800), square(800, 600, 1600, 1400)]
    collection = {
        "type": "FeatureCollection",
        "features": [
            feature("MultiPolygon", [ring, [square(3000, 1000, 3500, 1500)]]),
            feature("Polygon", [square(1100, 900, 1300, 1100)]),  # in the hole
            feature("Point", [10, 10]),
        ],
    }
    mask = draw(collection)
    assert mask[50, 60] and not mask[70, 90] and mask[100, 120] and mask[125, 325] and not mask[10, 300]
    assert mask.sum() == pytest.approx(160 * 160 - 80 * 80 + 50 * 50 + 20 * 20, rel=0.02)


def test_any_root_is_read_and_bounds_are_added() -> None:
    polygon = {"type": "Polygon", "coordinates": [square(0, 0, 400, 400)]}
    for value in (polygon, feature("Polygon", polygon["coordinates"]), [feature("Polygon", polygon["coordinates"])]):
        assert draw(value)[20, 20] and not draw(value)[100, 100]
    shifted = draw(polygon, Bounds(1000, 1000, 2000, 900))
    assert shifted[120, 120] and not shifted[20, 20]


def test_a_small_outline_still_marks_a_pixel() -> None:
    assert draw(feature("Polygon", [square(1001, 1001, 1003, 1003)])).any()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no json", "unreadable_annotation"),
        (b"[" * 100_000, "unreadable_annotation"),
        (b"{}", "unreadable_annotation"),
        (b'{"type": "FeatureCollection", "features": 3}', "unreadable_annotation"),
        (b'{"type": "Polygon", "coordinates": [[[0, 0], [1, "x"], [2, 2]]]}', "unreadable_annotation"),
        (b'{"type": "Polygon", "coordinates": [[[0, 0], [1, NaN], [2, 2]]]}', "unreadable_annotation"),
        (b'{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}', "unreadable_annotation"),
        (b'{"type": "Polygon", "coordinates": []}', "unreadable_annotation"),
        (b'{"type": "FeatureCollection", "features": []}', "missing_shapes"),
        (b'{"type": "Point", "coordinates": [1, 2]}', "missing_shapes"),
        (b'{"type": "Polygon", "coordinates": [[[1e9, 1e9], [2e9, 1e9], [2e9, 2e9]]]}', "wrong_coordinates"),
    ],
)
def test_outlines_that_cannot_be_drawn_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=r"roi\.geojson.*; ") as caught:
        mask_of_outlines(data, "roi.geojson", info(), (200, 400))
    assert caught.value.reason == reason


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["Polygon", "Feature", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "features", "geometry", "coordinates", "geometries"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@settings(max_examples=100)
@given(json_values)
def test_no_json_raises_anything_but_an_input_error(value: Any) -> None:
    try:
        draw(value)
    except InputError as error:
        assert error.reason != "internal_error"


def test_a_users_tissue_takes_the_place_of_ours(tmp_path: Path) -> None:
    with open_made(tmp_path, paint(glass(), disc(400, 400, 200), TISSUE)) as slide:
        outline = json.dumps(feature("Polygon", [square(100, 100, 300, 300)])).encode()
        drawn = tissue_of_outlines(outline, "own.geojson", slide, MPP, CONFIG)
        assert drawn.area_mm2 == pytest.approx(200 * 200 * 16e-6, rel=0.03)
        given = images.encode_mask(disc(400, 400, 100)[::4, ::4])
        image = tissue_of_image(given, "own.png", slide, MPP, CONFIG)
        assert image.mask.shape == drawn.mask.shape and image.mask[200, 200] and not image.mask[200, 120]
        inside = find_tissue(slide, MPP, CONFIG).within(drawn.mask, "a.tif")
        assert inside.mask.sum() < drawn.mask.sum()
        with pytest.raises(InputError, match="another shape") as caught:
            tissue_of_image(images.encode_mask(np.ones((10, 40), bool)), "own.png", slide, MPP, CONFIG)
        assert caught.value.reason == "size_mismatch"
        with pytest.raises(InputError, match="marks no tissue"):
            tissue_of_image(images.encode_mask(np.zeros((40, 40), bool)), "own.png", slide, MPP, CONFIG)
        with pytest.raises(InputError, match="region of interest"):
            image.within(np.zeros_like(image.mask), "a.tif")


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "mpp", "low", "high"),
    [
        ("CMU-1-Small-Region.svs", 0.499, 0.36, 0.46),
        ("tcga-cr-7395-01a-01-ts1.svs", 0.5, 0.6, 0.72),
        ("stas_mosaic.tif", 0.5, 0.52, 0.64),
    ],
)
def test_real_slides_have_as_much_tissue_as_one_sees(
    shared: Path, name: str, mpp: float, low: float, high: float
) -> None:
    path = shared / "data/slides" / name
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with open_slide(path) as slide:
        tissue = find_tissue(slide, Mpp(mpp, MppSource.OVERRIDE), CONFIG)
    assert low < tissue.share < high and tissue.pen_share == 0


@pytest.mark.real_data
def test_fluorescence_has_no_tissue(shared: Path) -> None:
    path = shared / "data/slides/more/bf2759_TRITC.ndpi"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with open_slide(path) as slide, pytest.raises(InputError) as caught:
        find_tissue(slide, Mpp(0.228, MppSource.METADATA), CONFIG)
    assert caught.value.reason == "no_tissue"
