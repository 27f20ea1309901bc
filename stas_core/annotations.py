"""labelme annotations to masks and back, by the exact rule of the published masks.

The rule (MATLAB `roipoly`): vertices shifted by half a pixel, polygons drawn on a grid of 5x5 sub-pixels, even-odd
inside one polygon, union over polygons. `pycocotools` implements it. Other rasterisers differ by 0.1-1.5 % of Dice.
"""

import json
from collections.abc import Collection, Sequence
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
"""A polygon is cut off geometrically this far outside the image where its outline may be longer than..."""
MAX_OUTLINE_PX = 1_000_000
"""...this: pycocotools takes some 100 bytes for each pixel of it."""


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
        points = np.array([[_number(x), _number(y)] for x, y in values["points"]], dtype=np.float64).reshape(-1, 2)
        return Shape(str(values["label"]), str(values.get("shape_type") or "polygon"), points)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UnreadableAnnotation(
            f"{name} is not a labelme shape ({type(error).__name__}: {error}); expected `label` and `points` as pairs"
        ) from error


def _number(value: Any) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    raise TypeError(f"{value!r} is not a number")  # float() would take text


def _parse_side(value: Any, key: str, name: str) -> int | None:
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
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
    _check_size(annotation, height, width)
    findings: list[Finding] = []
    outlines: dict[int, Polygon] = {}
    for index, shape in target_shapes(annotation, config or AnnotationConfig()):
        outline, found = _outline(shape, height, width)
        findings += [Finding(index, kind, message) for kind, message in found]
        if outline is not None:
            outlines[index] = outline
    mask, areas = _fill(outlines.values(), height, width)
    for (index, outline), area in zip(outlines.items(), areas, strict=True):
        if area == 0 or np.linalg.matrix_rank(outline - outline[0]) < 2:
            findings.append(Finding(index, "zero_area", f"a polygon without area: it covers {area} pixel(s)"))
    return mask, sorted(findings, key=lambda finding: finding.shape_index)


def _check_size(annotation: Annotation, height: int, width: int) -> None:
    stated_height = height if annotation.height is None else annotation.height
    stated_width = width if annotation.width is None else annotation.width
    if (stated_height, stated_width) != (height, width):
        raise SizeMismatch(
            f"annotation is for {stated_width}x{stated_height} px, the image has {width}x{height}; "
            "pair it with its own image, or annotate this one again"
        )


def _outline(shape: Shape, height: int, width: int) -> tuple[Polygon | None, list[tuple[FindingKind, str]]]:
    """Return what of a shape can be rasterised, None if nothing, and what is odd about it."""
    points = shape.points
    if shape.kind != "polygon":
        message = f"shape_type {shape.kind!r} has no area by the published rule; redraw as a polygon"
        return None, [("not_a_polygon", message)]
    if not np.isfinite(points).all():
        return None, [("not_finite", "a coordinate is NaN or infinite; the shape was left out")]
    if len(points) < 3:
        return None, [("too_few_points", f"{len(points)} point(s), a polygon needs 3; the shape was left out")]
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    if min(left, top) >= -0.5 and right <= width - 0.5 and bottom <= height - 0.5:
        return points, []
    box = f"x {left:g}..{right:g}, y {top:g}..{bottom:g}"
    found: list[tuple[FindingKind, str]] = [
        ("points_outside", f"{box} reaches outside the image of {width}x{height} px; cut at its border")
    ]
    if right < -1 or bottom < -1 or left > width or top > height:
        return None, found
    is_far = min(left, top) < -FAR_PX or right > width + FAR_PX or bottom > height + FAR_PX
    if is_far and len(points) * max(right - left, bottom - top) > MAX_OUTLINE_PX:
        found.append(("far_outside", f"reaches more than {FAR_PX} px outside; its border may be off by 0.2 px"))
        points = _cut_far_points(points, height, width)
    return (points if len(points) else None), found


def _fill(outlines: Collection[Polygon], height: int, width: int) -> tuple[Mask, list[int]]:
    """Return the union of polygons, and how many pixels each covers."""
    if not outlines:
        return np.zeros((height, width), bool), []
    encoded = coco.frPyObjects([_at_subpixels(outline) for outline in outlines], height, width)
    columns_first = coco.decode(coco.merge(encoded)).T
    return cv2.transpose(columns_first).view(bool), coco.area(encoded).tolist()


def _at_subpixels(points: Polygon) -> list[float]:
    """Move vertices to the grid of 5x5 sub-pixels, and return them as pycocotools takes them: x, y, x, y...

    It goes to the grid itself, by int(5 * x + 0.5), but int() bends outlines that cross zero: it rounds towards it.
    The vertices given here stay a quarter of a step away from where that could matter.
    """
    steps = np.floor(5 * (points + 0.5) + 0.5)
    flat: list[float] = ((steps + np.copysign(0.25, steps) - 0.5) / 5).ravel().tolist()
    return flat


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
                # By halves, so that no difference overflows.
                share = (sign * limit / 2 - start[axis] / 2) / (end[axis] / 2 - start[axis] / 2)
                crossing = (1 - share) * start + share * end
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
    return [_bridged(rings) for rings in outlines(mask)]


def outlines(mask: Mask) -> list[list[Polygon]]:
    """Outline each 8-connected component along pixel edges: its outer ring, then its holes, as (n, 2) x, y in px.

    Pixel centres have whole coordinates, so corners lie at halves.
    """
    # On a grid twice as fine every pixel edge lies between two contour points, on both sides of an outline, so
    # ceil(c / 2) is the edge for outer contours (drawn inside) and holes (drawn outside) alike.
    fine = np.repeat(np.repeat(np.pad(mask, 1).astype(np.uint8), 2, axis=0), 2, axis=1)
    contours, hierarchy = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return []
    components: dict[int, list[Polygon]] = {}
    for index, (_, _, _, parent) in enumerate(hierarchy[0]):
        ring = _along_edges(contours[index][:, 0])
        if parent < 0:
            components.setdefault(index, []).insert(0, ring)
        else:
            components.setdefault(int(parent), []).append(ring)
    return list(components.values())


def _along_edges(contour: np.ndarray) -> Polygon:
    corners = (contour + 1) // 2 - 1.5  # off the padding, and to the pixel's edge
    corners = corners[(corners != np.roll(corners, 1, axis=0)).any(axis=1)]
    before, after = corners - np.roll(corners, 1, axis=0), np.roll(corners, -1, axis=0) - corners
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    back = (before * after).sum(axis=1) < 0
    return np.asarray(corners[turns | back])


def _bridged(rings: Sequence[Polygon]) -> Polygon:
    """Walk from ring to ring, round each on the way, and back along the same bridges."""
    there = [np.concatenate([ring, ring[:1]]) for ring in rings]
    back = [ring[:1] for ring in reversed(rings[:-1])]
    return np.concatenate(there + back) if len(rings) > 1 else rings[0]


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
