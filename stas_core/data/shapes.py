"""labelme's shapes and the areas they stand for.

Published annotations hold polygons only. The other shapes that have an area are drawn by the same rule, as polygons: a
rectangle as that of its corners, a circle as a regular one that stays within `CIRCLE_ERROR_PX` of it. An AI mask is
pasted pixel for pixel. Lines and points have no area.
"""

import base64
import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64
from PIL import Image

from stas_core.arrays import Mask
from stas_core.errors import UnreadableAnnotation

Polygon = Float64[np.ndarray, "_ 2"]
"""Vertices (x, y) in labelme's frame: pixel centres at integers."""

NUM_POINTS = {"polygon": (3,), "rectangle": (2, 4), "oriented_rectangle": (4,), "rotation": (4,), "circle": (2,)}
"""Shapes that are drawn as polygons, and how many points each has; a polygon may have more."""
NUM_MASK_POINTS = (1, 2)
CIRCLE_ERROR_PX = 0.01
"""How far inside a circle the polygon that is drawn for it may run..."""
MAX_CIRCLE_CORNERS = 10_000
"""...up to a radius of 200,000 px, where it has this many corners."""

FindingKind = Literal[
    "too_few_points",
    "too_many_points",
    "zero_area",
    "not_finite",
    "no_area",
    "points_outside",
    "far_outside",
    "other_image",
    "size_not_stated",
    "flagged",
    "near_corner",
]
Odd = list[tuple[FindingKind, str]]
"""What is odd about a shape, in words."""


@dataclass(frozen=True)
class Shape:
    """One labelme shape."""

    label: str
    kind: str
    """labelme's shape_type: polygon, rectangle, circle, mask, line, point..."""
    points: Polygon
    mask_png: str | None = None
    """The pixels of an AI mask as labelme stores them: a PNG in base64."""


def has_area(shape: Shape) -> bool:
    """Tell whether shapes of this type have an area."""
    return shape.kind in NUM_POINTS or shape.kind == "mask"


def corners(shape: Shape) -> tuple[Polygon | None, Odd]:
    """Return the polygon that stands for a shape, or the box of an AI mask; None, and why, if it has no area."""
    points, kind = shape.points, shape.kind
    if not has_area(shape):
        return None, [("no_area", f"shape_type {kind!r} has no area; redraw it as a polygon")]
    wanted = NUM_POINTS.get(kind, NUM_MASK_POINTS)
    if len(points) < wanted[0]:
        return None, [("too_few_points", f"{len(points)} point(s), a {kind} needs {wanted[0]}; the shape was left out")]
    if kind != "polygon" and len(points) not in wanted:
        expected = " or ".join(map(str, wanted))
        return None, [("too_many_points", f"{len(points)} points, a {kind} has {expected}; the shape was left out")]
    if kind == "rectangle" and len(points) == 2:
        (left, top), (right, bottom) = points
        points = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    if kind == "circle":
        points = _regular_polygon(*points)
    if not np.isfinite(points).all():
        return None, [("not_finite", "a coordinate is NaN, infinite or too large; the shape was left out")]
    return points, []


def _regular_polygon(centre: np.ndarray, rim: np.ndarray) -> Polygon:
    with np.errstate(over="ignore", invalid="ignore"):
        radius = float(np.hypot(*(rim - centre)))
        # An inscribed polygon of n corners runs at most radius * (pi / n)^2 / 2 inside its circle.
        num_corners = math.pi * math.sqrt(max(radius, 1.0) / (2 * CIRCLE_ERROR_PX))
        num_corners = math.ceil(min(num_corners, MAX_CIRCLE_CORNERS))
        angles = 2 * np.pi * np.arange(num_corners) / num_corners
        return np.asarray(centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1))


def paste(shape: Shape, box: Polygon, onto: Mask, name: str) -> Odd:
    """Paste an AI mask; its box runs from the centre of its first pixel to that of its last.

    Raises:
        UnreadableAnnotation: it cannot be decoded, is larger than the image, or contradicts its box.
    """
    height, width = onto.shape
    pixels = _decode_ai_mask(shape.mask_png, onto.shape, name)
    sides = pixels.shape[::-1]
    if len(box) == 2:
        spanned = np.abs(box[1] - box[0]) + 1
        if np.abs(spanned - sides).max() > 1:
            raise UnreadableAnnotation(
                f"{name} is an AI mask of {sides[0]}x{sides[1]} px, but its points span {spanned[0]:g}x"
                f"{spanned[1]:g}; draw it again"
            )
    x, y = (math.floor(side + 0.5) for side in box.min(axis=0).tolist())
    odd: Odd = []
    if min(x, y) < 0 or x + sides[0] > width or y + sides[1] > height:
        message = f"an AI mask at {x:g}, {y:g} reaches outside the image of {width}x{height} px; cut at its border"
        odd.append(("points_outside", message))
    inside = pixels[max(-y, 0) : max(height - y, 0), max(-x, 0) : max(width - x, 0)]
    if inside.any():
        top, left = max(y, 0), max(x, 0)
        onto[top : top + inside.shape[0], left : left + inside.shape[1]] |= inside
    else:
        odd.append(("zero_area", "an AI mask without a target pixel inside the image"))
    return odd


def _decode_ai_mask(mask_png: str | None, max_size: tuple[int, ...], name: str) -> np.ndarray:
    """Decode the PNG of an AI mask as labelme does: non-zero is target."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(mask_png or "", validate=True)), formats=("PNG",))
        if image.height > max_size[0] or image.width > max_size[1]:
            raise ValueError(f"{image.width}x{image.height} px in an image of {max_size[1]}x{max_size[0]}")
        if image.mode not in ("1", "L"):
            raise ValueError(f"mode {image.mode}, expected L (8-bit grey)")
        return np.asarray(np.asarray(image) != 0)
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableAnnotation(f"{name} is an AI mask that cannot be used: {error}; draw it again") from error
