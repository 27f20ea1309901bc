"""How points lie on a plane: the circle that holds most of them, and the gaps between them. Points are (x, y) rows."""

from dataclasses import dataclass

import numpy as np
import shapely
from jaxtyping import Float64
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import Delaunay, QhullError, cKDTree

Points = Float64[np.ndarray, "n 2"]
Lengths = Float64[np.ndarray, "_"]

MOST_COUNTED = 1_500_000_000
"""Points that a search for the densest circle counts, again in each circle: about 10 s."""
_CIRCLE_POINTS = 1000
"""How many points take as long to count as a circle that holds none."""
_LEAST = 1e-9
"""An edge of no length is none to scipy."""


@dataclass(frozen=True)
class Circle:
    """A circle and how many points lie in it or on it."""

    x: float
    y: float
    count: int
    slack: float
    """No circle whose radius is smaller by this holds more points."""


def densest_circle(points: Points, radius: float, slack: float, *, most_counted: int = MOST_COUNTED) -> Circle | None:
    """Return a circle that holds most points, wherever its centre lies; None: there is no point.

    No circle of `radius - slack` holds more. Squares of possible centres are halved until they are as small as `slack`
    and left out as soon as they cannot do better: circles about any point of a square of half diagonal h lie within
    the circle of a radius larger by h about its middle.

    Where very many circles hold about as many, as on a lattice of 100,000 points, that takes too long: beyond
    `most_counted` only the most promising squares are halved, and the circle's `slack` is the half diagonal of those
    that were not. Their middles were tried, so it is still no estimate of the count, only of how much is missed.

    Example:
        >>> found = densest_circle(np.array([[0.0, 0.0], [8.0, 0.0], [30.0, 0.0]]), radius=5, slack=0.1)
        >>> round(found.x, 3), round(found.y, 3), found.count, found.slack
        (4.0, 0.0, 2, 0.1)
    """
    if not len(points):
        return None
    tree = cKDTree(points)
    side = radius
    low, high = points.min(axis=0), points.max(axis=0)
    steps = [np.arange(start + side / 2, stop + side, side) for start, stop in zip(low, high, strict=True)]
    centres = np.stack(np.meshgrid(*steps), axis=-1).reshape(-1, 2)
    best, best_centre, missed, left = 0, low, slack, most_counted
    while len(centres):
        half = side / np.sqrt(2)
        bounds = tree.query_ball_point(centres, radius - slack + half, return_length=True)
        left -= int(bounds.sum()) + _CIRCLE_POINTS * len(bounds)
        centres, bounds = centres[bounds > best], bounds[bounds > best]
        counts = tree.query_ball_point(centres, radius, return_length=True)
        left -= int(counts.sum()) + _CIRCLE_POINTS * len(counts)
        if len(counts) and counts.max() > best:
            best, best_centre = int(counts.max()), centres[counts.argmax()]
        if half <= slack:
            break
        centres, bounds = centres[bounds > best], bounds[bounds > best]
        order = np.argsort(-bounds, kind="stable")
        # Its quarters take up to twice a square's points each; half of what is left is for what is smaller still.
        cost = np.cumsum(8 * (bounds[order] + _CIRCLE_POINTS))
        num_kept = int(np.searchsorted(cost, left / 2, side="right"))
        if num_kept < len(centres):
            centres, missed = centres[order[:num_kept]], max(missed, half)
        side /= 2
        corners = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]]) * (side / 2)
        centres = (centres[:, None] + corners).reshape(-1, 2)
    return Circle(*_centred(tree, best_centre, radius, best), float(missed))


def _centred(tree: cKDTree, centre: np.ndarray, radius: float, count: int) -> tuple[float, float, int]:
    """Move a circle to the middle of what it holds, if that loses nothing; return x, y and how many it holds."""
    held = np.unique(tree.data[tree.query_ball_point(centre, radius)], axis=0)
    enclosing = shapely.minimum_bounding_circle(shapely.multipoints(held))
    (middle,) = shapely.get_coordinates(shapely.centroid(enclosing))
    (moved,) = tree.query_ball_point(middle[None], radius, return_length=True)
    if moved >= count:
        centre, count = middle, int(moved)
    return float(centre[0]), float(centre[1]), count


def gaps(points: Points) -> Lengths:
    """Return the lengths of the shortest net of lines that joins all points (their minimum spanning tree), sorted.

    There is one less than points; where points coincide a length is 0.

    Example:
        >>> gaps(np.array([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]])).tolist()
        [1.0, 5.0]
    """
    if not len(points):
        return np.zeros(0)
    lengths = np.sort(_net(np.unique(points, axis=0)).data)
    return np.concatenate([np.zeros(len(points) - 1 - len(lengths)), lengths])


def widest_gap_back(points: Points, distances: Lengths) -> float:
    """Return the longest stride that cannot be avoided on the way from some point home, from point to point.

    `distances` are the points' own to home, which is a place of any shape. The net of points and home avoids all longer
    strides, and its longest one parts some point from home.

    Example:
        >>> widest_gap_back(np.array([[3.0, 0.0], [7.0, 0.0], [9.0, 0.0]]), np.array([3.0, 7.0, 9.0]))
        4.0
    """
    places, first = np.unique(points, axis=0, return_index=True)
    net, home = coo_array(_net(places)), len(places)
    every = np.arange(home)
    ends = np.concatenate([net.row, every]), np.concatenate([net.col, np.full(home, home)])
    lengths = np.concatenate([net.data, np.maximum(distances[first], _LEAST)])
    return float(minimum_spanning_tree(csr_array((lengths, ends), shape=(home + 1, home + 1))).data.max())


def _net(places: Points) -> csr_array:
    """Return the minimum spanning tree of distinct points, as a sparse matrix of lengths."""
    starts, ends = _neighbours(places)
    lengths = np.maximum(np.hypot(*(places[starts] - places[ends]).T), _LEAST)
    return minimum_spanning_tree(csr_array((lengths, (starts, ends)), shape=(len(places),) * 2))


def _neighbours(places: Points) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of points among which those of the tree are: those of a Delaunay triangulation."""
    centred = places - places.mean(axis=0)
    if len(places) > 2:
        try:
            triangles = Delaunay(centred)
        except QhullError:  # all lie on a line
            pass
        else:
            first, neighbours = triangles.vertex_neighbor_vertices
            starts = np.repeat(np.arange(len(places)), np.diff(first))
            left_out = triangles.coplanar  # too near to another to be told from it
            return np.concatenate([starts, left_out[:, 0]]), np.concatenate([neighbours, left_out[:, 2]])
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    order = np.argsort(centred @ direction, kind="stable")
    return order[:-1], order[1:]
