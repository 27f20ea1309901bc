"""What is found out about a slide before it is predicted, and what a user gives in its place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stas_core import storage
from stas_core.data import images
from stas_core.errors import CoarseSlide, MissingMpp, MissingShapes, NoTissue, StorageError, UnreadableAnnotation
from stas_core.slides.blocks import TileConfig
from stas_core.slides.finish import read_tumour
from stas_core.slides.run import SlideRecord, SlideRun
from stas_core.slides.source import open_slide
from stas_core.slides.survey import NOT_SCORED, SCORED, Survey, blocks_to_predict, survey_slide, tiles_to_predict
from stas_core.slides.tiling import Box
from stas_core.slides.tissue import TissueConfig
from tests.slides.made import stained, write_pyramid

CONFIG = TissueConfig()


def square(x0: int, y0: int, side: int) -> bytes:
    ring = [[x0, y0], [x0 + side, y0], [x0 + side, y0 + side], [x0, y0 + side], [x0, y0]]
    return json.dumps({"type": "Polygon", "coordinates": [ring]}).encode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "a.tif", stained(800, 1200), mpp=0.5)


def test_a_survey_is_the_same_when_it_is_read_again(path: Path, tmp_path: Path) -> None:
    with open_slide(path) as slide:
        survey, shades = survey_slide(slide, mpp=None, frame_mpp=1.0, config=CONFIG)
    assert (survey.frame_height, survey.frame_width, survey.level) == (400, 600, 1)
    assert (survey.mpp, survey.mpp_source, survey.level0_px) == (0.5, "metadata", 2.0)
    assert survey.stain() is not None and survey.sharpness is not None
    run = SlideRun(str(tmp_path / "out"))
    run.write_survey("a", "key", survey=survey, tissue=shades)
    read, again = run.survey("a")
    assert read == survey and np.array_equal(again, shades) and run.survey_by("a", "other") is None
    assert run.survey_by("a", "key") is not None and run.survey_by("b", "key") is None


def test_the_tissue_that_is_given_takes_the_place_of_what_is_computed(path: Path) -> None:
    with open_slide(path) as slide:
        drawn = square(0, 0, 400), "own.geojson"
        survey, shades = survey_slide(slide, mpp=None, frame_mpp=0.5, config=CONFIG, tissue=drawn)
    assert survey.tissue_source == "GeoJSON"
    assert (shades[:25, :25] == SCORED).all() and not shades[26:].any() and not shades[:, 26:].any()


def test_the_region_of_interest_stays_what_a_slide_was_surveyed_with(path: Path, tmp_path: Path) -> None:
    roi = square(100, 200, 600)
    with open_slide(path) as slide:
        survey, shades = survey_slide(slide, mpp=None, frame_mpp=1.0, config=CONFIG, roi=(roi, "roi.geojson"))
    run = SlideRun(str(tmp_path / "out"))
    run.write_survey("a", "key", survey=survey, tissue=shades, roi=roi)
    region = run.region("a", survey)
    assert region is not None
    drawn = region.covers(Box(0, 0, survey.frame_height, survey.frame_width))
    assert drawn[100:400, 50:350].all() and drawn.sum() <= 302 * 302
    Path(run.file("regions", "a")).write_bytes(square(0, 0, 600))
    assert run.survey_by("a", "key") is None
    with pytest.raises(StorageError, match=r"regions/a\.geojson is not what .*surveys/a\.json was made with"):
        run.region("a", survey)


def test_a_region_of_interest_restricts_what_is_scored_and_leaves_the_section(path: Path) -> None:
    with open_slide(path) as slide:
        whole, _ = survey_slide(slide, mpp=None, frame_mpp=0.5, config=CONFIG)
        roi = square(0, 0, 600), "roi.geojson"
        survey, shades = survey_slide(slide, mpp=None, frame_mpp=0.5, config=CONFIG, roi=roi)
        with pytest.raises(NoTissue, match="region of interest"):
            nothing = np.zeros((800, 1200, 3), np.uint8) + 243
            other = write_pyramid(
                path.parent / "b.tif", np.where(np.arange(1200)[:, None] > 700, stained(800, 1200), nothing)
            )
            with open_slide(other) as half:
                survey_slide(half, mpp=None, frame_mpp=0.5, config=CONFIG, roi=roi)
    assert set(np.unique(shades)) == {0, NOT_SCORED, SCORED}
    assert survey.tissue(shades).mask.sum() < survey.tissue(shades, whole=True).mask.sum()
    assert whole.tissue_digest != survey.tissue_digest


def test_what_cannot_be_scored_is_refused_before_anything_is_predicted(tmp_path: Path) -> None:
    with open_slide(write_pyramid(tmp_path / "a.tif", stained(300, 300), mpp=None)) as slide:
        with pytest.raises(MissingMpp):
            survey_slide(slide, mpp=None, frame_mpp=0.5, config=CONFIG)
        survey, _ = survey_slide(slide, mpp=0.25, frame_mpp=0.5, config=CONFIG)
        assert (survey.mpp_source, survey.frame_width) == ("override", 150)
        with pytest.raises(CoarseSlide):
            survey_slide(slide, mpp=1.0, frame_mpp=0.5, config=CONFIG)


def test_blocks_hold_the_tiles_that_touch_tissue_each_once(path: Path) -> None:
    with open_slide(path) as slide:
        survey, shades = survey_slide(slide, mpp=None, frame_mpp=0.5, config=TissueConfig(margin_um=0))
    grid = TileConfig(px=64, halo_px=32).grid(survey.frame_height, survey.frame_width)
    tissue = survey.tissue(shades)
    tiles = [(tile.row, tile.col) for tile in tiles_to_predict(grid, tissue, 0.5)]
    in_blocks = [(t.row, t.col) for _, chosen in blocks_to_predict(grid, 3, tissue, 0.5) for t in chosen]
    assert sorted(in_blocks) == sorted(tiles) and 0 < len(tiles) < grid.num_rows * grid.num_cols


@pytest.mark.parametrize("text", ["[]", '{"key": "x"}', '{"key": "x", "survey": {"mpp": 1}}', "no JSON"])
def test_a_damaged_survey_says_so(tmp_path: Path, text: str) -> None:
    run = SlideRun(str(tmp_path))
    storage.write_bytes(run.file("surveys", "a"), text.encode())
    with pytest.raises(StorageError, match=r"surveys/a\.json"):
        run.survey("a")


def test_a_record_is_the_same_when_it_is_read_again(tmp_path: Path) -> None:
    run = SlideRun(str(tmp_path))
    keys: Any = {"predict_key": "p", "finish_key": "f", "limits_key": "l"}
    scored = SlideRecord(id="a", slide_uri="/a.svs", stamp="1", found={"id": "a"}, files=["maps"], **keys)
    failed = SlideRecord(id="b", slide_uri="/b.svs", stamp="2", reason="no_tissue", message="blank", **keys)
    for record in (scored, failed):
        run.write_record(record)
        assert run.record(record.id) == record
    assert run.records() == [scored, failed]
    storage.write_json(run.file("records", "c"), {"id": "c"})
    with pytest.raises(StorageError, match=r"records/c\.json has no"):
        run.records()


def test_json_of_another_kind_is_no_survey() -> None:
    with pytest.raises(StorageError, match="no survey of a slide"):
        Survey.from_json({"bounds": None, "colour": "pink"}, "a.json")


def test_tissue_that_was_changed_by_hand_is_surveyed_again(path: Path, tmp_path: Path) -> None:
    with open_slide(path) as slide:
        survey, shades = survey_slide(slide, mpp=None, frame_mpp=0.5, config=CONFIG)
    run = SlideRun(str(tmp_path / "out"))
    run.write_survey("a", "key", survey=survey, tissue=shades)
    Path(run.file("tissue", "a")).write_bytes(images.encode_map(255 - shades))
    assert run.survey_by("a", "key") is None
    with pytest.raises(StorageError, match=r"tissue/a\.png is not what .*given\.tissue"):
        run.survey("a")
    Path(run.file("tissue", "a")).unlink()
    assert run.survey_by("a", "key") is None


def test_polygons_of_a_tumour_may_overlap(path: Path) -> None:
    with open_slide(path) as slide:
        survey, _ = survey_slide(slide, mpp=None, frame_mpp=0.5, config=CONFIG)
    squares = [json.loads(square(x0, 100, 400)) for x0 in (100, 300)]
    both = json.dumps({"type": "GeometryCollection", "geometries": squares}).encode()
    tumour = read_tumour(both, "tumour.geojson", survey)
    assert tumour.area_um.area == pytest.approx(600 * 400 * 0.25)
    for data, error in (
        (b'{"type": "FeatureCollection", "features": []}', MissingShapes),
        (b"x", UnreadableAnnotation),
    ):
        with pytest.raises(error, match=r"tumour\.geojson"):
            read_tumour(data, "tumour.geojson", survey)
