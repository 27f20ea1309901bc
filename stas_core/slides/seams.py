"""Which pieces of neighbouring tiles belong together: a graph whose nodes are pieces, numbered over the slide."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from stas_core.predict.postprocess import SIDES
from stas_core.slides.tiling import Grid, Tile

Nodes = npt.NDArray[np.int64]
"""Numbers of nodes; 0 stands for all that is not told apart."""
Pairs = npt.NDArray[np.int64]
"""(n, 2): nodes that touch."""


def sides_of_slide(grid: Grid, tile: Tile) -> list[int]:
    """Return the sides of a tile that are sides of the slide; 0 to 3: left, right, top, bottom."""
    there = (tile.col == 0, tile.col == grid.num_cols - 1, tile.row == 0, tile.row == grid.num_rows - 1)
    return [side for side, is_outer in enumerate(there) if is_outer]


def inner_lines(grid: Grid, tile: Tile) -> list[Any]:
    """Return the lines along which a tile meets other tiles, as indices of its pixels."""
    outer = sides_of_slide(grid, tile)
    return [line for side, line in enumerate(SIDES) if side not in outer]


class Seams:
    """Collects which nodes touch, 8-connected, over the edges of tiles that come in scan order.

    Remembers one line of the slide's width: the bottom of the row of tiles above. Held against the top of the next row,
    straight and shifted by one pixel to either side, it covers the corners too.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._above, self._top, self._bottom = (np.zeros(grid.width, np.int64) for _ in range(3))
        self._left: Nodes = np.zeros(0, np.int64)
        self._pairs = [np.zeros((0, 2), np.int64)]

    def add(self, tile: Tile, lines: Sequence[Nodes]) -> None:
        """Take the nodes along a tile's left, right, top and bottom."""
        left, right, top, bottom = lines
        self._top[tile.core.x0 : tile.core.x1] = top
        self._bottom[tile.core.x0 : tile.core.x1] = bottom
        if tile.col > 0:
            self._meet(self._left, left)
        self._left = right
        if tile.col == self._grid.num_cols - 1:
            if tile.row > 0:
                self._meet(self._above, self._top)
            self._above, self._bottom = self._bottom, self._above

    def touch(self, pairs: Pairs) -> None:
        """Add nodes that touch within a tile."""
        self._pairs.append(pairs)

    def pairs(self) -> Pairs:
        """Return all pairs."""
        return np.concatenate(self._pairs)

    def _meet(self, one: Nodes, other: Nodes) -> None:
        for here, there in ((one, other), (one[1:], other[:-1]), (one[:-1], other[1:])):
            at = np.flatnonzero(here != there)  # nodes of two tiles are never the same, but for 0
            if len(at):
                pairs = np.stack([here[at], there[at]], axis=1)
                new = np.ones(len(pairs), bool)
                new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
                self._pairs.append(pairs[new])


def components(pairs: Pairs, alive: npt.NDArray[np.bool_]) -> tuple[int, npt.NDArray[np.int32]]:
    """Join the living nodes that touch.

    Returns:
        the number of components, and the component of each node; the dead are alone."""
    living = pairs[alive[pairs].all(axis=1)]
    graph = coo_array((np.ones(len(living), bool), (living[:, 0], living[:, 1])), shape=(len(alive), len(alive)))
    num_components, component = connected_components(graph, directed=False)
    return int(num_components), component
