"""The tables of a search of training settings: its trials, and their courses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stas_core import markdown, tables
from stas_core.runs import EpochMetrics, TrainingRun
from stas_core.search.space import Dimension
from stas_core.tables import Int32


@dataclass(frozen=True)
class TrialEpoch:
    """A row of `history.parquet`: an epoch that all folds of a trial had validated."""

    trial: str
    epoch: Int32
    """From 1."""
    dice: float
    """Mean validation Dice of its folds."""
    unix_time_s: float
    """When the last of them had validated it."""


@dataclass(frozen=True)
class TrialRow:
    """The fixed columns of `trials.parquet`; a column per key of the space follows."""

    trial: str
    state: str
    """done, stopped, failed or open."""
    epoch: Int32
    """The last that was scored, or 0."""
    dice: float | None
    seconds: float | None
    error: str | None


def history_of(out: str, trials: Sequence[Mapping[str, Any]], folds: Sequence[int]) -> list[TrialEpoch]:
    """Return a row per trial and epoch that all its folds had validated when the trial ended.

    From the folds' own metrics: they have also what was validated after the driver had died.
    """
    from workflows.folds.trial import joint_epochs, trial_uri

    rows = []
    for trial in trials:
        run = TrainingRun(trial_uri(out, trial["trial"]))
        for epoch, at_epoch in joint_epochs([_validated(run.fold(fold).metrics()) for fold in folds]).items():
            if epoch > trial["epoch"]:
                break
            dice = sum(dice for dice, _ in at_epoch) / len(at_epoch)
            end = max(end for _, end in at_epoch)
            rows.append(TrialEpoch(trial["trial"], epoch, dice, end))
    return rows


def _validated(metrics: Sequence[EpochMetrics]) -> dict[int, tuple[float, float]]:
    """Return Dice and time of each epoch that was validated."""
    return {row.epoch: (row.val_dice, row.unix_time_s) for row in metrics if row.val_dice is not None}


def table_of(rows: Sequence[Mapping[str, Any]], space: Mapping[str, Dimension]) -> pa.Table:
    """Return the trials as a table, with a column for each key of the space; values of several kinds become text."""
    fixed = tables.schema_of(TrialRow)
    columns = {name: pa.array([row[name] for row in rows], fixed.field(name).type) for name in fixed.names}
    for key in space:
        values = [row[key] for row in rows]
        one_kind = len({type(value) for value in values if value is not None}) <= 1
        columns[key] = pa.array(values if one_kind else [str(value) for value in values])
    return pa.table(columns)


def trials_markdown(rows: Sequence[Mapping[str, Any]], space: Mapping[str, Dimension]) -> str:
    """Write the trials, best first, as a Markdown table."""
    lines = []
    for row in rows:
        dice = "" if row["dice"] is None else f"{row['dice']:.4f}"
        cells = [f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in space]
        lines.append([row["trial"], row["state"], f"{row['epoch']}", dice, *cells])
    return markdown.table(["Trial", "State", "Epoch", "Dice", *space], lines)
