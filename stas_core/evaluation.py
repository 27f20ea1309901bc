"""How good predictions are: scores of one image, and tables over images, strata and groups, also as Markdown.

`SCORES_SCHEMA`, `SUMMARY_SCHEMA` and `COMPARISONS_SCHEMA` are the contracts. Rows go in sorted by id, and equal rows
give equal tables: resampling is seeded.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from stas_core import metrics
from stas_core.arrays import Mask, ProbMapU8
from stas_core.cohort import STRATUM_EDGES, stratum_of
from stas_core.config import Config
from stas_core.metrics import Counts
from stas_core.report import stratum_name

POSTPROCESSED, RAW = "post-processed", "raw 0.5"
"""The two predictions of an image: its mask, and its probability map cut at 0.5."""

MAX_LISTED = 50
"""Failures that the report lists; the table beside it has all."""

_PREFIXES = {POSTPROCESSED: "", RAW: "raw_"}
_SCORES = ("dice", "precision", "recall")
_COUNTS = ("tp", "fp", "fn")
_OBJECT_COUNTS = ("num_matched", "num_pred", "num_truth")

SCORES_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("stratum", pa.int8(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("target_px", pa.int64(), nullable=False),
        pa.field("num_truth", pa.int32(), nullable=False),
        *(
            pa.field(f"{prefix}{name}", kind, nullable=bool(prefix))
            for prefix in _PREFIXES.values()
            for names, kind in (
                (_SCORES, pa.float64()),
                (_COUNTS, pa.int64()),
                (("num_pred", "num_matched"), pa.int32()),
            )
            for name in names
        ),
        pa.field("against_dice", pa.float64()),
    ]
)
"""One row per scored image. `raw_` columns are null where the run has no map, `against_dice` where the other run has no
mask. `tp`, `fp`, `fn` and `target_px` are pixels; `num_truth`, `num_pred` and `num_matched` are targets (8-connected,
matched one to one at an IoU of at least 0.5). `stratum` is the truth's."""

SUMMARY_SCHEMA = pa.schema(
    [
        pa.field("prediction", pa.string(), nullable=False),
        pa.field("subset", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("num_images", pa.int32(), nullable=False),
        pa.field("num_groups", pa.int32(), nullable=False),
        *(
            pa.field(f"{score}_{statistic}", pa.float64(), nullable=statistic != "mean")
            for score in _SCORES
            for statistic in ("mean", "sd", "low", "high")
        ),
        *(pa.field(f"pooled_{score}", pa.float64(), nullable=False) for score in _SCORES),
        *(pa.field(name, pa.int64(), nullable=False) for name in _COUNTS),
        *(pa.field(f"object_{score}", pa.float64(), nullable=False) for score in ("f1", "precision", "recall")),
        *(pa.field(name, pa.int64(), nullable=False) for name in _OBJECT_COUNTS),
    ]
)
"""One row per prediction and set of images; `subset` is overall, stratum or group. `pooled_` and `object_` scores are
those of the summed counts. `sd` is null for one image; `low` and `high`, the bounds of the bootstrap interval of the
mean, are null where there is one image, or one group when whole groups are resampled."""

COMPARISONS_SCHEMA = pa.schema(
    [
        pa.field("first", pa.string(), nullable=False),
        pa.field("second", pa.string(), nullable=False),
        pa.field("num_images", pa.int32(), nullable=False),
        pa.field("first_mean", pa.float64(), nullable=False),
        pa.field("second_mean", pa.float64(), nullable=False),
        pa.field("difference", pa.float64(), nullable=False),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("share_better", pa.float64(), nullable=False),
        pa.field("share_equal", pa.float64(), nullable=False),
        pa.field("share_worse", pa.float64(), nullable=False),
    ]
)
"""Paired comparisons of per-image Dice on the images that have both; `difference` is first minus second."""

Row = Mapping[str, Any]


class BootstrapConfig(Config):
    """How intervals of means are found."""

    by: Literal["image", "group"] = "image"
    """What is resampled: images, or whole groups (patients, slides), whose images are alike."""
    num_resamples: int = Field(2000, ge=100)
    """Number of resamples."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Share of resamples that the interval holds."""
    seed: int = 0
    """Seed of the resampling."""


def score_image(truth: Mask, mask: Mask, prob_map: ProbMapU8 | None) -> dict[str, Any]:
    """Score the mask of one image, and its map at 0.5 where there is one: the values `SCORES_SCHEMA` names.

    Raises:
        ValueError: the arrays differ in shape.
    """
    height, width = truth.shape
    row = {"height": height, "width": width, "target_px": int(truth.sum()), "stratum": stratum_of(float(truth.mean()))}
    row |= _score(truth, mask, "")
    return row if prob_map is None else row | _score(truth, metrics.is_target(prob_map), "raw_")


def _score(truth: Mask, pred: Mask, prefix: str) -> dict[str, Any]:
    pixels, targets = metrics.count(pred, truth), metrics.count_targets(pred, truth)
    row: dict[str, Any] = {f"{prefix}{name}": getattr(pixels, name) for name in _SCORES + _COUNTS}
    row |= {f"{prefix}num_pred": targets.tp + targets.fp, f"{prefix}num_matched": targets.tp}
    return row | {"num_truth": targets.tp + targets.fn}


def summarise_scores(rows: Sequence[Row], config: BootstrapConfig) -> list[dict[str, Any]]:
    """Return the rows of `SUMMARY_SCHEMA`: overall, by stratum, and by group where a group has several images."""
    table = []
    for prediction, prefix in _PREFIXES.items():
        having = [row for row in rows if row[f"{prefix}dice"] is not None]
        for subset, name, chosen in _subsets(having):
            head = {"prediction": prediction, "subset": subset, "name": name}
            table.append(head | _summarise(chosen, prefix, config))
    return table


def _subsets(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    if not rows:
        return []
    subsets = [("overall", "all", list(rows))]
    for stratum in sorted({row["stratum"] for row in rows}):
        chosen = [row for row in rows if row["stratum"] == stratum]
        subsets.append(("stratum", stratum_name(stratum, STRATUM_EDGES), chosen))
    for group, num_images in sorted(Counter(row["group"] for row in rows).items()):
        if num_images > 1:
            subsets.append(("group", group, [row for row in rows if row["group"] == group]))
    return subsets


def _summarise(rows: Sequence[Row], prefix: str, config: BootstrapConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"num_images": len(rows), "num_groups": len({row["group"] for row in rows})}
    for score in _SCORES:
        summary = metrics.summarise([row[prefix + score] for row in rows], **_resampling(rows, config))
        low, high = _if_resampled(rows, config, summary.low, summary.high)
        sd = summary.sd if len(rows) > 1 else None
        values |= {f"{score}_mean": summary.mean, f"{score}_sd": sd, f"{score}_low": low, f"{score}_high": high}
    pixels = Counts(*(sum(row[prefix + name] for row in rows) for name in _COUNTS))
    matched, pred = (sum(row[prefix + name] for row in rows) for name in ("num_matched", "num_pred"))
    truth = sum(row["num_truth"] for row in rows)
    targets = Counts(matched, fp=pred - matched, fn=truth - matched)
    values |= {f"pooled_{score}": getattr(pixels, score) for score in _SCORES}
    values |= {name: getattr(pixels, name) for name in _COUNTS}
    values |= {"object_f1": targets.dice, "object_precision": targets.precision, "object_recall": targets.recall}
    return values | {"num_matched": matched, "num_pred": pred, "num_truth": truth}


def _resampling(rows: Sequence[Row], config: BootstrapConfig) -> dict[str, Any]:
    groups = [row["group"] for row in rows] if config.by == "group" else None
    return {"groups": groups, **config.model_dump(exclude={"by"})}


def _if_resampled(rows: Sequence[Row], config: BootstrapConfig, *bounds: float) -> tuple[float | None, ...]:
    """Return the bounds, or nothing where every resample is the same one image or group: that is no interval."""
    units = {row["id" if config.by == "image" else "group"] for row in rows}
    return bounds if len(units) > 1 else (None,) * len(bounds)


def compare_scores(rows: Sequence[Row], config: BootstrapConfig) -> list[dict[str, Any]]:
    """Return the rows of `COMPARISONS_SCHEMA`: the mask with the map at 0.5, and with the other run's mask."""
    table = []
    for first, second, column in ((POSTPROCESSED, RAW, "raw_dice"), ("run", "against", "against_dice")):
        both = [row for row in rows if row[column] is not None]
        if not both:
            continue
        ours, theirs = [row["dice"] for row in both], [row[column] for row in both]
        found = metrics.compare(ours, theirs, **_resampling(both, config))
        low, high = _if_resampled(both, config, found.low, found.high)
        shares = {f"share_{name}": getattr(found, f"num_{name}") / len(both) for name in ("better", "equal", "worse")}
        values = {"first": first, "second": second, "num_images": len(both), "difference": found.mean}
        means = {"first_mean": sum(ours) / len(both), "second_mean": sum(theirs) / len(both)}
        table.append(values | means | {"low": low, "high": high} | shares)
    return table


def summary_markdown(summary: Sequence[Row], config: BootstrapConfig) -> str:
    """Write the summary as Markdown tables that can be read on their own."""
    interval = f"{config.confidence * 100:g} % interval"
    parts = [
        "## Scores",
        f"Scores per image are means over images, with the {interval} of {config.num_resamples} bootstrap resamples of "
        f"{config.by}s (seed {config.seed}); sd is the standard deviation over images. Pooled scores are those of all "
        "pixels together. Targets are 8-connected components, matched one to one at an IoU of at least 0.5. Strata "
        "are shares of the image that are target. n/a: nothing to estimate it from.",
    ]
    for prediction, meaning in ((POSTPROCESSED, "the masks"), (RAW, "the probability maps cut at 0.5")):
        for subsets, heading in ((("overall", "stratum"), "overall and by stratum"), (("group",), "by group")):
            rows = [row for row in summary if row["prediction"] == prediction and row["subset"] in subsets]
            if rows:
                parts += [
                    f"### {prediction[0].upper()}{prediction[1:]}: {heading}",
                    f"{meaning[0].upper()}{meaning[1:]}.",
                ]
                parts.append(_markdown_table(rows, _summary_columns(interval, "group" not in subsets)))
    return "\n\n".join(parts)


def _summary_columns(interval: str, by_stratum: bool) -> dict[str, Callable[[Row], str]]:
    def mean(score: str) -> Callable[[Row], str]:
        return lambda row: f"{row[f'{score}_mean']:.4f} {_interval(row[f'{score}_low'], row[f'{score}_high'])}"

    def plain(*names: str) -> Callable[[Row], str]:
        return lambda row: " / ".join(f"{row[name]:.4f}" for name in names)

    return {
        "Stratum" if by_stratum else "Group": lambda row: row["name"],
        "Images": lambda row: f"{row['num_images']}",
        f"Dice ({interval})": mean("dice"),
        "sd": lambda row: "n/a" if row["dice_sd"] is None else f"{row['dice_sd']:.4f}",
        f"Precision ({interval})": mean("precision"),
        f"Recall ({interval})": mean("recall"),
        "Pooled Dice / precision / recall": plain("pooled_dice", "pooled_precision", "pooled_recall"),
        "Target F1 / precision / recall": plain("object_f1", "object_precision", "object_recall"),
        "Targets matched / predicted / true": lambda row: " / ".join(f"{row[name]}" for name in _OBJECT_COUNTS),
    }


def comparisons_markdown(comparisons: Sequence[Row], config: BootstrapConfig) -> str:
    """Write the paired comparisons as a Markdown table with what it means; nothing where there is none."""
    columns: dict[str, Callable[[Row], str]] = {
        "First": lambda row: row["first"],
        "Second": lambda row: row["second"],
        "Images": lambda row: f"{row['num_images']}",
        "Mean Dice, first": lambda row: f"{row['first_mean']:.4f}",
        "Mean Dice, second": lambda row: f"{row['second_mean']:.4f}",
        f"Difference ({config.confidence * 100:g} % interval)": lambda row: (
            f"{row['difference']:+.4f} {_interval(row['low'], row['high'], '+.4f')}"
        ),
        "First better": lambda row: f"{row['share_better']:.1%}",
        "Equal": lambda row: f"{row['share_equal']:.1%}",
        "First worse": lambda row: f"{row['share_worse']:.1%}",
    }
    if not comparisons:
        return ""
    text = (
        "Dice per image of the first minus the second, on the images that have both; the interval is of the mean "
        f"difference, by paired bootstrap over {config.by}s. An interval that holds 0 leaves open which is better."
    )
    return f"## Paired comparisons\n\n{text}\n\n{_markdown_table(comparisons, columns)}"


def failures_markdown(missing: Sequence[Row], not_compared: Sequence[Row]) -> str:
    """Write which images of the truth have no score, or none of the other run, and why; nothing where all have."""
    columns: dict[str, Callable[[Row], str]] = {
        name.capitalize(): lambda row, name=name: " ".join(row[name].split())  # type: ignore[misc]
        for name in ("id", "stage", "reason", "message")
    }
    parts = []
    if missing:
        text = "Images of the truth without a score. They count in no table below, which may flatter the run."
        parts += [f"## Missing: {len(missing)}", text, _markdown_table(missing[:MAX_LISTED], columns)]
    if not_compared:
        parts += [f"## Not compared: {len(not_compared)}", "Masks of the other run that could not be used."]
        parts.append(_markdown_table(not_compared[:MAX_LISTED], columns))
    if max(len(missing), len(not_compared)) > MAX_LISTED:
        parts.append(f"The first {MAX_LISTED} are listed; all are in failures.parquet.")
    return "\n\n".join(parts)


def _interval(low: float | None, high: float | None, form: str = ".4f") -> str:
    return "(n/a)" if low is None or high is None else f"({low:{form}} to {high:{form}})"


def _markdown_table(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
