"""An evaluation of slides as Markdown."""

from collections.abc import Sequence

from stas_core import markdown
from stas_core.failures import Failure
from stas_core.scores.bootstrap import MIN_RESAMPLED, BootstrapConfig
from stas_core.scores.report import MAX_LISTED
from stas_core.slides.evaluated import (
    DENSITIES,
    FALSE_PER_MM2,
    SENSITIVITIES,
    EvaluatedSlide,
    SlideSummary,
)

_NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "precision": "Precision",
    "recall": "Recall",
    "target_f1": "Target F1",
    "target_precision": "Target precision",
    "target_recall": "Target recall",
    "true_per_mm2": "True targets per mm²",
    "found_per_mm2": "Found targets per mm²",
    "sensitivity_mean": "Mean sensitivity of these",
} | {name: f"Sensitivity at {rate:g} false per mm²" for name, rate in zip(SENSITIVITIES, FALSE_PER_MM2, strict=True)}


def summary_markdown(summary: Sequence[SlideSummary], config: BootstrapConfig) -> str:
    """Write the summary as a table that can be read on its own."""
    interval = f"{config.confidence * 100:g} % interval"
    text = (
        f"Means are over slides, with the {interval} of {config.num_resamples} bootstrap resamples of slides (seed "
        f"{config.seed}); sd is the standard deviation over slides. Pooled scores are those of all pixels, or all "
        "targets, together. Targets are 8-connected components, matched one to one at an IoU of at least 0.5. "
        "Sensitivity is the share of the true targets that is found at no more than so many false targets per mm² of "
        "tissue, the threshold being on a target's mean probability; it ends at the recall of the masks. n/a: too "
        f"little to estimate it from; fewer than {MIN_RESAMPLED} slides give no interval."
    )
    columns = ["Score", "Slides", f"Mean ({interval})", "sd", f"Pooled ({interval})"]
    rows = [
        [
            _NAMES[row.score],
            f"{row.num_slides}",
            f"{_number(row.mean)} {_interval(row.low, row.high)}",
            _number(row.sd),
            f"{_number(row.pooled)} {_interval(row.pooled_low, row.pooled_high)}",
        ]
        for row in summary
    ]
    return f"## Scores\n\n{text}\n\n{markdown.table(columns, rows)}"


def slides_markdown(rows: Sequence[EvaluatedSlide]) -> str:
    """Write a line for each slide, the worst target F1 first."""
    columns = ["Slide", "Tissue (mm²)", "Dice", "IoU", "Precision / recall", "Targets matched / found / true"]
    columns += ["Target F1", *(_NAMES[name] for name in DENSITIES), "Mean sensitivity"]
    table = [
        [
            row.id,
            f"{row.tissue_mm2:.4g}",
            _number(row.dice),
            _number(row.iou),
            f"{row.precision:.4f} / {row.recall:.4f}",
            f"{row.target_tp} / {row.target_tp + row.target_fp} / {row.target_tp + row.target_fn}",
            _number(row.target_f1),
            *(f"{getattr(row, name):.4g}" for name in DENSITIES),
            _number(row.sensitivity_mean),
        ]
        for row in sorted(rows, key=lambda row: (row.target_f1, row.id))[:MAX_LISTED]
    ]
    parts = ["## Slides", "The worst target F1 first.", markdown.table(columns, table)]
    if len(rows) > MAX_LISTED:
        parts.append(f"The first {MAX_LISTED} are listed; all are in scores.parquet.")
    return "\n\n".join(parts)


def failures_markdown(missing: Sequence[Failure], without_truth: Sequence[Failure]) -> str:
    """List the slides that are on one side alone, or cannot be compared, and why; "" if there are none."""
    parts = []
    for failures, heading, text in (
        (missing, "Missing", "Slides of the truth without a score. They count in no table, which may flatter the run."),
        (without_truth, "Without truth", "Slides that were scored, and that the truth has no file for."),
    ):
        if failures:
            rows = ([one.id, one.stage, one.reason, one.message] for one in failures[:MAX_LISTED])
            table = markdown.table(["Id", "Stage", "Reason", "Message"], rows)
            parts += [f"## {heading}: {len(failures)}", text, table]
    if max(len(missing), len(without_truth)) > MAX_LISTED:
        parts.append(f"The first {MAX_LISTED} are listed; all are in failures.parquet.")
    return "\n\n".join(parts)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"({low:.4f} to {high:.4f})"
