"""The maps of a slide while it is predicted: a file for each block of tiles, read back as one map of any size.

    blocks/<slide>/<key>/<row>_<col>.tif

A block's file is a multi-page TIFF (zstd): a page for each plane of each tile that was predicted, described by
`<tile row> <tile col> <plane>`. Planes are `prob` (probability k / 255) and, of several members, `std` (standard
deviation k / 510) and `member_0`, `member_1`, ... A page is a tile's core, or with `blend` all that was read for it.
Equal maps give equal bytes.
"""

import io
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from pydantic import Field, field_validator, model_validator

from stas_core import storage
from stas_core.arrays import Mask, ProbMapU8
from stas_core.config import Config
from stas_core.errors import StorageError
from stas_core.slides.recent import RecentArrays
from stas_core.slides.tiling import Box, Grid, Tile, blend, neighbours

TileKey = tuple[int, int]
"""Row and column of a tile."""
Planes = Mapping[str, npt.NDArray[np.uint8]]
"""What is predicted of a tile, by name."""
PROB, STD = "prob", "std"
CACHE_BYTES, THREAD_CACHE_BYTES = 96 << 20, 48 << 20
"""Decoded tiles and undecoded blocks that a map keeps, and that one for another thread does."""
MOST_BLOCK_BYTES = 512 * 10**6
"""Pixels of a block and its halo."""
_ALIGNED_PX = 32
"""Networks halve an image up to five times: tiles that begin at other places would be sampled at others."""


class TileConfig(Config):
    """How slides are cut into tiles."""

    px: int = Field(2048, ge=64, le=8192)
    """Side of the core that a tile gives."""
    halo_px: int = Field(256, ge=0, le=2048)
    """Context about it that is predicted and thrown away, or with `blend` faded out."""
    blend: bool = False
    """Fade neighbouring tiles into one another over their halos: for networks that see a whole tile at once (layer
    norm, squeeze-excitation), to which no halo is enough. Else each pixel is one tile's."""
    measure: bool = True
    """Measure once per ensemble, on one square of tissue, how much of a map still depends on where tiles are cut."""
    block: int = Field(2, ge=1, le=16)
    """Tiles along a side of a block: what is read, predicted and, after a fault, repeated together."""

    @field_validator("px", "halo_px")
    @classmethod
    def _aligned(cls, value: int) -> int:
        if value % _ALIGNED_PX:
            nearest = max(1, round(value / _ALIGNED_PX)) * _ALIGNED_PX
            raise ValueError(f"{value} is no multiple of {_ALIGNED_PX}, which networks need: use {nearest}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> "TileConfig":
        side = self.block * self.px + 2 * self.halo_px
        if (num_bytes := 3 * side**2) > MOST_BLOCK_BYTES:
            room = math.isqrt(MOST_BLOCK_BYTES // 3) - 2 * self.halo_px
            remedy = f"block = {room // self.px}" if room >= self.px else f"px = {room // _ALIGNED_PX * _ALIGNED_PX}"
            raise ValueError(
                f"a block of {self.block} x {self.block} tiles takes 3 * ({self.block} * {self.px} + 2 * "
                f"{self.halo_px})^2 = {num_bytes / 1e6:,.0f} MB, expected at most {MOST_BLOCK_BYTES / 1e6:.0f} MB, as "
                f"it is read as one image: use {remedy} or less"
            )
        return self

    def grid(self, height: int, width: int) -> Grid:
        """Return the tiles of a slide."""
        return Grid(height, width, self.px, self.halo_px)


def member_plane(number: int) -> str:
    """Return the name of the plane of a member, from 0."""
    return f"member_{number}"


def block_name(row: int, col: int) -> str:
    """Return the name of a block's file, by its row and column among blocks."""
    return f"{row}_{col}.tif"


def page_box(tile: Tile, *, blended: bool) -> Box:
    """Return which pixels a tile's pages hold."""
    return tile.read if blended else tile.core


def encode_block(tiles: Mapping[TileKey, Planes]) -> bytes:
    """Return the file of a block: the planes of its predicted tiles, in scan order."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for (row, col), planes in sorted(tiles.items()):
            for name, levels in planes.items():
                file.write(
                    levels,
                    compression="zstd",
                    compressionargs={"level": 3},
                    photometric="minisblack",
                    rowsperstrip=256,
                    description=f"{row} {col} {name}",
                    metadata=None,
                    software=False,
                )
    return buffer.getvalue()


class SlideMaps:
    """The planes of a predicted slide, from the files of its blocks."""

    def __init__(
        self,
        folder: str,
        grid: Grid,
        config: TileConfig,
        predicted: Collection[TileKey],
        region: Callable[[Box], Mask] | None = None,
        *,
        copies: Path | None = None,
    ) -> None:
        """Elsewhere than in predicted tiles, and outside of a region of interest, the maps are 0.

        Args:
            folder: of the blocks' files.
            grid: the slide's tiles.
            config: how they were cut.
            predicted: row and column of the tiles that were predicted.
            region: returns which pixels of a box lie in the region of interest; None: all do.
            copies: a local folder for copies of the files, which are read several times; None: they are local.
        """
        self.grid = grid
        self._folder = folder
        self._config = config
        self._predicted = frozenset(predicted)
        self._region = region
        self._copies = copies
        self._cache: RecentArrays[tuple[object, ...]] = RecentArrays(CACHE_BYTES)

    def plane(self, name: str) -> "PlaneMap":
        """Return one plane as a map."""
        return PlaneMap(self, name)

    def for_thread(self) -> "SlideMaps":
        """Return the same maps for another thread, with a cache of its own."""
        maps = SlideMaps(self._folder, self.grid, self._config, self._predicted, self._region, copies=self._copies)
        maps._cache = RecentArrays(THREAD_CACHE_BYTES)
        return maps

    def is_predicted(self, tile: Tile) -> bool:
        """Tell whether a tile was predicted."""
        return (tile.row, tile.col) in self._predicted

    def core(self, tile: Tile, plane: str) -> ProbMapU8:
        """Return the core of a predicted tile.

        Raises:
            StorageError: its block's file is not there, or is damaged.
        """
        region = self._region
        if region is None:
            return self._joined(tile, plane)

        def cut() -> ProbMapU8:
            return np.where(region(tile.core), self._joined(tile, plane), np.uint8(0))

        return self._cache.of(("within", tile.row, tile.col, plane), cut)

    def _joined(self, tile: Tile, plane: str) -> ProbMapU8:
        """Return the core of a tile as it was predicted, or as its neighbours and it were blended."""
        if not self._config.blend:
            return self._page(tile, plane)

        def blended() -> ProbMapU8:
            near = [other for other in neighbours(self.grid, tile) if self.is_predicted(other)]
            maps = {(other.row, other.col): self._page(other, plane).astype(np.float32) for other in near}
            return np.asarray(np.rint(blend(self.grid, tile, maps)), np.uint8)

        return self._cache.of(("blended", tile.row, tile.col, plane), blended)

    def _page(self, tile: Tile, plane: str) -> ProbMapU8:
        side = self._config.block
        name = block_name(tile.row // side, tile.col // side)

        def decoded() -> ProbMapU8:
            box = page_box(tile, blended=self._config.blend)
            block = self._cache.of((name,), lambda: self._block(name))
            return block.page(f"{tile.row} {tile.col} {plane}", (box.height, box.width))

        return self._cache.of((tile.row, tile.col, plane), decoded)

    def _block(self, name: str) -> "_BlockFile":
        uri = storage.join(self._folder, name)
        if self._copies is None:
            return _BlockFile.of(storage.read_bytes(uri), uri)
        copy = self._copies / name
        if not copy.exists():
            whole = self._copies / f"{name}.{threading.get_ident()}"  # another thread may fetch it at the same time
            storage.fetch_file(uri, whole)
            whole.replace(copy)
        return _BlockFile.of(copy.read_bytes(), uri)


@dataclass(frozen=True)
class PlaneMap:
    """One plane of a slide: a `stitching.MapSource`."""

    maps: SlideMaps
    name: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.maps.grid.height, self.maps.grid.width

    def read(self, y0: int, x0: int, height: int, width: int) -> ProbMapU8:
        """Read a box; where nothing was predicted, it is 0.

        Raises:
            StorageError: as `SlideMaps.core`.
        """
        box = Box(y0, x0, y0 + height, x0 + width)
        tiles = list(self.maps.grid.tiles_of(box))
        if len(tiles) == 1 and tiles[0].core == box and self.maps.is_predicted(tiles[0]):
            return self.maps.core(tiles[0], self.name)
        levels = np.zeros((height, width), np.uint8)
        for tile in tiles:
            if self.maps.is_predicted(tile):
                shared = tile.core.common(box)
                levels[shared.within(box).slices] = self.maps.core(tile, self.name)[shared.within(tile.core).slices]
        return levels

    def is_blank(self, y0: int, x0: int, height: int, width: int) -> bool:
        """Tell whether nothing was predicted in a box."""
        tiles: Iterable[Tile] = self.maps.grid.tiles_of(Box(y0, x0, y0 + height, x0 + width))
        return not any(self.maps.is_predicted(tile) for tile in tiles)


@dataclass(frozen=True)
class _Page:
    """Where a page lies in the file of its block."""

    shape: tuple[int, ...]
    strips: Sequence[slice]
    """Of the file's bytes."""


@dataclass(frozen=True)
class _BlockFile:
    """The file of a block in memory; its pages are decoded one by one.

    No `TiffFile` is kept: it and its pages refer to one another, and would keep the bytes after the last use.
    """

    uri: str
    data: bytes
    pages: Mapping[str, _Page]
    """By description."""

    @property
    def nbytes(self) -> int:
        """Return the bytes that it holds."""
        return len(self.data)

    @classmethod
    def of(cls, data: bytes, uri: str) -> "_BlockFile":
        found: dict[str, _Page] = {}
        with _decoding(uri), tifffile.TiffFile(io.BytesIO(data)) as file:
            for one in reversed(file.pages):
                page = one.aspage()
                strips = zip(page.dataoffsets, page.databytecounts, strict=True)
                found[page.description] = _Page(page.shape, [slice(at, at + size) for at, size in strips])
        return cls(uri, data, found)

    def page(self, description: str, size: tuple[int, int]) -> ProbMapU8:
        page = self.pages.get(description)
        if page is None or page.shape != size:
            found = "missing" if page is None else f"of shape {page.shape}"
            raise StorageError(
                f"{self.uri}: page {description!r} is {found}, expected one of shape {size}; delete the file, and its "
                "block is predicted again"
            )
        levels = np.empty(size, np.uint8)
        rest = levels.data.cast("B")
        with _decoding(self.uri):
            for strip in page.strips:
                decoded = imagecodecs.zstd_decode(self.data[strip])
                rest[: len(decoded)] = decoded
                rest = rest[len(decoded) :]
            if len(rest):
                raise ValueError(f"{len(rest)} bytes of page {description!r} are missing")
        return levels


@contextmanager
def _decoding(uri: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the decoders raise almost anything on damaged files
        raise StorageError(f"{uri} is damaged ({error}); delete it, and its block is predicted again") from error
