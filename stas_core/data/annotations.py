"""Annotations of any format to masks, by the exact rule of the published masks.

A file is read as what its content says: labelme, GeoJSON (QuPath), COCO, ASAP XML, or a mask image. All become one
`Annotation`, and one rasteriser draws it.

The rule (MATLAB `roipoly`): polygons drawn on a grid of 5x5 sub-pixels, even-odd inside one ring, union over polygons;
labelme's vertices are shifted by half a pixel before. `pycocotools` implements it. Other rasterisers differ by
0.1-1.5 % of Dice. A polygon with holes covers what its outside covers and none of its holes does; a hole that reaches
outside of it, or overlaps another one, adds nothing.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from pycocotools import mask as coco
from pydantic import Field

from stas_core import review
from stas_core.arrays import Mask
from stas_core.config import Config, additions
from stas_core.data import asap, geojson, labelme, masks, shapes
from stas_core.data import coco as coco_files
from stas_core.data.file_limits import in_utf8, parse_json, shown, unpacked
from stas_core.data.shapes import FORMATS, Annotation, FindingKind, Format, Odd, Polygon, Shape
from stas_core.errors import (
    MissingShapes,
    OversizedAnnotation,
    SizeMismatch,
    UnknownLabel,
    UnreadableAnnotation,
)

FAR_PX = 2_000
"""A polygon is cut off geometrically this far outside the image where its outline may be longer than..."""
MAX_OUTLINE_PX = 1_000_000
"""...this, and refused if it still is: pycocotools takes some 100 bytes for each pixel of it."""
MAX_OUTLINES_PX = 20_000_000
"""Longest outline of all targets of an annotation together: a few seconds of drawing."""
MAX_EXAMPLE = 300
"""Characters of the settings that a message suggests."""

_POLYGONS_AT_ONCE = 255
"""pycocotools cannot measure the areas of more in one call."""


class AnnotationConfig(Config):
    """Which labels make up the mask."""

    labels: dict[str, Literal["target", "ignore"]] = Field({"STAS": "target"})
    """What each label means: part of the mask, or left out. In mask images labels are values (`2`) or colours
    (`#c80000`); where none is listed, the only value beside 0 is the target."""
    unknown_labels: Literal["error", "ignore", "target"] = "error"
    """What a label that is not listed means. The classes of `export review=true` that wait for a decision, `proposed`
    and `questioned`, mean nothing until they are listed."""
    on_degenerate: Literal["error", "keep_rest", "ignore"] = "keep_rest"
    """Targets that cover nothing. `keep_rest` leaves stray clicks (too few points, or no pixel covered) out beside
    other targets, and refuses the image for lines, points and numbers that are not finite, or if no target is left;
    `error` refuses it for each of them, `ignore` for none. Whatever is left out is counted and printed."""
    coordinates: Literal["check", "pixels"] = "check"
    """`check` refuses coordinates that look like shares or percent, or like x and y swapped; `pixels` takes them as
    they are."""
    mask_tolerance: int = Field(0, ge=0, le=masks.MAX_TOLERANCE)
    """Grey levels, of 255 in each channel, by which pixels of a mask image may be off a listed value, or black or white
    where none is listed: they count as the nearest. Makes blurred masks and JPEGs readable, changes no mask that is
    exact, and none with a palette, and refuses one of which it would leave nothing but black; 0 takes exact ones
    only."""

    def meaning_of(self, label: str) -> Literal["target", "ignore", "error"]:
        """Return what a label means; `error`: nothing says so."""
        return self.labels.get(label, "error" if label in review.UNDECIDED else self.unknown_labels)

    @property
    def lists_values(self) -> bool:
        """Whether mask images are read by listed values or colours, or by nearness, not as masks of one class."""
        return self.mask_tolerance > 0 or any(map(masks.is_value, self.labels))


@dataclass(frozen=True)
class Finding:
    """An oddity of a shape, or of the file (index None), that was handled but should be reported."""

    shape_index: int | None
    kind: FindingKind
    message: str


def parse(data: bytes, name: str, *, image_id: str, size: tuple[int, int], config: AnnotationConfig) -> Annotation:
    """Read what an annotation file of any format says of one image.

    Args:
        data: the file.
        name: the file's, for errors.
        image_id: tells which image of a COCO file.
        size: height and width of the image.
        config: which values of a mask image are labels.

    Raises:
        InputError: why it cannot be read, naming the file.

    Example:
        >>> ring = "[[0, 0], [8, 0], [8, 4], [0, 0]]"
        >>> data = f'{{"type": "Polygon", "coordinates": [{ring}]}}'.encode()
        >>> found = parse(data, "0007.geojson", image_id="0007", size=(10, 10), config=AnnotationConfig())
        >>> found.format, [shape.label for shape in found.shapes]
        ('geojson', ['Unclassified'])
    """
    data = unpacked(data, name)
    if (values := _json_of(data, name)) is None:
        if asap.is_xml(data):
            return asap.parse_asap(data, name)
        return masks.parse_mask(data, name, size, listed=config.labels, tolerance=config.mask_tolerance)
    if isinstance(values, coco_files.CocoFile):
        return values.annotation_of(image_id, name)
    return values if isinstance(values, Annotation) else _of_json(values, name)


def _json_of(data: bytes, name: str) -> Any:
    """Return the parsed JSON of a file, or what was made of it; None: it is no JSON."""
    if not re.match(rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff|[\s\0])*[{\[]", data):
        return None
    try:
        data = in_utf8(data)
        if (found := coco_files.read(data, name)) is not None:
            return found
        return parse_json(data, name)
    except UnicodeDecodeError as error:
        return labelme.in_another_code_page(data, name, error)


def _of_json(values: Any, name: str) -> Annotation:
    if isinstance(values, dict) and "shapes" in values:
        return labelme.from_json(values, name)
    if geojson.is_geojson(values):
        return geojson.from_json(values, name)
    if not isinstance(values, dict):
        raise UnreadableAnnotation(
            f"annotation of {name} holds a {type(values).__name__} that is no list of GeoJSON features; {READ_FORMATS}"
        )
    keys = ", ".join(shown(key) for key in list(values)[:5]) or "none"
    raise MissingShapes(
        f"annotation of {name} has the keys {keys}, but neither `shapes` (labelme), `type` (GeoJSON), nor `images` and "
        "`annotations` (COCO); save it in one of these formats"
    )


READ_FORMATS = f"read are {', '.join(list(FORMATS.values())[:-1])} and mask images"


@dataclass(frozen=True)
class Description:
    """What an annotation file holds."""

    format: Format
    labels: dict[str, int]
    """How many shapes there are of each label."""
    images: tuple[str, ...] = ()
    """Ids of the images that a COCO file names."""


def describe(data: bytes, name: str, image_id: str | None, config: AnnotationConfig) -> Description:
    """Describe an annotation file, or what it says of one image.

    Raises:
        InputError: it cannot be read.
    """
    data = unpacked(data, name)
    found = _json_of(data, name)
    if isinstance(found, coco_files.CocoFile) and image_id is None:
        return Description("coco", found.count_labels(), tuple(found.images))
    one = parse(data, name, image_id=image_id or "", size=(0, 0), config=config)
    return Description(one.format, one.count_labels())


def target_shapes(annotation: Annotation, config: AnnotationConfig, key: str = "annotation") -> list[tuple[int, Shape]]:
    """Return the shapes that make up the mask, with their index in the file; `key` is what errors call the settings.

    Raises:
        UnknownLabel: a label is neither listed nor allowed.
    """
    chosen, unknown = [], Counter[str]()
    for index, shape in enumerate(annotation.shapes):
        use = "target" if shape.is_target else config.meaning_of(shape.label)
        if use == "error":
            unknown[shape.label] += 1
        if use == "target":
            chosen.append((index, shape))
    if unknown:
        raise UnknownLabel(unknown_labels(unknown, config, key))
    return chosen


def unknown_labels(counts: Mapping[str, int], config: AnnotationConfig, key: str = "annotation") -> str:
    """Say which labels are not listed, and how to list them."""
    found = ", ".join(f"{shown(label)} ({count} shape{'s' * (count > 1)})" for label, count in sorted(counts.items()))
    meaning = f"{{{', '.join(f'{label}: {use}' for label, use in config.labels.items())}}}"
    others = f"; or set {key}.unknown_labels=ignore"
    if undecided := sorted(review.UNDECIDED & counts.keys()):
        others = f"; {' and '.join(undecided)}: from a review, accept or delete them"
    how = how_to_list([min(counts)], config.labels, key)
    return f"{found}: not in {key}.labels = {meaning:.200}; {how}{others}"


def how_to_list(labels: Sequence[str], listed: Mapping[str, str], key: str = "annotation") -> str:
    """Say how to add labels to those that are listed; `key` is what the settings are called."""
    example = additions(f"{key}.labels", labels, "target", listed)
    if len(example) > MAX_EXAMPLE:
        example = f"in a YAML file, under {key}.labels, as target"
    return f"say what each means: {example} (or ignore)"


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
    outlines: dict[int, list[Polygon]] = {}
    pasted = np.zeros((height, width), bool)
    for index, shape in target_shapes(annotation, config or AnnotationConfig()):
        points, odd = shapes.corners(shape)
        if points is not None and shape.kind == "mask":
            odd += shapes.paste(shape, points, pasted, f"shape {index}")
        elif points is not None:
            holes, without_area = shapes.holes_with_area(shape)
            rings, outside = _cut_at_border([points, *holes], shape.shift_px, height, width)
            odd += [*without_area, *outside]
            if rings:
                outlines[index] = rings
        findings += [Finding(index, kind, message) for kind, message in odd]
    _check_lengths(outlines)
    mask, areas = _fill([rings[0] for rings in outlines.values() if len(rings) == 1], height, width)
    without_holes = iter(areas)
    for index, rings in outlines.items():
        area = next(without_holes) if len(rings) == 1 else _fill_with_holes(rings, mask)
        if area == 0 or np.linalg.matrix_rank(rings[0] - rings[0][0]) < 2:
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


def _cut_at_border(rings: Sequence[Polygon], shift_px: float, height: int, width: int) -> tuple[list[Polygon], Odd]:
    """Clip a polygon's rings to the image's border, counted from the corner of the first pixel; also say what was odd.

    None are left of one that lies outside.
    """
    placed = [ring + shift_px for ring in rings]
    (left, top), (right, bottom) = placed[0].min(axis=0).tolist(), placed[0].max(axis=0).tolist()
    if min(left, top) >= 0 and right <= width and bottom <= height and len(rings) == 1:
        return placed, []
    found: Odd = []
    if min(left, top) < 0 or right > width or bottom > height:
        (x0, y0), (x1, y1) = rings[0].min(axis=0).tolist(), rings[0].max(axis=0).tolist()
        box = f"x {x0:g}..{x1:g}, y {y0:g}..{y1:g}"
        found = [("points_outside", f"{box} reaches outside the image of {width}x{height} px; cut at its border")]
    if right < -0.5 or bottom < -0.5 or left > width + 0.5 or top > height + 0.5:
        return [], found
    cut = [_cut_far_points(ring, height, width) if _is_far(ring, height, width) else ring for ring in placed]
    if any(now is not before for now, before in zip(cut, placed, strict=True)):
        found.append(("far_outside", f"reaches more than {FAR_PX} px outside; its border may be off by 0.2 px"))
    return ([cut[0], *(hole for hole in cut[1:] if len(hole))] if len(cut[0]) else []), found


def _is_far(ring: Polygon, height: int, width: int) -> bool:
    """Tell whether a ring is to be clipped geometrically: it would take much memory outside of the image."""
    (left, top), (right, bottom) = ring.min(axis=0).tolist(), ring.max(axis=0).tolist()
    is_far = min(left, top) < -FAR_PX or right > width + FAR_PX or bottom > height + FAR_PX
    return bool(is_far and len(ring) * max(right - left, bottom - top) > MAX_OUTLINE_PX)


def _check_lengths(outlines: Mapping[int, Sequence[Polygon]]) -> None:
    total = 0.0
    for index, rings in outlines.items():
        length = sum(map(_length_px, rings))
        total += length
        if length > MAX_OUTLINE_PX:
            raise OversizedAnnotation(
                f"shape {index} has {sum(map(len, rings)):,} points and an outline of {length:,.0f} px, more than the "
                f"limit of {MAX_OUTLINE_PX:,}; it runs to and fro: draw it again"
            )
    if total > MAX_OUTLINES_PX:
        num_points = sum(len(ring) for rings in outlines.values() for ring in rings)
        raise OversizedAnnotation(
            f"{len(outlines):,} shapes with {num_points:,} points have outlines of {total:,.0f} px together, more than "
            f"the limit of {MAX_OUTLINES_PX:,}; outline fewer targets, with fewer points"
        )


def _fill_with_holes(rings: Sequence[Polygon], onto: Mask) -> int:
    """Draw a polygon's outside without its holes; return how many pixels it covers."""
    height, width = onto.shape
    # In a window of whole pixels, as `_fill` draws the whole image; 0 where the polygon begins outside.
    left, top = np.maximum(np.floor(rings[0].min(axis=0)) - 1, 0).astype(int).tolist()
    right, bottom = np.minimum(np.ceil(rings[0].max(axis=0)) + 1, (width, height)).astype(int).tolist()
    if right <= left or bottom <= top:
        return 0
    outside, *holes = (ring - (left, top) for ring in rings)
    drawn, _ = _fill([outside], bottom - top, right - left)
    cut, _ = _fill(holes, bottom - top, right - left)
    drawn = drawn & ~cut
    onto[top:bottom, left:right] |= drawn
    return int(drawn.sum())


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
    steps = np.floor(5 * points + 0.5)
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
