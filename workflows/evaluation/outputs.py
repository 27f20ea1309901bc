"""What evaluate writes: tables, a report and figures."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stas_core import failures, storage, tables, verdicts
from stas_core.arrays import Mask, RgbImage
from stas_core.data import images, overlay
from stas_core.data import truth as truths_of_files
from stas_core.data.cohort import HOLD_OUT, TRAIN
from stas_core.errors import ConfigError, InputError, StorageError
from stas_core.failures import Failure
from stas_core.scores import detection, evaluation, report
from stas_core.scores.bootstrap import BootstrapConfig
from stas_core.scores.detection import DetectionScore
from stas_core.scores.evaluation import Comparison, ImageScore, Outcome, SubsetScore
from stas_core.scores.metrics import GreyLevelCounts
from stas_core.verdicts import Verdict, VerdictConfig
from workflows.conclusion import recorded
from workflows.evaluation.pairing import ImagePairs, TruthConfig
from workflows.progress import doing

TABLES = ("failures", "scores", "summary", "comparisons", "detection")
FIGURES = ("dice_histogram", "dice_by_area", "calibration", "examples")
EXAMPLES_PER_KIND, EXAMPLE_WIDTH_PX = 4, 640
NEARLY_FULL = 0.95
"""Share of an image above which a target is more likely a mask that was read or made wrongly."""


@dataclass(frozen=True)
class Context:
    """What was evaluated, and what the report says of it beside the scores."""

    run: str
    against: str | None
    truth: TruthConfig
    bootstrap: BootstrapConfig
    pairs: ImagePairs
    levels: GreyLevelCounts
    """Of all maps that were scored."""
    limits: VerdictConfig


@doing("resampling for the intervals, drawing the figures, writing the tables")
def write_outputs(out: str, outcomes: Sequence[Outcome], context: Context) -> dict[str, Any]:
    """Write tables, report and figures; return the facts for the manifest.

    Raises:
        ConfigError: no image of the truth has a score.
    """
    missing = [*context.pairs.missing, *(one.failure for one in outcomes if one.failure is not None)]
    not_compared = [
        *context.pairs.not_compared,
        *(one.not_compared for one in outcomes if one.not_compared is not None),
    ]
    for kind, failed in (("missing", missing), ("not compared", not_compared)):
        failed.sort(key=lambda failure: failure.id)
        for line in failures.lines(failed, kind):
            print(line)
    tables.write_rows(storage.join(out, "failures.parquet"), Failure, [*missing, *not_compared])
    findings = {one.id: one.findings for one in outcomes if one.findings}
    for line in truths_of_files.findings_lines(findings):
        print(line)
    rows = [one.score for one in outcomes if one.score is not None]
    if not rows:
        raise ConfigError(
            f"none of the {len(context.pairs.truths)} images of the truth has a score in run = {context.run}; see "
            f"{out}/failures.parquet, and check that truth and run name the same images"
        )
    summary = evaluation.summarise_scores(rows, context.bootstrap)
    comparisons = evaluation.compare_scores(rows, context.bootstrap)
    tables.write_rows(storage.join(out, "scores.parquet"), ImageScore, rows)
    tables.write_rows(storage.join(out, "summary.parquet"), SubsetScore, summary)
    tables.write_rows(storage.join(out, "comparisons.parquet"), Comparison, comparisons)
    cases = evaluation.cases_of(rows)
    found = detection.score_detection(cases, context.bootstrap)
    tables.write_rows(storage.join(out, "detection.parquet"), DetectionScore, found)
    figures = _draw_figures(rows, context)
    for name, data in figures.items():
        storage.write_bytes(storage.join(out, "figures", f"{name}.png"), data)
    verdict = _judge(rows, len(missing), context)
    parts = [
        _heading(out, summary, rows, context, verdict),
        report.failures_markdown(missing, not_compared),
        report.summary_markdown(summary, context.bootstrap),
        detection.detection_markdown(found, detection.negatives_of(cases), context.bootstrap),
        report.comparisons_markdown(comparisons, context.bootstrap),
        "## Figures",
        *(f"![{name}](figures/{name}.png)" for name in figures),
    ]
    storage.write_bytes(storage.join(out, "report.md"), ("\n\n".join(filter(None, parts)) + "\n").encode())
    counts = {"num_truth": len(context.pairs.truths), "num_scored": len(rows), "num_missing": len(missing)}
    facts = {"findings": truths_of_files.count_findings(findings), **recorded(verdict, context.limits)}
    return counts | facts


def _judge(rows: Sequence[ImageScore], num_missing: int, context: Context) -> Verdict:
    sizes = [row.height * row.width for row in rows]
    shares = {
        "truth": [row.target_px / size for row, size in zip(rows, sizes, strict=True)],
        "found": [(row.tp + row.fp) / size for row, size in zip(rows, sizes, strict=True)],
    }
    split_of = {truth.id: truth.split for truth in context.pairs.truths}
    is_cohort = context.truth.cohort is not None
    num_trained_on = sum(split_of[row.id] == TRAIN for row in rows) if is_cohort else 0
    dice = [row.dice for row in rows]
    return verdicts.of_evaluation(dice, shares, num_missing, context.limits, num_trained_on=num_trained_on)


def _heading(
    out: str, summary: Sequence[SubsetScore], rows: Sequence[ImageScore], context: Context, verdict: Verdict
) -> str:
    """Write the report's heading: what was evaluated, against what, on how many images, and how well it did."""
    truth, num_truth, num_scored = context.truth, len(context.pairs.truths), len(rows)
    source = next(uri for uri in (truth.cohort, truth.masks, truth.annotations) if uri is not None)
    chosen = f" (split {truth.split}, folds {truth.folds or 'all'})" if truth.cohort is not None else ""
    extra = len(set(context.pairs.scored.image_uris) - {truth.id for truth in context.pairs.truths})
    facts = {
        "Run": context.run,
        "Truth": f"{source}{chosen}",
        "Images of the truth": f"{num_truth}; scored {num_scored}; **without a score {num_truth - num_scored}**",
        "Images of the run that are not in this truth": f"{extra}, left out",
    }
    warning = []
    if truth.cohort is not None:
        split_of = {truth.id: truth.split for truth in context.pairs.truths}
        splits = Counter(split_of[row.id] for row in rows)
        facts["Scored images by split"] = f"{splits[HOLD_OUT]} hold-out, {splits[TRAIN]} of the training split"
        if splits[TRAIN]:
            warning = [
                f"**Warning: {splits[TRAIN]} of the scored images are of the training split.** An ensemble's members "
                "were trained on most of them, so these scores are better than on new images, unless only members "
                "that had left them out were applied. truth.split=hold-out scores images that no member has seen.",
                "",
            ]
    shares = [row.target_px / (row.height * row.width) for row in rows]
    if not any(shares) or min(share for share in shares if share) > NEARLY_FULL:
        what = f"covers more than {NEARLY_FULL:.0%} of each image that has a target" if any(shares) else "is empty"
        text = f"**Warning: the truth {what}.** Check that its files mark the targets, and what they mark them with."
        print(text.strip("*"))
        warning += [text, ""]
    if context.against is not None:
        num_compared = sum(row.against_dice is not None for row in rows)
        facts["Against"] = f"{context.against}; {num_compared} images in both runs and the truth are compared"
    overall = summary[0]
    facts["Mean Dice per image"] = f"{overall.dice_mean:.4f}; of all pixels together {overall.pooled_dice:.4f}"
    if with_targets := [row for row in summary if row.subset == evaluation.WITH_TARGETS]:
        having = with_targets[0]
        facts["Mean Dice per image"] += (
            f"; of the {having.num_images} with targets {having.dice_mean:.4f} (each of the "
            f"{overall.num_images - having.num_images} without counts 1 where nothing is predicted, else 0)"
        )
    print(f"Mean Dice per image: {facts['Mean Dice per image']}")
    command = shlex.join(["python", "workflows/evaluate.py", "--config", f"{out}/config.resolved.yaml"])
    lines = [f"- {name}: {text}" for name, text in facts.items()]
    return "\n".join(
        ["# Evaluation", "", verdict.markdown(), "", *lines, "", *warning, "Command:", "", f"    {command}"]
    )


def _draw_figures(rows: Sequence[ImageScore], context: Context) -> dict[str, bytes]:
    from stas_core.figures import contact_sheet, scores, training

    dice = [row.dice for row in rows]
    raw = [row.raw_dice for row in rows if row.raw_dice is not None]
    figures = {
        "dice_histogram": scores.dice_histogram(dice, raw),
        "dice_by_area": scores.dice_by_area([row.target_px for row in rows], dice),
    }
    if context.levels.any():
        figures["calibration"] = scores.reliability_diagram(context.levels)
    truth_of = {truth.id: truth for truth in context.pairs.truths}
    dice_of = {row.id: row.dice for row in rows}
    picked = training.pick_examples(list(dice_of), dice, num_each=EXAMPLES_PER_KIND)
    tiles = []
    for kind, ids in picked.items():
        for image_id in ids:
            mask = evaluation.read_mask(context.pairs.scored.masks[image_id])
            known = truth_of[image_id]
            truth, _ = evaluation.read_truth(
                known.uri, mask, context.truth.annotation, image_id=image_id, fingerprint=known.fingerprint
            )
            picture = _overlay(context.pairs.scored.image_uris[image_id], truth, mask)
            tiles.append(contact_sheet.Tile(picture, f"{kind}: {image_id}  Dice {dice_of[image_id]:.3f}"))
    title = "Best, median and worst images: truth cyan, prediction yellow; missed and invented areas tinted"
    figures["examples"] = contact_sheet.contact_sheet(tiles, columns=len(picked["best"]), title=title)  # a row each
    return figures


def _overlay(image_uri: str, truth: Mask, mask: Mask) -> RgbImage:
    """Outline both masks on the image, or on white if the image cannot be read any more: scores need no image."""
    image = np.full((*truth.shape, 3), 255, np.uint8)
    try:
        found = images.read_image(image_uri)
        if found.shape == image.shape:
            image = found
    except (InputError, StorageError) as error:
        print(f"example drawn on white: {error}")
    drawn = overlay.draw(image, truth=truth, prediction=mask, tint_errors=True)
    return overlay.thumbnail(drawn, width_px=EXAMPLE_WIDTH_PX)
