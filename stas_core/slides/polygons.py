"""Outlines of the targets of a whole slide, from its labels tile by tile: equal to `trace` on the whole array.

A tile finds the corners of its pixels with the help of one line of the tiles above and to the left. Targets that need
no other tile are outlined at once; corners of the others are kept until the last row of tiles that they reach, and
which of their parts belong together is settled then.

Memory: a tile, two lines of the slide's width, and the corners of targets that reach over the edge of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from stas_core.arrays import Labels
from stas_core.predict.polygons import Corners, Numbers, TargetShapes, find_corners, link
from stas_core.slides.seams import Pairs, components
from stas_core.slides.stitching import StitchedMask
from stas_core.slides.tiling import Grid, Tile

NUM_BEFORE = 0
"""Where the numbers of parts begin: on a slide of 46,341 px square or more they outgrow 32 bits."""
_AT_ONCE = -1
"""Instead of a row of tiles: the target needs one tile alone."""


def trace_targets(stitched: StitchedMask) -> Iterator[TargetShapes]:
    """Yield the outlines of all targets, each once, some at a time, in px of the map.

    `numbers` are the rows of `stitched.targets`, from 1. What is yielded at a time ends in the same tile, or in the
    same row of tiles.

    Example:
        >>> from stas_core.predict.postprocess import PostprocessConfig
        >>> from stas_core.slides.stitching import ArraySource, postprocess_slide
        >>> prob_u8 = np.zeros((100, 100), np.uint8)
        >>> prob_u8[20:60, 20:60] = 200
        >>> stitched = postprocess_slide(ArraySource(prob_u8), PostprocessConfig(), tile_px=32)
        >>> [(shapes.numbers.tolist(), shapes.geometry[0].wkt) for shapes in trace_targets(stitched)]
        [([1], 'POLYGON ((20 20, 20 60, 60 60, 60 20, 20 20))')]
    """
    tracer = Tracer(stitched)
    for tile, labels in stitched.labels():
        yield from tracer.add(tile, labels)


class Tracer:
    """Outlines targets from the tiles of `StitchedMask.labels`, as they come: see `trace_targets`."""

    def __init__(self, stitched: StitchedMask) -> None:
        self._grid = stitched.grid
        self._due = _due(stitched.targets.bbox, stitched.grid)
        self._frame = _Frame(stitched.grid)
        self._waiting: dict[int, _Waiting] = {}

    def add(self, tile: Tile, labels: Labels) -> list[TargetShapes]:
        """Take a tile; return the targets that end in it."""
        corners, met, pairs = self._frame.add(tile, labels)
        row_of_corner, row_of_pair = self._due[corners.number], self._due[met]
        found, waiting = [], self._waiting
        for row in np.unique(row_of_corner).tolist():
            chosen = corners.only(row_of_corner == row)
            if row == _AT_ONCE:
                found.append(link(chosen))
            else:
                waiting.setdefault(row, _Waiting()).corners.append(chosen)
        for row in np.unique(row_of_pair).tolist():
            waiting.setdefault(row, _Waiting()).pairs.append(pairs[row_of_pair == row])
        if tile.col == self._grid.num_cols - 1 and tile.row in waiting:
            found.append(link(waiting.pop(tile.row).joined()))
        return found


def _due(bbox: npt.NDArray[np.int64], grid: Grid) -> Numbers:
    """Return, for each target from 1, the row of tiles that finds the last of its corners; `_AT_ONCE`: a tile has all.

    Corners on the line between two tiles are found by the later one."""
    first_col, first_row, last_col, last_row = (
        np.minimum(ends // grid.tile_px, most - 1).astype(np.int32)
        for ends, most in zip(bbox.T, (grid.num_cols, grid.num_rows) * 2, strict=True)
    )
    alone = (first_col == last_col) & (first_row == last_row)
    return np.concatenate([np.array([_AT_ONCE], np.int32), np.where(alone, np.int32(_AT_ONCE), last_row)])


@dataclass
class _Waiting:
    """What is known of the targets that end in a row of tiles."""

    corners: list[Corners] = field(default_factory=list)
    pairs: list[Pairs] = field(default_factory=list)
    """Parts of neighbouring tiles that are one."""

    def joined(self) -> Corners:
        """Return all corners in scan order, parts joined over the tiles."""
        x, y, number, part, lower_right = (
            np.concatenate([getattr(some, name) for some in self.corners])
            for name in ("x", "y", "number", "part", "lower_right")
        )
        pairs = np.concatenate([np.zeros((0, 2), np.int64), *self.pairs])
        parts, node = np.unique(np.concatenate([part, pairs.ravel()]), return_inverse=True)
        _, whole = components(node[len(part) :].reshape(-1, 2), np.ones(len(parts), bool))
        corners = Corners(x, y, number, whole[node[: len(part)]].astype(np.int64), lower_right)
        return corners.only(np.argsort(y * (int(x.max()) + np.int64(1)) + x, kind="stable"))


class _Line:
    """Pixels along an edge of tiles: their targets, and their 4-connected parts, numbered over the slide."""

    def __init__(self, num_px: int) -> None:
        self.number = np.zeros(num_px, np.int32)
        self.part = np.zeros(num_px, np.int64)


class _Frame:
    """Finds the corners of tiles that come in scan order, beside the last lines of those before.

    A tile finds the corners at the upper left of its pixels; those at the right and the bottom of the slide find the
    outermost ones too.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        # The pixel in column x is at x + 1, that outside of the slide at 0.
        self._above, self._below = _Line(grid.width + 1), _Line(grid.width + 1)
        self._left = _Line(grid.tile_px)
        self._num_px = NUM_BEFORE

    def add(self, tile: Tile, labels: Labels) -> tuple[Corners, Numbers, Pairs]:
        """Take a tile.

        Returns:
            its corners, the targets that reach into it from tiles before, and their parts there and here.
        """
        grid, core = self._grid, tile.core
        height, width = labels.shape
        is_last_col, is_last_row = tile.col == grid.num_cols - 1, tile.row == grid.num_rows - 1
        framed = np.zeros((1 + height + is_last_row, 1 + width + is_last_col), np.int32)
        framed[1 : 1 + height, 1 : 1 + width] = labels
        above = slice(core.x0, core.x1 + 1)
        framed[0, : 1 + width] = self._above.number[above]
        if tile.col > 0:
            framed[1 : 1 + height, 0] = self._left.number[:height]
        corners, in_tile = find_corners(framed, (core.x0, core.y0))
        # More numbers than there can be parts; an array, so that sums have its 64 bits, not the 32 of a tile's numbers.
        first_part, self._num_px = np.array([self._num_px]), self._num_px + framed.size
        met = np.concatenate([framed[0, : 1 + width], framed[1 : 1 + height, 0]])
        here = np.concatenate([in_tile[0, : 1 + width], in_tile[1 : 1 + height, 0]]) + first_part
        there = np.concatenate([self._above.part[above], self._left.part[:height]])
        changes = np.flatnonzero((np.diff(here, prepend=-1) != 0) | (np.diff(there, prepend=-1) != 0))
        changes = changes[met[changes] > 0]
        self._below.number[core.x0 + 1 : core.x1 + 1] = labels[-1]
        self._below.part[core.x0 + 1 : core.x1 + 1] = in_tile[height, 1 : 1 + width] + first_part
        self._left.number[:height] = labels[:, -1]
        self._left.part[:height] = in_tile[1 : 1 + height, width] + first_part
        if is_last_col:
            self._above, self._below = self._below, self._above
        pairs = np.stack([there[changes], here[changes]], axis=1)
        return replace(corners, part=corners.part + first_part), met[changes], pairs
