"""labelme annotations to masks and back, by the exact rule of the published masks.

The rule (MATLAB `roipoly`): vertices shifted by half a pixel, polygons drawn on a grid of 5x5 sub-pixels, even-odd
inside one polygon, union over polygons. `pycocotools` implements it. Other rasterisers differ by 0.1-1.5 % of Dice.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import Float64
from pycocotools import mask as coco
from pydantic import Field

from stas_core.arrays import Mask
from stas_core.config import Config
from stas_core.errors import EmptyFile, MissingShapes, SizeMismatch, UnknownLabel, UnreadableAnnotation

Polygon = Float64[np.ndarray, "_ 2"]
"""Vertices (x, y) in labelme's frame: pixel centres at integers."""

FAR_PX = 2_000
"""Vertices further than this outside the image are cut off geometrically before rasterising, to bound memory."""


class AnnotationConfig(Config):
    """Which labels make up the mask."""

    labels: dict[str, Literal["target", "ignore"]] = Field({"STAS": "target"})
    """What each label means: part of the mask, or left out."""
    unknown_labels: Literal["error", "ignore", "target"] = "error"
    """What a label that is not listed means."""


@dataclass(frozen=True)
class Shape:
    """One labelme shape."""

    label: str
    kind: str
    """labelme's shape_type: polygon, rectangle, circle, line, point..."""
    points: Polygon


@dataclass(frozen=True)
class Annotation:
    """A parsed labelme file; height and width are None where it does not state them."""

    shapes: tuple[Shape, ...]
    height: int | None
    width: int | None


FindingKind = Literal["too_few_points", "zero_area", "not_finite", "not_a_polygon", "points_outside", "far_outside"]


@dataclass(frozen=True)
class Finding:
    """Something odd about a shape that was handled, and should be known."""

    shape_index: int
    kind: FindingKind
    message: str


def parse_labelme(data: bytes, name: str) -> Annotation:
    """Parse a labelme file of any version.

    Raises:
        EmptyFile, UnreadableAnnotation, MissingShapes: naming the file.
    """
    if not data:
        raise EmptyFile(f"annotation of {name} holds 0 bytes; save it again")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnreadableAnnotation(f"annotation of {name} is not JSON: {error}; save it again") from error
    if not isinstance(values, dict):
        raise UnreadableAnnotation(f"annotation of {name} holds a {type(values).__name__}, expected a labelme object")
    if not isinstance(values.get("shapes"), list):
        raise MissingShapes(f"annotation of {name} has no list `shapes`; is it a labelme file?")
    shapes = tuple(_parse_shape(shape, f"shape {i} of {name}") for i, shape in enumerate(values["shapes"]))
    height, width = (_parse_side(values.get(key), key, name) for key in ("imageHeight", "imageWidth"))
    return Annotation(shapes, height, width)


def _parse_shape(values: Any, name: str) -> Shape:
    try:
        points = np.array([[float(x), float(y)] for x, y in values["points"]], dtype=np.float64).reshape(-1, 2)
        return Shape(str(values["label"]), str(values.get("shape_type") or "polygon"), points)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UnreadableAnnotation(
            f"{name} is not a labelme shape ({type(error).__name__}: {error}); expected `label` and `points` as pairs"
        ) from error


def _parse_side(value: Any, key: str, name: str) -> int | None:
    if value is None or (isinstance(value, (int, float)) and float(value).is_integer()):
        return None if value is None else int(value)
    raise UnreadableAnnotation(f"annotation of {name} has {key} = {value!r}, expected a whole number")


def target_shapes(annotation: Annotation, config: AnnotationConfig) -> list[tuple[int, Shape]]:
    """Return the shapes that make up the mask, with their index in the file.

    Raises:
        UnknownLabel: a label is neither listed nor allowed.
    """
    chosen = []
    for index, shape in enumerate(annotation.shapes):
        use = config.labels.get(shape.label, config.unknown_labels)
        if use == "error":
            raise UnknownLabel(
                f"shape {index} has label {shape.label!r}, expected one of {sorted(config.labels)}; list it under "
                "annotation.labels as target or ignore, or set annotation.unknown_labels"
            )
        if use == "target":
            chosen.append((index, shape))
    return chosen


def num_polygons(annotation: Annotation, config: AnnotationConfig) -> int:
    """Count the target polygons."""
    return sum(shape.kind == "polygon" for _, shape in target_shapes(annotation, config))


def rasterise(
    annotation: Annotation, size: tuple[int, int], config: AnnotationConfig | None = None
) -> tuple[Mask, list[Finding]]:
    """Rasterise an annotation for an image of `size` (height, width); return the mask and what was odd.

    Degenerate shapes and points outside are findings and contribute what area they have.

    Raises:
        SizeMismatch: the annotation states another size.
        UnknownLabel: a label is neither listed nor allowed.
    """
    height, width = size
    stated = (annotation.height or height, annotation.width or width)
    if stated != (height, width):
        raise SizeMismatch(
            f"annotation is for {stated[1]}x{stated[0]} px, the image has {width}x{height}; "
            "pair it with its own image, or annotate this one again"
        )
    mask = np.zeros((height, width), bool)
    findings: list[Finding] = []
    for index, shape in target_shapes(annotation, config or AnnotationConfig()):
        found = _findings(shape, height, width)
        findings += [Finding(index, kind, message) for kind, message in found]
        kinds = {kind for kind, _ in found}
        if not kinds & {"not_a_polygon", "not_finite", "too_few_points"}:
            points = _cut_far_points(shape.points, height, width) if "far_outside" in kinds else shape.points
            if len(points):
                mask |= _rasterise_polygon(points, height, width)
    return mask, findings


def _findings(shape: Shape, height: int, width: int) -> list[tuple[FindingKind, str]]:
    points = shape.points
    if shape.kind != "polygon":
        return [("not_a_polygon", f"shape_type {shape.kind!r} has no area by the published rule; redraw as a polygon")]
    if not np.isfinite(points).all():
        return [("not_finite", "a coordinate is NaN or infinite; the shape was left out")]
    if len(points) < 3:
        return [("too_few_points", f"{len(points)} point(s), a polygon needs 3; the shape was left out")]
    found: list[tuple[FindingKind, str]] = []
    if _area(points) == 0:
        found.append(("zero_area", "the polygon encloses no area"))
    low, high = points.min(axis=0), points.max(axis=0)
    if (low < -0.5).any() or high[0] > width - 0.5 or high[1] > height - 0.5:
        box = f"x {low[0]:g}..{high[0]:g}, y {low[1]:g}..{high[1]:g}"
        found.append(("points_outside", f"{box} reaches outside the image of {width}x{height} px; cut at its border"))
    if (low < -FAR_PX).any() or high[0] > width + FAR_PX or high[1] > height + FAR_PX:
        found.append(("far_outside", f"reaches more than {FAR_PX} px outside; its border may be off by 0.2 px"))
    return found


def _area(points: Polygon) -> float:
    x, y = (points - points.mean(axis=0)).T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _rasterise_polygon(points: Polygon, height: int, width: int) -> Mask:
    # pycocotools truncates towards zero, which is wrong below it: move polygon and window by whole pixels.
    dx, dy = (max(0, math.ceil(-low)) for low in points.min(axis=0))
    moved = (points + np.array([dx + 0.5, dy + 0.5])).ravel().tolist()
    encoded = coco.frPyObjects([moved], height + dy, width + dx)
    return np.asarray(coco.decode(encoded)[dy:, dx:, 0], bool)


def _cut_far_points(points: Polygon, height: int, width: int) -> Polygon:
    """Clip a polygon to a window far around the image (Sutherland-Hodgman)."""
    window = ((0, 1, -FAR_PX), (0, -1, -(width + FAR_PX)), (1, 1, -FAR_PX), (1, -1, -(height + FAR_PX)))
    for axis, sign, limit in window:
        kept: list[np.ndarray] = []
        for start, end in zip(points, np.roll(points, -1, axis=0), strict=True):
            inside = sign * start[axis] >= limit, sign * end[axis] >= limit
            if inside[0]:
                kept.append(start)
            if inside[0] != inside[1]:
                share = (limit - sign * start[axis]) / (sign * (end[axis] - start[axis]))
                crossing = start + share * (end - start)
                crossing[axis] = sign * limit  # exact, however far away the ends are
                kept.append(crossing)
        if len(kept) < 3:
            return np.zeros((0, 2))  # wholly outside
        points = np.array(kept)
    return points


def mask_to_polygons(mask: Mask) -> list[Polygon]:
    """Outline a mask's 8-connected components along pixel edges; rasterising the polygons gives the mask back exactly.

    labelme knows no holes, so a hole is joined to its outline by a bridge of no width, walked in both directions:
    even-odd filling leaves the hole open.
    """
    # On a grid twice as fine every pixel edge lies between two contour points, on both sides of an outline, so
    # ceil(c / 2) is the edge for outer contours (drawn inside) and holes (drawn outside) alike.
    fine = np.repeat(np.repeat(np.pad(mask, 1).astype(np.uint8), 2, axis=0), 2, axis=1)
    contours, hierarchy = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return []
    outlines = [_along_edges(contour[:, 0]) for contour in contours]
    polygons: dict[int, list[Polygon]] = {}
    for index, (_, _, _, parent) in enumerate(hierarchy[0]):
        if parent < 0:
            polygons.setdefault(index, []).insert(0, outlines[index])
        else:
            polygons.setdefault(int(parent), []).append(outlines[index])
    return [_bridged(rings) for rings in polygons.values()]


def _along_edges(contour: np.ndarray) -> Polygon:
    corners = (contour + 1) // 2 - 1.5  # off the padding, and to the pixel's edge
    corners = corners[(corners != np.roll(corners, 1, axis=0)).any(axis=1)]
    before, after = corners - np.roll(corners, 1, axis=0), np.roll(corners, -1, axis=0) - corners
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    back = (before * after).sum(axis=1) < 0
    return np.asarray(corners[turns | back])


def _bridged(rings: Sequence[Polygon]) -> Polygon:
    outer, holes = rings[0], rings[1:]
    path = [outer, outer[:1]] if holes else [outer]
    for hole in holes:
        path += [hole, hole[:1], outer[:1]]
    return np.concatenate(path)


def to_labelme(polygons: Sequence[Polygon], size: tuple[int, int], image_name: str, label: str = "STAS") -> bytes:
    """Write polygons as a labelme file for an image of `size` (height, width)."""
    shapes = [
        {"label": label, "points": polygon.tolist(), "group_id": None, "shape_type": "polygon", "flags": {}}
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
