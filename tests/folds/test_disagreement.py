"""How far members disagree on the hold-out: measured once, however a run was stopped."""

from dataclasses import replace
from pathlib import Path

import pytest

from stas_core.data.cohort import CohortRow
from stas_core.data.reference import reference_of
from stas_core.runs import TrainingRun, write_ensemble
from workflows.folds.training import lacks_disagreement


def held_out(rows: list[CohortRow], num: int) -> list[CohortRow]:
    """Return the rows with the first few in the hold-out."""
    return [replace(row, split="hold-out", fold=None) if at < num else row for at, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("num_held_out", "folds", "measured", "lacks"),
    [(2, [0, 1], None, True), (2, [0, 1], 0.1, False), (2, [0], None, False), (0, [0, 1], None, False)],
)
def test_a_run_that_ended_before_its_members_were_compared_compares_them(
    num_held_out: int,
    folds: list[int],
    measured: float | None,
    lacks: bool,
    cohort_rows: list[CohortRow],
    tmp_path: Path,
) -> None:
    rows = held_out(cohort_rows, num_held_out)
    assert lacks_disagreement(str(tmp_path), folds, rows) == (num_held_out > 0 and len(folds) > 1)  # nothing is there
    write_ensemble(TrainingRun(str(tmp_path)).path(TrainingRun.ENSEMBLE), [], reference_of(rows, measured))
    assert lacks_disagreement(str(tmp_path), folds, rows) == lacks
