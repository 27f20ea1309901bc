"""Whatever an annotation holds, it is a mask or a failure row with a reason: nothing else leaves the reader."""

import json
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

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
