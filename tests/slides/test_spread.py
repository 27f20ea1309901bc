"""The densest circle and the gaps between points, against plain definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from stas_core.slides.spread import densest_circle, gaps, widest_gap_back

RADIUS, SLACK = 10.0, 0.25
PLACES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=25)
LINES = st.builds(lambda steps: [(3 * step, 7 * step) for step in steps], st.lists(st.integers(0, 9), min_size=1))
FAR = 40_000.0


def array(places: list[tuple[int, int]]) -> np.ndarray:
    return np.array(places, float).reshape(-1, 2)


def most_in_a_circle(points: np.ndarray, radius: float) -> int:
    """Try every circle about a point and through two points: one of them holds most."""
    centres = [*points]
    for one in points:
        for other in points:
            apart = np.hypot(*(other - one))
            if 0 < apart <= 2 * radius:
                across = np.array([-(other - one)[1], (other - one)[0]]) / apart
                centres.append((one + other) / 2 + across * np.sqrt(max(radius**2 - apart**2 / 4, 0)))
    return int((cdist(np.array(centres), points) <= radius + 1e-9).sum(axis=1).max())


def tree_of_all_pairs(distances: np.ndarray) -> np.ndarray:
    """Return the lengths of the minimum spanning tree (Prim's algorithm)."""
    near, left, lengths = distances[0].copy(), set(range(1, len(distances))), []
    while left:
        best = min(left, key=lambda point: near[point])
        left.remove(best)
        lengths.append(near[best])
        near = np.minimum(near, distances[best])
    return np.sort(lengths)


@given(PLACES)
def test_no_circle_but_a_little_larger_ones_holds_more(places: list[tuple[int, int]]) -> None:
    points = array(places)
    found = densest_circle(points, RADIUS, SLACK)
    assert found is not None
    assert most_in_a_circle(points, RADIUS - SLACK) <= found.count <= most_in_a_circle(points, RADIUS)
    assert found.count == np.count_nonzero(np.hypot(*(points - [found.x, found.y]).T) <= RADIUS)


@given(PLACES, st.integers(0, 60_000))
def test_a_search_that_is_cut_short_says_what_it_may_have_missed(places: list[tuple[int, int]], most: int) -> None:
    points = array(places)
    found = densest_circle(points, RADIUS, SLACK, most_counted=most)
    assert found is not None and SLACK <= found.slack < RADIUS
    assert most_in_a_circle(points, RADIUS - found.slack) <= found.count <= most_in_a_circle(points, RADIUS)


def test_a_lattice_is_no_endless_search() -> None:
    points = np.stack(np.meshgrid(np.arange(300.0), np.arange(300.0)), axis=-1).reshape(-1, 2)
    found = densest_circle(points, 30, 0.01, most_counted=10**7)
    assert found is not None and 0.01 < found.slack < 30
    assert np.pi * 29**2 < found.count < np.pi * 31**2


def test_a_circle_lies_about_the_middle_of_what_it_holds() -> None:
    assert densest_circle(np.zeros((0, 2)), RADIUS, SLACK) is None
    alone = densest_circle(np.array([[FAR, 3.0]]), RADIUS, SLACK)
    assert alone is not None and (alone.x, alone.y, alone.count) == (FAR, 3.0, 1)
    ring = np.array([[9.0, 0], [-9, 0], [0, 9], [0, -9], [6.4, 6.4]])
    found = densest_circle(ring + FAR, RADIUS, SLACK)
    assert found is not None and found.count == 5  # a circle about any of them holds three at most
    assert (found.x, found.y) == pytest.approx((FAR, FAR), abs=0.1)


@settings(max_examples=150)
@given(PLACES | LINES)
def test_gaps_are_those_of_the_shortest_net(places: list[tuple[int, int]]) -> None:
    points = array(places)
    expected = tree_of_all_pairs(cdist(points, points))
    np.testing.assert_allclose(gaps(points), expected, atol=1e-6)
    np.testing.assert_allclose(gaps(points / 3 + FAR), expected / 3, atol=1e-6)


@given(PLACES | LINES)
def test_the_way_home_is_the_one_of_shortest_strides(places: list[tuple[int, int]]) -> None:
    points = array(places)
    home = np.abs(points[:, 0] - 55)  # a line
    strides = np.zeros((len(points) + 1,) * 2)
    strides[1:, 1:], strides[0, 1:], strides[1:, 0] = cdist(points, points), home, home
    widest = strides.copy()
    for via in range(len(strides)):  # Floyd and Warshall
        widest = np.minimum(widest, np.maximum(widest[:, [via]], widest[[via]]))
    assert widest_gap_back(points, home) == pytest.approx(widest[0].max(), abs=1e-6)


def test_nothing_and_points_that_coincide_have_gaps_too() -> None:
    assert gaps(np.zeros((0, 2))).tolist() == gaps(np.ones((1, 2))).tolist() == []
    assert gaps(np.ones((3, 2))).tolist() == [0, 0]
    assert widest_gap_back(np.ones((2, 2)), np.array([5.0, 5.0])) == 5
