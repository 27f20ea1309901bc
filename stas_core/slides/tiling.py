"""How a slide is cut into tiles: pure geometry.

Every pixel lies in the core of exactly one tile. A tile is predicted with a halo of context around its core, and gives
its core alone, so that a map never depends on which tiles are predicted together, where, or in which order.
`Grid.weights` is the other way to join tiles: they fade into one another over the halo.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

Weights = Float64[np.ndarray, "_"]
"""Weights along one side of a tile's read box."""

TileMap = Float32[np.ndarray, "_ _"]
"""Probabilities of one tile among several, each of its own size."""


class Box(NamedTuple):
    """A rectangle of pixels; y1 and x1 are the first outside."""

    y0: int
    x0: int
    y1: int
    x1: int

    @property
    def height(self) -> int:
        """Return the number of rows."""
        return self.y1 - self.y0

    @property
    def width(self) -> int:
        """Return the number of columns."""
        return self.x1 - self.x0

    @property
    def slices(self) -> tuple[slice, slice]:
        """Return what cuts the box out of an array `[y, x]`."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def within(self, outer: "Box") -> "Box":
        """Return this box in the frame of another."""
        return Box(self.y0 - outer.y0, self.x0 - outer.x0, self.y1 - outer.y0, self.x1 - outer.x0)

    def common(self, other: "Box") -> "Box":
        """Return the pixels that lie in both boxes, which must meet."""
        return Box(max(self.y0, other.y0), max(self.x0, other.x0), min(self.y1, other.y1), min(self.x1, other.x1))


@dataclass(frozen=True)
class Tile:
    """One tile of a grid."""

    row: int
    col: int
    core: Box
    """What the tile gives."""
    read: Box
    """What is read for it: the core and its halo, cut at the slide's sides."""

    @property
    def inside(self) -> Box:
        """Return where the core lies in the read box."""
        return self.core.within(self.read)


@dataclass(frozen=True)
class Block:
    """Neighbouring tiles: one work item."""

    row: int
    col: int
    tiles: tuple[Tile, ...]
    """In scan order."""

    @property
    def core(self) -> Box:
        """Return the cores of all tiles: they form a rectangle."""
        first, last = self.tiles[0].core, self.tiles[-1].core
        return Box(first.y0, first.x0, last.y1, last.x1)

    @property
    def read(self) -> Box:
        """Return what is read for all tiles."""
        first, last = self.tiles[0].read, self.tiles[-1].read
        return Box(first.y0, first.x0, last.y1, last.x1)


@dataclass(frozen=True)
class Grid:
    """The tiles of a slide, from its upper left corner; those at the right and the bottom may be smaller.

    Example:
        >>> grid = Grid(height=100, width=250, tile_px=100, halo_px=10)
        >>> (grid.num_rows, grid.num_cols), grid.tile(0, 2).core, grid.tile(0, 2).read
        ((1, 3), Box(y0=0, x0=200, y1=100, x1=250), Box(y0=0, x0=190, y1=100, x1=250))
    """

    height: int
    width: int
    tile_px: int
    """Side of a core."""
    halo_px: int

    def __post_init__(self) -> None:
        for name, least in (("height", 1), ("width", 1), ("tile_px", 1), ("halo_px", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} = {value}: a grid of tiles needs at least {least}")

    @property
    def num_rows(self) -> int:
        """Return the number of rows of tiles."""
        return math.ceil(self.height / self.tile_px)

    @property
    def num_cols(self) -> int:
        """Return the number of tiles in a row."""
        return math.ceil(self.width / self.tile_px)

    @property
    def box(self) -> Box:
        """Return the whole slide."""
        return Box(0, 0, self.height, self.width)

    def tile(self, row: int, col: int) -> Tile:
        """Return one tile."""
        y0, x0 = row * self.tile_px, col * self.tile_px
        core = Box(y0, x0, min(y0 + self.tile_px, self.height), min(x0 + self.tile_px, self.width))
        halo = self.halo_px
        read = Box(core.y0 - halo, core.x0 - halo, core.y1 + halo, core.x1 + halo).common(self.box)
        return Tile(row, col, core, read)

    def tiles(self) -> Iterator[Tile]:
        """Yield all tiles in scan order: row by row, from the left."""
        return self.tiles_of(self.box)

    def tiles_of(self, box: Box) -> Iterator[Tile]:
        """Yield the tiles whose cores meet a box of the slide, in scan order."""
        for row in range(box.y0 // self.tile_px, math.ceil(box.y1 / self.tile_px)):
            for col in range(box.x0 // self.tile_px, math.ceil(box.x1 / self.tile_px)):
                yield self.tile(row, col)

    def blocks(self, side: int) -> Iterator[Block]:
        """Yield blocks of up to `side` x `side` neighbouring tiles, in scan order."""
        if side < 1:
            raise ValueError(f"side = {side}: a block needs at least 1 tile a side")
        for row in range(math.ceil(self.num_rows / side)):
            for col in range(math.ceil(self.num_cols / side)):
                yield self.block(row, col, side)

    def block(self, row: int, col: int, side: int) -> Block:
        """Return one block of up to `side` x `side` tiles, by its row and column among blocks."""
        first = self.tile(row * side, col * side).core
        last = self.tile(min((row + 1) * side, self.num_rows) - 1, min((col + 1) * side, self.num_cols) - 1).core
        return Block(row, col, tuple(self.tiles_of(Box(first.y0, first.x0, last.y1, last.x1))))

    def weights(self, tile: Tile) -> tuple[Weights, Weights]:
        """Return the weights of a tile's read box along y and x; its window is their outer product.

        At every pixel of the slide the windows of all tiles sum to 1.
        """
        along_y = self._fade(tile.row, self.num_rows, tile.read.y0, tile.read.y1)
        return along_y, self._fade(tile.col, self.num_cols, tile.read.x0, tile.read.x1)

    def _fade(self, index: int, num_tiles: int, start: int, stop: int) -> Weights:
        # Each tile takes over from the one before along a ramp about the cut between them. Its weight is its own ramp
        # less that of the next, so that the sum over all tiles telescopes to 1, whatever the halo's share of a tile.
        centres = np.arange(start, stop) + 0.5
        here = self._ramp(centres - index * self.tile_px) if index > 0 else np.ones(len(centres))
        if index + 1 < num_tiles:
            here = here - self._ramp(centres - (index + 1) * self.tile_px)
        return here

    def _ramp(self, beyond_px: Weights) -> Weights:
        """Rise from 0 to 1 between a halo before a cut and a halo after it, level at both ends."""
        if self.halo_px == 0:
            return (beyond_px > 0).astype(np.float64)
        share = np.clip(beyond_px / (2 * self.halo_px) + 0.5, 0, 1)
        return np.asarray(share * share * (3 - 2 * share))


def blend(grid: Grid, tile: Tile, maps: Mapping[tuple[int, int], TileMap]) -> TileMap:
    """Return the core of a tile as the weighted mean of all tiles that were read over it.

    Args:
        grid: the grid that the tile belongs to.
        tile: the tile.
        maps: the map of each read box by (row, col): those of `neighbours`. Where one is missing, as no tissue lies
            there, the others stand in for it.
    """
    total = np.zeros((tile.core.height, tile.core.width))
    near = neighbours(grid, tile)
    there_too = [other for other in near if (other.row, other.col) in maps]
    weight = None if len(there_too) == len(near) else np.zeros_like(total)
    for other in there_too:  # always in this order: the sum does not depend on who adds it up
        shared = other.read.common(tile.core)
        (ys, xs), there = shared.within(tile.core).slices, shared.within(other.read)
        along_y, along_x = grid.weights(other)
        window = np.outer(along_y[there.slices[0]], along_x[there.slices[1]])
        total[ys, xs] += window * maps[other.row, other.col][there.slices]
        if weight is not None:
            weight[ys, xs] += window
    return (total if weight is None else total / weight).astype(np.float32)


def neighbours(grid: Grid, tile: Tile) -> list[Tile]:
    """Return the tiles whose read boxes meet the core of a tile, itself included, in scan order."""
    halo, core = grid.halo_px, tile.core
    around = Box(core.y0 - halo, core.x0 - halo, core.y1 + halo, core.x1 + halo).common(grid.box)
    return list(grid.tiles_of(around))
