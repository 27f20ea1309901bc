from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stas_core import verdicts
from stas_core.data.cohort import CohortRow
from stas_core.runs import EpochMetrics, OofScore
from stas_core.scores.metrics import count
from stas_core.verdicts import DO_NOT_USE, LEVELS, LOOK, OK, Reason, Verdict, VerdictConfig

LIMITS = VerdictConfig()
SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=20)


def made_row(number: int, share: float, **values: Any) -> CohortRow:
    area = round(share * 10_000)
    plain: dict[str, Any] = {
        "id": str(number),
        "image_uri": "",
        "annotation_uri": "",
        "mask_uri": "",
        "height": 100,
        "width": 100,
        "num_polygons": 1,
        "num_targets": int(area > 0),
        "target_areas_px": [area] if area else [],
        "foreground_share": share,
        "stratum": 0,
        "group": str(number),
        "split": "train",
        "fold": number % 2,
        "stain_matrix": [0.6, 0.2, 0.7, 0.8, 0.4, 0.5],
        "stain_max_c": [2.0, 1.0],
        "findings": [],
        **dict.fromkeys(("fingerprint", "image_fingerprint", "mask_fingerprint"), ""),
    }
    return CohortRow(**plain | values)


def scored(row: CohortRow, dice: float, found_px: int = 500) -> OofScore:
    return OofScore(row.id, int(row.fold or 0), "", dice, dice, dice, int(0.8 * found_px), found_px // 5, 100)


def history(*losses: float) -> list[EpochMetrics]:
    rest: dict[str, Any] = {"fold": 0, "lr": 0.1, "grad_norm": 1.0, "images_per_s": 1.0, "unix_time_s": 0.0}
    return [EpochMetrics(epoch=epoch, train_loss=loss, **rest) for epoch, loss in enumerate(losses, start=1)]


def judge(dice: Sequence[float], share: float = 0.05, losses: Sequence[float] = (1.0, 0.3), **values: Any) -> Verdict:
    rows = [made_row(number, share) for number in range(len(dice))]
    oof = [scored(row, one, **values) for row, one in zip(rows, dice, strict=True)]
    return verdicts.of_folds(oof, {0: history(*losses), 1: history(1.0, 0.3)}, rows, LIMITS)


def checks(verdict: Verdict) -> list[str]:
    return [reason.check for reason in verdict.reasons]


def test_a_training_that_learned_is_ok() -> None:
    verdict = judge([0.7, 0.8, 0.75, 0.7, 0.8, 0.75, 0.7, 0.8, 0.75, 0.8])
    assert verdict == Verdict() and verdict.level == OK
    assert verdict.lines == ["VERDICT: ok"]


def test_a_training_that_learned_nothing_is_not_to_be_used() -> None:
    # All foreground has 2 * 0.05 / 1.05 = 0.095.
    verdict = judge([0.05, 0.13, 0.09, 0.10, 0.08, 0.12, 0.09, 0.10, 0.06, 0.12])
    assert verdict.level == DO_NOT_USE and checks(verdict) == ["no_better_than_constant"]
    (reason,) = verdict.reasons
    assert "Dice is 0.094, and that of a mask that is all foreground 0.095 (difference -0.001" in reason.figure
    assert "do not use: out-of-fold Dice" in verdict.lines[1] and reason.remedy in verdict.lines[1]


def test_beyond_a_constant_mask_there_is_a_floor() -> None:
    dice = [0.25, 0.24, 0.26, 0.25] * 3
    assert checks(judge(dice)) == ["dice_below_floor"]
    rows = [made_row(number, 0.05) for number in range(12)]
    oof = [scored(row, one) for row, one in zip(rows, dice, strict=True)]
    lower = VerdictConfig(min_dice=0.2)
    assert verdicts.of_folds(oof, {}, rows, lower).level == OK


def test_images_without_targets_do_not_hide_that_nothing_is_found() -> None:
    rows = [made_row(number, 0.05 * (number % 4 == 0)) for number in range(20)]
    oof = [scored(row, float(row.num_targets == 0), found_px=0) for row in rows]  # nothing is ever predicted
    verdict = verdicts.of_folds(oof, {}, rows, LIMITS)
    assert checks(verdict) == ["no_better_than_constant", "empty_maps"] and verdict.level == DO_NOT_USE
    assert "Dice of the 5 images with targets is 0.000" in verdict.reasons[0].figure
    alarmed = [scored(row, 0.9, found_px=10) for row in rows]
    assert checks(verdicts.of_folds(alarmed, {}, rows, LIMITS)) == ["false_alarms"]
    nothing = [scored(row, 1.0, found_px=0) for row in rows if not row.num_targets]
    assert checks(verdicts.of_folds(nothing, {}, rows, LIMITS)) == ["no_target"]  # there is no Dice to judge


@pytest.mark.parametrize(
    ("values", "check", "text"),
    [
        ({"losses": (0.5, 0.49)}, "loss_not_falling", "training loss of fold 0 went from 0.500 to 0.490 in 2 epochs"),
        ({"dice": [0.2, 0.9] * 6}, "fold_apart", "fold 0 has Dice 0.200, the others 0.900"),
        ({"found_px": 6000}, "full_maps", "100% of the predictions cover more than 50% of their image"),
    ],
)
def test_what_is_odd_is_named(values: dict[str, Any], check: str, text: str) -> None:
    verdict = judge(**{"dice": [0.7, 0.8, 0.75] * 4} | values)
    assert check in checks(verdict) and text in "\n".join(verdict.lines)
    assert verdict.level in (LOOK, DO_NOT_USE)


def test_probabilities_that_mean_nothing_are_told() -> None:
    (reason,) = verdicts.precision_reasons(10, 90, LIMITS)
    assert reason.level == LOOK and "10% are target" in reason.figure
    assert not list(verdicts.precision_reasons(60, 40, LIMITS)) and not list(verdicts.precision_reasons(0, 0, LIMITS))


def test_cohorts() -> None:
    rows = [made_row(number, 0.05) for number in range(20)]
    assert verdicts.of_cohort(rows, 1, LIMITS).level == OK
    assert checks(verdicts.of_cohort(rows, 10, LIMITS)) == ["failed"]
    assert checks(verdicts.of_cohort([made_row(0, 0.0), made_row(1, 0.0)], 0, LIMITS)) == ["no_target"]
    assert checks(verdicts.of_cohort([made_row(0, 0.9)], 0, LIMITS)) == ["mostly_target"]
    blank = [made_row(0, 0.1, stain_matrix=None, stain_max_c=None), *rows[:3]]
    assert checks(verdicts.of_cohort(blank, 0, LIMITS)) == ["no_tissue"]


@given(SHARES)
def test_the_constant_mask_is_scored_as_masks_are(shares: list[float]) -> None:
    sizes = [max(1, round(share * 400)) for share in shares]
    truths = [np.arange(400).reshape(20, 20) < size for size in sizes]
    dice = [count(np.ones((20, 20), bool), truth).dice for truth in truths]
    assert verdicts.constant_dice(np.array(sizes) / 400).tolist() == pytest.approx(dice)


@given(SHARES, st.sampled_from([0.0, 1.0]))
def test_a_constant_mask_never_passes(shares: list[float], level: float) -> None:
    dice = [1.0 if share == level == 0 else level * 2 * share / (1 + share) for share in shares]
    found = verdicts.dice_reasons(dice, shares, LIMITS)
    num = sum(share > 0 for share in shares)
    assert Verdict.of(found).level == (OK if num == 0 else LOOK if num < verdicts.MIN_JUDGED else DO_NOT_USE)


REASONS = st.builds(Reason, st.sampled_from(LEVELS), *[st.text(max_size=9)] * 4)


@given(st.lists(REASONS, max_size=6), st.lists(st.text(max_size=9), max_size=2))
def test_a_verdict_is_as_bad_as_its_worst_reason_and_survives_json(reasons: list[Reason], notes: list[str]) -> None:
    verdict = Verdict.of(reasons, notes)
    assert verdict.level == max([OK, *(reason.level for reason in reasons)], key=LEVELS.index)
    assert sorted(verdict.reasons, key=str) == sorted(reasons, key=str)
    assert Verdict.from_json(verdict.to_json()) == verdict
    assert Verdict.from_json({"level": "ok"}) is None and Verdict.from_json(None) is None
