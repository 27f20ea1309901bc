import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from stas_core import annotations
from stas_core.annotations import AnnotationConfig, mask_to_polygons, parse_labelme, rasterise, to_labelme
from stas_core.errors import EmptyFile, InputError, MissingShapes, SizeMismatch, UnknownLabel, UnreadableAnnotation

SQUARE = [[10, 10], [20, 10], [20, 20], [10, 20]]


def labelme(*shapes: dict[str, Any], **values: Any) -> bytes:
    return json.dumps({"shapes": list(shapes), "imageHeight": 40, "imageWidth": 50} | values).encode()


def shape(points: Any, label: str = "STAS", **values: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": "polygon"} | values


def draw(*shapes: dict[str, Any], config: AnnotationConfig | None = None) -> tuple[np.ndarray, list[str]]:
    mask, findings = rasterise(parse_labelme(labelme(*shapes), "field"), (40, 50), config)
    return mask, [finding.kind for finding in findings]


@pytest.mark.real_data
def test_equals_the_published_rule_on_every_oracle_pair(shared: Path) -> None:
    folder = shared / "oracle" / "annotation"
    names = sorted(path.stem for path in (folder / "json").iterdir())
    assert names
    for name in names:
        expected = np.asarray(Image.open(folder / "mask" / f"{name}.png")) > 0
        annotation = parse_labelme((folder / "json" / f"{name}.json").read_bytes(), name)
        assert np.array_equal(rasterise(annotation, expected.shape)[0], expected), name


@pytest.mark.real_data
def test_areas_of_all_real_annotations_are_the_published_ones(shared: Path) -> None:
    stas = shared / "data" / "stas"
    with (stas / "reference_folds.csv").open() as file:
        for row in csv.DictReader(file):
            data = (stas / "Train_Annotations" / f"{row['image_id']}.json").read_bytes()
            mask, _ = rasterise(parse_labelme(data, row["image_id"]), (942, 1716))
            assert mask.sum() == int(row["area_px"]), row["image_id"]


@pytest.mark.parametrize(
    "extra",
    [
        {"version": "3.16.7", "lineColor": [0, 255, 0, 128], "fillColor": [255, 0, 0, 128], "imageData": "aGVsbG8="},
        {"version": "4.5.5", "flags": {}, "imageData": None, "imagePath": "x.jpg"},
        {"imageHeight": None, "imageWidth": None},
    ],
    ids=["3.16.7", "4.5.5", "no size"],
)
def test_all_key_layouts_give_the_same_mask(extra: dict[str, Any]) -> None:
    old = {"label": "STAS", "points": SQUARE, "line_color": None, "fill_color": None}  # no shape_type: a polygon
    new = shape(SQUARE, group_id=None, flags={})
    for layout in (old, new):
        mask, findings = rasterise(parse_labelme(labelme(layout, **extra), "x"), (40, 50))
        assert mask[10:20, 10:20].sum() >= 81 and mask.sum() <= 121 and not findings


def test_polygons_are_even_odd_inside_and_united_between() -> None:
    once, _ = draw(shape(SQUARE))
    twice_round, kinds = draw(shape(SQUARE + SQUARE))
    assert not twice_round.any() and kinds == []
    two_shapes, _ = draw(shape(SQUARE), shape(SQUARE))
    assert np.array_equal(two_shapes, once)


@pytest.mark.parametrize(
    ("odd", "kind"),
    [
        (shape([[1, 1], [2, 2]]), "too_few_points"),
        (shape([]), "too_few_points"),
        (shape([[1, 1], [5, 1], [9, 1]]), "zero_area"),
        (shape([[1, 1], [float("nan"), 1], [9, 9]]), "not_finite"),
        (shape([[1, 1], [float("inf"), 1], [9, 9]]), "not_finite"),
        (shape([[1, 1], [5, 5]], shape_type="rectangle"), "not_a_polygon"),
        (shape([[1, 1], [5, 5]], shape_type="circle"), "not_a_polygon"),
        (shape([[100, 100], [110, 100], [110, 110]]), "points_outside"),
    ],
)
def test_odd_shapes_are_findings_and_leave_the_others_alone(odd: dict[str, Any], kind: str) -> None:
    alone, _ = draw(shape(SQUARE))
    mask, kinds = draw(odd, shape(SQUARE))
    assert kind in kinds and np.array_equal(mask, alone)


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(3, 8), st.just(2)), elements=st.floats(-30, 80, width=32)),
    st.integers(0, 25),
    st.integers(0, 25),
)
def test_a_polygon_reaching_outside_is_cut_not_bent(points: np.ndarray, dx: int, dy: int) -> None:
    """Rasterising in a larger field and cropping is the same as rasterising in the small one."""
    small, _ = rasterise(parse_labelme(labelme(shape(points.tolist())), "x"), (40, 50))
    moved = labelme(shape((points + [dx + 31, dy + 31]).tolist()), imageHeight=140, imageWidth=150)
    large, _ = rasterise(parse_labelme(moved, "x"), (140, 150))
    assert np.array_equal(small, large[dy + 31 : dy + 71, dx + 31 : dx + 81])


@pytest.mark.parametrize("far", [3e3, 1e6, 1e12, 1e300])
def test_coordinates_far_outside_cost_no_memory_and_keep_the_inside(far: float) -> None:
    mask, kinds = draw(shape([[-far, 10], [far, 10], [far, 20], [-far, 20]]))
    near, _ = draw(shape([[-100, 10], [150, 10], [150, 20], [-100, 20]]))
    assert "far_outside" in kinds and np.array_equal(mask, near)
    gone, _ = draw(shape([[far, far], [far * 2, far], [far, far * 2]]))
    assert not gone.any()


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_outlines_rasterise_back_to_the_mask(mask: np.ndarray) -> None:
    size = (mask.shape[0], mask.shape[1])
    annotation = parse_labelme(to_labelme(mask_to_polygons(mask), size, "x.jpg"), "x")
    assert np.array_equal(rasterise(annotation, size)[0], mask)


def test_a_ring_becomes_one_polygon_with_its_hole() -> None:
    mask = np.zeros((20, 20), bool)
    mask[2:15, 3:18] = True
    mask[6:9, 6:9] = False
    (polygon,) = mask_to_polygons(mask)
    assert len(polygon) == 4 + 1 + 4 + 1 + 1  # outline closed, bridge, hole closed, bridge back
    assert mask_to_polygons(np.zeros((3, 3), bool)) == []


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", EmptyFile, "0 bytes"),
        (b'{"shapes": [', UnreadableAnnotation, "not JSON"),
        (b"\xff\xfe\x00", UnreadableAnnotation, "not JSON"),
        (b"[1]", UnreadableAnnotation, "holds a list, expected a labelme object"),
        (b'{"flags": {}}', MissingShapes, "no list `shapes`"),
        (b'{"shapes": [{"label": "STAS", "points": [[1]]}]}', UnreadableAnnotation, "shape 0 of field"),
        (b'{"shapes": [{"points": []}]}', UnreadableAnnotation, "KeyError"),
        (b'{"shapes": [7]}', UnreadableAnnotation, "shape 0 of field is not a labelme shape"),
        (b'{"shapes": [], "imageHeight": "tall"}', UnreadableAnnotation, "imageHeight = 'tall'"),
    ],
)
def test_unreadable_files_are_errors(data: bytes, error: type[InputError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        parse_labelme(data, "field")
    assert "field" in str(caught.value)


def test_no_shapes_is_an_empty_mask() -> None:
    assert not draw()[0].any()


def test_another_size_is_an_error() -> None:
    with pytest.raises(SizeMismatch, match="annotation is for 50x40 px, the image has 50x41"):
        rasterise(parse_labelme(labelme(shape(SQUARE)), "x"), (41, 50))


def test_labels_are_mapped_ignored_or_refused() -> None:
    shapes = (shape(SQUARE), shape([[30, 5], [40, 5], [40, 15]], label="tumour"))
    alone, _ = draw(shapes[0])
    with pytest.raises(UnknownLabel, match=r"shape 1 has label 'tumour', expected one of \['STAS'\]; list it under"):
        draw(*shapes)
    ignoring = AnnotationConfig(labels={"STAS": "target", "tumour": "ignore"})
    assert np.array_equal(draw(*shapes, config=ignoring)[0], alone)
    both, _ = draw(*shapes, config=AnnotationConfig(unknown_labels="target"))
    assert both.sum() > alone.sum()
    annotation = parse_labelme(labelme(*shapes), "x")
    assert annotations.num_polygons(annotation, ignoring) == 1
