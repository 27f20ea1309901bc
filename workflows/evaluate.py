"""Score a run's masks against the truth: per image, per target, with intervals, figures and paired comparisons.

    python workflows/evaluate.py run=/data/stas/runs/scored truth.cohort=/data/stas/cohort/cohort.parquet \\
        truth.split=hold-out out=/data/stas/runs/evaluation

Writes <out>/report.md (start there), scores.parquet (one row per image), summary.parquet, comparisons.parquet,
failures.parquet (images of the truth without a score, and why), figures/*.png and, last, manifest.json. Where the run
has maps, these are scored too, cut at 0.5, and compared with the masks. With `against=` it is compared with another
run. Run again, it does nothing unless a file it reads has changed.
"""

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from stas_core import annotations, evaluation, images, metrics, report, score_figures, storage
from stas_core import config as configs
from stas_core.annotations import AnnotationConfig
from stas_core.arrays import Mask, RgbImage
from stas_core.cohort import folds_of, read_cohort
from stas_core.config import Config
from stas_core.errors import ConfigError, InputError, SizeMismatch, StorageError, UnreadableFile
from stas_core.evaluation import COMPARISONS_SCHEMA, SCORES_SCHEMA, SUMMARY_SCHEMA, BootstrapConfig
from stas_core.outputs import FAILURES_SCHEMA
from workflows.cli import main
from workflows.runtime import (
    MANIFEST,
    Rate,
    claim,
    is_finished,
    quieten_ray_data,
    ray_session,
    require_uri,
    write_manifest,
)

STAGE, AGAINST_STAGE = "evaluate", "evaluate against"
NOT_SCORED = "not_scored"
"""Reason code of an image of the truth that the run neither scored nor reports as failed."""

EXAMPLES_PER_KIND, EXAMPLE_WIDTH_PX = 4, 640

# What a task returns of one image: its scores or why it has none, the same of the other run, and its level counts.
RESULT_SCHEMA = pa.schema(
    [
        *(field.with_nullable(True) for field in SCORES_SCHEMA),
        *(pa.field(name, pa.string()) for name in ("reason", "message", "against_reason", "against_message")),
        pa.field("levels", pa.list_(pa.int64())),
    ]
)


class TruthConfig(Config):
    """What the masks are scored against; give one of cohort, masks and annotations."""

    cohort: str | None = None
    """cohort.parquet of prepare_data; path or URI."""
    split: Literal["all", "train", "hold-out"] = "all"
    """Which images of the cohort count."""
    folds: tuple[int, ...] | None = None
    """Only images of these folds of the cohort; null: of every fold."""
    masks: str | None = None
    """Folder of mask PNGs, named like the run's images."""
    annotations: str | None = None
    """Folder of labelme .json files, named like the run's images; drawn by the exact rule of the published masks."""
    annotation: AnnotationConfig = AnnotationConfig()
    """How annotations are read."""


class EvaluateConfig(Config):
    """Settings of evaluate."""

    out: str | None = None
    """Folder of the outputs; path or URI."""
    run: str | None = None
    """Folder of the scored run: images.parquet, masks/ and perhaps maps/."""
    truth: TruthConfig = TruthConfig()
    against: str | None = None
    """Folder of a second scored run, compared with the first image by image."""
    bootstrap: BootstrapConfig = BootstrapConfig()
    max_missing_fraction: float = Field(0.0, ge=0, le=1)
    """Exit with status 1 when a larger share of the truth's images has no score."""


@dataclass(frozen=True)
class Truth:
    """One image of the truth: its group, the file that holds its target, and a mark of that file's version."""

    id: str
    group: str
    uri: str
    stamp: str


@dataclass(frozen=True)
class ScoredRun:
    """What a folder of score_images holds."""

    image_uris: dict[str, str]
    """Of each image that was scored, by id."""
    failures: dict[str, dict[str, str]]
    masks: dict[str, str]
    maps: dict[str, str]


def run(config: EvaluateConfig, force: bool) -> int:
    """Evaluate the run; return the exit status."""
    out = require_uri("out", config.out, "/data/runs/evaluation")
    config = _with_absolute_paths(config)
    start = time.monotonic()
    truths = find_truth(config.truth)
    scored = read_run("run", str(config.run))
    other = None if config.against is None else read_run("against", config.against)
    items, missing = pair(truths, scored, other)
    inputs = _fingerprint(truths, items, missing)
    # Neither where the results lie nor what is tolerated changes them. Other data of the same paths are done anew.
    identity = config.model_copy(update={"out": None, "max_missing_fraction": 0.0})
    claim(out, STAGE, identity, "", force=force)
    if is_finished(out, identity, inputs):
        print(f"nothing to do: {out} is up to date ({len(truths)} images of the truth)")
        return _status(config, storage.read_json(storage.join(out, MANIFEST))["num_missing"], len(truths))
    resolved = configs.dump(config.model_copy(update={"out": out}))
    storage.write_bytes(storage.join(out, "config.resolved.yaml"), resolved.encode())
    print(f"{len(truths)} images of the truth, {len(items)} of them in the run, {len(missing)} missing")
    results = sorted(_with_progress(items, config.truth.annotation), key=lambda row: str(row["id"]))
    facts = _write_outputs(out, config, results, Context(truths, scored, other, missing))
    write_manifest(
        out,
        STAGE,
        config=identity,
        inputs=inputs,
        facts={**facts, "seconds": round(time.monotonic() - start, 1)},
    )
    print(f"look at {out}/report.md and {out}/figures; rows in scores.parquet, summary.parquet, comparisons.parquet")
    return _status(config, facts["num_missing"], len(truths))


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


def find_truth(config: TruthConfig) -> list[Truth]:
    """List the images of the truth, sorted by id.

    Raises:
        ConfigError: there is none, a fold is unknown, or two files have one name.
    """
    if config.cohort is not None:
        return _cohort_truth(config, config.cohort)
    folder, suffix = (config.masks, ".png") if config.masks is not None else (config.annotations, ".json")
    uris = storage.list_files(str(folder), (suffix,))
    if not uris:
        raise ConfigError(f"truth: {folder} holds no {suffix} files; give the folder they are in")
    by_id: dict[str, str] = {}
    for uri in uris:
        image_id = storage.stem_of(uri)
        if image_id in by_id:
            raise ConfigError(f"truth: {uri} and {by_id[image_id]} have the same name; ids must be unique, rename one")
        by_id[image_id] = uri
    return [Truth(name, name, uri, storage.stamp(uri)) for name, uri in sorted(by_id.items())]


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
    return [Truth(row.id, row.group, row.mask_uri, row.fingerprint) for row in sorted(chosen, key=lambda row: row.id)]


def read_run(key: str, folder: str) -> ScoredRun:
    """Read what a folder of score_images holds.

    Raises:
        ConfigError: it is no such folder.
    """
    table = storage.join(folder, "images.parquet")
    if not storage.exists(table):
        raise ConfigError(
            f"{key} = {folder} holds no images.parquet; give the output folder of score_images, whose run has ended"
        )
    rows = storage.read_table(table, ["id", "image_uri"]).to_pylist()
    failures = storage.join(folder, "failures.parquet")
    failed = storage.read_table(failures).to_pylist() if storage.exists(failures) else []
    return ScoredRun(
        image_uris={row["id"]: row["image_uri"] for row in rows},
        failures={row["id"]: row for row in failed},
        masks=_pngs(storage.join(folder, "masks")),
        maps=_pngs(storage.join(folder, "maps")),
    )


def _pngs(folder: str) -> dict[str, str]:
    uris = storage.list_files(folder, (".png",)) if storage.exists(folder) else []
    return {storage.stem_of(uri): uri for uri in uris}


def pair(
    truths: Sequence[Truth], scored: ScoredRun, other: ScoredRun | None
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Match the truth with the run: items to score (an absent file is ""), and failure rows for what the run lacks."""
    items, missing = [], []
    for truth in truths:
        if truth.id in scored.image_uris and truth.id in scored.masks:
            item = {"id": truth.id, "group": truth.group, "truth_uri": truth.uri, "mask_uri": scored.masks[truth.id]}
            against = "" if other is None or truth.id not in other.image_uris else other.masks.get(truth.id, "")
            items.append(item | {"map_uri": scored.maps.get(truth.id, ""), "against_uri": against})
        elif truth.id in scored.failures:
            missing.append(scored.failures[truth.id])
        elif truth.id in scored.image_uris:
            missing.append(_failure(truth.id, NOT_SCORED, f"the run lists {truth.id} but has no masks/{truth.id}.png"))
        else:
            missing.append(_failure(truth.id, NOT_SCORED, f"the run has no image {truth.id}; score it, too"))
    return items, missing


def _failure(image_id: str, reason: str, message: str, stage: str = STAGE) -> dict[str, str]:
    return {"id": image_id, "stage": stage, "reason": reason, "message": message}


def _fingerprint(
    truths: Sequence[Truth], items: Sequence[Mapping[str, str]], missing: Sequence[Mapping[str, str]]
) -> str:
    read = [item[name] for item in items for name in ("mask_uri", "map_uri", "against_uri")]
    return storage.fingerprint(
        *(f"{truth.id} {truth.group} {truth.stamp}" for truth in truths),
        *(f"{uri} {storage.stamp(uri)}" if uri else "" for uri in read),
        *(f"{row['id']} {row['reason']} {row['message']}" for row in missing),
    )


def evaluate_item(item: Mapping[str, str], config: AnnotationConfig) -> dict[str, Any]:
    """Score one image; return its row of `RESULT_SCHEMA`, with the reason where it cannot be scored."""
    row: dict[str, Any] = dict.fromkeys(RESULT_SCHEMA.names) | {"id": item["id"], "group": item["group"]}
    try:
        mask = _read_mask(item["mask_uri"])
        truth = _read_truth(item["truth_uri"], mask, config)
        prob_map = None
        if item["map_uri"]:
            prob_map = images.decode_map(storage.read_bytes(item["map_uri"]), item["map_uri"])
            _require_size(item["map_uri"], prob_map.shape, truth)
    except (InputError, StorageError) as error:
        return row | {"reason": _reason(error), "message": str(error)}
    row |= evaluation.score_image(truth, mask, prob_map)
    if prob_map is not None:
        row["levels"] = metrics.count_levels(prob_map, truth).ravel().tolist()
    return row | _score_against(item["against_uri"], truth)


def _score_against(uri: str, truth: Mask) -> dict[str, Any]:
    if not uri:
        return {}
    try:
        mask = _read_mask(uri)
        _require_size(uri, mask.shape, truth)
    except (InputError, StorageError) as error:
        return {"against_reason": _reason(error), "against_message": str(error)}
    return {"against_dice": metrics.count(mask, truth).dice}


def _reason(error: InputError | StorageError) -> str:
    return error.reason if isinstance(error, InputError) else UnreadableFile.reason


def _read_mask(uri: str) -> Mask:
    return images.decode_mask(storage.read_bytes(uri), uri)


def _read_truth(uri: str, mask: Mask, config: AnnotationConfig) -> Mask:
    """Read the truth of the image whose predicted mask is given.

    Raises:
        SizeMismatch: they differ in size.
    """
    if uri.lower().endswith(".json"):
        annotation = annotations.parse_labelme(storage.read_bytes(uri), uri)
        return annotations.rasterise(annotation, mask.shape, config)[0]
    truth = _read_mask(uri)
    _require_size("the run's mask", mask.shape, truth)
    return truth


def _require_size(name: str, size: tuple[int, ...], truth: Mask) -> None:
    if size != truth.shape:
        raise SizeMismatch(
            f"{name} has {size[1]}x{size[0]} px, the truth {truth.shape[1]}x{truth.shape[0]}; "
            "score the image again at its own size, or pair it with its own truth"
        )


def _with_progress(items: Sequence[dict[str, str]], config: AnnotationConfig) -> Iterator[dict[str, Any]]:
    rate = Rate(len(items))
    for row in stream(items, config):
        yield row
        line = rate.step()
        if line:
            print(line, flush=True)


def stream(items: Sequence[dict[str, str]], config: AnnotationConfig) -> Iterator[dict[str, Any]]:
    """Yield the results of items as Ray Data finishes them."""
    import ray.data

    def evaluate_batch(batch: dict[str, np.ndarray]) -> pa.Table:
        import cv2

        cv2.setNumThreads(0)
        rows = [dict(zip(batch, map(str, values), strict=True)) for values in zip(*batch.values(), strict=True)]
        return pa.Table.from_pylist([evaluate_item(row, config) for row in rows], schema=RESULT_SCHEMA)

    if not items:
        return
    with ray_session():
        quieten_ray_data()
        found = ray.data.from_items(list(items), override_num_blocks=max(1, len(items) // 8))
        yield from found.map_batches(evaluate_batch, batch_size=8, batch_format="numpy").iter_rows()


@dataclass(frozen=True)
class Context:
    """What the report says beside the scores."""

    truths: Sequence[Truth]
    scored: ScoredRun
    other: ScoredRun | None
    missing: Sequence[dict[str, str]]


def _write_outputs(
    out: str, config: EvaluateConfig, results: Sequence[dict[str, Any]], context: Context
) -> dict[str, Any]:
    """Write tables, report and figures; return the facts for the manifest."""
    missing = [*context.missing, *(_failure(r["id"], r["reason"], r["message"]) for r in results if r["reason"])]
    missing.sort(key=lambda row: row["id"])
    not_compared = [
        _failure(r["id"], r["against_reason"], r["against_message"], AGAINST_STAGE)
        for r in results
        if r["against_reason"]
    ]
    _write_table(out, "failures", [*missing, *not_compared], FAILURES_SCHEMA)
    for row in [*missing, *not_compared][:10]:
        print(f"missing: {row['id']}: {row['reason']}: {row['message']}")
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
    _write_table(out, "comparisons", comparisons, COMPARISONS_SCHEMA)
    figures = _draw_figures(config, rows, context)
    storage.remove(storage.join(out, "figures"))  # an earlier run may have had maps
    for name, data in figures.items():
        storage.write_bytes(storage.join(out, "figures", f"{name}.png"), data)
    parts = [
        _heading(out, config, summary[0], context),
        evaluation.failures_markdown(missing, not_compared),
        evaluation.summary_markdown(summary, config.bootstrap),
        evaluation.comparisons_markdown(comparisons, config.bootstrap),
        "## Figures",
        *(f"![{name}](figures/{name}.png)" for name in figures),
    ]
    storage.write_bytes(storage.join(out, "report.md"), ("\n\n".join(filter(None, parts)) + "\n").encode())
    return {"num_truth": len(context.truths), "num_scored": len(rows), "num_missing": len(missing)}


def _write_table(out: str, name: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    storage.write_table(storage.join(out, f"{name}.parquet"), pa.Table.from_pylist(list(rows), schema=schema))


def _heading(out: str, config: EvaluateConfig, overall: Mapping[str, Any], context: Context) -> str:
    """Say what was evaluated against what, on how many images, how well it did, and by which command."""
    truth, num_truth, num_scored = config.truth, len(context.truths), overall["num_images"]
    source = next(uri for uri in (truth.cohort, truth.masks, truth.annotations) if uri is not None)
    chosen = f" (split {truth.split}, folds {truth.folds or 'all'})" if truth.cohort is not None else ""
    extra = len(set(context.scored.image_uris) - {truth.id for truth in context.truths})
    facts = {
        "Run": config.run,
        "Truth": f"{source}{chosen}",
        "Images of the truth": f"{num_truth}; scored {num_scored}; **without a score {num_truth - num_scored}**",
        "Images of the run that are not in this truth": f"{extra}, left out",
    }
    if context.other is not None:
        common = {truth.id for truth in context.truths} & set(context.scored.image_uris) & set(context.other.image_uris)
        facts["Against"] = f"{config.against}; {len(common)} images in both runs and the truth"
    facts["Mean Dice per image"] = f"{overall['dice_mean']:.4f}; of all pixels together {overall['pooled_dice']:.4f}"
    command = shlex.join(["python", "workflows/evaluate.py", "--config", f"{out}/config.resolved.yaml"])
    lines = [f"- {name}: {text}" for name, text in facts.items()]
    return "\n".join(["# Evaluation", "", *lines, "", "Command:", "", f"    {command}"])


def _draw_figures(config: EvaluateConfig, rows: Sequence[dict[str, Any]], context: Context) -> dict[str, bytes]:
    dice = [row["dice"] for row in rows]
    raw = [row["raw_dice"] for row in rows if row["raw_dice"] is not None]
    figures = {
        "dice_histogram": score_figures.dice_histogram(dice, raw),
        "dice_by_area": score_figures.dice_by_area([row["target_px"] for row in rows], dice),
    }
    levels = [row["levels"] for row in rows if row["levels"] is not None]
    if levels:
        figures["calibration"] = score_figures.calibration_curve(np.sum(levels, axis=0, dtype=np.int64).reshape(256, 2))
    truth_of = {truth.id: truth for truth in context.truths}
    dice_of = {row["id"]: row["dice"] for row in rows}
    picked = report.pick_examples(list(dice_of), dice, num_each=EXAMPLES_PER_KIND)
    tiles = []
    for kind, ids in picked.items():
        for image_id in ids:
            mask = _read_mask(context.scored.masks[image_id])
            truth = _read_truth(truth_of[image_id].uri, mask, config.truth.annotation)
            picture = _overlay(context.scored.image_uris[image_id], truth, mask)
            tiles.append(report.Tile(picture, f"{kind}: {image_id}  Dice {dice_of[image_id]:.3f}"))
    title = "Best, median and worst images: truth cyan, prediction yellow; missed and invented areas tinted"
    figures["examples"] = report.contact_sheet(tiles, columns=EXAMPLES_PER_KIND, title=title)
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
    drawn = report.overlay(image, truth=truth, prediction=mask, tint_errors=True)
    return report.thumbnail(drawn, width_px=EXAMPLE_WIDTH_PX)


if __name__ == "__main__":
    main("evaluate", EvaluateConfig, run, __doc__ or "")
