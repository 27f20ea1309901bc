"""Write images, probability maps and masks of any size as pyramidal tiled BigTIFF, which OpenSlide and QuPath open.

    rows = (slide_map[top : top + 2048] for top in range(0, height, 2048))
    write_pyramid("0007.tif", (height, width), rows, mpp=0.5)

Each level halves the one before, rounded up, until one tile holds it: a pixel of a level is the mean of the level-0
pixels under it. Levels grow together as the rows come in, from a strip of `tile_px` rows each; encoded tiles of the
smaller ones wait in temporary files without a name. No tag holds a date or a version: equal pixels give equal bytes.
"""

import functools
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice, pairwise, repeat
from pathlib import Path
from typing import IO, Any

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

Pixels = npt.NDArray[np.uint8]
"""Grey (h, w) or RGB (h, w, 3)."""
_DEFLATE_LEVEL = 1
"""libdeflate's fastest is within 8 % of the size that its default gives, in a fifth to a half of the time."""


@dataclass(frozen=True)
class Layout:
    """How pixels are stored."""

    tile_px: int = 512
    """Side of a tile, a multiple of 16."""
    smooth: bool = True
    """Smaller levels have means; False: 0 or 255, whichever covers more of a pixel, a tie being 255."""
    jpeg_quality: int | None = None
    """1 to 100; None: deflate, which loses nothing and which all readers know."""

    def __post_init__(self) -> None:
        if self.tile_px < 16 or self.tile_px % 16:
            raise ValueError(f"tile_px = {self.tile_px}: TIFF has tiles whose side is a multiple of 16")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality = {self.jpeg_quality}: expected 1 to 100, or None for deflate")


MASK = Layout(smooth=False)
"""For masks of 0 and 255."""


def write_pyramid(
    path: str | Path,
    size: tuple[int, int],
    strips: Iterable[Pixels],
    *,
    mpp: float | None,
    layout: Layout = Layout(),
    pool: Executor | None = None,
) -> None:
    """Write a pyramid from strips of full width, top to bottom. Where it fails, a broken file is left at `path`.

    Args:
        path: a local file.
        size: height and width in px.
        strips: grey or RGB, uint8; each but the last has a multiple of `layout.tile_px` rows.
        mpp: um per pixel, for the resolution tags; None: the file does not say.
        layout: tiles, compression, and what smaller levels are.
        pool: threads that encode tiles while the next strips are made; the bytes are the same without.

    Raises:
        ValueError: the strips do not make up an image of this size.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_pyramid(f"{folder}/a.tif", (700, 900), [np.zeros((700, 900), np.uint8)], mpp=0.5)
        ...     with tifffile.TiffFile(f"{folder}/a.tif") as file:
        ...         [page.shape for page in file.pages]
        [(700, 900), (350, 450)]
    """
    waiting = iter(strips)
    first = list(islice(waiting, 1))
    if not first:
        raise ValueError(f"{path}: no strips, expected those of {size[1]}x{size[0]} px")
    path, channels = Path(path), first[0].shape[2:]
    encoder = _Encoder(layout, pool)
    tags: dict[str, Any] = _tags(channels, mpp, layout)
    with ExitStack() as files:
        levels = [
            _Level((*level, *channels), encoder, files.enter_context(tempfile.TemporaryFile(dir=path.parent)))
            for level in level_sizes(size, layout.tile_px)[1:]
        ]
        for level, smaller in pairwise(levels):
            level.smaller = smaller
        file = files.enter_context(tifffile.TiffWriter(path, bigtiff=True, byteorder="<"))
        rows = _tile_rows(chain(_given_away(first), waiting), (*size, *channels), layout.tile_px, str(path))
        file.write(_encoded(rows, levels[:1], encoder), shape=(*size, *channels), subfiletype=0, **tags)
        next(rows, None)  # one row too many is an error, too
        for level in levels:
            file.write(level.encoded(), shape=level.shape, subfiletype=1, **tags)


def _given_away(strips: list[Any]) -> Iterator[Any]:
    """Yield strips and keep none: a strip of a gigapixel slide takes 100 MB."""
    while strips:
        yield strips.pop(0)


def level_sizes(size: tuple[int, int], tile_px: int) -> list[tuple[int, int]]:
    """Return (height, width) of all levels, the largest first.

    Example:
        >>> level_sizes((2001, 1200), 512)
        [(2001, 1200), (1001, 600), (501, 300)]
    """
    sizes = [size]
    while max(sizes[-1]) > tile_px and min(sizes[-1]) > 1:
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes


def halved(pixels: Pixels) -> Pixels:
    """Return the means of 2x2 pixels, halves rounded up; those of an odd last row or column are of 2x1, 1x2 or 1x1."""
    height, width = pixels.shape[:2]
    if height % 2 or width % 2:
        pixels = np.asarray(cv2.copyMakeBorder(pixels, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE))
    size = pixels.shape[1] // 2, pixels.shape[0] // 2
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


@dataclass(frozen=True)
class _Encoder:
    """Encodes rows of tiles, in threads if there is a pool."""

    layout: Layout
    pool: Executor | None

    def encode(self, rows: Pixels) -> Iterator[bytes]:
        """Return the encoded tiles of a row of tiles, in order; the rows may change once this returns."""
        side = self.layout.tile_px
        tiles = (rows[:, left : left + side] for left in range(0, rows.shape[1], side))
        if self.pool is None:
            return iter([_encode_tile(tile, self.layout) for tile in tiles])
        return self.pool.map(_encode_tile, [tile.copy() for tile in tiles], repeat(self.layout))


class _Level:
    """A smaller level: its rows gather until they fill a row of tiles, whose bytes wait in a file."""

    def __init__(self, shape: tuple[int, ...], encoder: _Encoder, file: IO[bytes]) -> None:
        self.shape, self._encoder, self._file = shape, encoder, file
        self.smaller: _Level | None = None
        self._rows: Pixels = np.empty((min(encoder.layout.tile_px, shape[0]), *shape[1:]), np.uint8)
        self._num_rows, self._num_left = 0, shape[0]
        self._sizes = array("Q")
        self._tiles: Iterator[bytes] = iter(())

    def add(self, rows: Pixels) -> None:
        self._rows[self._num_rows : self._num_rows + len(rows)] = rows
        self._num_rows += len(rows)
        layout = self._encoder.layout
        if self._num_rows < min(layout.tile_px, self._num_left):
            return
        full = self._rows[: self._num_rows]
        self._store()
        self._tiles = self._encoder.encode(full if layout.smooth else np.where(full < 128, np.uint8(0), np.uint8(255)))
        if self.smaller is not None:
            self.smaller.add(halved(full))
        self._num_left -= self._num_rows
        self._num_rows = 0

    def _store(self) -> None:
        """Store the tiles of the row before, which had the time of this one to be encoded."""
        for data in self._tiles:
            self._sizes.append(len(data))
            self._file.write(data)

    def encoded(self) -> Iterator[bytes]:
        """Yield the tiles, when all rows are there."""
        self._store()
        self._file.seek(0)
        for num_bytes in self._sizes:
            yield self._file.read(num_bytes)


def _encoded(rows: Iterable[Pixels], smaller: list[_Level], encoder: _Encoder) -> Iterator[bytes]:
    before: Iterator[bytes] = iter(())
    for one in rows:
        for level in smaller:
            level.add(halved(one))
        tiles = encoder.encode(one)
        del one  # it is a view of a strip: the next is made without it
        yield from before
        before = tiles
    yield from before


def _encode_tile(tile: Pixels, layout: Layout) -> bytes:
    """Return an encoded tile; what lies outside of the image repeats its edge."""
    height, width = tile.shape[:2]
    rest = layout.tile_px - height, layout.tile_px - width
    whole = np.asarray(cv2.copyMakeBorder(tile, 0, rest[0], 0, rest[1], cv2.BORDER_REPLICATE), np.uint8)
    if layout.jpeg_quality is not None:
        colours: dict[str, Any] = {}
        if whole.ndim == 3:
            colours = {"colorspace": "rgb", "outcolorspace": "ycbcr", "subsampling": "420"}
        return bytes(imagecodecs.jpeg8_encode(whole, level=layout.jpeg_quality, **colours))
    if whole.ndim == 3:
        return _deflate(np.asarray(imagecodecs.delta_encode(whole, axis=1), np.uint8))
    level = int(whole[0, 0])
    return _deflate_uniform(layout.tile_px, level) if (whole == level).all() else _deflate(whole)


def _deflate(pixels: Pixels) -> bytes:
    return bytes(imagecodecs.deflate_encode(pixels.tobytes(), level=_DEFLATE_LEVEL, raw=False))


@functools.lru_cache(maxsize=8)
def _deflate_uniform(side: int, level: int) -> bytes:
    """Return an encoded tile of one grey level: most of a slide's tiles are 0."""
    return _deflate(np.full((side, side), level, np.uint8))


def _tags(channels: tuple[int, ...], mpp: float | None, layout: Layout) -> dict[str, Any]:
    tags: dict[str, Any] = {"dtype": np.uint8, "tile": (layout.tile_px,) * 2, "metadata": None, "software": False}
    tags["photometric"] = "rgb" if channels else "minisblack"
    tags["compression"] = "deflate" if layout.jpeg_quality is None else "jpeg"
    if channels and layout.jpeg_quality is None:
        tags["predictor"] = "horizontal"  # a fifth smaller; maps and masks grow by it
    if mpp is None:
        return tags | {"resolution": (1, 1), "resolutionunit": "NONE"}
    return tags | {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}


def _tile_rows(strips: Iterable[Pixels], shape: tuple[int, ...], tile_px: int, name: str) -> Iterator[Pixels]:
    """Cut strips into rows of tiles.

    Raises:
        ValueError: naming the strip that does not fit, or what is missing.
    """
    top = 0
    for strip in strips:
        rest = shape[0] - top
        fits = strip.dtype == np.uint8 and strip.shape[1:] == shape[1:] and strip.shape[2:] in ((), (3,))
        if not fits or not 0 < len(strip) <= rest or (len(strip) % tile_px and len(strip) != rest):
            raise ValueError(
                f"{name}: the strip at row {top} is {strip.dtype} of shape {strip.shape}; expected uint8 of shape "
                f"{(rest, *shape[1:])}, or fewer rows: a multiple of {tile_px}"
            )
        for first in range(0, len(strip), tile_px):
            yield strip[first : first + tile_px]
        top += len(strip)
        del strip
    if top < shape[0]:
        raise ValueError(f"{name}: the strips have {top} rows, expected {shape[0]}")
