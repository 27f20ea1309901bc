"""The truth of a slide, and masks that were written of it, read box by box in the frame of a map.

    truth = TiffMask("masks/0007.tif", size=(20_000, 30_000))
    truth = OutlineSource.of(data, "0007.geojson", size=(20_000, 30_000), level0_px=2.0)

Both are a `MapSource` of 0 and 255, so all that works on maps works on them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from stas_core.arrays import Mask, ProbMapU8
from stas_core.errors import SizeMismatch, UnclearMask
from stas_core.slides.outlines import draw_polygon, polygons_of
from stas_core.slides.recent import RecentArrays
from stas_core.slides.slide import reading
from stas_core.slides.tiling import Box

_CACHE_BYTES = 64 << 20
_LARGEST_PX = 1 << 26
"""Of an outline that is drawn whole."""
_SAME_SHAPE = 0.01
"""A mask covers the frame where the scales along both sides differ by no more than this share."""


class TiffMask:
    """A grey tiled TIFF, as `write_pyramid` writes it; in the frame of a map, each pixel is that under its middle."""

    def __init__(self, path: str | Path, size: tuple[int, int] | None = None) -> None:
        """Open a local file, which covers a frame of (height, width); None: the frame is its own.

        Raises:
            UnreadableSlide: it is no TIFF, or a damaged one.
            UnclearMask: it is not grey, of 8 bits and tiled.
            SizeMismatch: it has another shape than the frame.
        """
        self._name = str(path)
        with reading(self._name, "write it again"):
            self._file = tifffile.TiffFile(path)
        page: Any = self._file.pages[0]
        self._page = page
        if page.samplesperpixel != 1 or page.dtype != np.uint8 or not page.is_tiled:
            self.close()
            raise UnclearMask(
                f"{path} has {page.samplesperpixel} channel(s) of {page.dtype}; expected grey tiles of 8 bits"
            )
        self.size = size or (page.imagelength, page.imagewidth)
        self._steps = page.imagelength / self.size[0], page.imagewidth / self.size[1]
        slack = _SAME_SHAPE + 1 / min(*self.size, page.imagelength, page.imagewidth)
        if abs(self._steps[0] / self._steps[1] - 1) > slack:
            self.close()
            raise SizeMismatch(
                f"{path} is {page.imagewidth}x{page.imagelength} px, and the slide {self.size[1]}x{self.size[0]} in "
                "its frame: of another shape; give a mask of the whole slide"
            )
        self._tiles: RecentArrays[int] = RecentArrays(_CACHE_BYTES)

    def read(self, y0: int, x0: int, height: int, width: int) -> ProbMapU8:
        """Read a box that lies within the frame.

        Raises:
            UnreadableSlide: the file does not give these pixels.
        """
        rows, cols = (
            np.minimum(((first + np.arange(num) + 0.5) * step).astype(np.int64), end - 1)
            for first, num, step, end in zip((y0, x0), (height, width), self._steps, self._page.shape, strict=True)
        )
        box = np.zeros((height, width), np.uint8)
        down, across = self._page.tilelength, self._page.tilewidth
        for row in range(rows[0] // down, rows[-1] // down + 1):
            for col in range(cols[0] // across, cols[-1] // across + 1):
                tile = self._tile(row * -(-self._page.imagewidth // across) + col)
                if tile.size:
                    ys, xs = (
                        np.flatnonzero(at // num == one) for at, num, one in ((rows, down, row), (cols, across, col))
                    )
                    part = tile[np.ix_(rows[ys] - row * down, cols[xs] - col * across)]
                    box[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1] = part
        return box

    def is_blank(self, y0: int, x0: int, height: int, width: int) -> bool:
        """Not known."""
        return False

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _tile(self, number: int) -> npt.NDArray[np.uint8]:
        """Return a tile; without any pixel if it is 0 everywhere."""

        def decoded() -> npt.NDArray[np.uint8]:
            page = self._page
            with reading(f"{self._name} (tile {number})", "write it again"):
                self._file.filehandle.seek(page.dataoffsets[number])
                data = self._file.filehandle.read(page.databytecounts[number])
                tile = np.asarray(page.decode(data, number)[0])[0, ..., 0]
            return tile if tile.any() else np.zeros((0, 0), np.uint8)

        return self._tiles.of(number, decoded)


@dataclass(frozen=True)
class OutlineSource:
    """Outlines, drawn where they are read."""

    size: tuple[int, int]
    """Height and width of the frame."""
    polygons: tuple[list[np.ndarray], ...]
    """The rings of each in px of the frame, whole coordinates at pixel centres."""
    boxes: npt.NDArray[np.float64]
    """(n, 4): least and greatest x, least and greatest y of each."""

    @classmethod
    def of(
        cls, data: bytes, name: str, *, size: tuple[int, int], level0_px: float, corner: tuple[int, int] = (0, 0)
    ) -> "OutlineSource":
        """Take the polygons of a GeoJSON, whatever their class; see `of_polygons`.

        Raises:
            UnreadableAnnotation: it is no GeoJSON.
        """
        return cls.of_polygons(polygons_of(data, name), size=size, level0_px=level0_px, corner=corner)

    @classmethod
    def of_polygons(
        cls,
        found: Iterable[Sequence[np.ndarray]],
        *,
        size: tuple[int, int],
        level0_px: float,
        corner: tuple[int, int] = (0, 0),
    ) -> "OutlineSource":
        """Take polygons; there may be none.

        Args:
            found: the rings of each, (n, 2) x, y in level-0 px.
            size: height and width of the frame.
            level0_px: level-0 pixels per pixel of the frame, along a side.
            corner: x, y of the level-0 pixel that coordinates count from: QuPath's is that of the slide's bounds.
        """
        polygons = tuple([(ring + corner) / level0_px - 0.5 for ring in rings] for rings in found)
        boxes = [[rings[0].min(axis=0), rings[0].max(axis=0)] for rings in polygons]
        table = np.array(boxes, float).reshape(-1, 2, 2).transpose(0, 2, 1).reshape(-1, 4)
        return cls(size, polygons, table)

    def covers(self, box: Box) -> Mask:
        """Return which pixels of a box lie within an outline."""
        return np.asarray(self.read(box.y0, box.x0, box.height, box.width) > 0)

    def read(self, y0: int, x0: int, height: int, width: int) -> ProbMapU8:
        """Draw a box."""
        mask, box = np.zeros((height, width), np.uint8), Box(y0, x0, y0 + height, x0 + width)
        for number in self._touching(y0, x0, height, width):
            left, right, top, bottom = self.boxes[number]
            whole = Box(int(top) - 2, int(left) - 2, int(bottom) + 3, int(right) + 3)
            # Drawn whole, and then cut: where OpenCV cuts an outline, it moves an edge by a pixel, or along the cut.
            area = whole if whole.height * whole.width <= _LARGEST_PX else Box(y0 - 8, x0 - 8, box.y1 + 8, box.x1 + 8)
            drawn = np.zeros((area.height, area.width), np.uint8)
            draw_polygon(drawn, [ring - [area.x0, area.y0] for ring in self.polygons[number]])
            shared = area.common(box)
            if shared.height > 0 and shared.width > 0:
                mask[shared.within(box).slices] |= drawn[shared.within(area).slices]
        return np.asarray(np.where(mask > 0, 255, 0), np.uint8)

    def is_blank(self, y0: int, x0: int, height: int, width: int) -> bool:
        """Tell that no outline comes near."""
        return not len(self._touching(y0, x0, height, width))

    def _touching(self, y0: int, x0: int, height: int, width: int) -> npt.NDArray[np.intp]:
        left, right, top, bottom = self.boxes.T
        return np.flatnonzero((left < x0 + width + 1) & (right > x0 - 1) & (top < y0 + height + 1) & (bottom > y0 - 1))
