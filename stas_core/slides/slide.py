"""What a slide is to all that reads one: levels, resolution, and pixels of any region.

Pixels are decoded in blocks of a fixed grid, never at the corner that a caller asks for: some decoders interpolate
between pixels when a level's scale is odd, so the same pixel would come out differently in another region.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import cv2
import numpy as np

from stas_core.arrays import ResizedImage, RgbImage
from stas_core.errors import InputError, OutOfMemory, UnreadableSlide, without_addresses
from stas_core.slides.recent import RecentArrays

CACHE_BYTES = 2**26
"""Decoded blocks that a slide keeps: neighbouring tiles share those of their halo."""
BLANK = 255
"""Grey value of what a scanner did not image."""


@dataclass(frozen=True)
class Level:
    """One level of a pyramid."""

    width: int
    height: int
    downsample: float
    """Level-0 pixels per pixel of this level, along a side."""


@dataclass(frozen=True)
class Bounds:
    """The part of level 0 that was scanned; the rest of the frame is empty."""

    x0: int
    y0: int
    width: int
    height: int


@dataclass(frozen=True)
class SlideInfo:
    """What a file says of itself."""

    name: str
    vendor: str
    levels: tuple[Level, ...]
    """Level 0 is the largest."""
    mpp_x: float | None = None
    """um per level-0 pixel, as the file has it: not judged yet."""
    mpp_y: float | None = None
    objective: float | None = None
    """Magnification of the objective."""
    bounds: Bounds | None = None

    @property
    def width(self) -> int:
        """Return the width of level 0."""
        return self.levels[0].width

    @property
    def height(self) -> int:
        """Return the height of level 0."""
        return self.levels[0].height


@runtime_checkable
class Slide(Protocol):
    """An open slide."""

    @property
    def info(self) -> SlideInfo:
        """Return what the file says of itself."""

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RgbImage:
        """Return a region of a level, in that level's pixels; what is transparent or outside is white.

        Raises:
            UnreadableSlide: the file does not give these pixels.
        """

    def close(self) -> None:
        """Let go of the file."""


@runtime_checkable
class Decoder(Protocol):
    """One file format: blocks of its levels."""

    info: SlideInfo

    def block_size(self, level: int) -> tuple[int, int]:
        """Return (width, height) of what is decoded at once."""

    def decode(self, level: int, col: int, row: int) -> RgbImage:
        """Return a block, cut at the level's edges."""

    def close(self) -> None:
        """Let go of the file."""


class BlockSlide:
    """A slide whose regions are put together from decoded blocks. Not for several threads at once."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._blocks: RecentArrays[tuple[int, int, int]] = RecentArrays(CACHE_BYTES)

    @property
    def info(self) -> SlideInfo:
        """Return what the file says of itself."""
        return self._decoder.info

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RgbImage:
        """Return a region, as `Slide.read`."""
        size = self.info.levels[level]
        block_width, block_height = self._decoder.block_size(level)
        region = np.full((height, width, 3), BLANK, np.uint8)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, size.width), min(y + height, size.height)
        if x0 >= x1 or y0 >= y1:
            return region
        for row in range(y0 // block_height, (y1 - 1) // block_height + 1):
            for col in range(x0 // block_width, (x1 - 1) // block_width + 1):
                left, top = col * block_width, row * block_height
                block = self._block(level, col, row)
                part = block[max(y0 - top, 0) : y1 - top, max(x0 - left, 0) : x1 - left]
                at_y, at_x = max(y0, top) - y, max(x0, left) - x
                region[at_y : at_y + part.shape[0], at_x : at_x + part.shape[1]] = part
        return region

    def _block(self, level: int, col: int, row: int) -> RgbImage:
        def decoded() -> RgbImage:
            where = f"{self.info.name} (level {level}, block {col}, {row})"
            with reading(where, "copy the slide again, or export it anew"):
                return self._decoder.decode(level, col, row)

        return self._blocks.of((level, col, row), decoded)

    def close(self) -> None:
        """Let go of the file and of decoded blocks."""
        self._blocks.clear()
        self._decoder.close()

    def __enter__(self) -> "BlockSlide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def thumbnail(slide: Slide, max_px: int = 1024) -> ResizedImage:
    """Return the whole slide, its longer side at most `max_px`, without ever holding a large level."""
    info = slide.info
    scale = min(1.0, max_px / max(info.width, info.height))
    width, height = max(1, round(info.width * scale)), max(1, round(info.height * scale))
    level = best_level(info, 1 / scale)
    size = info.levels[level]
    small = np.empty((height, width, 3), np.uint8)
    strip = max(1, 2**22 * height // (size.width * size.height))  # of about 4 Mpx
    for top in range(0, height, strip):
        bottom = min(height, top + strip)
        y0, y1 = top * size.height // height, max(bottom * size.height // height, top * size.height // height + 1)
        pixels = slide.read(level, 0, y0, size.width, y1 - y0)
        small[top:bottom] = cv2.resize(pixels, (width, bottom - top), interpolation=cv2.INTER_AREA)
    return small


def best_level(info: SlideInfo, downsample: float) -> int:
    """Return the smallest level that is at least as fine as asked for, or level 0."""
    fine = [index for index, level in enumerate(info.levels) if level.downsample <= downsample * (1 + 1e-6)]
    return max(fine, key=lambda index: info.levels[index].downsample, default=0)


def levels_of(sizes: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Return levels of these widths and heights.

    Scanners round a level's size: 4443 px halved are 2221, and the scale is 2, not 2.0005. Where a whole number
    explains both sides within a pixel, best a power of two, it is the scale.
    """
    full_width, full_height = sizes[0]
    levels = []
    for width, height in sizes:
        mean = (full_width / width + full_height / height) / 2
        whole = [2 ** round(math.log2(mean)), round(mean)]
        explaining = [one for one in whole if abs(full_width / one - width) <= 1 >= abs(full_height / one - height)]
        levels.append(Level(width, height, float(explaining[0]) if explaining else mean))
    return tuple(levels)


def on_white(rgb: RgbImage, alpha: np.ndarray) -> RgbImage:
    """Return colours on a white ground, by their opacity `[y, x]`."""
    share = alpha[..., None].astype(np.uint16)
    return ((rgb * share + BLANK * (255 - share) + 127) // 255).astype(np.uint8)


@contextmanager
def reading(name: str, remedy: str) -> Iterator[None]:
    """Turn whatever a reader raises, which is almost anything on damaged files, into an error naming the slide.

    Raises:
        UnreadableSlide, OutOfMemory: an `InputError` of the block passes as it is.
    """
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise OutOfMemory(f"{name} does not fit into memory when it is decoded; give the process more") from error
    except Exception as error:
        cause = without_addresses(f"{type(error).__name__}: {error}")
        raise UnreadableSlide(f"{name} cannot be read: {cause}; {remedy}") from error
