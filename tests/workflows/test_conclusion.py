from pathlib import Path

import pytest

from stas_core import config, storage
from stas_core.verdicts import DO_NOT_USE, LOOK, Reason, Verdict, VerdictConfig
from workflows import pipeline
from workflows.conclusion import conclude, conclude_again, is_judged, recorded, verdict_of
from workflows.pipeline import PipelineConfig

BAD = Reason(DO_NOT_USE, "dice_below_floor", "Dice is 0.1", "0.3 or more (verdict.min_dice)", "Train longer")
ODD = Reason(LOOK, "drift", "6 of 6 images look unlike", "0.4 to 0.6", "Another scanner?")


def test_what_is_not_to_be_used_sets_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = Verdict.of([ODD, BAD], ["disagreement"])
    assert conclude(verdict, accept_warnings=False) == 1
    assert capsys.readouterr().out.splitlines() == [
        "VERDICT: do not use",
        "  do not use: Dice is 0.1; expected 0.3 or more (verdict.min_dice). Train longer",
        "  look at this: 6 of 6 images look unlike; expected 0.4 to 0.6. Another scanner?",
        "  not checked: disagreement",
        "  exit status 1; outputs are kept. accept_warnings=true goes on all the same",
    ]
    assert conclude(verdict, accept_warnings=True) == 0
    assert conclude(Verdict.of([ODD]), accept_warnings=False) == 0
    assert conclude(Verdict(), accept_warnings=False) == 0


def test_a_finished_run_tells_its_verdict_again(tmp_path: Path) -> None:
    limits, out = VerdictConfig(), str(tmp_path)
    assert conclude_again(out, accept_warnings=False) == 0 and verdict_of(out) is None  # of an earlier version
    storage.write_json(f"{out}/manifest.json", {"stage": "x", **recorded(Verdict.of([BAD]), limits)})
    assert conclude_again(out, accept_warnings=False) == 1 and verdict_of(out) == Verdict.of([BAD])
    assert is_judged(out, limits) and not is_judged(out, VerdictConfig(min_dice=0.05))


def test_a_pipeline_that_accepts_makes_its_stages_accept() -> None:
    accepting = pipeline._accepting(config.build(PipelineConfig, {"slides": {}}))
    for name in ("prepare", "train", "tune", "score", "evaluate", "slides"):
        assert getattr(accepting, name).accept_warnings
