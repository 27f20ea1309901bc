import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stas_core.scores import detection
from stas_core.scores.bootstrap import BootstrapConfig
from stas_core.scores.detection import LARGEST, PEAK, TOTAL, Case, DetectionScore

FAST = BootstrapConfig(num_resamples=200)


def case(group: str, *, positive: bool, area: float, peak: float = 0.5) -> Case:
    return Case(group, positive, area > 0, {LARGEST: area, TOTAL: area, PEAK: peak}, 0.0 if positive else area / 1000)


def of(table: list[DetectionScore], level: str, measure: str) -> DetectionScore:
    (found,) = (one for one in table if (one.level, one.measure) == (level, measure))
    return found


CASES = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=1, max_size=20)


@given(CASES)
def test_auc_is_how_often_a_positive_ranks_above_a_negative(cases: list[tuple[int, bool, int]]) -> None:
    ranks, positive, weights = (np.array(column) for column in zip(*cases, strict=True))
    pairs = [
        (weights[i] * weights[j], (ranks[i] > ranks[j]) + (ranks[i] == ranks[j]) / 2)
        for i in np.flatnonzero(positive)
        for j in np.flatnonzero(~positive)
    ]
    total = sum(weight for weight, _ in pairs)
    (found,) = detection.auc(ranks.astype(float), positive, weights[None].astype(float))
    if total:
        assert found == pytest.approx(sum(weight * won for weight, won in pairs) / total)
    else:
        assert np.isnan(found)


def test_images_and_groups_are_told_apart() -> None:
    cases = [case("a", positive=True, area=50), case("a", positive=False, area=0)]
    cases += [case("b", positive=False, area=0), case("b", positive=False, area=8), case("c", positive=True, area=0)]
    table = detection.score_detection(cases, FAST)
    assert of(table, "image", "sensitivity").value == 0.5 and of(table, "image", "specificity").value == 2 / 3
    assert of(table, "group", "sensitivity").value == 0.5 and of(table, "group", "specificity").value == 0
    assert (of(table, "group", "sensitivity").num_positive, of(table, "group", "sensitivity").num_negative) == (2, 1)
    assert of(table, "image", "AUC by total area").value == pytest.approx((3 + 2 * 0.5) / 6)
    assert of(table, "image", "sensitivity").low is None  # three groups say nothing of others


def test_intervals_are_over_groups() -> None:
    # Ten groups of five images each: within a group all is right, or all is wrong.
    cases = [case(str(g), positive=True, area=9.0 * (g < 8)) for g in range(10) for _ in range(5)]
    alone = [case(f"{g} {n}", positive=True, area=9.0 * (g < 8)) for g in range(10) for n in range(5)]
    grouped = of(detection.score_detection(cases, FAST), "image", "sensitivity")
    single = of(detection.score_detection(alone, FAST), "image", "sensitivity")
    assert grouped.value == single.value == 0.8
    assert grouped.low is not None and grouped.high is not None and single.low is not None and single.high is not None
    assert grouped.high - grouped.low > 1.5 * (single.high - single.low)
    assert of(detection.score_detection(cases, FAST), "image", "specificity").value is None


def test_negatives_are_told_apart() -> None:
    cases = [case("a", positive=False, area=0), case("b", positive=False, area=100), case("c", positive=True, area=5)]
    found = detection.negatives_of(cases)
    assert found == detection.Negatives(2, 1, 0.05)
    text = detection.detection_markdown(detection.score_detection(cases, FAST), found, FAST)
    assert "2 images without a target: 1 of them (50.0%) with a predicted target, 5.000% of their area" in text
    assert "| image | specificity | 0.5000 (n/a) | 1 | 2 |" in text
    assert "each of them counts 1 where nothing is predicted, else 0; `with targets` leaves them out." in text
    alone = detection.detection_markdown([], found, FAST, what="slides", without=None)
    assert "over all slides each of them counts 1 where nothing is predicted, else 0.\n" in alone
    assert detection.negatives_of(cases[2:]) is None


@given(st.lists(st.tuples(st.sampled_from("abcdefghij"), st.booleans(), st.integers(0, 9)), min_size=1, max_size=30))
def test_scores_lie_in_their_intervals_bounds(rows: list[tuple[str, bool, int]]) -> None:
    cases = [case(group, positive=positive, area=area) for group, positive, area in rows]
    for one in detection.score_detection(cases, BootstrapConfig(num_resamples=100)):
        assert one.value is None or 0 <= one.value <= 1
        if one.low is not None and one.high is not None:
            assert 0 <= one.low <= one.high <= 1
