"""Outlines of targets are valid, exact and the same however they were found."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from stas_core.predict.polygons import trace, trace_shapes


def label(mask: np.ndarray) -> np.ndarray:
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    return np.asarray(labels, np.int32)


def union_of_pixels(labels: np.ndarray, number: int) -> shapely.Geometry:
    y, x = np.nonzero(labels == number)
    return shapely.normalize(shapely.union_all(shapely.box(x, y, x + 1, y + 1)))


def without_straight_points(shape: shapely.Geometry) -> shapely.Geometry:
    """Return a shape whose rings turn at every point."""

    def turning(ring: shapely.LinearRing) -> np.ndarray:
        points = shapely.get_coordinates(ring)[:-1]
        before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
        return np.asarray(points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]])

    polygons = [
        shapely.Polygon(turning(one.exterior), [turning(hole) for hole in one.interiors])
        for one in shapely.get_parts(shape)
        if isinstance(one, shapely.Polygon)
    ]
    return shapely.normalize(shapely.multipolygons(polygons) if len(polygons) > 1 else polygons[0])


def drawn(shape: shapely.Geometry, size: tuple[int, int]) -> np.ndarray:
    """Rasterise a shape of whole coordinates: pixels with an odd number of its edges to the left are inside."""
    crossings = np.zeros((size[0], size[1] + 1), np.intp)
    for ring in shapely.get_rings(shapely.get_parts(shapely.get_parts(shape))):
        points = shapely.get_coordinates(ring).astype(int)
        for (x, y0), (_, y1) in itertools.pairwise(points.tolist()):
            crossings[min(y0, y1) : max(y0, y1), x] += 1
    return np.asarray(np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1)


@settings(max_examples=300, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=14)))
def test_shapes_are_the_union_of_their_pixels(mask: np.ndarray) -> None:
    labels = label(mask)
    numbers, shapes = trace(labels)
    assert numbers.dtype == np.int32
    assert numbers.tolist() == list(range(1, labels.max() + 1))
    for number, shape in zip(numbers.tolist(), shapes, strict=True):
        assert shapely.is_valid(shape), shapely.is_valid_reason(shape)
        expected = without_straight_points(union_of_pixels(labels, number))
        assert shapely.to_wkt(shape) == shapely.to_wkt(expected)
        assert (drawn(shape, mask.shape) == (labels == number)).all()


def spiral_of_corners(side: int) -> np.ndarray:
    y, x = np.indices((side, side))
    return np.asarray(((x + y) % 2 == 0) & (np.maximum(abs(x - side // 2), abs(y - side // 2)) % 4 < 3))


MASKS: dict[str, Callable[[], np.ndarray]] = {
    "checkerboard": lambda: np.indices((60, 61)).sum(axis=0) % 2 == 0,
    "lattice": lambda: np.indices((60, 61)).sum(axis=0) % 3 == 0,
    "noise": lambda: np.random.default_rng(0).random((300, 400)) < 0.5,
    "dense noise": lambda: np.random.default_rng(1).random((300, 400)) < 0.8,
    "all": lambda: np.ones((30, 50), bool),
    "corners": lambda: spiral_of_corners(81),
}


@pytest.mark.parametrize("name", MASKS)
def test_rough_masks_give_valid_shapes_that_draw_them_again(name: str) -> None:
    mask = MASKS[name]()
    labels = label(mask)
    _, shapes = trace(labels)
    assert shapely.is_valid(shapes).all()
    assert shapely.area(shapes).tolist() == np.bincount(labels.ravel())[1:].tolist()
    assert (drawn(shapely.GeometryCollection(shapes.tolist()), mask.shape) == mask).all()
    assert [one.wkt for one in shapely.normalize(shapes)] == [one.wkt for one in shapes]


def test_a_part_that_closes_a_ring_at_a_corner_has_a_hole_and_no_ring_that_touches_itself() -> None:
    mask = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], bool)
    (shape,) = trace(label(mask))[1]
    assert shape.geom_type == "Polygon"
    assert [hole.wkt for hole in shape.interiors] == ["LINEARRING (1 1, 2 1, 2 2, 1 2, 1 1)"]
    assert all(ring.is_simple for ring in shapely.get_rings(shape))


def test_islands_in_holes_belong_to_their_own_polygons() -> None:
    y, x = np.indices((21, 21))
    away = np.maximum(abs(x - 10), abs(y - 10))
    labels = np.where(away % 4 == 2, 5, 0).astype(np.int32)  # three frames of one target, inside one another
    ((number,), (shape,)) = trace(labels)
    assert number == 5
    assert shape.geom_type == "MultiPolygon"
    assert [len(one.interiors) for one in shape.geoms] == [1, 1, 1]
    assert shape.is_valid and shape.area == np.count_nonzero(labels)


def test_labels_keep_their_numbers_and_their_place() -> None:
    labels = np.zeros((6, 8), np.int32)
    labels[0:2, 0:2], labels[2:4, 2:4], labels[5, 7] = 9, 4, 70_000  # two of them meet at a corner
    numbers, shapes = trace(labels, origin=(100, 50))
    assert numbers.tolist() == [4, 9, 70_000]
    assert [one.bounds for one in shapes] == [(102, 52, 104, 54), (100, 50, 102, 52), (107, 55, 108, 56)]


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (3, 3)])
def test_nothing_gives_nothing(size: tuple[int, int]) -> None:
    numbers, shapes = trace(np.zeros(size, np.int32))
    assert len(numbers) == len(shapes) == 0


def test_labels_that_touch_are_refused() -> None:
    with pytest.raises(ValueError, match="labels 3 and 4 touch; expected 8-connected targets"):
        trace(np.array([[0, 3, 4]], np.int32))


def test_columns_say_the_same_as_the_shapes() -> None:
    mask = np.random.default_rng(2).random((40, 40)) < 0.55
    found = trace_shapes(label(mask))
    assert found.corners.tolist() == shapely.get_coordinates(found.geometry).tolist()
    assert len(found) == len(found.targets) - 1
    assert np.diff(found.rings).min() >= 5
