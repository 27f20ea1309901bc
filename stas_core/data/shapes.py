"""What an annotation is, whatever file it came from: labelled shapes, and the areas they stand for.

Published annotations hold polygons only. The other shapes that have an area are drawn by the same rule, as polygons: a
rectangle as that of its corners, a circle as a regular one that stays within `CIRCLE_ERROR_PX` of it. Pixels (AI masks
of labelme, RLE of COCO, mask images) are pasted as they are. Lines and points have no area.
"""

import base64
import io
import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64
from PIL import Image

from stas_core.arrays import Mask
from stas_core.errors import UnreadableAnnotation

Polygon = Float64[np.ndarray, "_ 2"]
"""Vertices (x, y) in px."""
Format = Literal["labelme", "geojson", "coco", "asap", "mask"]
FORMATS: dict[Format, str] = {
    "labelme": "labelme",
    "geojson": "GeoJSON",
    "coco": "COCO",
    "asap": "ASAP XML",
    "mask": "mask image",
}
"""The formats that are read, as people call them."""
UNCLASSIFIED = "Unclassified"
"""Label of a shape without one, as QuPath calls it."""
CENTRE_PX, CORNER_PX = 0.5, 0.0
"""Added to coordinates, makes them count from the corner of the first pixel: labelme counts from its centre, the others
from its corner."""

NUM_POINTS = {
    "polygon": (3,),
    "spline": (3,),
    "rectangle": (2, 4),
    "oriented_rectangle": (4,),
    "rotation": (4,),
    "circle": (2,),
}
"""Shapes that are drawn as polygons, and how many points each has; those of `ANY_NUMBER` may have more."""
ANY_NUMBER = ("polygon", "spline")
NUM_MASK_POINTS = (1, 2)
CIRCLE_ERROR_PX = 0.01
"""How far inside a circle the polygon that is drawn for it may run, up to a radius of 200,000 px."""
MAX_CIRCLE_CORNERS = 10_000
"""Corners of that polygon at this radius, and the most there are."""

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
    "spline",
    "near_corner",
    "hole_without_area",
]
Odd = list[tuple[FindingKind, str]]
"""What is odd about a shape, in words."""


@dataclass(frozen=True)
class PngPixels:
    """Pixels of an AI mask of labelme: a PNG in base64, not 0 is target."""

    text: str

    def decode(self, max_size: tuple[int, ...]) -> Mask:
        """Decode the PNG as labelme does; not 0 is target."""
        image = Image.open(io.BytesIO(base64.b64decode(self.text, validate=True)), formats=("PNG",))
        _require_within((image.height, image.width), max_size)
        if image.mode not in ("1", "L"):
            raise ValueError(f"mode {image.mode}, expected L (8-bit grey)")
        return np.asarray(np.asarray(image) != 0)


@dataclass(frozen=True)
class RunPixels:
    """Pixels of COCO's RLE: lengths of runs down the columns, in turn of background and target."""

    runs: npt.NDArray[np.int64]
    size: tuple[int, int]
    """Height and width in px; the runs add up to all pixels."""

    def decode(self, max_size: tuple[int, ...]) -> Mask:
        """Draw the runs, down the columns."""
        _require_within(self.size, max_size)
        if int(self.runs.sum()) != self.size[0] * self.size[1]:
            raise ValueError(f"runs of {int(self.runs.sum())} px in all for {self.size[1]}x{self.size[0]} px")
        is_target = np.arange(len(self.runs)) % 2 == 1
        return np.ascontiguousarray(np.repeat(is_target, self.runs).reshape(self.size[1], self.size[0]).T)


@dataclass(frozen=True)
class LevelPixels:
    """Pixels of one value of a mask image; the image is shared by the shapes of all values."""

    image: npt.NDArray[np.integer]
    value: int

    def decode(self, max_size: tuple[int, ...]) -> Mask:
        """Select the pixels of the value."""
        _require_within(self.image.shape, max_size)
        return np.asarray(self.image == self.value)


Pixels = PngPixels | RunPixels | LevelPixels
"""Pixels of a shape, decoded where they are drawn: there may be many shapes of the size of the image. `decode` takes
the largest (height, width) in px, and raises ValueError, OSError or SyntaxError where they are larger or damaged."""


def _require_within(size: tuple[int, ...], max_size: tuple[int, ...]) -> None:
    if size[0] > max_size[0] or size[1] > max_size[1]:
        raise ValueError(f"{size[1]}x{size[0]} px in an image of {max_size[1]}x{max_size[0]}")


@dataclass(frozen=True)
class Shape:
    """One shape."""

    label: str
    kind: str
    """As labelme's shape_type: polygon, rectangle, circle, mask, line, point..."""
    points: Polygon
    """Its outline, or the box of its pixels."""
    pixels: Pixels | None = None
    """What a shape of kind `mask` covers."""
    holes: tuple[Polygon, ...] = ()
    """Rings that are cut out of a polygon."""
    shift_px: float = CENTRE_PX
    """Added to its coordinates, makes them count from the corner of the first pixel."""
    is_target: bool = False
    """Target whatever its label means: the one class of a mask image."""


@dataclass(frozen=True)
class Annotation:
    """A parsed annotation; height, width and the image's name are None where the file does not state them."""

    shapes: tuple[Shape, ...]
    height: int | None
    width: int | None
    image_path: str | None = None
    flags: tuple[str, ...] = ()
    """Flags of the whole image that are set."""
    format: Format = "labelme"

    def count_labels(self) -> dict[str, int]:
        """Count the shapes of each label."""
        return dict(sorted(Counter(shape.label for shape in self.shapes).items()))


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
    if kind not in ANY_NUMBER and len(points) not in wanted:
        expected = " or ".join(map(str, wanted))
        return None, [("too_many_points", f"{len(points)} points, a {kind} has {expected}; the shape was left out")]
    if kind == "rectangle" and len(points) == 2:
        (left, top), (right, bottom) = points
        points = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    if kind == "circle":
        points = _regular_polygon(*points)
    if not all(np.isfinite(ring).all() for ring in (points, *shape.holes)):
        return None, [("not_finite", "a coordinate is NaN, infinite or too large; the shape was left out")]
    if kind == "spline":
        return points, [("spline", "a spline is drawn straight from point to point; its curves are not known here")]
    return points, []


def holes_with_area(shape: Shape) -> tuple[list[Polygon], Odd]:
    """Return the holes of a polygon that can be drawn, and how many others there are: these take nothing away."""
    holes = [hole for hole in shape.holes if len(np.unique(hole, axis=0)) >= NUM_POINTS["polygon"][0]]
    if not (num := len(shape.holes) - len(holes)):
        return holes, []
    return holes, [
        ("hole_without_area", f"{num} hole(s) of fewer than 3 different points; left out, the rest is drawn")
    ]


def _regular_polygon(centre: np.ndarray, rim: np.ndarray) -> Polygon:
    with np.errstate(over="ignore", invalid="ignore"):
        radius = float(np.hypot(*(rim - centre)))
        # An inscribed polygon of n corners runs at most radius * (pi / n)^2 / 2 inside its circle.
        num_corners = math.pi * math.sqrt(max(radius, 1.0) / (2 * CIRCLE_ERROR_PX))
        num_corners = math.ceil(min(num_corners, MAX_CIRCLE_CORNERS))
        angles = 2 * np.pi * np.arange(num_corners) / num_corners
        return np.asarray(centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1))


def paste(shape: Shape, box: Polygon, onto: Mask, name: str) -> Odd:
    """Paste the pixels of a shape; the box of an AI mask runs from the centre of its first pixel to that of its last.

    Raises:
        UnreadableAnnotation: it cannot be decoded, is larger than the image, or contradicts its box.
    """
    height, width = onto.shape
    pixels = _decode(shape.pixels, onto.shape, name)
    sides = pixels.shape[::-1]
    if len(box) == 2:
        spanned = np.abs(box[1] - box[0]) + 1
        if np.abs(spanned - sides).max() > 1:
            raise UnreadableAnnotation(
                f"{name} is a mask of {sides[0]}x{sides[1]} px, but its points span {spanned[0]:g}x"
                f"{spanned[1]:g}; draw it again"
            )
    x, y = (math.floor(side + 0.5) for side in box.min(axis=0).tolist())
    odd: Odd = []
    if min(x, y) < 0 or x + sides[0] > width or y + sides[1] > height:
        message = f"a mask at {x:g}, {y:g} reaches outside the image of {width}x{height} px; cut at its border"
        odd.append(("points_outside", message))
    inside = pixels[max(-y, 0) : max(height - y, 0), max(-x, 0) : max(width - x, 0)]
    if inside.any():
        top, left = max(y, 0), max(x, 0)
        onto[top : top + inside.shape[0], left : left + inside.shape[1]] |= inside
    else:
        odd.append(("zero_area", "a mask without a target pixel inside the image"))
    return odd


def _decode(pixels: Pixels | None, max_size: tuple[int, ...], name: str) -> Mask:
    try:
        if pixels is None:
            raise ValueError("it has no pixels")
        return pixels.decode(max_size)
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableAnnotation(f"{name} is a mask that cannot be used: {error}; draw it again") from error
