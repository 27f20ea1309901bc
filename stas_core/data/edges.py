"""Masks as polygons along the edges of their pixels, in labelme's frame: pixel centres at whole coordinates."""

from collections.abc import Sequence

import cv2
import numpy as np

from stas_core.arrays import Mask
from stas_core.data.shapes import Polygon


def mask_to_polygons(mask: Mask) -> list[Polygon]:
    """Outline a mask's 8-connected components along pixel edges; rasterising the polygons gives the mask back exactly.

    labelme knows no holes, so a hole is joined to its outline by a bridge of no width, walked in both directions:
    even-odd filling leaves the hole open.
    """
    return [bridged(rings) for rings in outlines(mask)]


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


def bridged(rings: Sequence[Polygon]) -> Polygon:
    """Join a polygon's rings, its outside first, to one: from ring to ring, round each, back along the same bridges."""
    there = [np.concatenate([ring, ring[:1]]) for ring in rings]
    back = [ring[:1] for ring in reversed(rings[:-1])]
    return np.concatenate(there + back) if len(rings) > 1 else rings[0]
