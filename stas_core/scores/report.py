"""An evaluation's tables as Markdown."""

from collections.abc import Callable, Mapping, Sequence

from stas_core import markdown
from stas_core.failures import Failure
from stas_core.scores.bootstrap import MIN_RESAMPLED, BootstrapConfig
from stas_core.scores.evaluation import POSTPROCESSED, RAW, WITH_TARGETS, Comparison, SubsetScore

MAX_LISTED = 50
"""Failures that the report lists; the table beside it has all."""

Cell = Callable[[SubsetScore], str]


def summary_markdown(summary: Sequence[SubsetScore], config: BootstrapConfig) -> str:
    """Write the summary as Markdown tables that can be read on their own."""
    interval = f"{config.confidence * 100:g} % interval"
    grouped = [row for row in summary if row.subset == "overall" and row.num_groups < row.num_images]
    text = (
        f"Scores per image are means over images, with the {interval} of {config.num_resamples} bootstrap resamples of "
        f"{config.by}s (seed {config.seed}); sd is the standard deviation over images. Pooled scores are those of all "
        "pixels together, target scores those of all targets together, with intervals from the same resamples. Targets "
        "are 8-connected components, matched one to one at an IoU of at least 0.5. Strata are shares of the image that "
        f"are target. n/a: too little to estimate it from; fewer than {MIN_RESAMPLED} {config.by}s give no interval, "
        "because resampling so few makes it far too narrow."
    )
    if grouped and config.by == "image":
        text += (
            f" These images come from only {grouped[0].num_groups} groups (patients, slides), whose images are "
            "alike: intervals over images may then be too narrow; bootstrap.by=group resamples whole groups."
        )
    parts = ["## Scores", text]
    for prediction, name, meaning in (
        (POSTPROCESSED, "Post-processed", "The masks."),
        (RAW, "Raw 0.5", "The probability maps cut at 0.5."),
    ):
        by_stratum = ("overall", WITH_TARGETS, "stratum")
        for subsets, heading in ((by_stratum, "overall and by stratum"), (("group",), "by group")):
            rows = [row for row in summary if row.prediction == prediction and row.subset in subsets]
            if rows:
                head = _head_columns(by_stratum="group" not in subsets, with_groups=bool(grouped))
                parts += [f"### {name}: {heading}", f"{meaning} Per image:"]
                parts.append(_markdown_table(rows, head | _per_image_columns(interval)))
                parts += [
                    "All pixels and all targets together:",
                    _markdown_table(rows, head | _pooled_columns(interval)),
                ]
    return "\n\n".join(parts)


def _head_columns(*, by_stratum: bool, with_groups: bool) -> dict[str, Cell]:
    """Return the leading columns: subset, number of images and, outside the by-group table, number of groups."""
    if not by_stratum:
        return {"Group": lambda row: row.name, "Images": lambda row: f"{row.num_images}"}
    columns: dict[str, Cell] = {
        "Stratum": lambda row: row.name,
        "Images": lambda row: f"{row.num_images}",
    }
    return columns | {"Groups": lambda row: f"{row.num_groups}"} if with_groups else columns


def _per_image_columns(interval: str) -> dict[str, Cell]:
    return {
        f"Dice ({interval})": lambda row: _score(row.dice_mean, row.dice_low, row.dice_high),
        "sd": lambda row: "n/a" if row.dice_sd is None else f"{row.dice_sd:.4f}",
        f"Precision ({interval})": lambda row: _score(row.precision_mean, row.precision_low, row.precision_high),
        f"Recall ({interval})": lambda row: _score(row.recall_mean, row.recall_low, row.recall_high),
    }


def _pooled_columns(interval: str) -> dict[str, Cell]:
    return {
        f"Pooled Dice ({interval})": lambda row: _score(row.pooled_dice, row.pooled_dice_low, row.pooled_dice_high),
        "Pooled precision / recall": lambda row: f"{row.pooled_precision:.4f} / {row.pooled_recall:.4f}",
        f"Target F1 ({interval})": lambda row: _score(row.object_f1, row.object_f1_low, row.object_f1_high),
        "Target precision / recall": lambda row: f"{row.object_precision:.4f} / {row.object_recall:.4f}",
        "Targets matched / predicted / true": lambda row: f"{row.num_matched} / {row.num_pred} / {row.num_truth}",
    }


def _score(score: float, low: float | None, high: float | None) -> str:
    return f"{score:.4f} {_interval(low, high)}"


def comparisons_markdown(comparisons: Sequence[Comparison], config: BootstrapConfig) -> str:
    """Write the paired comparisons as a Markdown table with what it means; nothing where there is none."""
    if not comparisons:
        return ""
    text = (
        "Dice per image of the first minus the second, on the images that have both; the interval is of the mean "
        f"difference, by paired bootstrap over {config.by}s (n/a: fewer than {MIN_RESAMPLED}). An interval that holds "
        "0 leaves open which is better."
    )
    difference = f"Difference ({config.confidence * 100:g} % interval)"
    columns = ["First", "Second", "Images", "Mean Dice, first", "Mean Dice, second", difference]
    columns += ["First better", "Equal", "First worse"]
    rows = [
        [one.first, one.second, f"{one.num_images}", f"{one.first_mean:.4f}", f"{one.second_mean:.4f}"]
        + [f"{one.difference:+.4f} {_interval(one.low, one.high, '+.4f')}"]
        + [f"{share:.1%}" for share in (one.share_better, one.share_equal, one.share_worse)]
        for one in comparisons
    ]
    return f"## Paired comparisons\n\n{text}\n\n{markdown.table(columns, rows)}"


def failures_markdown(missing: Sequence[Failure], not_compared: Sequence[Failure]) -> str:
    """List the images of the truth without a score or a comparison, and why; "" if there are none."""
    parts = []
    if missing:
        text = "Images of the truth without a score. They count in no table below, which may flatter the run."
        parts += [f"## Missing: {len(missing)}", text, _failures_table(missing)]
    if not_compared:
        text = "Images of the truth that the other run has no usable mask or map of."
        parts += [f"## Not compared: {len(not_compared)}", text, _failures_table(not_compared)]
    if max(len(missing), len(not_compared)) > MAX_LISTED:
        parts.append(f"The first {MAX_LISTED} are listed; all are in failures.parquet.")
    return "\n\n".join(parts)


def _failures_table(failures: Sequence[Failure]) -> str:
    rows = ([one.id, one.stage, one.reason, one.message] for one in failures[:MAX_LISTED])
    return markdown.table(["Id", "Stage", "Reason", "Message"], rows)


def _interval(low: float | None, high: float | None, form: str = ".4f") -> str:
    return "(n/a)" if low is None or high is None else f"({low:{form}} to {high:{form}})"


def _markdown_table(rows: Sequence[SubsetScore], columns: Mapping[str, Cell]) -> str:
    return markdown.table(list(columns), ([cell(row) for cell in columns.values()] for row in rows))
