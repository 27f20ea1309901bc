"""The page of the pipeline: one index over its stages, and the line of numbers that sums each up."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from stas_core import storage, tables
from stas_core.errors import StorageError
from stas_core.pages.contents import Contents, Part
from stas_core.pages.finished import FinishedRun
from stas_core.runs import TrainingRun
from stas_core.scores.evaluation import SubsetScore
from stas_core.verdicts import Verdict

STAGES = {
    "cohort": "Cohort",
    "folds": "Training",
    "thresholds": "Thresholds",
    "scores": "Scores of the hold-out images",
    "evaluation": "How good these scores are",
    "slides": "Scores of slides",
    "slides_evaluation": "How good the scores of slides are",
}
"""Folders of the stages, in their order."""


def build(run: FinishedRun) -> Contents:
    """Return the contents of the page."""
    verdicts = run.record.get("verdicts")
    known = verdicts if isinstance(verdicts, Mapping) else {}
    parts = [part for name, title in STAGES.items() if (part := _part(run, name, title, known.get(name))) is not None]
    return Contents(
        title=f"Pipeline of {len(parts)} stages",
        lead="Each stage has a page of its own, with its images and what they were found to hold.",
        parts=parts,
        files=run.files((("config.resolved.yaml", "all settings: gives the same run again"),)),
    )


def _part(run: FinishedRun, name: str, title: str, verdict: Any) -> Part | None:
    uri = run.path(f"{name}/manifest.json")
    if not storage.exists(uri):
        return None
    record = storage.read_json(uri)
    record = record if isinstance(record, dict) else {}
    found = Verdict.from_json(verdict) or Verdict.from_json(record.get("verdict"))
    notes = [_numbers(FinishedRun(run.path(name), record, {}), name)]
    notes += [] if found is None else [str(reason) for reason in found.reasons]
    has_page = storage.exists(run.path(f"{name}/report.html"))
    link = f"{name}/report.html" if has_page else f"{name}/"
    return Part(title, link, "no verdict" if found is None else found.level, " ".join(note for note in notes if note))


def _numbers(stage: FinishedRun, name: str) -> str:
    """Return what a stage found, in a sentence."""
    makers: Mapping[str, Callable[[FinishedRun], str]] = {
        "cohort": lambda run: f"{_many(run.count('num_images'), 'image')}, {run.count('num_failures')} not usable.",
        "folds": _of_folds,
        "thresholds": lambda run: _sentence(str(run.record.get("recommendation", ""))),
        "scores": lambda run: (
            f"{_many(run.count('num_targets'), 'target')} in {_many(run.count('num_images'), 'image')}."
        ),
        "slides": lambda run: f"{_many(run.count('num_slides'), 'slide')}, {run.count('num_failures')} failed.",
        "evaluation": _of_evaluation,
        "slides_evaluation": lambda run: f"{_many(run.count('num_scored'), 'slide')} with a truth.",
    }
    try:
        return makers[name](stage)
    except StorageError:  # a table is gone; the page of the stage says so
        return ""


def _many(count: int | None, what: str) -> str:
    return f"{count or 0:,} {what}{'' if count == 1 else 's'}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _of_folds(run: FinishedRun) -> str:
    rows = TrainingRun(run.uri).folds()
    if not rows:
        return ""
    mean = np.average([row.dice_mean for row in rows], weights=[row.num_images for row in rows])
    return f"Out-of-fold Dice {mean:.3f} over {sum(row.num_images for row in rows)} images of {len(rows)} folds."


def _of_evaluation(run: FinishedRun) -> str:
    rows = tables.read_rows(run.path("summary.parquet"), SubsetScore)
    overall = next((row for row in rows if row.subset == "overall"), None)
    if overall is None or overall.dice_mean is None:
        return ""
    bounds = "" if overall.dice_low is None else f" ({overall.dice_low:.3f} to {overall.dice_high:.3f})"
    return f"Dice {overall.dice_mean:.3f}{bounds}, mean over {overall.num_images} images."
