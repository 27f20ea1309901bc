"""What pages of an evaluation have in common, of images or slides: scores as text, and whether targets are found."""

from dataclasses import asdict

from stas_core import tables
from stas_core.pages.contents import Column, Table
from stas_core.pages.finished import FinishedRun
from stas_core.scores.detection import DetectionScore

_DETECTION_COLUMNS = (
    Column("level", "of", kind="text"),
    Column("measure", "measure", kind="text"),
    Column("value", "value"),
    Column("interval", "95 % interval", kind="text"),
    Column("num_positive", "with targets", kind="whole"),
    Column("num_negative", "without", kind="whole"),
)
FILES = (
    ("report.md", "the same as text, with all strata and groups"),
    ("scores.parquet", "a row per image or slide"),
    ("summary.parquet", "means, intervals, pooled scores"),
    ("detection.parquet", "sensitivity, specificity, AUC"),
    ("froc.parquet", "sensitivity against false targets per mm\u00b2"),
    ("failures.parquet", "what of the truth has no score, and why"),
)


def score(value: float | None) -> str:
    """Return a score as a person reads it."""
    return "-" if value is None else f"{value:.3f}"


def interval(low: float | None, high: float | None) -> str:
    """Return the bounds of an interval as a person reads them."""
    return "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def detection_table(run: FinishedRun) -> list[Table]:
    """Return sensitivity, specificity and AUC, where any is known."""
    rows = tables.read_rows(run.path("detection.parquet"), DetectionScore)
    lines = [asdict(one) | {"interval": interval(one.low, one.high)} for one in rows if one.value is not None]
    reading = "Sensitivity and specificity of a mask with any target; AUC: how often a positive ranks above a negative."
    return [Table("Found or not", reading, _DETECTION_COLUMNS, lines)] if lines else []
