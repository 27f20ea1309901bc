"""Counts and scores against sets of pixels; intervals against scipy and their coverage."""

import inspect

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stas_core.metrics import Counts, Summary, bootstrap_interval, count, is_target, summarise

Pixels = npt.NDArray[np.bool_]
SHAPE = (6, 7)
masks = hnp.arrays(bool, SHAPE)


def pixels(mask: Pixels) -> set[tuple[int, int]]:
    return {(int(y), int(x)) for y, x in np.argwhere(mask)}


@settings(max_examples=50, deadline=None)
@given(pred=masks, truth=masks)
def test_counts_and_scores_equal_those_of_pixel_sets(pred: Pixels, truth: Pixels) -> None:
    p, t = pixels(pred), pixels(truth)
    counts = count(pred, truth)
    assert counts == Counts(tp=len(p & t), fp=len(p - t), fn=len(t - p))
    if p and t:
        assert counts.dice == pytest.approx(2 * len(p & t) / (len(p) + len(t)))
        assert counts.precision == pytest.approx(len(p & t) / len(p))
        assert counts.recall == pytest.approx(len(p & t) / len(t))


@settings(max_examples=50, deadline=None)
@given(pred=masks, truth=masks)
def test_dice_is_the_harmonic_mean_even_where_a_mask_is_empty(pred: Pixels, truth: Pixels) -> None:
    counts = count(pred, truth)
    total = counts.precision + counts.recall
    assert counts.dice == pytest.approx(2 * counts.precision * counts.recall / total if total else 0)


@settings(max_examples=30, deadline=None)
@given(pred=masks, truth=masks, cut=st.integers(0, SHAPE[0]))
def test_counts_of_parts_add_up(pred: Pixels, truth: Pixels, cut: int) -> None:
    assert count(pred[:cut], truth[:cut]) + count(pred[cut:], truth[cut:]) == count(pred, truth)


def test_swapping_the_masks_swaps_precision_and_recall() -> None:
    generator = np.random.default_rng(0)
    pred, truth = generator.random(SHAPE) < 0.3, generator.random(SHAPE) < 0.6
    one, other = count(pred, truth), count(truth, pred)
    assert (one.dice, one.precision, one.recall) == (other.dice, other.recall, other.precision)


@pytest.mark.parametrize(
    ("counts", "scores"),
    [
        (Counts(0, 0, 0), (1.0, 1.0, 1.0)),
        (Counts(0, 5, 0), (0.0, 0.0, 0.0)),
        (Counts(0, 0, 5), (0.0, 0.0, 0.0)),
        (Counts(3, 1, 0), (6 / 7, 3 / 4, 1.0)),
    ],
)
def test_empty_masks(counts: Counts, scores: tuple[float, float, float]) -> None:
    assert (counts.dice, counts.precision, counts.recall) == pytest.approx(scores)


def test_masks_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prediction is \(2, 3\).*truth is \(1, 3\)"):
        # Unwrapped, because the type checks of the test run would refuse the call first.
        inspect.unwrap(count)(np.zeros((2, 3), bool), np.zeros((1, 3), bool))


@pytest.mark.parametrize(
    ("threshold", "lowest"), [(0.5, 128), (0.2, 51), (3 / 255, 3), (0.1, 26), (0.0, 0), (1.0, 255)]
)
def test_threshold_is_reached_at_the_first_level_not_below_it(threshold: float, lowest: int) -> None:
    levels = np.arange(256, dtype=np.uint8)[None]
    np.testing.assert_array_equal(is_target(levels, threshold), levels >= lowest)


def test_threshold_above_one_selects_nothing() -> None:
    assert not is_target(np.full(SHAPE, 255, np.uint8), 1.5).any()


def test_threshold_is_half_by_default() -> None:
    np.testing.assert_array_equal(is_target(np.array([[127, 128]], np.uint8)), [[False, True]])


def test_interval_agrees_with_scipy() -> None:
    scores = np.random.default_rng(1).beta(8, 2, size=60)
    low, high = bootstrap_interval(scores, num_resamples=20_000)
    oracle = scipy.stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile").confidence_interval
    assert (low, high) == pytest.approx((oracle.low, oracle.high), abs=0.002)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    intervals = [
        bootstrap_interval(generator.normal(0.8, 0.1, 50), num_resamples=400, confidence=0.8, seed=i)
        for i in range(400)
    ]
    coverage = np.mean([low <= 0.8 <= high for low, high in intervals])
    assert 0.73 < coverage < 0.85


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_interval_lies_within_the_scores_and_is_repeatable(values: list[float], seed: int) -> None:
    low, high = bootstrap_interval(values, num_resamples=100, seed=seed)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    assert (low, high) == bootstrap_interval(values, num_resamples=100, seed=seed)


def test_seed_changes_the_resamples() -> None:
    values = np.random.default_rng(3).random(30)
    assert bootstrap_interval(values, seed=0) != bootstrap_interval(values, seed=1)


def test_summary() -> None:
    summary = summarise([0.5, 0.7, 0.9])
    assert (summary.mean, summary.sd, summary.num_images) == pytest.approx((0.7, 0.2, 3))
    assert (summary.low, summary.high) == bootstrap_interval([0.5, 0.7, 0.9])
    assert summarise([0.25]) == Summary(mean=0.25, sd=0.0, low=0.25, high=0.25, num_images=1)


def test_no_scores_is_an_error() -> None:
    with pytest.raises(ValueError, match="no scores to summarise"):
        summarise([])
