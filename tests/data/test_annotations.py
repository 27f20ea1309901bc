import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from stas_core.data import annotations
from stas_core.data.annotations import AnnotationConfig, rasterise
from stas_core.data.edges import mask_to_polygons
from stas_core.data.labelme import parse_labelme, to_labelme
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
    assert not twice_round.any() and kinds == ["zero_area"]
    two_shapes, _ = draw(shape(SQUARE), shape(SQUARE))
    assert np.array_equal(two_shapes, once)
    bow_tie, kinds = draw(shape([[10, 10], [20, 20], [20, 10], [10, 20]]))
    assert bow_tie.any() and kinds == []  # its signed area is zero, its even-odd area is not


@pytest.mark.parametrize(
    ("odd", "kind"),
    [
        (shape([[1, 1], [2, 2]]), "too_few_points"),
        (shape([]), "too_few_points"),
        (shape([[1, 1], [5, 1], [9, 1]]), "zero_area"),
        (shape([[1, 1], [float("nan"), 1], [9, 9]]), "not_finite"),
        (shape([[1, 1], [float("inf"), 1], [9, 9]]), "not_finite"),
        (shape([[1, 1], [5, 5]], shape_type="line"), "no_area"),
        (shape([[1, 1]], shape_type="rectangle"), "too_few_points"),
        (shape([[5, 5], [5, 5]], shape_type="circle"), "zero_area"),
        (shape([[100, 100], [110, 100], [110, 110]]), "points_outside"),
    ],
)
def test_odd_shapes_are_findings_and_leave_the_others_alone(odd: dict[str, Any], kind: str) -> None:
    alone, _ = draw(shape(SQUARE))
    mask, kinds = draw(odd, shape(SQUARE))
    assert kind in kinds and np.array_equal(mask, alone)


def plain_rule(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill one polygon as the rule is written down, step by step along every edge.

    Vertices go to a grid of fifths of a pixel. An edge is walked in unit steps of its longer side, from its lower end.
    Where a step crosses the centre line of a pixel column, everything below changes between inside and outside.
    """
    grid = np.floor(5 * (points + 0.5) + 0.5)
    flips = np.zeros((height + 1, width), bool)
    for ends in zip(grid, np.roll(grid, -1, axis=0), strict=True):
        longer = 0 if abs(ends[1][0] - ends[0][0]) >= abs(ends[1][1] - ends[0][1]) else 1
        low, high = sorted(ends, key=lambda end: end[longer])
        num_steps = int(high[longer] - low[longer])
        slope = (high - low) / max(1, num_steps)
        walk = np.floor(low + slope * np.arange(num_steps + 1)[:, None] + 0.5)
        for (x, y), (next_x, next_y) in itertools.pairwise(walk):
            column, rest = divmod(min(x, next_x), 5)
            if x != next_x and rest == 2 and 0 <= column < width:
                row = np.ceil((min(y, next_y) + 0.5) / 5 - 0.5)
                flips[int(np.clip(row, 0, height)), int(column)] ^= True
    return np.asarray(np.logical_xor.accumulate(flips, axis=0)[:height])


tenths = st.integers(-150, 250).map(lambda number: number / 10)  # every second one is a tie on the grid
anywhere = st.floats(-15, 25)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.integers(3, 7), st.just(2)), elements=st.one_of(tenths, anywhere)))
def test_equals_the_rule_as_it_is_written_down_inside_and_outside(points: np.ndarray) -> None:
    data = labelme(shape(points.tolist()), imageHeight=12, imageWidth=11)
    assert np.array_equal(rasterise(parse_labelme(data, "x"), (12, 11))[0], plain_rule(points, 12, 11))


def test_coordinates_a_few_fields_outside_are_exact() -> None:
    points = np.array([[-2975.3, -2480.2], [3025.3, 2520.2], [20.1, 5e3]])
    mask, kinds = draw(shape(points.tolist()))
    assert mask.any() and not mask.all() and kinds == ["points_outside"]
    assert np.array_equal(mask, plain_rule(points, 40, 50))


@pytest.mark.parametrize("far", [1e6, 1e12, 1e300, 1.7e308])
def test_coordinates_far_outside_cost_no_memory_and_keep_the_inside(far: float) -> None:
    mask, kinds = draw(shape([[-far, 10], [far, 10], [far, 20], [-far, 20]]))
    near, _ = draw(shape([[-100, 10], [150, 10], [150, 20], [-100, 20]]))
    assert "far_outside" in kinds and np.array_equal(mask, near)
    gone, kinds = draw(shape([[far / 2, far / 2], [far, far / 2], [far / 2, far]]))
    assert not gone.any() and kinds == ["points_outside"]


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_outlines_rasterise_back_to_the_mask(mask: np.ndarray) -> None:
    size = (mask.shape[0], mask.shape[1])
    annotation = parse_labelme(to_labelme(mask_to_polygons(mask), size, "x.jpg"), "x")
    assert np.array_equal(rasterise(annotation, size)[0], mask)


def test_outlines_of_noise_with_many_holes_rasterise_back() -> None:
    mask = np.random.default_rng(0).random((90, 120)) < 0.6
    annotation = parse_labelme(to_labelme(mask_to_polygons(mask), (90, 120), "x.jpg"), "x")
    found, findings = rasterise(annotation, (90, 120))
    assert np.array_equal(found, mask) and not findings


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
        (b'{"shapes": [{"label": "STAS", "points": [["1", "2"]]}]}', UnreadableAnnotation, "'1' is not a number"),
        (b'{"shapes": [{"label": "STAS", "points": ["12", "34"]}]}', UnreadableAnnotation, "'1' is not a number"),
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
    with pytest.raises(SizeMismatch, match="annotation is for 50x0 px"):
        rasterise(parse_labelme(labelme(imageHeight=0), "x"), (40, 50))


def test_labels_are_mapped_ignored_or_refused() -> None:
    shapes = (shape(SQUARE), shape([[30, 5], [40, 5], [40, 15]], label="tumour"))
    alone, _ = draw(shapes[0])
    with pytest.raises(
        UnknownLabel, match=r"'tumour' \(1 shape\): not in .* = {STAS: target}; say .*: annotation.labels.tumour=target"
    ):
        draw(*shapes)
    ignoring = AnnotationConfig(labels={"STAS": "target", "tumour": "ignore"})
    assert np.array_equal(draw(*shapes, config=ignoring)[0], alone)
    both, _ = draw(*shapes, config=AnnotationConfig(unknown_labels="target"))
    assert both.sum() > alone.sum()
    annotation = parse_labelme(labelme(*shapes), "x")
    assert annotations.num_polygons(annotation, ignoring) == 1
