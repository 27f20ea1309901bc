"""Which targets of a slide to show one by one, and their pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
import shapely
from jaxtyping import Float64
from scipy.spatial import cKDTree
from shapely.geometry import MultiPolygon, Polygon

from stas_core.arrays import AnyRgbImage, RgbImage
from stas_core.slides.scores import PlacedTargets
from stas_core.slides.slide import BLANK
from stas_core.slides.tiling import Box

CROP_PX = 256
MOST_SHOWN = 24
"""Targets of a slide."""
MARGIN = 1.25
"""Side of a crop of a large target, in sides of its box."""


@runtime_checkable
class FramePixels(Protocol):
    """Reads a slide in the frame that targets are in, such as a `RegionReader`."""

    @property
    def mpp(self) -> float:
        """Return the um per pixel of the frame."""

    def read_at(self, box: Box, mpp: float) -> RgbImage:
        """Return a box of the frame of another resolution, in um/px; outside of the slide it is white."""


@dataclass(frozen=True)
class Chosen:
    """Some targets, and what they have in common."""

    why: str
    rows: Sequence[int]
    """Of the table of targets, from 0; no target is in two groups."""


@dataclass(frozen=True)
class Crop:
    """A target's surroundings, at the frame's resolution, or shrunk to the size of a crop."""

    image: AnyRgbImage
    um_per_px: float
    outline: Polygon | MultiPolygon
    """In um from the crop's corner."""


def choose_targets(placed: PlacedTargets, disagreement: np.ndarray | None, *, most: int = MOST_SHOWN) -> list[Chosen]:
    """Choose the largest targets, the farthest from the tumour, and those that the members differ on most.

    Without the tumour's outline the most isolated take the place of the farthest; with one member the last group is
    left out. Groups without any target are, too.
    """
    if placed.tumour_um is not None:
        far = "Farthest from the tumour's edge", placed.tumour_um
    else:
        far = "Most isolated", _isolation(placed.points_um)
    groups = [("Largest", placed.area_um2), far]
    if disagreement is not None:
        groups.append(("Members differ most", np.asarray(disagreement, np.float64)))
    each, taken, chosen = most // len(groups), set[int](), []
    for why, values in groups:
        order = np.argsort(-values, kind="stable")
        if why != "Largest":
            order = order[values[order] > 0]  # inside the tumour, alone, or undisputed
        rows = [int(row) for row in order if int(row) not in taken][:each]
        taken |= set(rows)
        chosen.append(Chosen(why, rows))
    return [group for group in chosen if group.rows]


def _isolation(points: Float64[np.ndarray, "n 2"]) -> Float64[np.ndarray, "n"]:
    """Return how far each point is from the nearest other one; 0 if there is none."""
    if len(points) < 2:
        return np.zeros(len(points))
    distances = np.asarray(cKDTree(points).query(points, k=2)[0])
    return distances[:, 1]


def crop_target(reader: FramePixels, bbox: Sequence[int], outline: Polygon | MultiPolygon) -> Crop:
    """Read a target's surroundings: those of a large one as coarse as they are shown, whatever their size.

    Args:
        reader: of the frame.
        bbox: x0, y0, x1, y1 of the target, in pixels of the frame.
        outline: of the target, in pixels of the frame.

    Raises:
        UnreadableSlide: the file does not give these pixels.
    """
    box, factor = _surroundings(bbox)
    image = reader.read_at(box, reader.mpp * factor)
    if box.width > CROP_PX:
        image = np.asarray(cv2.resize(image, (CROP_PX, CROP_PX), interpolation=cv2.INTER_AREA))
    return _crop(image, box, reader.mpp * factor, shapely.transform(outline, lambda points: points * reader.mpp))


def blank_crop(mpp: float, bbox: Sequence[int], outline: Polygon | MultiPolygon) -> Crop:
    """Return the crop of a target whose pixels cannot be read: its outline on white."""
    box, factor = _surroundings(bbox)
    image = np.full((CROP_PX, CROP_PX, 3), BLANK, np.uint8)
    return _crop(image, box, mpp * factor, shapely.transform(outline, lambda points: points * mpp))


def _surroundings(bbox: Sequence[int]) -> tuple[Box, int]:
    """Return a square about a box, in pixels so many times as large as those of the frame that it has 256 to 511."""
    x0, y0, x1, y1 = (int(value) for value in bbox)
    side = max(CROP_PX, round(MARGIN * max(x1 - x0, y1 - y0)))
    factor = side // CROP_PX
    left, top = (x0 + x1 - side) // 2 // factor, (y0 + y1 - side) // 2 // factor
    size = -(-side // factor)
    return Box(top, left, top + size, left + size), factor


def _crop(image: RgbImage, box: Box, mpp: float, outline_um: Polygon | MultiPolygon) -> Crop:
    corner_um = np.array([box.x0, box.y0]) * mpp
    return Crop(image, mpp * box.width / CROP_PX, shapely.transform(outline_um, lambda points: points - corner_um))


def describe_target(placed: PlacedTargets, row: int, disagreement: np.ndarray | None) -> list[str]:
    """Return what is worth saying of a target: its area, its distances, how far the members differ on it."""
    lines = [f"{placed.area_um2[row]:,.0f} µm²"]
    if placed.tumour_um is not None:
        away = placed.tumour_um[row]
        lines.append(f"{_length(away)} from the tumour" if away else "in the tumour")
    if placed.edge_um is not None:
        lines.append(f"{_length(placed.edge_um[row])} from the section's edge")
    if disagreement is not None:
        lines.append(f"members differ by {disagreement[row]:.2f}")
    return lines


def _length(um: float) -> str:
    return f"{um:.0f} µm" if um < 1000 else f"{um / 1000:.2f} mm"
