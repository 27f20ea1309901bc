"""The pieces of a tile: its 8-connected components, and what is added up over those that belong together.

Sums, boxes and peaks are taken over runs (stretches of a row), of which a tile has far fewer than pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stas_core.arrays import label_components
from stas_core.slides.tiling import Tile

Indices = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]
Table = Mapping[str, npt.NDArray[np.int64]]
"""Columns of one length: a row per run, piece or target."""

_JOIN: Mapping[str, tuple[np.ufunc, int]] = {
    "area": (np.add, 0),
    "core": (np.add, 0),
    "selected": (np.add, 0),
    "sum_x": (np.add, 0),
    "sum_y": (np.add, 0),
    "sum_level": (np.add, 0),
    "peak": (np.maximum, 0),
    "x0": (np.minimum, np.iinfo(np.int64).max),
    "y0": (np.minimum, np.iinfo(np.int64).max),
    "x1": (np.maximum, 0),
    "y1": (np.maximum, 0),
    "first": (np.minimum, np.iinfo(np.int64).max),
}
"""How the rows of a column are joined, and what none of them come to. All are whole numbers: no order can matter."""


def join(table: Table, group: npt.NDArray[np.integer], num_groups: int) -> Table:
    """Return one row per group of rows."""
    joined = {}
    for name, column in table.items():
        ufunc, nothing = _JOIN[name]
        joined[name] = np.full(num_groups, nothing, np.int64)
        ufunc.at(joined[name], group, column)
    return joined


@dataclass(frozen=True)
class Runs:
    """The longest stretches of ones in the rows of a mask, in scan order."""

    y: Indices
    x0: Indices
    x1: Indices
    """The first column outside."""
    width: int
    """Columns of the mask."""

    @classmethod
    def of(cls, mask: npt.NDArray[np.uint8]) -> "Runs":
        """Find the runs of a mask (0 or 1)."""
        height, width = mask.shape
        padded = np.zeros(height * (width + 1) + 1, np.uint8)  # a zero before each row and after the last
        padded[1:].reshape(height, width + 1)[:, :width] = mask
        changes = np.flatnonzero(padded[1:] != padded[:-1])
        y, x0 = np.divmod(changes[::2], width + 1)
        return cls(y, x0, x0 + changes[1::2] - changes[::2], width)

    @property
    def start(self) -> Indices:
        """Return the flat index of each run's first pixel."""
        return self.y * self.width + self.x0

    @property
    def length(self) -> Indices:
        """Return the pixels of each run."""
        return self.x1 - self.x0

    def only(self, chosen: Flags) -> "Runs":
        """Return some of the runs."""
        return Runs(self.y[chosen], self.x0[chosen], self.x1[chosen], self.width)

    def pixels(self) -> Indices:
        """Return the flat indices of all pixels, in scan order."""
        length = self.length
        return np.arange(length.sum()) + np.repeat(self.start - self.offsets(), length)

    def offsets(self) -> Indices:
        """Return where each run begins among `pixels`."""
        length = self.length
        return np.cumsum(length) - length

    def measure(self, tile: Tile, slide_width: int, levels: npt.NDArray[np.uint8]) -> Table:
        """Return area, sums, box, first pixel and peak of each run, in the slide's frame."""
        y, x0, x1, length = self.y + tile.core.y0, self.x0 + tile.core.x0, self.x1 + tile.core.x0, self.length
        values, offsets = levels.ravel()[self.pixels()], self.offsets()
        return {
            "area": length,
            "sum_x": length * (x0 + x1 - 1) // 2,
            "sum_y": length * y,
            "sum_level": np.add.reduceat(values, offsets, dtype=np.int64),
            "peak": np.maximum.reduceat(values, offsets).astype(np.int64),
            "x0": x0,
            "y0": y,
            "x1": x1,
            "y1": y + 1,
            "first": y * slide_width + x0,
        }


@dataclass(frozen=True)
class Pieces:
    """The 8-connected components of one kind in a tile, numbered from 1."""

    num_labels: int
    """One more than there are pieces."""
    labels: npt.NDArray[np.int32]
    """The piece of each pixel; 0: another kind."""
    runs: Runs
    of_run: npt.NDArray[np.int32]
    """The piece of each run."""

    @classmethod
    def of(cls, mask: npt.NDArray[np.uint8]) -> "Pieces":
        """Label a mask (0 or 1)."""
        num_labels, labels = label_components(mask)
        runs = Runs.of(mask)
        return cls(num_labels, labels, runs, labels.ravel()[runs.start])

    @classmethod
    def none(cls, height: int, width: int) -> "Pieces":
        """Return the pieces of a mask of zeros, whatever its size at no cost."""
        nothing = np.zeros(0, np.intp)
        labels = np.broadcast_to(np.int32(0), (height, width))
        return cls(1, labels, Runs(nothing, nothing, nothing, width), np.zeros(0, np.int32))

    @classmethod
    def whole(cls, height: int, width: int) -> "Pieces":
        """Return the one piece of a mask of ones."""
        rows = np.arange(height)
        labels = np.broadcast_to(np.int32(1), (height, width))
        return cls(2, labels, Runs(rows, 0 * rows, 0 * rows + width, width), np.ones(height, np.int32))

    @property
    def area(self) -> npt.NDArray[np.int64]:
        """Return the pixels of each label; of 0: none."""
        return np.bincount(self.of_run, weights=self.runs.length, minlength=self.num_labels).astype(np.int64)

    def on(self, lines: list[Any]) -> Flags:
        """Tell which labels reach one of some lines of the tile; 0 never does."""
        there = np.zeros(self.num_labels, bool)
        for line in lines:
            there[self.labels[line]] = True
        there[0] = False
        return there
