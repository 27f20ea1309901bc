"""Masks as layers of a page: outlines, or a picture where outlines are too long; what is not drawn is counted.

A layer shows no target where there is none. Outlines are simplified by a hair and then held against their mask, pixel
by pixel; a picture has the mask's own pixels, or twice as wide ones. What has no room either way is left out, the
smallest targets first, and a note says how many.
"""

import io
import math
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from PIL import Image

from stas_core.arrays import Mask, ResizedMask

LARGEST_SIDE_PX = 3200
"""Larger masks are shrunk: no page shows as many pixels."""
_ASTRAY_SHARE = 1 / 400
"""Of the longer side: how far what is drawn may lie from the mask, and the mask from what is drawn."""
_FINEST_SHARE, _COARSER = 1 / 1600, 1.6
"""Of the longer side: by how much outlines are simplified at first; how much more each time they are too long."""
_LEAST_TOLERANCE_PX, _SHORTEST_RING = 0.1, 12
"""What no line of a ring is shorter than; characters of the path of one pixel, at least."""
_HOLES_LOST = 4
"""Where rings are so many times too many, simplified holes, which may vanish, are not even tried."""
_PREFIX_CHARACTERS = 30
"""Of a data URI, before its data."""
_TRIES = 8
"""Numbers of targets that are tried, until one is found that nearly fills the room."""


@dataclass(frozen=True, slots=True)
class DrawnMask:
    """A mask as a page shows it: by a path or by a picture, in the mask's frame."""

    path: str = ""
    """Outlines as one SVG path for even-odd filling, in px of the mask."""
    picture: bytes = b""
    """Or a lossless WebP, white on black, where outlines are too long; to be stretched to the mask's size."""
    note: str = ""
    """What is not drawn."""


def draw_mask(mask: Mask, num_characters: int) -> DrawnMask:
    """Draw a mask in so many characters: the picture takes four of them for three bytes.

    Where neither outlines nor picture fit, the largest targets that do are drawn, and `note` counts the others.
    """
    small, px = mask, 1
    while max(small.shape) > LARGEST_SIDE_PX:
        small, px = _halved(small), 2 * px
    drawn = _draw(small, px, num_characters)
    return drawn if drawn is not None else _draw_largest(mask, small, px, num_characters)


def astray_px(shape: tuple[int, ...]) -> int:
    """Return how far, in px of a mask, what is drawn may lie from it: pixels that a page cannot tell apart.

    >>> astray_px((300, 400)), astray_px((2400, 3200))
    (1, 8)
    """
    return max(1, round(_ASTRAY_SHARE * max(shape)))


def _draw(mask: Mask, px: int, num_characters: int) -> DrawnMask | None:
    """Draw all of a mask whose pixels are `px` wide; None: nothing true to it is short enough."""
    path = _true_path(mask, px, num_characters)
    if path is not None:
        return DrawnMask(path)
    for plane in (mask, _halved(mask)):
        picture = _encode(plane)
        if _fits(picture, num_characters):
            return DrawnMask(picture=picture)
    return None


def _draw_largest(mask: Mask, small: ResizedMask, px: int, num_characters: int) -> DrawnMask:
    """Draw as many targets as fit, the largest first; `small` is the mask in pixels `px` wide."""
    num, labels, stats, _ = cv2.connectedComponentsWithStats(small.astype(np.uint8), connectivity=8)
    ranks = np.full(num, num)  # of the background, too
    # Of equal targets any come first, wherever they lie: else the top of an image would seem to have more of them.
    any_order = np.random.default_rng(0).permutation(num - 1)
    ranks[1 + np.lexsort((any_order, -stats[1:, cv2.CC_STAT_AREA]))] = np.arange(num - 1)
    places = ranks[labels]
    drawn, fit, too_many = DrawnMask(), 0, num - 1
    for _ in range(_TRIES):
        tried = max(fit + 1, math.isqrt(max(1, fit) * too_many))
        if tried >= too_many:
            break
        found = _draw(places < tried, px, num_characters)
        drawn, fit, too_many = (drawn, fit, tried) if found is None else (found, tried, too_many)
    num_all, num_drawn = (_count_targets(one, px, mask) for one in (small, places < fit))
    which = "only the largest are" if num_drawn else "none is"
    note = f"{num_all - num_drawn:,} of {num_all:,} targets are not drawn, as the page has no room ({which})"
    return DrawnMask(drawn.path, drawn.picture, note)


def _count_targets(shown: ResizedMask, px: int, mask: Mask) -> int:
    """Count the targets of a mask that lie in what is shown of it, which is `px` times as coarse."""
    if px > 1:
        wide = np.repeat(np.repeat(shown, px, axis=0), px, axis=1)[: mask.shape[0], : mask.shape[1]]
        shown = np.asarray(wide & mask, bool)
    return int(cv2.connectedComponents(shown.astype(np.uint8), connectivity=8)[0]) - 1


def _encode(mask: Mask) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(sink, "WEBP", lossless=True, quality=80, method=4)
    return sink.getvalue()


def _fits(picture: bytes, num_characters: int) -> bool:
    return _PREFIX_CHARACTERS + 4 * math.ceil(len(picture) / 3) <= num_characters


def outline_path(mask: Mask, num_characters: int = 10_000) -> str | None:
    """Return the outlines of a mask as one SVG path for even-odd filling, in px; None where a true one is too long.

    Targets that the border cuts are closed along it. No target vanishes.

    >>> mask = np.zeros((8, 8), bool)
    >>> mask[2:5, 2:6] = True
    >>> outline_path(mask)
    'M2 2v3h4v-3z'
    """
    return _true_path(mask, 1, num_characters)


def _true_path(mask: Mask, px: int, num_characters: int) -> str | None:
    # Corners of pixels have whole coordinates, and a pixel's corner belongs to it: repeated pixels give both sides.
    contours, hierarchy = cv2.findContours(_on_corners(mask), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    is_hole = [] if hierarchy is None else (hierarchy[0, :, 3] >= 0).tolist()
    if _SHORTEST_RING * max(is_hole.count(False), len(is_hole) / _HOLES_LOST) > num_characters:
        return None
    side = max(mask.shape)
    tolerance_px = side * _FINEST_SHARE
    while tolerance_px <= side * _ASTRAY_SHARE:
        rings = [_simplified(ring, tolerance_px, hole) for ring, hole in zip(contours, is_hole, strict=True)]
        rings = [ring for ring in rings if len(ring) > 2]
        path = "".join(_written(px * ring) for ring in rings)
        if len(path) <= num_characters:
            return path if _is_true(rings, mask) else None
        tolerance_px *= _COARSER
    return None


def _is_true(rings: list[np.ndarray], mask: Mask) -> bool:
    """Say whether rings enclose the mask, but for what lies near its edge."""
    drawn = np.zeros(mask.shape, np.uint8)
    # The centre of a pixel lies half a pixel from its corners, in units of half a pixel: a shift of 1.
    cv2.fillPoly(drawn, [2 * ring - 1 for ring in rings], 1, shift=1)
    pixels = mask.astype(np.uint8)  # no view: a mask of Pillow's holds 255
    if np.array_equal(drawn, pixels):
        return True
    near = np.ones((2 * astray_px(mask.shape) + 1,) * 2, np.uint8)
    return not (np.any(drawn > cv2.dilate(pixels, near)) or np.any(pixels > cv2.dilate(drawn, near)))


def _halved(mask: Mask) -> ResizedMask:
    """Return a mask of half the size: a pixel is set where one of four is."""
    even = np.pad(mask, ((0, mask.shape[0] % 2), (0, mask.shape[1] % 2)))
    return np.asarray(even[::2, ::2] | even[1::2, ::2] | even[::2, 1::2] | even[1::2, 1::2], bool)


def _on_corners(mask: Mask) -> np.ndarray:
    """Return which corners of pixels, one more than pixels each way, touch the mask."""
    grown = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.uint8)
    pixels = mask.view(np.uint8)
    for dy in (0, 1):
        for dx in (0, 1):
            grown[dy : dy + mask.shape[0], dx : dx + mask.shape[1]] |= pixels
    return grown


def _simplified(contour: np.ndarray, tolerance_px: float, is_hole: bool) -> np.ndarray:
    points = cv2.approxPolyDP(contour, tolerance_px, True)
    while len(points) < 3 and not is_hole and tolerance_px > _LEAST_TOLERANCE_PX:
        tolerance_px /= 2
        points = cv2.approxPolyDP(contour, tolerance_px, True)
    return np.asarray(points[:, 0])


def _written(ring: np.ndarray) -> str:
    points = ring.tolist()
    parts = [f"M{points[0][0]} {points[0][1]}"]
    for (x0, y0), (x1, y1) in pairwise(points):
        dx, dy = x1 - x0, y1 - y0
        parts.append(f"h{dx}" if dy == 0 else f"v{dy}" if dx == 0 else f"l{dx} {dy}")
    return "".join([*parts, "z"])
