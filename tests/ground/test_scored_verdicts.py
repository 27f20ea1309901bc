from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stas_core import scored_verdicts
from stas_core.data.appearance import Look
from stas_core.data.reference import CohortReference
from stas_core.scored_runs import ScoredImage
from stas_core.verdicts import DO_NOT_USE, LOOK, OK, Verdict, VerdictConfig

REFERENCE = CohortReference(50, 0.1, 0.0, {"brightness": (100.0, 200.0), "sharpness": (0.4, 0.6)}, 0.01)


def judge(shares: Sequence[float], reference: CohortReference | None = REFERENCE, **values: Any) -> Verdict:
    plain: dict[str, Any] = {"look": Look(brightness=150.0, sharpness=0.5), "mean_disagreement": 0.01} | values
    one = ScoredImage("a", "a.png", 100, 100, 0.1, 1, 1, 0.0, 4)
    images = [replace(one, id=str(number), foreground_share=share, **plain) for number, share in enumerate(shares)]
    return scored_verdicts.of_images(scored_verdicts.with_drift(images, reference), 0, reference, VerdictConfig())


def test_images_like_those_of_the_training_are_ok() -> None:
    assert judge([0.05] * 9 + [0.0]) == Verdict()
    assert judge([]).level == OK


def test_masks_that_cover_everything_are_not_to_be_used() -> None:
    for reference in (REFERENCE, None):  # whether or not the ensemble says what it was trained on
        verdict = judge([0.995, 1.0, 1.0, 1.0, 0.998, 1.0], reference)
        assert verdict.level == DO_NOT_USE and verdict.reasons[0].check == "large_masks"
        assert "6 of 6 masks cover more than 50% of their image" in verdict.reasons[0].figure
    assert judge([0.9] * 3 + [0.05] * 12).level == LOOK
    trained_so = replace(REFERENCE, large_share=0.9)
    assert judge([0.995] * 6, trained_so).level == OK


def test_more_empty_masks_than_in_training_are_told() -> None:
    assert judge([0.0] * 2 + [0.1] * 8).level == OK
    (reason,) = judge([0.0] * 6 + [0.1] * 4).reasons
    assert reason.level == LOOK and "6 of 10 masks are empty" in reason.figure and "about 10%" in reason.limit


def test_the_cause_of_a_drift_is_named() -> None:
    (reason,) = judge([0.05] * 6, look=Look(brightness=150.0, sharpness=0.2)).reasons
    assert reason.level == LOOK and reason.check == "drift"
    assert "6 of 6 images look unlike those of the training, mostly by their sharpness: median 0.2" in reason.figure
    assert "0.4 to 0.6" in reason.limit and "um per pixel" in reason.remedy
    assert judge([0.05], look=Look(brightness=250.0)).reasons[0].check == "drift"  # a single image, too


def test_members_that_disagree_are_told() -> None:
    (reason,) = judge([0.05] * 6, mean_disagreement=0.05).reasons
    assert "the members disagree on 6 of 6 images" in reason.figure and "up to 0.0200" in reason.limit
    quiet = judge([0.05] * 6, replace(REFERENCE, disagreement=None), mean_disagreement=0.05)
    assert quiet.level == OK and "disagreement" in quiet.unchecked[0]


def test_an_ensemble_that_says_nothing_is_told() -> None:
    verdict = judge([0.05] * 6, None)
    assert verdict.level == OK and verdict.lines[1].startswith("  not checked: masks, looks and disagreement")


def test_slides_are_judged_by_their_warnings() -> None:
    rows: list[dict[str, Any]] = [
        {"warnings": ["stain: eosin of 9", "pen: 3 %"]},
        {"warnings": ["stain: eosin of 8"]},
        {"warnings": []},
    ]
    verdict = scored_verdicts.of_slides(rows, 0, VerdictConfig(), assumed_mpp=0.5)
    assert [reason.check for reason in verdict.reasons] == ["slides_stain", "slides_pen", "assumed_mpp"]
    assert "2 of 3 slides have a warning of the kind `stain`, such as: stain: eosin of 9" in verdict.reasons[0].figure
    assert scored_verdicts.of_slides(rows[2:], 0, VerdictConfig(), assumed_mpp=None).level == OK
