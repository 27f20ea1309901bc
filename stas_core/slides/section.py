"""What targets lie in: the section of tissue with its edge, and the tumour with its own. Lengths are um."""

from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import shapely
from jaxtyping import Bool, Float32, Float64
from shapely.geometry import MultiPolygon, Polygon

from stas_core.arrays import Mask
from stas_core.errors import MissingShapes, WrongCoordinates
from stas_core.slides.regions import RegionReader
from stas_core.slides.tissue import Tissue

Values = Float64[np.ndarray, "n"]
Flags = Bool[np.ndarray, "n"]


@dataclass(frozen=True)
class Frame:
    """The frame that maps and targets are in."""

    height: int
    width: int
    mpp: float
    """um per pixel."""
    level0_px: float
    """Level-0 pixels per pixel, along a side."""

    @classmethod
    def of(cls, reader: RegionReader) -> "Frame":
        """Return the frame that a reader reads in."""
        return cls(reader.height, reader.width, reader.mpp, reader.level0_px)


@dataclass(frozen=True)
class Section:
    """The tissue on a slide, and how far it is to the edge of it."""

    area_mm2: float
    mpp: float
    """um per pixel of the tissue mask: distances are good to one."""
    _edge_um: Float32[np.ndarray, "h w"] | None

    @classmethod
    def of(cls, tissue: Tissue, *, whole: Tissue | None = None) -> "Section":
        """Measure the tissue.

        Args:
            tissue: what is scored; its area counts.
            whole: all tissue of the slide, where `tissue` was narrowed to a region of interest, whose outline is no
                edge of the section.
        """
        of_edge = whole or tissue
        glass = _glass(of_edge.mask)
        if not glass.any():
            return cls(tissue.area_mm2, of_edge.mpp, None)
        steps = cv2.distanceTransform((~glass).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        # It counts from middle to middle of pixels, and the edge is half a pixel before the glass.
        return cls(tissue.area_mm2, of_edge.mpp, np.maximum(steps - np.float32(0.5), 0) * np.float32(of_edge.mpp))

    def distances_um(self, x_um: Values, y_um: Values) -> Values | None:
        """Return how far points are from the section's edge; 0: on glass; None: no edge is on the slide."""
        if self._edge_um is None:
            return None
        rows, cols = self._edge_um.shape
        row = np.clip((y_um / self.mpp).astype(np.int64), 0, rows - 1)
        col = np.clip((x_um / self.mpp).astype(np.int64), 0, cols - 1)
        return self._edge_um[row, col].astype(np.float64)


def _glass(mask: Mask) -> Mask:
    """Return what lies outside of the section: background that reaches the slide's border. The rest is air spaces."""
    _, labels = cv2.connectedComponents((~mask).view(np.uint8), connectivity=4)
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    outside = np.zeros(int(labels.max()) + 1, bool)
    outside[border] = True
    outside[0] = False
    return np.asarray(outside[labels])


class Tumour:
    """The tumour that a user outlined."""

    def __init__(self, outline: Polygon | MultiPolygon, frame: Frame) -> None:
        """Take an outline in pixels of the frame. Of lines that cross, what they go round twice is outside.

        Raises:
            MissingShapes: it has no area.
            WrongCoordinates: it lies outside of the frame.
        """
        parts = shapely.get_parts(shapely.make_valid(outline))
        areas = parts[shapely.area(parts) > 0]
        if not len(areas):
            raise MissingShapes(
                f"the tumour's outline is a {outline.geom_type} without area, expected a polygon; draw it round the "
                "tumour, or leave it out"
            )
        whole = shapely.union_all(areas)
        if not shapely.intersects(whole, shapely.box(0, 0, frame.width, frame.height)):
            x0, y0, x1, y1 = (round(value) for value in whole.bounds)
            raise WrongCoordinates(
                f"the tumour's outline spans x {x0} to {x1} and y {y0} to {y1} px, and the slide is {frame.width}x"
                f"{frame.height} px at {frame.mpp:g} um/px; export the outline of this slide"
            )
        self._area = shapely.transform(whole, lambda points: points * frame.mpp)
        shapely.prepare(self._area)
        lines = [shapely.get_coordinates(ring) for ring in shapely.get_parts(shapely.boundary(self._area))]
        sides = np.concatenate([np.stack([line[:-1], line[1:]], axis=1) for line in lines])
        self._sides = shapely.STRtree(np.asarray(shapely.linestrings(sides)))
        self.edge_mm = float(self._area.length) / 1000
        """Length of its outline, that of holes included."""

    @property
    def area_um(self) -> Polygon | MultiPolygon:
        """Return the tumour, in um from the left and the top of the frame."""
        return cast(Polygon | MultiPolygon, self._area)

    def contains(self, x_um: Values, y_um: Values) -> Flags:
        """Tell which points lie in it or on its edge."""
        return np.asarray(shapely.intersects_xy(self._area, x_um, y_um))

    def distances_um(self, x_um: Values, y_um: Values) -> Values:
        """Return how far points are from its edge; 0 inside."""
        distances = np.zeros(len(x_um))
        outside = np.flatnonzero(~self.contains(x_um, y_um))
        if len(outside):
            points = shapely.points(x_um[outside], y_um[outside])
            pairs, found = self._sides.query_nearest(points, return_distance=True, all_matches=False)
            distances[outside[pairs[0]]] = found
        return distances
