"""The scores of folds: an interval where enough images, or groups of them, are there to draw from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stas_core import tables
from stas_core.data.cohort import CohortRow, read_cohort
from stas_core.networks.checkpoints import CheckpointRecord
from stas_core.pages import training as page
from stas_core.predict import model_card
from stas_core.runs import FoldResult, OofScore, TrainingRun
from stas_core.scores import bootstrap
from stas_core.scores.bootstrap import MIN_RESAMPLED
from stas_core.train.recipe import FoldRecipe
from tests.folds import test_train_folds
from workflows.folds import training


def write_fold(run: TrainingRun, number: int, rows: Sequence[CohortRow]) -> list[float]:
    """Write what a finished fold leaves of these images; return their Dice."""
    fold, dice = run.fold(number), [float(value) for value in np.linspace(0.5, 0.9, len(rows))]
    fold.write_oof(
        [OofScore(row.id, number, "", value, 0.8, 0.7, 1, 1, 1) for row, value in zip(rows, dice, strict=True)]
    )
    fold.finish(FoldResult(number, 3, 0.9, 0.9, 0.9, 0.9, 0.9, 3, 1.0, 5.0, ("cpu",)), {})
    return dice


def test_a_training_is_of_its_images_and_masks_whatever_the_annotations_are_called(
    tiny_recipe: FoldRecipe, cohort_uri: str, cohort_rows: list[CohortRow], tmp_path: Path
) -> None:
    """A cohort that is prepared with other labels has other masks of the same annotations."""

    def work(**changes: str) -> tuple[object, str]:
        first, *others = read_cohort(cohort_uri)
        uri = f"{tmp_path}/{len(list(tmp_path.iterdir()))}.parquet"
        tables.write_rows(uri, CohortRow, [replace(first, **changes), *others])  # type: ignore[arg-type]
        return training.open_training(test_train_folds.settings(tiny_recipe, uri, tmp_path / "out")).work

    assert work() == work(fingerprint="of the annotation, saved again")
    assert work() != work(mask_fingerprint="other labels")


def test_a_fold_has_an_interval_over_its_images_or_groups_where_they_are_enough(
    cohort_rows: list[CohortRow], tmp_path: Path
) -> None:
    run, num = TrainingRun(str(tmp_path)), MIN_RESAMPLED
    alone = [replace(cohort_rows[0], id=f"a{n}", group=f"a{n}") for n in range(num)]
    few = [replace(cohort_rows[0], id=f"b{n}", group=f"b{n}") for n in range(num - 1)]
    pairs = [replace(cohort_rows[0], id=f"c{n}", group=f"c{n // 2}") for n in range(2 * num)]
    alike = [replace(cohort_rows[0], id=f"d{n}", group=f"d{n // 3}") for n in range(2 * num)]
    every = [alone, few, pairs, alike]
    dice = [write_fold(run, number, rows) for number, rows in enumerate(every)]
    cohort = [row for rows in every for row in rows]
    table = training.fold_table(run.uri, range(4), cohort)
    by_group = bootstrap.bootstrap_interval(dice[2], groups=[row.group for row in pairs])
    bounds = [(row.dice_low, row.dice_high) for row in table]
    assert bounds == [bootstrap.bootstrap_interval(dice[0]), (None, None), by_group, (None, None)]
    assert by_group != bootstrap.bootstrap_interval(dice[2])
    assert table[1].recall_low is None and table[1].recall_mean == pytest.approx(0.7)

    run.write_folds(table)
    assert run.folds() == table
    said = training._fold_lines(
        table, {"b0": 0.5, **dict(zip([row.id for row in pairs], dice[2], strict=True))}, cohort
    )
    assert [line.count("(n/a)") for line in said.splitlines()[1:6]] == [0, 1, 0, 1, 0]
    assert len({line.index("  0.8000     0.7000") for line in said.splitlines()[1:5]}) == 1  # columns stand
    assert said.endswith("n/a: fewer than 8 images, or groups of them, give no interval")
    assert [str(row["interval"]) == "n/a" for row in page._table(table).rows] == [False, True, False, True]


def test_a_model_card_says_where_a_fold_is_too_small_for_an_interval(
    cohort_rows: list[CohortRow], tmp_path: Path
) -> None:
    run = TrainingRun(str(tmp_path))
    write_fold(run, 0, cohort_rows[:3])
    run.write_folds(training.fold_table(run.uri, [0], cohort_rows))

    record = CheckpointRecord({}, 1.0, fold=0, epoch=3, averaged=False, scores={}, provenance={})
    assert "| 0 | 3 | 0.700 (n/a: too few images) |" in model_card._scores(run.uri, [record])
