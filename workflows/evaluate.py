"""Score a run's masks against the truth: per image, per target, with intervals, figures and paired comparisons.

    python workflows/evaluate.py run=/data/stas/runs/scored truth.cohort=/data/stas/cohort/cohort.parquet \\
        truth.split=hold-out out=/data/stas/runs/evaluation

Writes <out>/report.md (start there), scores.parquet (one row per image), summary.parquet, comparisons.parquet,
failures.parquet (images of the truth without a score, and why), figures/*.png and, last, manifest.json. Where the run
has maps, these are scored too, cut at 0.5, and compared with the masks. With `against=` masks and maps are compared
with those of another run. Run again, it does nothing unless a setting or a file it reads has changed.
"""

import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from stas_core import config as configs
from stas_core import failures, storage, tables
from stas_core.arrays import Mask, RgbImage
from stas_core.config import Config, Uri
from stas_core.data import images, listing, overlay
from stas_core.data import truth as truths_of_files
from stas_core.data.annotations import AnnotationConfig
from stas_core.data.cohort import HOLD_OUT, TRAIN, folds_of, read_cohort
from stas_core.errors import ConfigError, InputError, StorageError
from stas_core.failures import Failure
from stas_core.runs import MAPS, MASKS, ScoredRun
from stas_core.scores import evaluation, report
from stas_core.scores.bootstrap import BootstrapConfig
from stas_core.scores.evaluation import RESULT_SCHEMA, SCORES_SCHEMA, SUMMARY_SCHEMA, Comparison, PairedFiles
from stas_core.scores.metrics import GreyLevelCounts
from workflows.cli import main
from workflows.cluster import quieten_ray_data, ray_session
from workflows.out_folder import (
    MANIFEST,
    OutFolder,
    Outputs,
    claim_for_stage,
    require_apart,
    require_out,
    require_uri,
)
from workflows.progress import Progress

STAGE, AGAINST_STAGE = "evaluate", "evaluate against"
NOT_SCORED = "not_scored"
"""Reason code of an image of the truth that the run neither scored nor reports as failed."""

TABLES = ("failures", "scores", "summary", "comparisons")
FIGURES = ("dice_histogram", "dice_by_area", "calibration", "examples")
OUTPUTS = Outputs(
    STAGE, ("report.md", *(f"{name}.parquet" for name in TABLES), *(f"figures/{name}.png" for name in FIGURES))
)
EXAMPLES_PER_KIND, EXAMPLE_WIDTH_PX = 4, 640
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
NEARLY_FULL = 0.95
"""Share of an image above which a target is more likely a mask that was read or made wrongly."""


class TruthConfig(Config):
    """What the masks are scored against; give one of cohort, masks and annotations."""

    cohort: Uri | None = None
    """cohort.parquet of prepare_data; path or URI."""
    split: Literal["all", "train", "hold-out"] = "all"
    """Which images of the cohort count."""
    folds: tuple[int, ...] | None = None
    """Only images of these folds of the cohort; null: of every fold."""
    masks: Uri | None = None
    """Folder of mask PNGs, named like the run's images."""
    annotations: Uri | None = None
    """Folder of labelme .json files, named like the run's images; drawn by the exact rule of the published masks."""
    annotation: AnnotationConfig = AnnotationConfig()
    """How annotations are read."""


class EvaluateConfig(Config):
    """Settings of evaluate."""

    out: Uri | None = None
    """Folder of the outputs; path or URI."""
    run: Uri | None = None
    """Folder of the scored run: images.parquet, masks/ and perhaps maps/."""
    truth: TruthConfig = TruthConfig()
    against: Uri | None = None
    """Folder of a second scored run, compared with the first image by image."""
    bootstrap: BootstrapConfig = BootstrapConfig()
    max_missing_fraction: float = Field(0.0, ge=0, le=1)
    """Exit with status 1 when a larger share of the truth's images has no score."""


@dataclass(frozen=True)
class Truth:
    """One image of the truth: the file that holds its target, a mark of its version, and what the cohort says of it."""

    id: str
    uri: str
    stamp: str
    group: str
    split: str | None = None
    fingerprint: str = ""
    """Of its pixels, where the cohort says."""


Found = tuple[list[Truth], list[Failure], dict[str, int]]
"""The truth's images, failure rows of what names none, and how many files of other suffixes were passed over."""


@dataclass(frozen=True)
class Scored:
    """What there is of a scored run: files and failures, by image id."""

    image_uris: dict[str, str]
    failures: dict[str, Failure]
    masks: dict[str, str]
    maps: dict[str, str]


def run(config: EvaluateConfig, force: bool) -> int:
    """Evaluate the run; return the exit status."""
    out = require_out(config.out, "/data/runs/evaluation")
    config = _with_absolute_paths(config)
    _refuse_inputs_as_out(config, out)
    found, scored = find_truth(config.truth), read_run("run", str(config.run))
    other = None if config.against is None else read_run("against", config.against)
    with claim_for_stage(out, OUTPUTS, force=force) as folder:
        return _evaluate(config, folder, found, scored, other)


def _refuse_inputs_as_out(config: EvaluateConfig, out: str) -> None:
    truth = config.truth
    read = {"run": config.run, "against": config.against, "truth.cohort": truth.cohort}
    listed = {"truth.masks": truth.masks, "truth.annotations": truth.annotations}
    for key, run_uri in (("run", config.run), ("against", config.against)):
        if run_uri is not None:
            listed |= {f"{key}/{folder}": ScoredRun(run_uri).path(folder) for folder in (MASKS, MAPS)}
    require_apart(out, read | listed, listed=listed)


def _evaluate(config: EvaluateConfig, folder: OutFolder, found: Found, scored: Scored, other: Scored | None) -> int:
    out, start = folder.uri, time.monotonic()
    truths, refused, passed_over = found
    items, missing = pair(truths, scored)
    missing += refused
    not_compared: list[Failure] = []
    if other is not None:
        items, not_compared = pair_other(items, truths, other)
    inputs = _fingerprint(truths, items, [*missing, *not_compared])
    # Neither where the results lie nor what is tolerated changes them. Other data of the same paths are done anew.
    identity = config.model_copy(update={"out": None, "max_missing_fraction": 0.0})
    if folder.is_finished(identity, inputs):
        print(f"nothing to do: {out} is up to date ({len(truths)} images of the truth)")
        return _status(
            config, storage.read_record(storage.join(out, MANIFEST), "num_missing")["num_missing"], len(truths)
        )
    folder.discard()  # it speaks of other settings or inputs
    resolved = configs.dump(config.model_copy(update={"out": out}))
    storage.write_bytes(storage.join(out, "config.resolved.yaml"), resolved.encode())
    print(f"{len(truths)} images of the truth, {len(items)} of them in the run, {len(missing)} missing")
    results, levels = _score(items, config.truth.annotation)
    folder.verify()
    facts = _write_outputs(out, config, results, Context(truths, scored, missing, not_compared, levels))
    facts |= {"passed_over": passed_over, "seconds": round(time.monotonic() - start, 1)}
    folder.write_manifest(identity, inputs, facts)
    print(f"look at {out}/report.md and {out}/figures; rows in scores.parquet, summary.parquet, comparisons.parquet")
    return _status(config, facts["num_missing"], len(truths) + len(refused))


def _status(config: EvaluateConfig, num_missing: int, num_truth: int) -> int:
    return int(num_missing > config.max_missing_fraction * num_truth)


def _with_absolute_paths(config: EvaluateConfig) -> EvaluateConfig:
    """Return the config with every path safe to use on any node.

    Raises:
        ConfigError: a path is missing, or not exactly one kind of truth is given.
    """
    truth = config.truth
    given = {name: value for name in ("cohort", "masks", "annotations") if (value := getattr(truth, name)) is not None}
    if len(given) != 1:
        stated = ", ".join(f"truth.{name} = {value}" for name, value in given.items()) or "none of them is set"
        raise ConfigError(f"give one of truth.cohort, truth.masks, truth.annotations; now: {stated}")
    if truth.cohort is None:
        for key, value, default in (
            ("truth.split", truth.split, "all"),
            ("truth.folds", truth.folds, None),
            ("bootstrap.by", config.bootstrap.by, "image"),
        ):
            if value != default:
                raise ConfigError(f"{key} = {value} needs truth.cohort, whose images have splits, folds and groups")
    paths = {name: require_uri(f"truth.{name}", value, f"/data/{name}") for name, value in given.items()}
    update: dict[str, Any] = {
        "run": require_uri("run", config.run, "/data/runs/scored"),
        "truth": truth.model_copy(update=paths),
    }
    if config.against is not None:
        update["against"] = require_uri("against", config.against, "/data/runs/other")
    return config.model_copy(update=update)


def find_truth(config: TruthConfig) -> Found:
    """Find the images of the truth.

    Returns these sorted by id, failure rows of ids that name no single file, and how many files of each other suffix
    were passed over.

    Raises:
        ConfigError: there is none, or a fold is unknown.
    """
    if config.cohort is not None:
        return _cohort_truth(config, config.cohort), [], {}
    key, folder, suffixes = (
        ("truth.masks", config.masks, MASK_SUFFIXES)
        if config.masks is not None
        else ("truth.annotations", config.annotations, (".json",))
    )
    found = listing.find(str(folder), suffixes)
    note = found.describe(key)
    jpeg = " (JPEG blurs masks: save them as PNG)" if config.masks is not None else ""
    refused = [Failure.of(image_id, STAGE, error) for image_id, error in found.refused]
    if not found.uris:
        for line in failures.lines(refused, "missing"):
            print(line)
        problem = f"; {found.refused[0][1]}" if found.refused else f"; {note}" if note else ""
        raise ConfigError(
            f"truth: {folder} holds no {', '.join(suffixes)} files; give the folder they are in{jpeg}{problem}"
        )
    if note:
        print(note + (jpeg if {".jpg", ".jpeg"} & found.passed_over.keys() else ""))
    marks = storage.stamps(list(found.uris.values()))
    truths = [Truth(name, uri, mark, name) for (name, uri), mark in zip(found.uris.items(), marks, strict=True)]
    return truths, refused, found.passed_over


def _cohort_truth(config: TruthConfig, uri: str) -> list[Truth]:
    rows = read_cohort(uri)
    unknown = sorted(set(config.folds or ()) - set(folds_of(rows)))
    if unknown:
        raise ConfigError(f"truth.folds = {unknown}: the cohort has folds {folds_of(rows)}")
    chosen = [
        row for row in rows if config.split in ("all", row.split) and (config.folds is None or row.fold in config.folds)
    ]
    if not chosen:
        raise ConfigError(
            f"truth.split = {config.split} with truth.folds = {config.folds} leaves none of the {len(rows)} images of "
            f"{uri}; choose others"
        )
    # The mask follows from the image and the annotation, which the fingerprint covers.
    found = (Truth(row.id, row.mask_uri, row.fingerprint, row.group, row.split, row.mask_fingerprint) for row in chosen)
    return sorted(found, key=lambda truth: truth.id)


def read_run(key: str, folder: str) -> Scored:
    """Read what a folder of score_images holds.

    Raises:
        ConfigError: it is no such folder.
    """
    run = ScoredRun.open(key, folder)
    failed = {failure.id: failure for failure in run.failures()}
    return Scored(run.image_uris(), failed, masks=run.files(MASKS), maps=run.files(MAPS))


def pair(truths: Sequence[Truth], scored: Scored) -> tuple[list[PairedFiles], list[Failure]]:
    """Match the truth with the run: items to score (an absent file is ""), and failure rows for what the run lacks."""
    items, missing = [], []
    for truth in truths:
        failure = _lacking(scored, truth.id, "the run")
        if failure is None:
            mask, found_map = scored.masks[truth.id], scored.maps.get(truth.id, "")
            items.append(PairedFiles(truth.id, truth.group, truth.uri, truth.fingerprint, mask, found_map))
        else:
            missing.append(failure)
    return items, missing


def pair_other(
    items: Sequence[PairedFiles], truths: Sequence[Truth], other: Scored
) -> tuple[list[PairedFiles], list[Failure]]:
    """Add the other run's files to the items; return these, and failure rows for what that run lacks of the truth."""
    lacking = {truth.id: _lacking(other, truth.id, "the other run") for truth in truths}
    paired = []
    for item in items:
        if lacking[item.id] is None:
            other_map = other.maps.get(item.id, "") if item.map_uri else ""  # maps are compared with maps
            item = replace(item, against_uri=other.masks[item.id], against_map_uri=other_map)
        paired.append(item)
    return paired, [replace(failure, stage=AGAINST_STAGE) for failure in lacking.values() if failure is not None]


def _lacking(scored: Scored, image_id: str, run_name: str) -> Failure | None:
    """Say why a run has no mask of an image; None: it has one."""
    if image_id in scored.image_uris and image_id in scored.masks:
        return None
    if image_id in scored.failures:
        return scored.failures[image_id]
    if image_id in scored.image_uris:
        return Failure(image_id, STAGE, NOT_SCORED, f"{run_name} lists {image_id} but has no masks/{image_id}.png")
    return Failure(image_id, STAGE, NOT_SCORED, f"{run_name} has no image {image_id}; score it, too")


def _fingerprint(truths: Sequence[Truth], items: Sequence[PairedFiles], failed: Sequence[Failure]) -> str:
    names = ("mask_uri", "map_uri", "against_uri", "against_map_uri")
    read = [uri for item in items for name in names if (uri := getattr(item, name))]
    return storage.fingerprint(
        *(f"{truth.id} {truth.group} {truth.split} {truth.stamp}" for truth in truths),
        *(f"{uri} {mark}" for uri, mark in zip(read, storage.stamps(read), strict=True)),
        *(f"{one.id} {one.stage} {one.reason} {one.message}" for one in failed),
    )


def _score(items: Sequence[PairedFiles], config: AnnotationConfig) -> tuple[list[dict[str, Any]], GreyLevelCounts]:
    """Score all items; return their results by id, and the level counts of all maps together."""
    results, levels = [], np.zeros((256, 2), np.int64)
    progress = Progress(len(items))
    for row in stream(items, config):
        if row["levels"] is not None:
            levels += np.reshape(row["levels"], levels.shape)
        results.append({name: value for name, value in row.items() if name != "levels"})
        progress.step()
    return sorted(results, key=lambda row: str(row["id"])), levels


def stream(items: Sequence[PairedFiles], config: AnnotationConfig) -> Iterator[dict[str, Any]]:
    """Yield the results of items as Ray Data finishes them."""
    import ray.data

    names = [field.name for field in fields(PairedFiles)]

    def evaluate_batch(batch: dict[str, np.ndarray]) -> pa.Table:
        import cv2

        cv2.setNumThreads(0)
        rows = [PairedFiles(*map(str, values)) for values in zip(*(batch[name] for name in names), strict=True)]
        return pa.Table.from_pylist([evaluation.score_files(row, config) for row in rows], schema=RESULT_SCHEMA)

    if not items:
        return
    with ray_session():
        quieten_ray_data()
        found = ray.data.from_items([asdict(item) for item in items], override_num_blocks=max(1, len(items) // 8))
        yield from found.map_batches(evaluate_batch, batch_size=8, batch_format="numpy").iter_rows()


@dataclass(frozen=True)
class Context:
    """What the report says beside the scores."""

    truths: Sequence[Truth]
    scored: Scored
    missing: Sequence[Failure]
    not_compared: Sequence[Failure]
    levels: GreyLevelCounts
    """Of all maps that were scored."""


def _write_outputs(
    out: str, config: EvaluateConfig, results: Sequence[dict[str, Any]], context: Context
) -> dict[str, Any]:
    """Write tables, report and figures; return the facts for the manifest."""
    missing = [*context.missing, *(Failure(r["id"], STAGE, r["reason"], r["message"]) for r in results if r["reason"])]
    not_compared = [
        *context.not_compared,
        *(
            Failure(r["id"], AGAINST_STAGE, r["against_reason"], r["against_message"])
            for r in results
            if r["against_reason"]
        ),
    ]
    for kind, failed in (("missing", missing), ("not compared", not_compared)):
        failed.sort(key=lambda failure: failure.id)
        for line in failures.lines(failed, kind):
            print(line)
    tables.write_rows(storage.join(out, "failures.parquet"), Failure, [*missing, *not_compared])
    findings = {row["id"]: row["findings"] for row in results if row["findings"]}
    for line in truths_of_files.findings_lines(findings):
        print(line)
    rows = [row for row in results if not row["reason"]]
    if not rows:
        raise ConfigError(
            f"none of the {len(context.truths)} images of the truth has a score in run = {config.run}; see "
            f"{out}/failures.parquet, and check that truth and run name the same images"
        )
    summary = evaluation.summarise_scores(rows, config.bootstrap)
    comparisons = evaluation.compare_scores(rows, config.bootstrap)
    _write_table(out, "scores", [{name: row[name] for name in SCORES_SCHEMA.names} for row in rows], SCORES_SCHEMA)
    _write_table(out, "summary", summary, SUMMARY_SCHEMA)
    tables.write_rows(storage.join(out, "comparisons.parquet"), Comparison, comparisons)
    figures = _draw_figures(config, rows, context)
    for name, data in figures.items():
        storage.write_bytes(storage.join(out, "figures", f"{name}.png"), data)
    parts = [
        _heading(out, config, summary[0], rows, context),
        report.failures_markdown(missing, not_compared),
        report.summary_markdown(summary, config.bootstrap),
        report.comparisons_markdown(comparisons, config.bootstrap),
        "## Figures",
        *(f"![{name}](figures/{name}.png)" for name in figures),
    ]
    storage.write_bytes(storage.join(out, "report.md"), ("\n\n".join(filter(None, parts)) + "\n").encode())
    counts = {"num_truth": len(context.truths), "num_scored": len(rows), "num_missing": len(missing)}
    return counts | {"findings": truths_of_files.count_findings(findings)}


def _write_table(out: str, name: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    tables.write_table(storage.join(out, f"{name}.parquet"), pa.Table.from_pylist(list(rows), schema=schema))


def _heading(
    out: str, config: EvaluateConfig, overall: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], context: Context
) -> str:
    """Say what was evaluated against what, on how many images, how well it did, and by which command."""
    truth, num_truth, num_scored = config.truth, len(context.truths), len(rows)
    source = next(uri for uri in (truth.cohort, truth.masks, truth.annotations) if uri is not None)
    chosen = f" (split {truth.split}, folds {truth.folds or 'all'})" if truth.cohort is not None else ""
    extra = len(set(context.scored.image_uris) - {truth.id for truth in context.truths})
    facts = {
        "Run": config.run,
        "Truth": f"{source}{chosen}",
        "Images of the truth": f"{num_truth}; scored {num_scored}; **without a score {num_truth - num_scored}**",
        "Images of the run that are not in this truth": f"{extra}, left out",
    }
    warning = []
    if truth.cohort is not None:
        split_of = {truth.id: truth.split for truth in context.truths}
        splits = Counter(split_of[row["id"]] for row in rows)
        facts["Scored images by split"] = f"{splits[HOLD_OUT]} hold-out, {splits[TRAIN]} of the training split"
        if splits[TRAIN]:
            warning = [
                f"**Warning: {splits[TRAIN]} of the scored images are of the training split.** An ensemble's members "
                "were trained on most of them, so these scores are better than on new images, unless only members "
                "that had left them out were applied. truth.split=hold-out scores images that no member has seen.",
                "",
            ]
    shares = [row["target_px"] / (row["height"] * row["width"]) for row in rows]
    if not any(shares) or min(share for share in shares if share) > NEARLY_FULL:
        what = f"covers more than {NEARLY_FULL:.0%} of each image that has a target" if any(shares) else "is empty"
        text = f"**Warning: the truth {what}.** Check that its files mark the targets, and what they mark them with."
        print(text.strip("*"))
        warning += [text, ""]
    if config.against is not None:
        num_compared = sum(row["against_dice"] is not None for row in rows)
        facts["Against"] = f"{config.against}; {num_compared} images in both runs and the truth are compared"
    facts["Mean Dice per image"] = f"{overall['dice_mean']:.4f}; of all pixels together {overall['pooled_dice']:.4f}"
    command = shlex.join(["python", "workflows/evaluate.py", "--config", f"{out}/config.resolved.yaml"])
    lines = [f"- {name}: {text}" for name, text in facts.items()]
    return "\n".join(["# Evaluation", "", *lines, "", *warning, "Command:", "", f"    {command}"])


def _draw_figures(config: EvaluateConfig, rows: Sequence[dict[str, Any]], context: Context) -> dict[str, bytes]:
    from stas_core.figures import contact_sheet, scores, training

    dice = [row["dice"] for row in rows]
    raw = [row["raw_dice"] for row in rows if row["raw_dice"] is not None]
    figures = {
        "dice_histogram": scores.dice_histogram(dice, raw),
        "dice_by_area": scores.dice_by_area([row["target_px"] for row in rows], dice),
    }
    if context.levels.any():
        figures["calibration"] = scores.calibration_curve(context.levels)
    truth_of = {truth.id: truth for truth in context.truths}
    dice_of = {row["id"]: row["dice"] for row in rows}
    picked = training.pick_examples(list(dice_of), dice, num_each=EXAMPLES_PER_KIND)
    tiles = []
    for kind, ids in picked.items():
        for image_id in ids:
            mask = evaluation.read_mask(context.scored.masks[image_id])
            truth, _ = evaluation.read_truth(truth_of[image_id].uri, mask, config.truth.annotation)
            picture = _overlay(context.scored.image_uris[image_id], truth, mask)
            tiles.append(contact_sheet.Tile(picture, f"{kind}: {image_id}  Dice {dice_of[image_id]:.3f}"))
    title = "Best, median and worst images: truth cyan, prediction yellow; missed and invented areas tinted"
    figures["examples"] = contact_sheet.contact_sheet(tiles, columns=len(picked["best"]), title=title)  # a row each
    return figures


def _overlay(image_uri: str, truth: Mask, mask: Mask) -> RgbImage:
    """Outline both masks on the image, or on white where the image cannot be read any more: scores need no image."""
    image = np.full((*truth.shape, 3), 255, np.uint8)
    try:
        found = images.decode_image(storage.read_bytes(image_uri), image_uri)
        if found.shape == image.shape:
            image = found
    except (InputError, StorageError) as error:
        print(f"example drawn on white: {error}")
    drawn = overlay.draw(image, truth=truth, prediction=mask, tint_errors=True)
    return overlay.thumbnail(drawn, width_px=EXAMPLE_WIDTH_PX)


if __name__ == "__main__":
    main("evaluate", EvaluateConfig, run, __doc__ or "")
