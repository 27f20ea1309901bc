"""What was found on a slide, shrunk to the size at which a page shows it: made as the slide is finished.

    small = SmallMask((30_000, 40_000), small_size((60_000, 80_000)))
    for strip in small.watching(strips):
        ...
    small.mask

The pyramids that are written keep what covers most of a pixel: on their small levels small targets vanish, and no level
has the members' disagreement. A page needs neither them nor a byte of a bucket beyond these pictures.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from stas_core import storage
from stas_core.arrays import ResizedMask

LAYER_PX = 1600
"""Longer side of the layers, at most."""
TRUE, MISSED, FALSE = COMPARED = ("truth", "missed", "false")
"""What a page shows of an evaluation: true targets, those that no found one matches, and found ones that match none."""


def compared_uri(out: str, slide_id: str, kind: str) -> str:
    """Return the path of one of the `COMPARED` layers of a slide, in the folder of an evaluation."""
    return storage.join(out, "layers", f"{slide_id}.{kind}.png")


def small_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of the layers of a slide, given those of its level 0.

    Example:
        >>> small_size((60_000, 80_000)), small_size((300, 200))
        ((1200, 1600), (300, 200))
    """
    scale = min(1.0, LAYER_PX / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


class SmallMask:
    """Shrinks a mask, or enlarges it, as its strips or tiles come in: a pixel is set where any under it is set."""

    def __init__(self, size: tuple[int, int], to: tuple[int, int]) -> None:
        self._levels = np.zeros(to, np.uint8)
        self._tops, self._bottoms = _ranges(size[0], to[0])
        self._lefts, self._rights = _ranges(size[1], to[1])

    def watching(self, strips: Iterable[npt.NDArray[np.uint8]]) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield strips of full width, top to bottom, and take in what is in them."""
        num_rows = 0
        for strip in strips:
            self.add(num_rows, 0, strip)
            num_rows += len(strip)
            yield strip
            del strip  # a strip of a gigapixel slide takes 200 MB

    def add(self, y0: int, x0: int, part: npt.NDArray[np.uint8]) -> None:
        """Take in a part of the mask, whose first pixel is at (y0, x0)."""
        y1, x1 = y0 + part.shape[0], x0 + part.shape[1]
        columns = np.flatnonzero((self._lefts < x1) & (self._rights > x0))
        starts = np.maximum(self._lefts[columns] - x0, 0)
        for row in np.flatnonzero((self._tops < y1) & (self._bottoms > y0)):
            taken = part[max(self._tops[row] - y0, 0) : self._bottoms[row] - y0].max(axis=0)
            self._levels[row, columns] = np.maximum(self._levels[row, columns], np.maximum.reduceat(taken, starts))

    @property
    def mask(self) -> ResizedMask:
        """Return the mask, once all of it was given."""
        return self._levels > 0


def _ranges(num: int, to: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where those of `num` pixels begin and end that lie under each of `to`."""
    edges = np.arange(to + 1) * num // to
    return edges[:-1], np.maximum(edges[1:], edges[:-1] + 1)
