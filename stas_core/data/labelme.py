"""labelme: JSON of one image, with polygons, other shapes and AI masks; coordinates count from pixel centres.

It knows no holes: a hole is joined to its outline by a bridge of no width, which even-odd filling leaves open.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stas_core.data.file_limits import parse_json, unpacked
from stas_core.data.shapes import Annotation, PngPixels, Polygon, Shape
from stas_core.errors import MissingShapes, UnreadableAnnotation

_CODE_PAGES = ("gb18030", "big5", "cp932", "cp949", "cp1252")
"""What an annotation that is not UTF-8 is tried as."""


def parse_labelme(data: bytes, name: str) -> Annotation:
    """Parse a labelme file of any version.

    Raises:
        EmptyFile, OversizedAnnotation, UnreadableAnnotation, MissingShapes: naming the file.
    """
    data = unpacked(data, name)
    try:
        return from_json(parse_json(data, name), name)
    except UnicodeDecodeError as error:
        return in_another_code_page(data, name, error)


def in_another_code_page(data: bytes, name: str, not_utf8: UnicodeDecodeError) -> Annotation:
    """Read a file in a legacy code page: paths may be ambiguous, labels must not be."""
    readings: dict[object, Annotation] = {}
    for code_page in _CODE_PAGES:
        try:
            found = from_json(json.loads(data.decode(code_page)), name)
        except (ValueError, RecursionError):
            continue
        # Which image it names is not known.
        meaning = [(shape.label, shape.kind, shape.points.tobytes()) for shape in found.shapes]
        readings[str(meaning)] = Annotation(found.shapes, found.height, found.width, None, found.flags)
    if not readings:
        raise UnreadableAnnotation(f"annotation of {name} is not JSON: {not_utf8}; save it as UTF-8") from not_utf8
    if len(readings) > 1:
        raise UnreadableAnnotation(
            f"annotation of {name} is not UTF-8, and its labels are not the same in every code page "
            f"({', '.join(_CODE_PAGES)}); save it as UTF-8"
        ) from not_utf8
    return next(iter(readings.values()))


def from_json(values: Any, name: str) -> Annotation:
    """Return the annotation that parsed JSON holds.

    Raises:
        UnreadableAnnotation, MissingShapes: naming the file.
    """
    if not isinstance(values, dict):
        raise UnreadableAnnotation(f"annotation of {name} holds a {type(values).__name__}, expected a labelme object")
    if not isinstance(values.get("shapes"), list):
        raise MissingShapes(f"annotation of {name} has no list `shapes`; is it a labelme file?")
    parsed = tuple(_parse_shape(shape, f"shape {i} of {name}") for i, shape in enumerate(values["shapes"]))
    height, width = (_parse_side(values.get(key), key, name) for key in ("imageHeight", "imageWidth"))
    image_path, flags = values.get("imagePath"), values.get("flags")
    return Annotation(
        parsed,
        height,
        width,
        image_path if isinstance(image_path, str) and image_path else None,
        tuple(flag for flag, is_set in flags.items() if is_set is True) if isinstance(flags, dict) else (),
    )


def _parse_shape(values: Any, name: str) -> Shape:
    try:
        points = np.array([[_number(x), _number(y)] for x, y in values["points"]], dtype=np.float64).reshape(-1, 2)
        label, kind, mask_png = values["label"], values.get("shape_type"), values.get("mask")
        for key, value in (("label", label), ("shape_type", kind), ("mask", mask_png)):
            if not isinstance(value, (str, int, float, type(None))):
                raise TypeError(f"{key} is a {type(value).__name__}")
        pixels = PngPixels(mask_png) if isinstance(mask_png, str) else None
        return Shape(str(label), str(kind or "polygon"), points, pixels)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UnreadableAnnotation(
            f"{name} is not a labelme shape ({type(error).__name__}: {error}); expected `label` and `points` as pairs"
        ) from error


def _number(value: Any) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    raise TypeError(f"{reprlib.repr(value)} is not a number")  # float() would take text


def _parse_side(value: Any, key: str, name: str) -> int | None:
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise UnreadableAnnotation(f"annotation of {name} has {key} = {reprlib.repr(value)}, expected a whole number")


def to_labelme(polygons: Sequence[Polygon], size: tuple[int, int], image_name: str, label: str = "STAS") -> bytes:
    """Write polygons as a labelme file for an image of `size` (height, width)."""
    return write_labelme({label: polygons}, size, image_name)


def write_labelme(classes: Mapping[str, Sequence[Polygon]], size: tuple[int, int], image_name: str) -> bytes:
    """Write the polygons of each class as a labelme file for an image of `size` (height, width)."""
    shapes = [
        {"label": label, "points": polygon.tolist(), "group_id": None, "shape_type": "polygon", "flags": {}}
        for label, polygons in classes.items()
        for polygon in polygons
    ]
    values: dict[str, object] = {
        "version": "4.6.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": image_name,
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }
    return json.dumps(values).encode()
