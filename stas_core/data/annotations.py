"""labelme annotations to masks and back, by the exact rule of the published masks.

The rule (MATLAB `roipoly`): vertices shifted by half a pixel, polygons drawn on a grid of 5x5 sub-pixels, even-odd
inside one polygon, union over polygons. `pycocotools` implements it. Other rasterisers differ by 0.1-1.5 % of Dice.
"""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from pycocotools import mask as coco
from pydantic import Field

from stas_core.arrays import Mask
from stas_core.config import Config
from stas_core.data import shapes
from stas_core.data.shapes import FindingKind, Odd, Polygon, Shape
from stas_core.errors import (
    EmptyFile,
    MissingShapes,
    OversizedAnnotation,
    SizeMismatch,
    UnknownLabel,
    UnreadableAnnotation,
)

MAX_BYTES = 64_000_000
"""Largest annotation file that is read; only an embedded image makes one this large."""
MAX_VALUES = 4_000_000
"""Most values in an annotation, counted as its commas and opening brackets: each takes up to 100 bytes once parsed."""

FAR_PX = 2_000
"""A polygon is cut off geometrically this far outside the image where its outline may be longer than..."""
MAX_OUTLINE_PX = 1_000_000
"""...this, and refused if it still is: pycocotools takes some 100 bytes for each pixel of it."""
MAX_OUTLINES_PX = 20_000_000
"""Longest outline of all targets of an annotation together: a few seconds of drawing."""

_POLYGONS_AT_ONCE = 255
"""pycocotools cannot measure the areas of more in one call."""
_CODE_PAGES = ("gb18030", "big5", "cp932", "cp949", "cp1252")
"""What an annotation that is not UTF-8 is tried as."""


class AnnotationConfig(Config):
    """Which labels make up the mask."""

    labels: dict[str, Literal["target", "ignore"]] = Field({"STAS": "target"})
    """What each label means: part of the mask, or left out."""
    unknown_labels: Literal["error", "ignore", "target"] = "error"
    """What a label that is not listed means."""
    on_degenerate: Literal["error", "keep_rest", "ignore"] = "keep_rest"
    """Targets that cover nothing. `keep_rest` leaves stray clicks (too few points, or no pixel covered) out beside
    other targets, and refuses the image for lines, points and numbers that are not finite, or if no target is left;
    `error` refuses it for each of them, `ignore` for none. Whatever is left out is counted and printed."""
    coordinates: Literal["check", "pixels"] = "check"
    """`check` refuses coordinates that look like shares or percent, or like x and y swapped; `pixels` takes them as
    they are."""


@dataclass(frozen=True)
class Annotation:
    """A parsed labelme file; height, width and the image's name are None where it does not state them."""

    shapes: tuple[Shape, ...]
    height: int | None
    width: int | None
    image_path: str | None = None
    flags: tuple[str, ...] = ()
    """Flags of the whole image that are set."""


@dataclass(frozen=True)
class Finding:
    """An oddity of a shape, or of the file (index None), that was handled but should be reported."""

    shape_index: int | None
    kind: FindingKind
    message: str


def parse_labelme(data: bytes, name: str) -> Annotation:
    """Parse a labelme file of any version.

    Raises:
        EmptyFile, OversizedAnnotation, UnreadableAnnotation, MissingShapes: naming the file.
    """
    if not data:
        raise EmptyFile(f"annotation of {name} holds 0 bytes; save it again")
    check_num_bytes(len(data), name)
    num_values = sum(map(data.count, (b",", b"[", b"{")))
    if num_values > MAX_VALUES:
        raise OversizedAnnotation(
            f"annotation of {name} holds some {num_values:,} values, more than the limit of {MAX_VALUES:,}; outline "
            "its targets with fewer points"
        )
    try:
        return _to_annotation(json.loads(data), name)
    except UnicodeDecodeError as error:
        return _in_another_code_page(data, name, error)
    except (ValueError, RecursionError) as error:
        raise UnreadableAnnotation(f"annotation of {name} is not JSON: {error}; save it again") from error


def check_num_bytes(num_bytes: int, name: str) -> None:
    """Refuse an annotation file that is too large to be read.

    Raises:
        OversizedAnnotation: naming the file, its size and the limit.
    """
    if num_bytes > MAX_BYTES:
        raise OversizedAnnotation(
            f"annotation of {name} holds {num_bytes:,} bytes, more than the limit of {MAX_BYTES:,}; save it without "
            "the image inside (labelme: File > Save With Image Data, off)"
        )


def _in_another_code_page(data: bytes, name: str, not_utf8: UnicodeDecodeError) -> Annotation:
    """Read a file in a legacy code page: paths may be ambiguous, labels must not be."""
    readings: dict[object, Annotation] = {}
    for code_page in _CODE_PAGES:
        try:
            found = _to_annotation(json.loads(data.decode(code_page)), name)
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


def _to_annotation(values: Any, name: str) -> Annotation:
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
        return Shape(str(label), str(kind or "polygon"), points, mask_png if isinstance(mask_png, str) else None)
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
    """Count the target polygons, and the other target shapes that have an area."""
    return sum(shapes.has_area(shape) for _, shape in target_shapes(annotation, config))


def rasterise(
    annotation: Annotation, size: tuple[int, int], config: AnnotationConfig | None = None
) -> tuple[Mask, list[Finding]]:
    """Rasterise an annotation for an image of `size` (height, width); return the mask and the findings.

    Degenerate shapes and points outside are findings and contribute what area they have; `truth` says which of them
    make an annotation unusable.

    Raises:
        SizeMismatch: the annotation states another size.
        UnknownLabel: a label is neither listed nor allowed.
        OversizedAnnotation: outlines are too long to be drawn.
        UnreadableAnnotation: an AI mask is damaged.
    """
    height, width = size
    _check_size(annotation, height, width)
    findings: list[Finding] = []
    outlines: dict[int, Polygon] = {}
    pasted = np.zeros((height, width), bool)
    for index, shape in target_shapes(annotation, config or AnnotationConfig()):
        points, odd = shapes.corners(shape)
        if points is not None and shape.kind == "mask":
            odd += shapes.paste(shape, points, pasted, f"shape {index}")
        elif points is not None:
            points, outside = _cut_at_border(points, height, width)
            odd += outside
            if points is not None:
                outlines[index] = points
        findings += [Finding(index, kind, message) for kind, message in odd]
    _check_lengths(outlines)
    mask, areas = _fill(list(outlines.values()), height, width)
    for (index, outline), area in zip(outlines.items(), areas, strict=True):
        if area == 0 or np.linalg.matrix_rank(outline - outline[0]) < 2:
            kind = annotation.shapes[index].kind
            findings.append(Finding(index, "zero_area", f"a {kind} without area: it covers {area} pixel(s)"))
    return mask | pasted, sorted(findings, key=lambda finding: finding.shape_index or 0)


def _check_size(annotation: Annotation, height: int, width: int) -> None:
    stated_height = height if annotation.height is None else annotation.height
    stated_width = width if annotation.width is None else annotation.width
    if (stated_height, stated_width) != (height, width):
        turned = (stated_height, stated_width) == (width, height)
        raise SizeMismatch(
            f"annotation is for {stated_width}x{stated_height} px, the image has {width}x{height}"
            f"{': width and height are swapped, or one of the two was turned' if turned else ''}; "
            "pair it with its own image, or annotate this one again"
        )


def _cut_at_border(points: Polygon, height: int, width: int) -> tuple[Polygon | None, Odd]:
    """Clip a polygon to the image's border; None: nothing is left. Also returns what was odd."""
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    if min(left, top) >= -0.5 and right <= width - 0.5 and bottom <= height - 0.5:
        return points, []
    box = f"x {left:g}..{right:g}, y {top:g}..{bottom:g}"
    found: Odd = [("points_outside", f"{box} reaches outside the image of {width}x{height} px; cut at its border")]
    if right < -1 or bottom < -1 or left > width or top > height:
        return None, found
    is_far = min(left, top) < -FAR_PX or right > width + FAR_PX or bottom > height + FAR_PX
    if is_far and len(points) * max(right - left, bottom - top) > MAX_OUTLINE_PX:
        found.append(("far_outside", f"reaches more than {FAR_PX} px outside; its border may be off by 0.2 px"))
        points = _cut_far_points(points, height, width)
    return (points if len(points) else None), found


def _check_lengths(outlines: Mapping[int, Polygon]) -> None:
    total = 0.0
    for index, points in outlines.items():
        length = _length_px(points)
        total += length
        if length > MAX_OUTLINE_PX:
            raise OversizedAnnotation(
                f"shape {index} has {len(points):,} points and an outline of {length:,.0f} px, more than the limit of "
                f"{MAX_OUTLINE_PX:,}; it runs to and fro: draw it again"
            )
    if total > MAX_OUTLINES_PX:
        raise OversizedAnnotation(
            f"{len(outlines):,} shapes with {sum(map(len, outlines.values())):,} points have outlines of {total:,.0f} "
            f"px together, more than the limit of {MAX_OUTLINES_PX:,}; outline fewer targets, with fewer points"
        )


def _fill(outlines: Sequence[Polygon], height: int, width: int) -> tuple[Mask, list[int]]:
    """Return the union of polygons, and how many pixels each covers."""
    columns_first = np.zeros((width, height), np.uint8)
    areas: list[int] = []
    for some in _in_batches(outlines):
        encoded = coco.frPyObjects([_at_subpixels(outline) for outline in some], height, width)
        columns_first |= coco.decode(coco.merge(encoded)).T
        areas += coco.area(encoded).tolist()
    return cv2.transpose(columns_first).view(bool), areas


def _in_batches(outlines: Sequence[Polygon]) -> Iterator[list[Polygon]]:
    """Split outlines into batches whose number and length one call of pycocotools can take."""
    batch: list[Polygon] = []
    length = 0.0
    for outline in outlines:
        if len(batch) == _POLYGONS_AT_ONCE or length > MAX_OUTLINE_PX:
            yield batch
            batch, length = [], 0.0
        batch.append(outline)
        length += _length_px(outline)
    if batch:
        yield batch


def _length_px(outline: Polygon) -> float:
    """Return the length in px that pycocotools walks along an outline."""
    steps = np.abs(outline - np.roll(outline, 1, axis=0)).max(axis=1)
    return float(steps.sum()) + len(outline)


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
                # In halves, so that no difference overflows.
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
