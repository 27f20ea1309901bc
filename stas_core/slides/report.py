"""The report of score_slides: a line for each slide, what failed, what the columns mean."""

from collections.abc import Mapping, Sequence
from typing import Any

from stas_core import markdown
from stas_core.failures import Failure
from stas_core.slides.scores import describe_scores
from stas_core.verdicts import Verdict

COLUMNS = {
    "slide": "id",
    "tissue (mm²)": "tissue_mm2",
    "targets": "num_targets",
    "per mm²": "targets_per_mm2",
    "STAS (mm²)": "stas_mm2",
    "densest field": "densest_count",
    "outside the tumour": "num_outside",
    "farthest (mm)": "outside_max_um",
    "um/px": "mpp",
}
"""Heading and column of the figures that are shown of each slide."""
RANGED = ("num_targets", "targets_per_mm2", "stas_mm2", "densest_count")
"""Figures that are shown with their range over the members."""


def write_report(
    rows: Sequence[Mapping[str, Any]], failed: Sequence[Failure], seams: Sequence[str], verdict: Verdict
) -> str:
    """Return the report as Markdown.

    Args:
        rows: of `slides.parquet`.
        failed: the slides that could not be scored.
        seams: what tiles cost and leave, in lines.
        verdict: of the run.
    """
    parts = [
        "# Slides",
        "",
        verdict.markdown(),
        "",
        "A research tool, not for diagnosis. In parentheses: least and largest over the ensemble's members.",
        "",
        markdown.table(tuple(COLUMNS), [[_cell(row, column) for column in COLUMNS.values()] for row in rows]),
    ]
    if warned := [(row["id"], text) for row in rows for text in row["warnings"]]:
        parts += ["", "## Warnings", "", *(f"- {slide_id}: {text}" for slide_id, text in warned)]
    if failed:
        parts += ["", "## Failed", "", *(f"- {one.id} ({one.reason}): {one.message}" for one in failed)]
    if seams:
        parts += ["", "## Seams", "", *(f"- {line}" for line in seams)]
    return "\n".join([*parts, "", "## What the figures are", "", describe_scores(), ""])


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        return "n/a"
    if isinstance(value, str):
        return value
    if column == "outside_max_um":
        return f"{value / 1000:.2f}"
    if column == "mpp":
        return f"{value:.4g} ({row['mpp_source']})"
    text = _number(value)
    low, high = row.get(f"{column}_min"), row.get(f"{column}_max")
    if column in RANGED and low is not None and high is not None:
        text += f" ({_number(low)}-{_number(high)})"
    return text


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
