"""The truth of a slide: outlines and masks in the frame of its maps, or a reason why they are of something else."""

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from stas_core.arrays import Mask
from stas_core.data import images
from stas_core.data.annotations import AnnotationConfig
from stas_core.errors import InputError
from stas_core.predict.geojson import GeoJsonWriter
from stas_core.predict.placement import TargetFacts
from stas_core.predict.polygons import trace_shapes
from stas_core.predict.postprocess import find_targets
from stas_core.slides.pyramid import MASK, write_pyramid
from stas_core.slides.slide_truth import open_truth
from stas_core.slides.survey import Survey
from tests.slides.made import noise, survey_of

SIZE = (300, 400)


def level0_mask(factor: int) -> Mask:
    return noise(SIZE[0] * factor + factor - 1, SIZE[1] * factor, 4)[..., 0] > 150


def survey(factor: float = 1.0) -> Survey:
    height, width = int(SIZE[0] * factor), int(SIZE[1] * factor)
    if factor == 2:
        height += 1  # half a pixel of the frame is cut off
    return survey_of(SIZE, level0_px=factor, level0=(height, width))


def read(path: Path, of: Survey, annotation: AnnotationConfig | None = None) -> np.ndarray:
    with open_truth(path, path.name, of, annotation or AnnotationConfig()) as found:
        assert found.size == SIZE
        parts = [found.read(y0, 0, min(128, SIZE[0] - y0), SIZE[1]) for y0 in range(0, SIZE[0], 128)]
    return np.concatenate(parts)


@pytest.mark.parametrize("value", [1, 255])
@pytest.mark.parametrize("factor", [1, 2])
def test_masks_of_the_maps_size_and_of_level_0_are_read_alike(tmp_path: Path, factor: int, value: int) -> None:
    mask = level0_mask(factor)
    expected = mask[factor // 2 :: factor, factor // 2 :: factor][: SIZE[0]] * 255
    levels = (mask * value).astype(np.uint8)
    write_pyramid(tmp_path / "tiled.tif", mask.shape, [levels], mpp=0.5, layout=dataclasses.replace(MASK, tile_px=64))
    tifffile.imwrite(tmp_path / "strips.tif", levels)
    (tmp_path / "a.png").write_bytes(images.encode_mask(mask))
    for path in tmp_path.iterdir():
        assert np.array_equal(read(path, survey(factor)), expected), path


@pytest.mark.parametrize("factor", [0.9, 1.979, 2.0, 3.3])
@pytest.mark.parametrize("tile_px", [17, 128])
def test_any_scale_takes_the_label_under_the_middle_of_a_pixel(tmp_path: Path, factor: float, tile_px: int) -> None:
    of = survey(factor)
    mask = noise(of.height_px, of.width_px, 4)[..., 0] > 150
    write_pyramid(tmp_path / "a.tif", mask.shape, [mask * np.uint8(255)], mpp=0.5, layout=MASK)
    found = np.zeros(SIZE, np.uint8)
    with open_truth(tmp_path / "a.tif", "a", of, AnnotationConfig()) as truth:
        for y0 in range(0, SIZE[0], tile_px):
            for x0 in range(0, SIZE[1], tile_px):
                size = min(tile_px, SIZE[0] - y0), min(tile_px, SIZE[1] - x0)
                found[y0 : y0 + size[0], x0 : x0 + size[1]] = truth.read(y0, x0, *size)
    for y in range(0, SIZE[0], 7):
        for x in range(0, SIZE[1], 7):
            row, col = (
                min(math.floor((at + 0.5) * factor), end - 1) for at, end in zip((y, x), mask.shape, strict=True)
            )
            assert found[y, x] == 255 * mask[row, col]


@pytest.mark.parametrize("factor", [1.0, 2.0, 1.979])
def test_outlines_are_in_pixels_of_level_0(tmp_path: Path, factor: float) -> None:
    square = np.array([[40, 60], [120, 60], [120, 100], [40, 100], [40, 60]]) * factor
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [square.tolist()]}))
    drawn = read(tmp_path / "a.geojson", survey(factor)) > 0
    assert drawn[60:100, 40:120].all()
    assert drawn.sum() <= 42 * 82
    moved = dataclasses.replace(survey(factor), bounds=(round(20 * factor), 0, 300, 300))
    assert np.array_equal(read(tmp_path / "a.geojson", moved)[:, 21:] > 0, drawn[:, 1:-20])


def test_no_outlines_are_an_empty_truth(tmp_path: Path) -> None:
    (tmp_path / "a.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    assert not read(tmp_path / "a.geojson", survey()).any()


def polygon(x: float, y: float) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": [[[x, y], [x + 50, y], [x, y + 50], [x, y]]]}


@pytest.mark.parametrize(
    ("geometries", "reason", "message"),
    [
        ([polygon(10, 10), polygon(900, 10)], "wrong_coordinates", "1 of its 2 outlines lie outside .* 400x300 px"),
        ([polygon(-60, 10)], "wrong_coordinates", "1 of its 1"),
        ([polygon(1, 1), {"type": "Point", "coordinates": [4, 5]}], "target_without_area", "has 1 point"),
        ([{"type": "Circle"}], "unreadable_annotation", "type 'Circle'"),
    ],
)
def test_outlines_of_something_else_are_refused(tmp_path: Path, geometries: Any, reason: str, message: str) -> None:
    text = json.dumps({"type": "GeometryCollection", "geometries": geometries})
    (tmp_path / "a.geojson").write_text(text)
    with pytest.raises(InputError, match=f"a.geojson.*{message}") as caught:
        read(tmp_path / "a.geojson", survey())
    assert caught.value.reason == reason


def drawn(path: Path, features: list[tuple[str | None, dict[str, Any]]]) -> Path:
    """Write geometries with their classes, as QuPath does."""
    written = [
        {
            "type": "Feature",
            "geometry": geometry,
            "properties": {} if name is None else {"classification": {"name": name}},
        }
        for name, geometry in features
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": written}))
    return path


def test_outlines_count_by_their_class(tmp_path: Path) -> None:
    """A project of QuPath also has tissue, what is to be ignored, and points."""
    stas, unnamed, tissue = polygon(10, 10), polygon(100, 10), polygon(200, 10)
    point = {"type": "Point", "coordinates": [4, 5]}
    every = [("STAS", stas), (None, unnamed), ("Tissue", tissue), ("Tissue", polygon(9000, 10)), ("Ignore*", point)]
    path = drawn(tmp_path / "a.geojson", every)
    alone = {name: read(drawn(tmp_path / "b.geojson", [(None, one)]), survey()) for name, one in every[:3]}
    with pytest.raises(InputError, match=r"^a.geojson: 'Ignore\*' \(1 shape\), 'Tissue' \(2 shapes\)") as caught:
        read(path, survey())
    assert caught.value.reason == "unknown_label"
    assert "say what each means: 'truth.annotation.labels.Ignore*=target' (or ignore); or set truth." in str(
        caught.value
    )
    listed = AnnotationConfig(labels={"STAS": "target", "Tissue": "ignore", "Ignore*": "ignore"})
    both = alone["STAS"] | alone[None]
    for config in (listed, AnnotationConfig(unknown_labels="ignore")):
        assert np.array_equal(read(path, survey(), config), both)
    own = AnnotationConfig(labels={"Tissue": "ignore", "STAS": "ignore", "Unclassified": "target", "Ignore*": "ignore"})
    assert np.array_equal(read(path, survey(), own), alone[None])
    own = AnnotationConfig(labels={"STAS": "target", "Unclassified": "ignore"}, unknown_labels="ignore")
    assert np.array_equal(read(path, survey(), own), alone["STAS"])


@pytest.mark.parametrize("empty", [{"type": "MultiPolygon", "coordinates": []}, None])
def test_a_target_of_a_slide_with_an_empty_geometry_is_told(tmp_path: Path, empty: Any) -> None:
    path = drawn(tmp_path / "a.geojson", [("STAS", polygon(10, 10)), ("STAS", empty)])
    with pytest.raises(InputError, match=r"has 1 point\(s\), line\(s\) or empty geometries, which have no area"):
        read(path, survey())


@pytest.mark.parametrize("name", ["proposed", "questioned"])
def test_an_outline_on_which_nobody_has_decided_is_no_truth(tmp_path: Path, name: str) -> None:
    path = drawn(tmp_path / "a.geojson", [("STAS", polygon(10, 10)), (name, polygon(100, 10))])
    for config in (AnnotationConfig(), AnnotationConfig(unknown_labels="ignore")):
        with pytest.raises(InputError, match=f"a.geojson: '{name}' .* from a review, accept or delete them") as caught:
            read(path, survey(), config)
        assert caught.value.reason == "unknown_label"
    decided = AnnotationConfig(labels={"STAS": "target", name: "ignore"})
    assert read(path, survey(), decided)[10:40, 100:140].max() == 0


@pytest.mark.parametrize("max_annotations", [0, 2000])
def test_outlines_that_score_slides_wrote_are_taken_as_they_are(tmp_path: Path, max_annotations: int) -> None:
    """As annotations or, where there are many, detections."""
    mask = np.zeros(SIZE, bool)
    mask[40:90, 30:70] = mask[50:60, 200:300] = True
    labels, targets = find_targets(mask, np.full(SIZE, 255, np.uint8))
    sink = io.BytesIO()
    with GeoJsonWriter(sink, TargetFacts("a", targets), max_annotations=max_annotations) as writer:
        writer.write(trace_shapes(labels))
    (tmp_path / "a.geojson").write_bytes(sink.getvalue())
    found = read(tmp_path / "a.geojson", survey()) > 0
    assert found[mask].all() and found.sum() <= mask.sum() + 2 * (50 + 40 + 10 + 100)


@pytest.mark.parametrize(
    ("factor", "size", "message"),
    [
        (1.0, (150, 200), "has 200x150 px, expected those of the run's maps, 400x300, or level 0's 400x300"),
        (2.0, (150, 200), "has 200x150 px, expected those of the run's maps, 400x300, or level 0's 800x601"),
        (1.979, (600, 800), "has 800x600 px, expected those of the run's maps, 400x300, or level 0's 791x593"),
    ],
)
def test_masks_of_another_size_are_refused(tmp_path: Path, factor: float, size: tuple[int, int], message: str) -> None:
    (tmp_path / "a.png").write_bytes(images.encode_mask(np.zeros(size, bool)))
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "a.png", survey(factor))
    assert caught.value.reason == "size_mismatch"


@pytest.mark.parametrize("values", [(0, 128), (1, 255), (255, 1)])
def test_masks_whose_values_do_not_say_what_is_target_are_refused(tmp_path: Path, values: tuple[int, int]) -> None:
    levels = np.zeros(SIZE, np.uint8)
    levels[10:20, 10:20], levels[250:260, 10:20] = values
    write_pyramid(tmp_path / "a.tif", SIZE, [levels], mpp=0.5)
    with pytest.raises(InputError, match=f"a.tif holds .*{max(values)}, expected 0 and 255, or 0 and 1") as caught:
        read(tmp_path / "a.tif", survey())
    assert caught.value.reason == "unclear_mask"
