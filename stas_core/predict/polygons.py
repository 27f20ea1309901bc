"""Outlines of targets as valid polygons along the edges of their pixels, many at once.

A polygon is a 4-connected part of a target; a target whose parts meet at corners alone has several. Corners are told by
the 2 x 2 pixels around each point of the pixel grid. Two neighbours on a line of the grid are the ends of an edge, so
sorting finds all edges, and jumping along them, two, four, eight... at a time, all rings.

Where two pixels of a part meet at a corner, its ring turns so that the background is cut apart, not the part: a ring
may touch another one there, and never itself, which is what OGC calls valid.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import shapely

from stas_core.arrays import Labels

Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int32]
Geometries = npt.NDArray[np.object_]
"""Polygons and multipolygons of shapely."""

_UPPER_LEFT, _UPPER_RIGHT, _LOWER_LEFT, _LOWER_RIGHT = 1, 2, 4, 8
"""What the four pixels around a point add to its code."""
_RISING, _FALLING = _UPPER_RIGHT | _LOWER_LEFT, _UPPER_LEFT | _LOWER_RIGHT
"""Points where two pixels meet at a corner, and the two others are background."""
_IS_CORNER = np.zeros(256, np.uint8)
_IS_CORNER[[1, 2, 4, 8, 7, 11, 13, 14, _RISING, _FALLING]] = 1
_OWNER = np.array([0, 1, 2, 1, 3, 1, 3, 1, 4, 1, 2, 1, 3, 1, 2, 1]) - 1
"""One of the pixels of each code, 0 to 3; where two meet at a corner, the left one."""


@dataclass(frozen=True)
class Corners:
    """Corners of some targets, all of each, as columns in scan order: by y, then by x.

    A point where two pixels meet at a corner is there twice: the left pixel's first.
    """

    x: Numbers
    """In px; pixel (0, 0) covers 0 to 1 in x and y."""
    y: Numbers
    number: Numbers
    """The target."""
    part: Indices
    """Its 4-connected part."""
    lower_right: Flags
    """Whether the pixel to the lower right is of a target."""

    @classmethod
    def none(cls) -> "Corners":
        """Return no corners."""
        nothing = np.zeros(0, np.int32)
        return cls(nothing, nothing, nothing, nothing.astype(np.int64), nothing.astype(bool))

    def __len__(self) -> int:
        return len(self.x)

    def only(self, chosen: Flags | Indices) -> "Corners":
        """Return some of the corners."""
        return Corners(*(column[chosen] for column in vars(self).values()))


@dataclass(frozen=True)
class TargetShapes:
    """Outlines of targets: rings of corners, the first one repeated at the end, as columns.

    The outside of a polygon comes before its holes. Order and directions are those of `shapely.normalize`, so equal
    areas give equal shapes.
    """

    numbers: Numbers
    """(n,): the targets, rising."""
    corners: Numbers
    """(m, 2): x, y in px; pixel (0, 0) covers 0 to 1 in x and y."""
    rings: Indices
    """Where each ring begins among the corners, and their number."""
    polygons: Indices
    """Where each polygon begins among the rings, and their number."""
    targets: Indices
    """(n + 1,): where each target begins among the polygons, and their number."""

    def __len__(self) -> int:
        return len(self.numbers)

    @classmethod
    def none(cls) -> "TargetShapes":
        """Return no targets."""
        return link(Corners.none())

    @property
    def geometry(self) -> Geometries:
        """Return the shapes for shapely: (n,) polygons, multipolygons for targets of several parts."""
        return self.geometry_at(self.corners.astype(np.float64))

    def geometry_at(self, points: npt.NDArray[np.float64]) -> Geometries:
        """Return the shapes with their corners at other points: (m, 2) x, y."""
        offsets = (self.rings, self.polygons)
        parts = shapely.from_ragged_array(shapely.GeometryType.POLYGON, points, offsets)
        num_parts = np.diff(self.targets)
        shapes = parts[self.targets[:-1]]
        several = num_parts > 1
        if several.any():
            of_several = np.repeat(several, num_parts)
            indices = np.repeat(np.arange(np.count_nonzero(several)), num_parts[several])
            shapes[several] = shapely.multipolygons(parts[of_several], indices=indices)
        return np.asarray(shapes)

    def batches(self, max_corners: int) -> Iterator["TargetShapes"]:
        """Yield the targets, some at a time: so many that they have about `max_corners`, and one at least."""
        before = self.rings[self.polygons[self.targets]]
        start = 0
        while start < len(self):
            stop = max(start + 1, int(np.searchsorted(before, before[start] + max_corners, side="right")) - 1)
            polygons = self.polygons[self.targets[start] : self.targets[stop] + 1]
            rings = self.rings[polygons[0] : polygons[-1] + 1]
            yield TargetShapes(
                self.numbers[start:stop],
                self.corners[rings[0] : rings[-1]],
                rings - rings[0],
                polygons - polygons[0],
                self.targets[start : stop + 1] - self.targets[start],
            )
            start = stop


def trace(labels: Labels, origin: tuple[int, int] = (0, 0)) -> tuple[Numbers, Geometries]:
    """Outline every label but 0 of an image.

    Args:
        labels: which target each pixel belongs to; pixels of two targets may meet at corners only.
        origin: x, y of the upper left corner, in px.

    Returns:
        the labels, rising, and the shape of each: a valid polygon along pixel edges, with whole coordinates (pixel
        (0, 0) covers 0 to 1), no point on a straight line, in the order of `shapely.normalize`; a multipolygon if it
        has several 4-connected parts.

    Raises:
        ValueError: pixels of two targets touch along an edge.

    Example:
        >>> labels = np.zeros((4, 5), np.int32)
        >>> labels[1:3, 1:4] = 7
        >>> numbers, shapes = trace(labels)
        >>> numbers.tolist(), shapes[0].wkt
        ([7], 'POLYGON ((1 1, 1 3, 4 3, 4 1, 1 1))')
    """
    _refuse_touching(labels)
    shapes = trace_shapes(labels, origin)
    return shapes.numbers, shapes.geometry


def trace_shapes(labels: Labels, origin: tuple[int, int] = (0, 0)) -> TargetShapes:
    """Outline every label but 0 of an image, as `trace`, without objects of shapely.

    Only labels of separate targets, as `find_targets` gives them: it is not checked that none touch.
    """
    corners, _ = find_corners(np.pad(labels, 1), origin)
    return link(corners)


def find_corners(framed: Labels, origin: tuple[int, int]) -> tuple[Corners, Numbers]:
    """Find the corners of all labels but 0.

    Args:
        framed: which target each pixel belongs to, with the pixels around those whose corners are wanted.
        origin: x, y of the point between its first four pixels.

    Returns:
        the corners, and the 4-connected part, from 1, that each pixel of `framed` belongs to.
    """
    mask = (framed != 0).view(np.uint8)
    if not mask.any():  # most tiles of a slide
        return Corners.none(), np.broadcast_to(np.int32(0), mask.shape)
    parts = np.asarray(cv2.connectedComponents(mask, connectivity=4)[1], np.int32)
    code = mask[1:, 1:] << 1
    for quarter in (mask[1:, :-1], mask[:-1, 1:]):
        code |= quarter
        code <<= 1
    code |= mask[:-1, :-1]
    at = np.flatnonzero(cv2.LUT(code, _IS_CORNER).view(bool))
    codes = code.ravel()[at]
    twice = (codes == _RISING) | (codes == _FALLING)
    row, col = np.divmod(at, code.shape[1])
    owner = _OWNER[codes]
    if twice.any():
        times = 1 + twice
        second = np.cumsum(times)[twice] - 1
        row, col, codes, owner = (np.repeat(column, times) for column in (row, col, codes, owner))
        owner[second] = 3 - owner[second]  # the pixel across
    pixel = (row + owner // 2) * framed.shape[1] + col + owner % 2
    corners = Corners(
        x=(col + origin[0]).astype(np.int32),
        y=(row + origin[1]).astype(np.int32),
        number=framed.ravel()[pixel],
        part=parts.ravel()[pixel].astype(np.int64),
        lower_right=codes & _LOWER_RIGHT > 0,
    )
    return corners, parts


def _refuse_touching(labels: Labels) -> None:
    mask = labels != 0
    for there, here in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        touching = labels[there] != labels[here]
        touching &= mask[there]
        touching &= mask[here]
        if touching.any():
            one, other = labels[there][touching][0], labels[here][touching][0]
            raise ValueError(f"labels {one} and {other} touch; expected 8-connected targets: give both one label")


def link(corners: Corners) -> TargetShapes:
    """Join corners into the rings, polygons and targets that they belong to."""
    top, bottom = _vertical_edges(corners)
    num_edges = len(top)
    edge = np.empty(2 * num_edges, np.int32)
    edge[top] = edge[bottom] = np.arange(num_edges, dtype=np.int32)
    # With the target to the right of an edge one walks down, on a screen, else up; then along the horizontal edge.
    down = corners.lower_right[top]
    start, end = np.where(down, top, bottom), np.where(down, bottom, top)
    first, rank, length = _cycles(edge[end ^ 1])
    # Edges are sorted by x, then y: a ring begins with its first, and the target lies right of it if it is an outside.
    leader = np.flatnonzero(rank == 0)
    is_outside = down[leader]
    number = corners.number[top[leader]]
    order = np.lexsort((*_order_in_target(leader, length[leader], is_outside, corners.part[top[leader]]), number))
    rings = _offsets(2 * length[leader[order]] + 1)
    begin = np.empty(num_edges, np.int64)
    begin[leader[order]] = rings[:-1]
    begin, turned, round_px = begin[first], ~down[first], 2 * length
    points = np.empty((rings[-1], 2), np.int32)
    for step, corner in ((0, start), (1, end)):
        at = begin + (2 * rank + step - turned) % round_px  # a hole begins at the end of its first edge
        points[at, 0], points[at, 1] = corners.x[corner], corners.y[corner]
    points[rings[1:] - 1] = points[rings[:-1]]
    polygons = np.append(np.flatnonzero(is_outside[order]), len(leader))
    of_polygon = number[order][polygons[:-1]]
    new = np.flatnonzero(np.diff(of_polygon, prepend=-1))
    return TargetShapes(of_polygon[new], points, rings, polygons, np.append(new, len(of_polygon)))


def _vertical_edges(corners: Corners) -> tuple[Indices, Indices]:
    """Return the upper and the lower corners of all vertical edges, which are sorted by x, then by y.

    Where a point is there twice, its left-going edge is joined with the one up or with the one down: round the pixels,
    if they belong to two parts, and across them, round the background, if they belong to one.
    """
    x, y, part = corners.x, corners.y, corners.part
    order = np.arange(len(corners))
    twice = np.flatnonzero((x[1:] == x[:-1]) & (y[1:] == y[:-1]))
    swapped = twice[(part[twice] == part[twice + 1]) == corners.lower_right[twice]]
    order[swapped], order[swapped + 1] = swapped + 1, swapped
    if len(corners) and (span := x - x.min()).max() < 1 << 16:
        x = span.astype(np.uint16)  # a radix sort
    order = order[np.argsort(x, kind="stable")] if not len(swapped) else order[np.argsort(x[order], kind="stable")]
    return order[::2], order[1::2]


def _cycles(following: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Take a permutation apart.

    Returns:
        for each element the smallest of its cycle, its steps from there, and the length of the cycle.
    """
    num = len(following)
    elements = np.arange(num, dtype=np.int32)
    first, hop = np.minimum(elements, following), following
    while True:
        hop = hop[hop]
        nearer = np.minimum(first, first[hop])
        if (nearer == first).all():
            break
        first = nearer
    is_first = first == elements
    steps = (~is_first).astype(np.int32)
    hop = np.where(is_first, elements, following)
    going = np.flatnonzero(~is_first[hop])
    while len(going):
        here = hop[going]
        ahead, beyond = steps[here], hop[here]
        steps[going] += ahead
        hop[going] = beyond
        going = going[~is_first[beyond]]
    length = np.bincount(first, minlength=num).astype(np.int32)[first]
    return first, np.where(is_first, 0, length - steps), length


def _order_in_target(leader: Indices, length: Numbers, is_outside: Flags, part: Indices) -> tuple[np.ndarray, ...]:
    """Return keys, the last one first, that sort the rings of a target as `shapely.normalize` does.

    Polygons by their outsides: longer ones first, then from the right; holes come after their outside, sorted alike.
    """
    outside = np.flatnonzero(is_outside)
    outside = outside[np.argsort(part[outside])]
    own = outside[np.searchsorted(part[outside], part)]
    return -leader, -length, ~is_outside, -leader[own], -length[own]


def _offsets(lengths: npt.NDArray[np.integer]) -> Indices:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
