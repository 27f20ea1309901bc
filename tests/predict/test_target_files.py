"""Targets as files: what QuPath, geopandas and any reader of GeoJSON find in them."""

import gzip
import io
import json
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stas_core.predict.exports import target_id
from stas_core.predict.geojson import GeoJsonWriter, to_geojson, write_geojson
from stas_core.predict.geoparquet import GeoParquetWriter, write_geoparquet
from stas_core.predict.placement import Placement, TargetFacts
from stas_core.predict.polygons import TargetShapes, trace_shapes
from stas_core.predict.postprocess import find_targets
from tests.predict.test_polygons import drawn

SLIDE = Placement(level0_px=1.9876, corner=(120, 64), mpp=0.5)


def found(mask: np.ndarray, **options: Any) -> tuple[TargetShapes, TargetFacts]:
    prob_u8 = np.random.default_rng(0).integers(0, 256, mask.shape).astype(np.uint8)
    labels, targets = find_targets(mask, prob_u8)
    return trace_shapes(labels), TargetFacts("case 7", targets, **options)


def noise(share: float = 0.5, size: tuple[int, int] = (60, 80)) -> np.ndarray:
    return np.random.default_rng(1).random(size) < share


def two() -> np.ndarray:
    mask = np.zeros((10, 12), bool)
    mask[1:6, 1:6], mask[3, 3] = True, False
    mask[8, 8] = mask[9, 9] = True
    return mask


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_geojson_of_a_field_draws_its_mask(mask: np.ndarray) -> None:
    collection = json.loads(to_geojson(*found(mask)))
    shapes = [shapely.from_geojson(json.dumps(one["geometry"])) for one in collection["features"]]
    assert all(shapely.is_valid(shapes))
    together = shapely.GeometryCollection(shapes)
    assert (drawn(together, mask.shape) == mask).all()


def test_what_qupath_reads() -> None:
    shapes, facts = found(two())
    data = to_geojson(shapes, facts)
    collection = json.loads(data)
    ring, corners = collection["features"]
    assert ring["geometry"] == {
        "type": "Polygon",
        "coordinates": [[[1, 1], [1, 6], [6, 6], [6, 1], [1, 1]], [[3, 3], [4, 3], [4, 4], [3, 4], [3, 3]]],
    }
    assert corners["geometry"]["type"] == "MultiPolygon"
    assert len(corners["geometry"]["coordinates"]) == 2
    properties = ring["properties"]
    assert (properties["objectType"], properties["name"]) == ("annotation", "STAS 1")
    assert properties["classification"] == {"name": "STAS", "color": [255, 200, 0]}
    assert properties["measurements"] == {
        "Area px^2": 24,
        "Mean probability": round(facts.targets.mean_prob[0], 4),
        "Peak probability": round(facts.targets.peak_prob[0], 4),
    }
    assert {uuid.UUID(one["id"]).version for one in collection["features"]} == {5}
    assert json.dumps(collection, separators=(",", ":")).encode() == data
    assert to_geojson(shapes, facts) == data


def test_ids_are_those_of_image_and_number() -> None:
    shapes, facts = found(two())
    other = TargetFacts("case 8", facts.targets)
    ids = [one["id"] for each in (facts, facts, other) for one in json.loads(to_geojson(shapes, each))["features"]]
    assert sorted(Counter(ids).values()) == [1, 1, 2, 2]


@given(st.text(), st.integers(1, 2**31))
def test_ids_are_uuids_of_names(image_id: str, number: int) -> None:
    project = uuid.uuid5(uuid.NAMESPACE_DNS, "stas-on-ray")
    assert target_id(image_id, number) == str(uuid.uuid5(project, f"{image_id} {number}"))


def test_coordinates_of_a_slide_are_those_of_level_0_within_its_bounds() -> None:
    mask = noise()
    shapes, facts = found(mask, placement=SLIDE)
    collection = json.loads(to_geojson(shapes, facts))
    assert collection["metadata"] == {
        "image": "case 7",
        "coordinates": "level-0 px from the upper left corner, y downwards",
        "bounds_subtracted": True,
        "bounds_corner": [120, 64],
        "level0_px_per_px": 1.9876,
        "um_per_px": 0.5,
        "um_per_level0_px": 0.5 / 1.9876,
    }
    for feature, on_map, area_px in zip(collection["features"], shapes.geometry, facts.targets.area_px, strict=True):
        shape = shapely.from_geojson(json.dumps(feature["geometry"]))
        assert shape.is_valid
        expected = shapely.transform(on_map, lambda points: points * 1.9876 - (120, 64))
        assert np.abs(shapely.get_coordinates(shape) - shapely.get_coordinates(expected)).max() <= 0.0051
        assert feature["properties"]["measurements"]["Area um^2"] == area_px * 0.25


@pytest.mark.parametrize(("most", "kind"), [(2, "annotation"), (1, "detection")])
def test_many_targets_are_detections(most: int, kind: str) -> None:
    shapes, facts = found(two())
    sink = io.BytesIO()
    with GeoJsonWriter(sink, facts, max_annotations=most) as writer:
        writer.write(shapes)
    assert {one["properties"]["objectType"] for one in json.loads(sink.getvalue())["features"]} == {kind}


def test_further_columns_are_measurements_where_they_are_known() -> None:
    columns = {
        "edge_um": np.array([12.34567, np.nan]),
        "in_tumour": np.array([True, False]),
        'odd "name"': np.array([1, 2]),
        "disagreement": None,
    }
    collection = json.loads(to_geojson(*found(two(), columns=columns)))
    one, other = (feature["properties"]["measurements"] for feature in collection["features"])
    assert (one["Edge um"], one["In tumour"], one['Odd "name"']) == (12.3457, 1, 1)
    assert "Edge um" not in other and other["In tumour"] == 0
    assert "Disagreement" not in one


@pytest.mark.parametrize("values", [np.zeros(3), np.array(["a", "b"])])
def test_columns_that_do_not_fit_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"column 'x' of case 7 is .*; expected a number for each of its 2 targets"):
        found(two(), columns={"x": values})


def test_what_is_written_at_once_is_what_is_written_in_parts(tmp_path: Path) -> None:
    shapes, facts = found(noise(), placement=SLIDE)
    parts = [*shapes.batches(40), *TargetShapes.none().batches(40), TargetShapes.none()]
    assert len(parts) > 5
    sink = io.BytesIO()
    with GeoJsonWriter(sink, facts) as geojson, GeoParquetWriter(str(tmp_path / "parts.parquet"), facts) as parquet:
        for some in parts:
            geojson.write(some)
            parquet.write(some)
    assert sink.getvalue() == to_geojson(shapes, facts)
    write_geoparquet(str(tmp_path / "once.parquet"), [shapes], facts)
    assert pq.read_table(tmp_path / "once.parquet").equals(pq.read_table(tmp_path / "parts.parquet"))


def test_gzip_holds_the_same_and_no_time() -> None:
    shapes, facts = found(noise())
    packed, again = io.BytesIO(), io.BytesIO()
    for sink in (packed, again):
        write_geojson(sink, [shapes], facts, compress=True)
    assert packed.getvalue() == again.getvalue()
    assert gzip.decompress(packed.getvalue()) == to_geojson(shapes, facts)


def test_an_image_without_targets_is_a_whole_file(tmp_path: Path) -> None:
    shapes, facts = found(np.zeros((5, 5), bool))
    assert json.loads(to_geojson(shapes, facts))["features"] == []
    write_geoparquet(str(tmp_path / "none.parquet"), [shapes], facts)
    assert len(geopandas.read_parquet(tmp_path / "none.parquet")) == 0


def test_a_file_that_was_not_finished_is_no_geojson() -> None:
    sink = io.BytesIO()
    with pytest.raises(RuntimeError, match="stopped"), GeoJsonWriter(sink, found(two())[1]):
        raise RuntimeError("stopped")
    with pytest.raises(json.JSONDecodeError):
        json.loads(sink.getvalue())


def test_geopandas_opens_the_table(tmp_path: Path) -> None:
    columns = {"edge_um": np.array([1.5, np.nan]), "disagreement": None}
    shapes, facts = found(two(), placement=SLIDE, columns=columns)
    path = tmp_path / "targets.parquet"
    write_geoparquet(str(path), [shapes], facts)
    table = geopandas.read_parquet(path)
    assert table.columns.tolist() == [
        "number", "geometry", "area_um2", "centroid_x", "centroid_y", "mean_prob", "peak_prob", "touches_border",
        "edge_um", "disagreement",
    ]  # fmt: skip
    assert table.crs is None and table.geometry.name == "geometry"
    assert table.geometry.is_valid.all()
    assert table["number"].tolist() == [1, 2]
    assert table["area_um2"].tolist() == [24 * 0.25, 2 * 0.25]
    assert table.geometry.area.to_numpy() == pytest.approx(facts.targets.area_px * 1.9876**2, rel=0.02)
    assert table["centroid_x"].to_numpy() == pytest.approx(table.geometry.centroid.x, abs=0.02)
    assert table["centroid_y"].to_numpy() == pytest.approx(table.geometry.centroid.y, abs=0.02)
    assert table["edge_um"].isna().tolist() == [False, True]
    assert table["touches_border"].tolist() == [False, True]
    metadata = pq.read_schema(path).metadata
    assert json.loads(metadata[b"stas"])["image"] == "case 7"
    geo = json.loads(metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    assert geo["columns"]["geometry"]["bbox"] == pytest.approx(table.total_bounds.tolist())


def test_a_column_is_not_written_twice(tmp_path: Path) -> None:
    _, facts = found(two(), columns={"mean_prob": np.zeros(2)})
    with pytest.raises(ValueError, match=r"\['mean_prob'\] of case 7 are written anyway"):
        GeoParquetWriter(str(tmp_path / "targets.parquet"), facts)
