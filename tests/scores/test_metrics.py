"""Counts and scores against sets of pixels; targets against scipy's labels; intervals against scipy, and coverage."""

import inspect
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stas_core.scores.bootstrap import Summary, bootstrap_interval, compare, pooled_intervals, summarise
from stas_core.scores.metrics import (
    Counts,
    ReliabilityBin,
    count,
    count_grey_levels,
    count_targets,
    expected_calibration_error,
    is_target,
    reliability_bins,
)

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


def test_the_interval_does_not_depend_on_how_much_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(57)
    whole = bootstrap_interval(values)
    monkeypatch.setattr("stas_core.scores.bootstrap.RESAMPLED_AT_ONCE", 1000)
    assert bootstrap_interval(values) == whole


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


def drawn(*rows: str) -> Pixels:
    """Turn rows of # and . into a mask."""
    return np.array([[letter == "#" for letter in row] for row in rows])


def test_targets_match_where_they_overlap_by_half_of_their_union() -> None:
    truth = drawn("##..##..", "##..##..", "........", "#.......")
    pred = drawn("##..#...", "#...#..#", "........", "#......#")
    # First: 3 of 4 px. Second: 2 of 4, exactly half. Third: the same. Then two inventions of one px, not connected.
    assert count_targets(pred, truth) == Counts(tp=3, fp=2, fn=0)


def test_targets_that_touch_at_a_corner_are_one() -> None:
    assert count_targets(drawn("#.", ".#"), drawn("##", "##")) == Counts(tp=1, fp=0, fn=0)
    assert count_targets(drawn("#..", "..#"), drawn("###", "###")) == Counts(tp=0, fp=2, fn=1)


def test_of_two_halves_of_a_target_one_matches() -> None:
    truth, halves = drawn("####", "####"), drawn("#.##", "#.##")
    assert count_targets(halves, truth) == Counts(tp=1, fp=1, fn=0)
    whole = drawn("#####", "....."), drawn("##.##", ".....")
    assert count_targets(*whole) == Counts(tp=0, fp=1, fn=2)  # 2 of 5 px each: below half
    equal = drawn("##.#", "##.#"), drawn("####", "....")
    assert count_targets(*equal) == Counts(tp=0, fp=2, fn=1)


def test_empty_masks_have_no_targets() -> None:
    empty, full = np.zeros(SHAPE, bool), np.ones(SHAPE, bool)
    assert count_targets(empty, empty) == Counts(0, 0, 0)
    assert count_targets(full, empty) == Counts(0, 1, 0)
    assert count_targets(empty, full) == Counts(0, 0, 1)


@settings(max_examples=100, deadline=None)
@given(pred=masks, truth=masks)
def test_target_counts_are_symmetric_and_equal_those_of_the_largest_matching(pred: Pixels, truth: Pixels) -> None:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    counts, swapped = count_targets(pred, truth), count_targets(truth, pred)
    assert (counts.tp, counts.fp, counts.fn) == (swapped.tp, swapped.fn, swapped.fp)
    ours, num_ours = scipy.ndimage.label(pred, np.ones((3, 3)))
    theirs, num_theirs = scipy.ndimage.label(truth, np.ones((3, 3)))
    allowed = np.zeros((num_ours + 1, num_theirs + 1), int)
    for i, j in product(range(1, num_ours + 1), range(1, num_theirs + 1)):
        one, other = ours == i, theirs == j
        allowed[i, j] = 2 * (one & other).sum() >= (one | other).sum()
    num_matched = int((maximum_bipartite_matching(csr_array(allowed), perm_type="column") >= 0).sum())
    assert counts == Counts(num_matched, fp=num_ours - num_matched, fn=num_theirs - num_matched)


@settings(max_examples=30, deadline=None)
@given(mask=masks)
def test_a_mask_matches_all_its_own_targets(mask: Pixels) -> None:
    counts = count_targets(mask, mask)
    assert counts.fp == counts.fn == 0 and counts.dice == 1


def test_targets_of_masks_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match="bring both to one size"):
        inspect.unwrap(count_targets)(np.zeros((2, 3), bool), np.zeros((1, 3), bool))


def test_reliability_by_hand() -> None:
    levels = count_grey_levels(np.array([[0, 0, 255, 255]], np.uint8), drawn(".#.#"))
    assert levels.shape == (256, 2) and levels[0].tolist() == levels[255].tolist() == [2, 1]
    bins = reliability_bins(levels)
    assert bins == [ReliabilityBin(0.0, 0.5, 2), ReliabilityBin(1.0, 0.5, 2)]
    assert expected_calibration_error(bins) == 0.5
    # Two levels of one bin of 16: (48 + 3 * 52) / 4 / 255 on average, and half of the pixels are target.
    mixed = reliability_bins(count_grey_levels(np.array([[48, 52, 52, 52]], np.uint8), drawn("##..")))
    assert mixed == [ReliabilityBin(0.2, 0.5, 4)]


@settings(max_examples=30, deadline=None)
@given(prob_map=hnp.arrays(np.uint8, SHAPE), truth=masks, cut=st.integers(0, SHAPE[0]), num_bins=st.integers(1, 256))
def test_level_counts_add_up_and_bins_lose_no_pixel(
    prob_map: npt.NDArray[np.uint8], truth: Pixels, cut: int, num_bins: int
) -> None:
    levels = count_grey_levels(prob_map, truth)
    np.testing.assert_array_equal(
        levels, count_grey_levels(prob_map[:cut], truth[:cut]) + count_grey_levels(prob_map[cut:], truth[cut:])
    )
    bins = reliability_bins(levels, num_bins=num_bins)
    assert sum(bin_.num_pixels for bin_ in bins) == prob_map.size
    assert sum(bin_.mean_prob * bin_.num_pixels for bin_ in bins) == pytest.approx(prob_map.sum() / 255)
    assert sum(bin_.target_share * bin_.num_pixels for bin_ in bins) == pytest.approx(truth.sum())
    assert 0 <= expected_calibration_error(bins) <= 1


def test_reliability_of_nothing_is_an_error() -> None:
    assert reliability_bins(np.zeros((256, 2), np.int64)) == []
    with pytest.raises(ValueError, match="no pixels to judge probabilities by"):
        expected_calibration_error([])


scores = st.lists(st.floats(0, 1), min_size=1, max_size=20)


@settings(max_examples=30, deadline=None)
@given(values=scores, seed=st.integers(0, 99))
def test_a_run_does_not_differ_from_itself(values: list[float], seed: int) -> None:
    found = compare(values, values, num_resamples=100, seed=seed)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert (found.num_better, found.num_equal, found.num_worse) == (0, len(values), 0)


def test_a_comparison_by_hand_and_turned_round() -> None:
    ours, theirs = [0.5, 0.75, 1.0, 0.25], [0.25, 0.75, 0.5, 0.5]
    found, turned = compare(ours, theirs), compare(theirs, ours)
    assert (found.mean, found.num_better, found.num_equal, found.num_worse) == (0.125, 2, 1, 1)
    assert (turned.mean, turned.num_better, turned.num_worse) == (-0.125, 1, 2)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


def test_a_paired_interval_is_narrower_than_images_differ() -> None:
    generator = np.random.default_rng(4)
    theirs = generator.random(80) * 0.8
    found = compare(theirs + 0.1 + generator.normal(0, 0.01, 80), theirs)
    assert 0.09 < found.low < found.mean < found.high < 0.11


def test_a_comparison_needs_the_same_images() -> None:
    with pytest.raises(ValueError, match="2 scores against 1; a paired comparison needs the same images"):
        compare([0.1, 0.2], [0.1])


@settings(max_examples=30, deadline=None)
@given(values=scores)
def test_groups_of_one_image_change_nothing(values: list[float]) -> None:
    groups = [f"{i:03d}" for i in range(len(values))]
    assert bootstrap_interval(values, num_resamples=100, groups=groups) == bootstrap_interval(values, num_resamples=100)


def test_alike_images_of_a_group_count_as_one_witness() -> None:
    values = np.random.default_rng(5).random(40)
    one_each = bootstrap_interval(values)
    copies, groups = np.repeat(values, 10), np.repeat([f"{i:02d}" for i in range(40)], 10).tolist()
    assert bootstrap_interval(copies, groups=groups) == pytest.approx(one_each)
    low, high = bootstrap_interval(copies)
    assert high - low < 0.5 * (one_each[1] - one_each[0])


def test_a_resample_of_groups_is_the_mean_over_its_images() -> None:
    # Resamples of the groups (0) and (1, 1, 1): 0, 3/4 or 1, never 1/2.
    low, high = bootstrap_interval([0, 1, 1, 1], groups=["a", "b", "b", "b"], confidence=0.2, num_resamples=4000)
    assert low == high == 0.75


def test_a_group_is_needed_for_each_score() -> None:
    with pytest.raises(ValueError, match="1 groups for 2 scores; give one group for each"):
        bootstrap_interval([0.1, 0.2], groups=["a"])


counts_of_images = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.sampled_from("xyz")), min_size=1, max_size=12
)


@settings(max_examples=50, deadline=None)
@given(drawn_counts=counts_of_images, by_group=st.booleans(), seed=st.integers(0, 99))
def test_pooled_intervals_equal_those_of_counts_added_image_by_image(
    drawn_counts: list[tuple[int, int, int, str]], by_group: bool, seed: int
) -> None:
    images = [Counts(*values[:3]) for values in drawn_counts]
    names = [values[3] for values in drawn_counts] if by_group else [f"{i:02d}" for i in range(len(images))]
    units = [[one for one, own in zip(images, names, strict=True) if own == name] for name in sorted(set(names))]
    chosen = np.random.default_rng(seed).integers(len(units), size=(40, len(units)))
    nothing = Counts(0, 0, 0)
    pooled = [sum((one for unit in draw for one in units[unit]), nothing) for draw in chosen.tolist()]
    found = pooled_intervals(images, groups=names if by_group else None, num_resamples=40, seed=seed)
    assert set(found) == {"dice", "precision", "recall"}
    for score, interval in found.items():
        assert interval == pytest.approx(np.quantile([getattr(one, score) for one in pooled], [0.025, 0.975]).tolist())


@settings(max_examples=30, deadline=None)
@given(hits=st.lists(st.integers(0, 10), min_size=1, max_size=20), by_group=st.booleans())
def test_of_images_that_weigh_alike_the_pooled_interval_is_that_of_the_mean(hits: list[int], by_group: bool) -> None:
    groups = ["ab"[index % 2] for index in range(len(hits))] if by_group else None
    found = pooled_intervals([Counts(tp, 10 - tp, 10 - tp) for tp in hits], groups=groups, num_resamples=100)
    mean = bootstrap_interval([tp / 10 for tp in hits], groups=groups, num_resamples=100)
    assert all(interval == pytest.approx(mean) for interval in found.values())


def test_pooled_intervals_of_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match="no scores to summarise"):
        pooled_intervals([])


def test_the_interval_of_a_mean_is_the_same_as_ever() -> None:
    scores = np.random.default_rng(6).random(100)
    chosen = np.random.default_rng(0).integers(100, size=(2000, 100))
    assert bootstrap_interval(scores) == tuple(np.quantile(scores[chosen].sum(axis=1) / 100, [0.025, 0.975]))
