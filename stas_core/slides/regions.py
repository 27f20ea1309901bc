"""Regions of a slide at the model's resolution: the frame that tiles, maps, masks and targets are in.

The frame is cut into squares of a fixed grid, and a square is always made in the same way from the same pixels of the
file: so a pixel does not depend on the region, or the tile, that it is read with.
"""

import cv2
import numpy as np

from stas_core.arrays import RgbImage
from stas_core.errors import CoarseSlide
from stas_core.slides.resolution import Mpp
from stas_core.slides.slide import BLANK, Slide, best_level
from stas_core.slides.tiling import Box

SQUARE_PX = 256
"""Side of a square of the grid. Tiles whose corners and halos are multiples of it are read without waste."""
MOST_READ_PX = 2048
"""Side of what is read of the file for a square at most: a slide without small levels is shrunk in small squares."""
MAX_ENLARGEMENT = 1.25
"""Slides may be this much coarser than the model; a larger picture would lack the detail that the model looks for."""


class RegionReader:
    """Reads a slide in the frame of a model."""

    def __init__(self, slide: Slide, mpp: Mpp, target_mpp: float) -> None:
        """Choose the level to read: the smallest that is at least as fine as the model.

        Raises:
            CoarseSlide: the slide has less detail than the model was trained on.
        """
        self.mpp = target_mpp
        self.level0_px = target_mpp / mpp.value
        """Level-0 pixels per pixel of the frame, along a side."""
        info = slide.info
        if self.level0_px * MAX_ENLARGEMENT < 1:
            raise CoarseSlide(
                f"{info.name} has {mpp.value:g} um/px, expected at most {target_mpp * MAX_ENLARGEMENT:g} for a model "
                f"of {target_mpp:g}; scan it at a higher magnification, or use a model of its resolution"
            )
        self.level = best_level(info, self.level0_px)
        size = info.levels[self.level]
        self.ratio = self.level0_px / size.downsample
        """Pixels of the level per pixel of the frame, along a side."""
        if abs(self.ratio - round(self.ratio)) < 1e-6 * self.ratio:  # 1 / 0.5 um/px out of a TIFF's fractions
            self.ratio = float(round(self.ratio))
            self.level0_px = self.ratio * size.downsample
        self.width = max(1, int(info.width / self.level0_px * (1 + 1e-9)))
        self.height = max(1, int(info.height / self.level0_px * (1 + 1e-9)))
        self._slide, self._slide_mpp = slide, mpp
        self._square_px = SQUARE_PX  # a power of two still
        while self._square_px > 1 and self._square_px * self.ratio > MOST_READ_PX:
            self._square_px //= 2
        self._level_size = size.width, size.height

    @property
    def box(self) -> Box:
        """Return the whole frame."""
        return Box(0, 0, self.height, self.width)

    def read(self, box: Box) -> RgbImage:
        """Return the pixels of a box of the frame; outside of the slide they are white.

        Raises:
            UnreadableSlide: the file does not give them.
        """
        region = np.full((box.height, box.width, 3), BLANK, np.uint8)
        inside = Box(max(box.y0, 0), max(box.x0, 0), min(box.y1, self.height), min(box.x1, self.width))
        if inside.y0 >= inside.y1 or inside.x0 >= inside.x1:
            return region
        for rows in _squares(inside.y0, inside.y1, self.height, self._square_px):
            for cols in _squares(inside.x0, inside.x1, self.width, self._square_px):
                square = Box(rows[0], cols[0], rows[1], cols[1])
                common = square.common(inside)
                region[common.within(box).slices] = self._square(square)[common.within(square).slices]
        return region

    def read_at(self, box: Box, mpp: float) -> RgbImage:
        """Return the pixels of a box of the frame of another resolution, in um/px, as `read`."""
        return RegionReader(self._slide, self._slide_mpp, mpp).read(box)

    def _square(self, square: Box) -> RgbImage:
        size = square.width, square.height
        if self.ratio < 1:
            return self._enlarged(square)
        x0, x1 = (self._edge(x, self._level_size[0]) for x in (square.x0, square.x1))
        y0, y1 = (self._edge(y, self._level_size[1]) for y in (square.y0, square.y1))
        pixels = self._slide.read(self.level, x0, y0, max(1, x1 - x0), max(1, y1 - y0))
        if pixels.shape[:2] == (square.height, square.width):
            return pixels
        return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))

    def _edge(self, at: int, most: int) -> int:
        """Return where an edge of a square lies in the level: to the nearest pixel, so that errors never add up."""
        return min(round(at * self.ratio), most)

    def _enlarged(self, square: Box) -> RgbImage:
        """Interpolate between pixels, with those beyond the square's edge."""
        x0, y0 = int(square.x0 * self.ratio) - 1, int(square.y0 * self.ratio) - 1
        x1, y1 = int(square.x1 * self.ratio) + 2, int(square.y1 * self.ratio) + 2
        left, top = max(x0, 0), max(y0, 0)
        right, bottom = min(x1, self._level_size[0]), min(y1, self._level_size[1])
        pixels = self._slide.read(self.level, left, top, right - left, bottom - top)
        columns = (np.arange(square.x0, square.x1) + 0.5) * self.ratio - 0.5 - left
        rows = (np.arange(square.y0, square.y1) + 0.5) * self.ratio - 0.5 - top
        at_x, at_y = np.meshgrid(columns.astype(np.float32), rows.astype(np.float32))
        enlarged = cv2.remap(pixels, at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return np.asarray(enlarged)


def _squares(start: int, stop: int, end: int, side: int) -> list[tuple[int, int]]:
    """Return the first pixel of each square that a stretch meets, and the first after it."""
    return [(first, min(first + side, end)) for first in range(start // side * side, stop, side)]
