"""Outlines that a user drew, such as in QuPath: GeoJSON polygons in level-0 pixels, as a mask of any resolution."""

import json
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import numpy.typing as npt

from stas_core.arrays import Mask
from stas_core.data import geojson
from stas_core.data.shapes import Shape
from stas_core.errors import MissingShapes, UnreadableAnnotation, WrongCoordinates
from stas_core.slides.slide import SlideInfo

_SHIFT = 8
"""Bits of a fraction of a pixel that OpenCV draws by."""
_FARTHEST_PX = 2.0**22
"""Of a mask: beyond it OpenCV's coordinates overflow."""


def mask_of_outlines(data: bytes, name: str, info: SlideInfo, size: tuple[int, int]) -> Mask:
    """Draw the polygons of a GeoJSON onto a mask of (height, width), which covers the whole of level 0.

    Where a slide has bounds, QuPath shows only these, and counts from their corner.

    Raises:
        UnreadableAnnotation, MissingShapes, WrongCoordinates: naming the file.
    """
    height, width = size
    scale = np.array([width / info.width, height / info.height])
    corner = np.array([info.bounds.x0, info.bounds.y0] if info.bounds else [0, 0], float)
    mask = np.zeros(size, np.uint8)
    num_polygons = 0
    for rings in polygons_of(data, name):
        num_polygons += 1
        draw_polygon(mask, [(ring + corner) * scale - 0.5 for ring in rings])
    if not num_polygons:
        raise MissingShapes(f"{name} holds no polygon; draw an area, and export it as GeoJSON")
    if not mask.any():
        raise WrongCoordinates(
            f"{name}: its {num_polygons} polygon(s) lie outside of {info.name}, which is {info.width}x{info.height} px "
            "at level 0; export the outlines of this slide, in pixels"
        )
    return mask.view(bool)


def draw_polygon(mask: npt.NDArray[np.uint8], rings: Sequence[np.ndarray]) -> None:
    """Set the pixels of a polygon to 1: its outside, then its holes, whole coordinates at pixel centres."""
    points = [np.clip(ring, -_FARTHEST_PX, _FARTHEST_PX) for ring in rings]
    fixed = [np.round(one * 2**_SHIFT).astype(np.int32) for one in points]
    drawn = np.zeros_like(mask) if len(rings) > 1 else mask
    cv2.fillPoly(drawn, fixed[:1], 1, cv2.LINE_8, _SHIFT)
    if len(rings) > 1:
        cv2.fillPoly(drawn, fixed[1:], 0, cv2.LINE_8, _SHIFT)
        mask |= drawn


def polygons_of(data: bytes, name: str) -> Iterator[list[np.ndarray]]:
    """Yield the rings of each polygon of a GeoJSON, whatever its class: (n, 2) x, y; its outside, then its holes.

    Points and lines have no area and are passed over.

    Raises:
        UnreadableAnnotation: naming the file, and what is no GeoJSON.
    """
    return (rings_of(shape, name) for shape in shapes_of(data, name) if shape.kind == "polygon")


def shapes_of(data: bytes, name: str) -> Iterator[Shape]:
    """Yield the shapes of a GeoJSON, with their classes.

    Raises:
        UnreadableAnnotation: naming the file, and what is no GeoJSON.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnreadableAnnotation(f"{name} is no GeoJSON: {error}; export it again") from error
    return geojson.shapes_in(values, name)


def rings_of(polygon: Shape, name: str) -> list[np.ndarray]:
    """Return the rings of a polygon, as the file has them: (n, 2) x, y; its outside, then its holes.

    Raises:
        UnreadableAnnotation: one has no area, or is not finite; naming the file.
    """
    rings = [polygon.points, *polygon.holes]
    for points in rings:
        if len(points) < 3 or not np.isfinite(points).all():
            raise UnreadableAnnotation(
                f"{name} has a ring of {len(points)} points, expected at least 3 of two finite numbers; export it again"
            )
    return rings
