"""What shapes and files of annotation tools become: areas, findings, or an image that is refused with a reason."""

import base64
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from stas_core.data import cohort, images, truth
from stas_core.data.annotations import AnnotationConfig, rasterise
from stas_core.data.edges import mask_to_polygons
from stas_core.data.labelme import parse_labelme, to_labelme
from stas_core.data.shapes import Annotation, Shape
from stas_core.errors import InputError

HEIGHT, WIDTH = 120, 160
FIELD = images.encode_png(np.full((HEIGHT, WIDTH, 3), (230, 180, 210), np.uint8))
SQUARE = [[20, 20], [60, 20], [60, 60], [20, 60]]


def shape(points: Any, kind: str = "polygon", **values: Any) -> dict[str, Any]:
    return {"label": "STAS", "points": points, "shape_type": kind} | values


def labelme(*shapes: dict[str, Any], **values: Any) -> bytes:
    stated = {"imagePath": "field.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH}
    return json.dumps({"shapes": list(shapes)} | stated | values).encode()


def draw(*shapes: dict[str, Any], size: tuple[int, int] = (HEIGHT, WIDTH)) -> tuple[np.ndarray, list[str]]:
    data = labelme(*shapes, imageHeight=size[0], imageWidth=size[1])
    mask, findings = rasterise(parse_labelme(data, "field"), size)
    return mask, [finding.kind for finding in findings]


def measure(data: bytes, image: bytes = FIELD, **config: Any) -> cohort.Measurement:
    return cohort.measure(image, data, "field", config=AnnotationConfig(**config))


def refused(data: bytes, image: bytes = FIELD, **config: Any) -> tuple[str, str]:
    """Return the reason code and the message with which prepare_data and evaluate refuse an annotation."""
    with pytest.raises(InputError) as caught:
        measure(data, image, **config)
    return caught.value.reason, str(caught.value)


def png(array: np.ndarray) -> str:
    sink = io.BytesIO()
    Image.fromarray(array).save(sink, "PNG")
    return base64.b64encode(sink.getvalue()).decode()


@pytest.mark.parametrize("count", [255, 256, 257, 1000])
def test_any_number_of_polygons_is_the_union_of_each(count: int) -> None:
    rng = np.random.default_rng(count)
    polygons = rng.uniform(0, 40, (count, 1, 2)) + rng.uniform(-1, 1, (count, 3, 2))
    together, _ = draw(*(shape(polygon.tolist()) for polygon in polygons), size=(40, 40))
    union = np.zeros_like(together)
    for polygon in polygons:
        union |= rasterise(Annotation((Shape("STAS", "polygon", polygon),), None, None), (40, 40))[0]
    assert np.array_equal(together, union)


corner = st.tuples(st.floats(-20, 180), st.floats(-20, 140))


@settings(max_examples=40, deadline=None)
@given(corner, corner)
def test_a_rectangle_is_the_polygon_of_its_corners(one: tuple[float, float], other: tuple[float, float]) -> None:
    (x0, y0), (x1, y1) = one, other
    corners = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    expected, _ = draw(shape(corners))
    assert np.array_equal(draw(shape([one, other], "rectangle"))[0], expected)
    for kind in ("rectangle", "oriented_rectangle", "rotation"):  # as other versions and tools write them
        assert np.array_equal(draw(shape(corners, kind))[0], expected)


@settings(max_examples=30, deadline=None)
@given(st.floats(20, 50), st.floats(0, 7), st.floats(55, 65), st.floats(55, 65))
def test_a_circle_has_its_area_and_its_place(radius: float, angle: float, x: float, y: float) -> None:
    rim = [x + radius * math.cos(angle), y + radius * math.sin(angle)]
    mask, kinds = draw(shape([[x, y], rim], "circle"))
    assert kinds == [] and mask.sum() == pytest.approx(math.pi * radius**2, rel=0.01)
    rows, columns = np.indices(mask.shape)
    distance = np.hypot(columns - x, rows - y)
    assert mask[distance < radius - 1].all() and not mask[distance > radius + 1].any()


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=30)), st.integers(-5, 150), st.integers(0, 80)
)
def test_an_ai_mask_is_pasted_pixel_for_pixel(pixels: np.ndarray, x: int, y: int) -> None:
    expected = np.zeros((HEIGHT + 100, WIDTH + 100), bool)
    expected[y + 50 : y + 50 + pixels.shape[0], x + 50 : x + 50 + pixels.shape[1]] = pixels
    box = [[x, y], [x + pixels.shape[1] - 1, y + pixels.shape[0] - 1]]
    for stored in (pixels, pixels.astype(np.uint8), pixels.astype(np.uint8) * 255):
        mask, _ = draw(shape(box, "mask", mask=png(stored)))
        assert np.array_equal(mask, expected[50 : 50 + HEIGHT, 50 : 50 + WIDTH])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask": "no base64!"}, "shape 0 is a mask that cannot be used"),
        ({}, "shape 0 is a mask that cannot be used"),
        ({"mask": png(np.ones((5, 5), np.uint8))}, "is a mask of 5x5 px, but its points span 11x11; draw it again"),
        ({"mask": png(np.ones((500, 11), np.uint8))}, "11x500 px in an image of 160x120"),
        ({"mask": png(np.ones((11, 11, 3), np.uint8))}, "mode RGB, expected L"),
    ],
)
def test_an_ai_mask_that_cannot_be_right_is_refused(values: dict[str, str], message: str) -> None:
    reason, text = refused(labelme(shape([[10, 10], [20, 20]], "mask", **values)))
    assert reason == "unreadable_annotation" and message in text


@pytest.mark.parametrize("kind", ["linestrip", "line", "point", "points", "cuboid"])
def test_shapes_without_area_make_the_image_a_failure_with_a_remedy(kind: str) -> None:
    for shapes in ([shape(SQUARE, kind)], [shape(SQUARE), shape(SQUARE, kind)]):
        reason, message = refused(labelme(*shapes))
        assert reason == "target_without_area" and f"shape_type '{kind}' has no area" in message
        assert "draw it again" in message and "annotation.on_degenerate=ignore" in message
    left = measure(labelme(shape(SQUARE), shape(SQUARE, kind)), on_degenerate="ignore")
    assert np.array_equal(left.mask, draw(shape(SQUARE))[0])
    assert len(left.values["findings"]) == 1 and "shape 1: no_area" in left.values["findings"][0]
    ignored = shape(SQUARE, kind, label="note")
    assert measure(labelme(ignored), labels={"STAS": "target", "note": "ignore"}).values["findings"] == []


NOTHING = {
    "not_finite": shape([[1, 1], [float("nan"), 1], [9, 9]]),
    "too_few_points": shape([[30, 30], [31, 31]]),
    "zero_area": shape([[20, 20], [50, 20], [80, 20]]),
    "points_outside": shape([[500, 500], [540, 500], [540, 540]]),
    "zero_area ": shape([[30, 30], [30, 30]], "circle"),
    "too_many_points": shape([[30, 30], [40, 40], [50, 50]], "circle"),
}


@pytest.mark.parametrize(("kind", "odd"), list(NOTHING.items()), ids=list(NOTHING))
def test_a_target_never_becomes_nothing_in_silence(kind: str, odd: dict[str, Any]) -> None:
    kind = kind.strip()
    reason, message = refused(labelme(odd))
    assert reason == "target_without_area" and kind in message
    beside = labelme(odd, shape(SQUARE))
    if kind in ("not_finite", "too_many_points"):
        assert kind in refused(beside)[1]
    else:
        assert kind in measure(beside).values["findings"][0]
    if kind != "points_outside":
        assert kind in refused(beside, on_degenerate="error")[1]
    alone = measure(labelme(odd), on_degenerate="ignore")
    assert not alone.mask.any() and kind in alone.values["findings"][0]


def zigzag(num_points: int, height: int = HEIGHT) -> list[list[float]]:
    return [[index % WIDTH, (index % 2) * (height - 1)] for index in range(num_points)]


def test_outlines_too_long_to_draw_are_refused_before_they_take_memory() -> None:
    reason, message = refused(labelme(shape(SQUARE), shape(zigzag(60_000))))
    assert reason == "oversized_annotation"
    assert "shape 1 has 60,000 points and an outline of 7," in message and "limit of 1,000,000" in message
    many = Annotation((Shape("STAS", "polygon", np.array(zigzag(5000), float)),) * 40, None, None)
    with pytest.raises(InputError, match="40 shapes with 200,000 points have outlines of 24,") as caught:
        rasterise(many, (HEIGHT, WIDTH))
    assert caught.value.reason == "oversized_annotation"


def test_files_too_large_to_parse_are_refused() -> None:
    reason, message = refused(b'{"shapes": [' + b"[]," * 3_000_000 + b"[]]}")
    assert reason == "oversized_annotation" and "some 6,000,00" in message and "limit of 4,000,000" in message
    reason, message = refused(b'{"imageData": "' + b"A" * 65_000_000 + b'", "shapes": []}')
    assert reason == "oversized_annotation" and "save it without the image inside" in message


@pytest.mark.parametrize("depth", [50, 900, 100_000])
@pytest.mark.parametrize(
    "place", ['"shapes": #', '"shapes": [{"label": "x", "points": [[#, 1]]}]', '"shapes": [{"label": #}]']
)
def test_deep_json_is_refused_in_a_short_message(depth: int, place: str) -> None:
    reason, message = refused(("{" + place + "}").replace("#", "[" * depth + "]" * depth).encode())
    assert reason == "unreadable_annotation" and len(message) < 400


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (942, 1716)])
def test_coordinates_in_shares_or_percent_are_refused(size: tuple[int, int]) -> None:
    image = images.encode_png(np.full((*size, 3), 200, np.uint8))
    sides = np.array(size[::-1])
    pixels = np.array([[21, 23], [67, 23], [67, 61], [21, 61]])
    for factor, word in ((1, "shares"), (100, "percent")):
        data = labelme(shape((pixels / sides * factor).tolist()), imageHeight=size[0], imageWidth=size[1])
        reason, message = refused(data, image)
        assert reason == "wrong_coordinates" and word in message and "annotation.coordinates=pixels" in message
    taken = measure(data, image, coordinates="pixels")
    assert taken.mask.any()
    fine = labelme(shape((pixels + 0.37).tolist()), imageHeight=size[0], imageWidth=size[1])
    kinds = [line.split(": ")[1] for line in measure(fine, image).values["findings"]]
    assert kinds == (["near_corner"] if size == (942, 1716) else [])


def test_x_and_y_swapped_are_refused() -> None:
    inside = [[20, 20], [150, 20], [150, 100], [20, 100]]
    swapped = shape([[y, x] for x, y in inside])
    for stated in ({}, {"imageHeight": None, "imageWidth": None}):
        reason, message = refused(labelme(swapped, **stated))
        assert reason == "wrong_coordinates" and "fit with x and y swapped" in message
    over_the_border = labelme(shape([[20, 20], [60, 20], [60, HEIGHT + 2]]))
    assert "points_outside" in measure(over_the_border).values["findings"][0]
    reason, message = refused(labelme(shape(SQUARE), imageHeight=WIDTH, imageWidth=HEIGHT))
    assert reason == "size_mismatch" and "width and height are swapped" in message


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2, 14]), st.integers(3, 12), st.floats(2, 60))
def test_small_targets_anywhere_are_no_false_alarm(seed: int, decimals: int, count: int, radius: float) -> None:
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, count))
    points = rng.uniform(radius, 100, 2) + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    data = labelme(shape(np.round(points, decimals).tolist()), imageHeight=None, imageWidth=None)
    try:
        truth.read_annotation(data, "field", (942, 1716), AnnotationConfig())
    except InputError as error:
        assert error.reason != "wrong_coordinates"


def test_outlines_along_pixel_edges_are_no_false_alarm() -> None:
    mask = np.zeros((1000, 1000), bool)
    mask[3:9, 4:60] = mask[0, 0] = True
    data = to_labelme(mask_to_polygons(mask), (1000, 1000), "field.jpg")
    assert np.array_equal(measure(data, images.encode_png(np.full((1000, 1000, 3), 200, np.uint8))).mask, mask)


@pytest.mark.parametrize("code_page", ["gb18030", "big5", "cp932", "cp949", "cp1252", "utf-16", "utf-8-sig"])
def test_other_code_pages_are_read_where_only_paths_differ(code_page: str) -> None:
    path = {"cp932": "組織.jpg", "cp949": "조직.jpg", "cp1252": "Gewebe-Übersicht.jpg"}.get(code_page, "許功蓋.jpg")
    text = labelme(shape(SQUARE)).decode().replace("field.jpg", path)
    found = measure(text.encode(code_page))
    assert np.array_equal(found.mask, draw(shape(SQUARE))[0])


def test_labels_that_could_be_read_in_several_ways_are_refused() -> None:
    text = labelme(shape(SQUARE, label="XX")).decode().replace("XX", "肿瘤")
    reason, message = refused(text.encode("gb18030"), unknown_labels="target")
    assert reason == "unreadable_annotation" and "save it as UTF-8" in message
    assert measure(text.encode(), labels={"肿瘤": "target"}).mask.any()


def test_what_is_odd_about_a_file_is_a_finding() -> None:
    data = labelme(
        shape(SQUARE), imagePath="..\\imgs\\another.jpg", flags={"exclude": True, "a": False}, imageWidth=None
    )
    found = measure(data)
    assert [line.split(": ")[1] for line in found.values["findings"]] == ["other_image", "size_not_stated", "flagged"]
    assert "names '..\\\\imgs\\\\another.jpg'" in found.values["findings"][0]
    assert np.array_equal(found.mask, draw(shape(SQUARE))[0])
    same = labelme(shape(SQUARE), imagePath="C:\\data\\field.png")
    assert measure(same).values["findings"] == []


@pytest.mark.real_data
def test_no_real_annotation_is_refused(shared: Path) -> None:
    stas = shared / "data" / "stas"
    with (stas / "reference_folds.csv").open() as file:
        for row in csv.DictReader(file):
            data = (stas / "Train_Annotations" / f"{row['image_id']}.json").read_bytes()
            mask, findings, _ = truth.read_annotation(data, row["image_id"], (942, 1716), AnnotationConfig())
            assert (mask.sum(), findings) == (int(row["area_px"]), []), row["image_id"]
