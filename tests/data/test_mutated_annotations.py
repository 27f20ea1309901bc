"""Whatever an annotation holds, it is a mask or a failure row with a reason: nothing else leaves the reader."""

import io
import json
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from stas_core import config
from stas_core.data import truth
from stas_core.data.annotations import AnnotationConfig
from stas_core.errors import InputError

SIZE = (24, 32)
number = st.one_of(
    st.integers(0, 32),
    st.floats(-5, 40),
    st.sampled_from([1e308, -1e308, 1e18, 2**70, 10**400, 1e-320, -0.0]),
    st.floats(),
)
scalar = st.one_of(st.none(), st.booleans(), number, st.text(max_size=4), st.text("\udc80\0\ud83d", max_size=2))
anything = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
points = st.lists(st.lists(number, min_size=2, max_size=2), max_size=5)
shape = st.fixed_dictionaries(
    {},
    optional={
        "label": st.just("STAS") | anything,
        "points": points | anything,
        "shape_type": st.sampled_from(["polygon", "rectangle", "circle", "mask", "line", "linestrip", "point"])
        | anything,
        "mask": st.just("iVBORw0KGgo=") | anything,
        "flags": anything,
        "group_id": anything,
    },
)
document = st.fixed_dictionaries(
    {},
    optional={
        "shapes": st.lists(shape | anything, max_size=3) | anything,
        "imageWidth": st.just(SIZE[1]) | anything,
        "imageHeight": st.just(SIZE[0]) | anything,
        "imagePath": st.just("a.jpg") | anything,
        "flags": st.dictionaries(st.text(max_size=3), anything, max_size=2) | anything,
        "imageData": anything,
    },
)
choices = st.fixed_dictionaries(
    {
        "unknown_labels": st.sampled_from(["error", "ignore", "target"]),
        "on_degenerate": st.sampled_from(["error", "keep_rest", "ignore"]),
        "coordinates": st.sampled_from(["check", "pixels"]),
    }
)


def read(data: bytes, values: dict[str, Any]) -> None:
    annotation = config.build(AnnotationConfig, values)
    try:
        mask, findings, _ = truth.read_annotation(data, "a", SIZE, annotation)
    except InputError as error:
        assert str(error)
        return
    assert mask.shape == SIZE and mask.dtype == np.bool_
    truth.findings_lines({"a": [truth.in_words(finding) for finding in findings]})


@given(document | anything, choices)
def test_any_json_is_a_mask_or_a_reason(content: Any, values: dict[str, Any]) -> None:
    read(json.dumps(content).encode(), values)


@settings(max_examples=40)
@given(document, st.integers(0, 2000), st.binary(max_size=4), choices)
def test_any_damage_is_a_mask_or_a_reason(content: Any, at: int, damage: bytes, values: dict[str, Any]) -> None:
    data = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    at %= len(data) + 1
    read(data[:at] + damage + data[at + len(damage) :], values)
    read(data[:at], values)


ring = st.lists(st.lists(number, min_size=2, max_size=3), max_size=5) | anything
geometry = st.recursive(
    st.fixed_dictionaries({"type": st.just("Polygon"), "coordinates": st.lists(ring, max_size=3) | anything})
    | st.fixed_dictionaries({"type": st.just("MultiPolygon"), "coordinates": st.lists(st.lists(ring, max_size=2))})
    | st.fixed_dictionaries({"type": st.sampled_from(["Point", "LineString", "Circle"]), "coordinates": anything}),
    lambda inner: st.fixed_dictionaries({"type": st.just("GeometryCollection"), "geometries": st.lists(inner)}),
    max_leaves=3,
)
properties = st.fixed_dictionaries({}, optional={"classification": st.just({"name": "STAS"}) | anything}) | anything
feature = st.fixed_dictionaries({"type": st.just("Feature"), "geometry": geometry | anything, "properties": properties})
features = st.lists(feature | geometry | anything, max_size=3)
geojson = features | st.fixed_dictionaries({"type": st.just("FeatureCollection"), "features": features | anything})

an_id = st.sampled_from([1, 2, "a"]) | anything
rle = st.fixed_dictionaries(
    {
        "size": st.just(list(SIZE)) | anything,
        "counts": st.lists(st.integers(-1, 800), max_size=6) | st.text("05PQo`", max_size=8) | anything,
    }
)
segmentation = st.lists(st.lists(number, max_size=9) | anything, max_size=3) | rle | anything
coco_annotation = st.fixed_dictionaries({"image_id": an_id, "category_id": an_id, "segmentation": segmentation})
coco_image = st.fixed_dictionaries(
    {
        "id": an_id,
        "file_name": st.sampled_from(["a.jpg", "x/a.png", "../b.jpg", ""]) | anything,
        "height": st.just(SIZE[0]) | anything,
        "width": st.just(SIZE[1]) | anything,
    }
)
coco = st.fixed_dictionaries(
    {
        "images": st.lists(coco_image, max_size=3) | anything,
        "annotations": st.lists(coco_annotation | anything, max_size=3) | anything,
        "categories": st.lists(st.fixed_dictionaries({"id": an_id, "name": st.just("STAS") | anything}), max_size=2),
    }
)
tag = st.sampled_from(["ASAP_Annotations", "Annotations", "Annotation", "Coordinates", "Coordinate", "Group", "x"])
attribute = st.sampled_from(["X", "Y", "Order", "Type", "PartOfGroup", "Name"])
value = st.sampled_from(["Polygon", "STAS", "1", "2,5", "nan", "1e400", "-inf", "Spline", "Dot", "&lt;", "&b;"])
attributes = st.dictionaries(attribute, value, max_size=4)


def xml(name: str, values: dict[str, str], inner: list[str]) -> str:
    listed = "".join(f' {key}="{text}"' for key, text in values.items())
    return f"<{name}{listed}>{''.join(inner)}</{name}>"


elements = st.recursive(
    st.builds(xml, tag, attributes, st.just([])),
    lambda inner: st.builds(xml, tag, attributes, st.lists(inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(geojson | coco, choices)
def test_any_geojson_or_coco_is_a_mask_or_a_reason(content: Any, values: dict[str, Any]) -> None:
    read(json.dumps(content).encode(), values)


@settings(max_examples=80, deadline=None)
@given(st.lists(elements, max_size=4), choices)
def test_any_xml_is_a_mask_or_a_reason(inner: list[str], values: dict[str, Any]) -> None:
    read(xml("ASAP_Annotations", {}, [xml("Annotations", {}, inner)]).encode(), values)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint8, SIZE, elements=st.integers(0, 3)), st.integers(0, 400), st.binary(max_size=4), choices)
def test_any_damage_to_a_mask_is_a_mask_or_a_reason(
    pixels: np.ndarray, at: int, damage: bytes, values: dict[str, Any]
) -> None:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    data = sink.getvalue()
    at %= len(data)
    for labels in ({}, {"1": "target", "2": "ignore"}):
        read(data, values | {"labels": labels})
        read(data[:at] + damage + data[at + len(damage) :], values | {"labels": labels})
        read(data[:at] or b"?", values | {"labels": labels, "mask_tolerance": 9})
