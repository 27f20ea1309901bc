"""Score images with a trained ensemble: masks, targets, overlays, the competition's archives.

    python workflows/score_images.py data.images=/data/stas/Test_Images ensemble.uri=/data/stas/folds/ensemble.json \\
        out=/data/stas/scores

Writes for every image <out>/masks/<id>.png (0 / 255, native size), and as configured maps/, disagreement/, overlays/
and geojson/ (plain or compressed); over all images images.parquet, targets.parquet, failures.parquet, timings.parquet,
segmentation.zip, detection.json, contact_sheet.png, review.parquet (what to look at first) and, last, manifest.json.
An image is done when its record (records/<id>.json, of many images records/part-*.parquet) is there, so a run that was
killed and started again does the rest, and ends with the same bytes.
Another threshold, ensemble or image redoes what depends on it, from the saved maps where they still hold.
"""

import sys

if __name__ == "__main__" and not (__package__ or getattr(sys.flags, "safe_path", False)):  # a script
    import environment  # noqa: F401 - ends where this Python lacks what follows

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import Field

from stas_core import config as configs
from stas_core import record_parts, storage, tables
from stas_core.config import Config, Uri
from stas_core.data import images, listing
from stas_core.data.images import COARSEST_MPP, FINEST_MPP
from stas_core.errors import TRY_AGAIN, ConfigError, StasError, StorageError
from stas_core.failures import Failure
from stas_core.predict.inference import InferenceConfig
from stas_core.predict.postprocess import PostprocessChoice, PostprocessConfig
from stas_core.runs import read_reference
from stas_core.scored_runs import ScoredRun
from stas_core.verdicts import VerdictConfig
from workflows import next_step, tracking
from workflows.autoscaling import asking_for_nodes
from workflows.cli import main
from workflows.cluster import ray_session
from workflows.conclusion import conclude_again
from workflows.forecast import Failing, Forecast, begin, nodes_at_hand
from workflows.out_folder import (
    MANIFEST,
    OutFolder,
    Outputs,
    claim_for_stage,
    require_apart,
    require_out,
    require_uri,
)
from workflows.report_pages import remove_pages
from workflows.scoring.image_progress import ImageProgress
from workflows.scoring.image_results import Given, write_results
from workflows.scoring.plan import (
    MIN_CALIBRATED,
    Ensemble,
    EnsembleConfig,
    ScorePlan,
    ScoreResources,
    Work,
    plan_scoring,
)
from workflows.scoring.settling import Standings, any_finished, must_predict, read_standings, split_todo
from workflows.scoring.tasks import Item, LimitsConfig, SaveConfig, ScoreTask
from workflows.tracking import TrackingConfig

STAGE = ScoredRun.STAGE
PLAN = "plan.json"
OUTPUTS = Outputs(STAGE, (PLAN, *ScoredRun.PATTERNS))


@dataclass(frozen=True)
class ListedImage:
    """A row of a list of images."""

    image_uri: str
    id: str | None
    """None, or no such column: the file's name without its suffix."""
    split: str | None
    """As a cohort has it; the column may be left out where no split is chosen."""


class ImagesConfig(Config):
    """Which images are scored."""

    images: Uri | None = None
    """Folder, glob or file of images, or a .parquet list with columns image_uri and, if not the file's name, id."""
    split: str | None = None
    """With a cohort.parquet as the list: only the images of this split (train or hold-out)."""
    mpp: float | None = Field(None, ge=FINEST_MPP, le=COARSEST_MPP)
    """um per pixel of the images: another one than the models' is refused; null: not known, which the verdict says."""


class ScoreConfig(Config):
    """Settings of score_images."""

    out: Uri | None = None
    """Folder of the outputs; path or URI."""
    data: ImagesConfig = ImagesConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    inference: InferenceConfig = InferenceConfig()
    postprocess: PostprocessChoice = PostprocessConfig()
    """The threshold cascade, or the path or URI of a YAML file of one, such as configs/postprocess/reference.yaml."""
    save: SaveConfig = SaveConfig()
    limits: LimitsConfig = LimitsConfig()
    resources: ScoreResources = ScoreResources()
    max_failed_fraction: float = Field(0.0, ge=0, le=1)
    """Exit with status 1 when a larger share of the images failed."""
    verdict: VerdictConfig = VerdictConfig()
    """Limits of the verdict that the stage ends with."""
    accept_warnings: bool = False
    """Exit with status 0 even where the verdict is `do not use`."""
    tracking: TrackingConfig = TrackingConfig()
    """Whether MLflow is told of the run."""


def run(config: ScoreConfig, force: bool) -> int:
    """Score the images; return the exit status."""
    config, out, checkpoints, given = _opened(config)
    with claim_for_stage(out, OUTPUTS, force=force, ids=[item["id"] for item in given.items]) as folder:
        status = _score(config, folder, checkpoints, given)
    return conclude_again(out, accept_warnings=config.accept_warnings) or status


def _opened(config: ScoreConfig) -> tuple[ScoreConfig, str, list[str], Given]:
    """Find images and checkpoints; return the settings with absolute paths, `out`, and what was found.

    Raises:
        ConfigError: a setting is wrong, or there is no image.
        CheckpointError: there is no ensemble, or its pixel size is another.
    """
    out = require_out(config.out, "/data/scores")
    source = require_uri("data.images", config.data.images, "/data/Test_Images")
    ensemble_uri = require_uri("ensemble.uri", config.ensemble.uri, "/data/folds/ensemble.json")
    items, refused, passed_over = find_images(source, config.data.split)
    _refuse_inputs_as_out(source, items, ensemble_uri, out)
    from stas_core.predict import ensemble as ensembles  # loads torch: after the cheap checks

    checkpoints = ensembles.find_checkpoints(ensemble_uri, top_k=config.ensemble.top_k)
    reference, unchecked = read_reference(ensemble_uri), ensembles.check_mpp(checkpoints, config.data.mpp)
    paths = {
        "out": out,
        "data": config.data.model_copy(update={"images": source}),
        "ensemble": config.ensemble.model_copy(update={"uri": ensemble_uri}),
    }
    given = Given(items, refused, passed_over, reference, unchecked)
    return config.model_copy(update=paths), out, checkpoints, given


def plan(config: ScoreConfig, force: bool) -> list[Forecast]:
    """Say what scoring the images would take, from a few that are scored here."""
    from stas_core.predict import ensemble as ensembles
    from workflows.scoring import estimate

    config, out, checkpoints, given = _opened(config)
    base, nodes = begin(out, OUTPUTS, force=force), nodes_at_hand()
    laid = plan_scoring(nodes, config.resources)
    use_gpu = laid.gpus_per_actor > 0 and not config.resources.logical_gpus
    weights = storage.fingerprint(*sorted(ensembles.checkpoint_fingerprint(uri) for uri in checkpoints))
    ensemble = choose_models(config, out, checkpoints, weights, use_gpu=use_gpu)
    standings = {} if force or not storage.exists(out) else read_standings(ScoredRun(out), given.items)
    fresh, from_maps = split_todo(given.items, standings, make_work(config, out, ensemble).task)
    work = f"{len(fresh)} images to predict with {len(checkpoints)} model(s)"
    work += f", {len(from_maps)} to finish from saved maps" if from_maps else ""
    work += f", {len(given.items) - len(fresh) - len(from_maps)} are done"
    todo = make_work(config, out, ensemble)
    base = replace(base, work=work, layout=laid.reason)
    known = [*given.refused, *_recorded_failures(out, given.items, standings, fresh)]
    failing = Failing(known, len(given.items) + len(given.refused), config.max_failed_fraction)
    return [estimate.of_images(base, todo, fresh, from_maps, estimate.Cluster(nodes, laid), failing)]


def _recorded_failures(out: str, items: Sequence[Item], standings: Standings, fresh: Sequence[Item]) -> list[Failure]:
    """Return the images whose records of an earlier run, which hold, say that they failed."""
    open_ids = {item["id"] for item in fresh}
    failed = {name: one.reason for name, one in standings.items() if one.reason is not None and name not in open_ids}
    message = f"an earlier run in {out} recorded that"
    return [Failure(item["id"], STAGE, reason, message) for item in items if (reason := failed.get(item["id"]))]


def _score(config: ScoreConfig, folder: OutFolder, checkpoints: Sequence[str], given: Given) -> int:
    import torch

    from stas_core.predict import ensemble as ensembles
    from workflows.scoring import pipeline

    out, items, refused = folder.uri, given.items, given.refused
    weights = storage.fingerprint(*sorted(ensembles.checkpoint_fingerprint(folder) for folder in checkpoints))
    messages = (failure.message for failure in refused)
    inputs = storage.fingerprint(weights, str(given.reference), *(item["stamp"] for item in items), *messages)
    identity = config.model_copy(update={"accept_warnings": False})
    if folder.is_finished(identity, inputs):
        failed = ScoredRun(out).failures()
        if not {failure.reason for failure in failed} & TRY_AGAIN:
            print(f"nothing to do: {out} is up to date ({len(items)} images)")
            return _status(config, len(failed), len(items) + len(refused))
    start, run = time.monotonic(), ScoredRun(out)
    ensembles.load_members(checkpoints, torch.device("cpu"))  # a bad checkpoint should fail here, not as a dying actor
    with ray_session() as nodes, asking_for_nodes():
        plan = plan_scoring(nodes, config.resources)
        use_gpu = plan.gpus_per_actor > 0 and not config.resources.logical_gpus
        ensemble = choose_models(config, out, checkpoints, weights, use_gpu=use_gpu)
        record_parts.compact_if_many(run, verify=folder.verify)
        standings = read_standings(run, items)
        _withdraw(run)
        storage.write_bytes(storage.join(out, "config.resolved.yaml"), configs.dump(config).encode())
        tracking.begin()
        unpredicted = [item for item in items if must_predict(standings.get(item["id"]), ensemble.key, config.limits)]
        ensemble, plan = settle(config, out, ensemble, unpredicted, plan)
        work = make_work(config, out, ensemble)
        fresh, from_maps = split_todo(items, standings, work.task)
        folder.account.num_gpus = plan.num_gpus if fresh else 0.0  # to finish from maps takes CPUs alone
        print(f"{len(items)} images: {len(fresh)} to predict, {len(from_maps)} to finish from saved maps", flush=True)
        if fresh:
            size = f"batch size {ensemble.inference.batch_size or 1}"
            each = f"{len(checkpoints)} model(s), {ensemble.threads} thread(s) each, {size}"
            print(f"{plan.reason}\n{plan.actors} actor(s) of {each}")
        progress = ImageProgress(len(fresh) + len(from_maps), plan, sum(node.num_cpus for node in nodes))
        finished = any_finished(items, standings, [*fresh, *from_maps])
        packed = partial(record_parts.packing, run, verify=folder.verify)
        try:
            if fresh:
                progress.follow(packed(pipeline.score(work, fresh, config.resources, plan, finished=finished)))
            if from_maps:
                progress.follow(packed(pipeline.finish_from_maps(work, from_maps, config.resources, plan)))
        except StasError:
            progress.tell_reasons()  # the error says what ended the run, these counts what may have led to it
            raise
    progress.summarise()
    folder.verify()
    facts = {
        **write_results(work.task, given, own=folder.ids, limits=config.verdict, verify=folder.verify),
        "passed_over": given.passed_over,
        "seconds": round(time.monotonic() - start, 1),
    }
    then = next_step.after_scoring(out, str(config.data.images), config.data.split)
    folder.write_manifest(identity, inputs, facts | next_step.recorded(*then))
    _tell(out, facts, config.save)
    return _status(config, facts["num_failures"], len(items) + len(refused))


def _withdraw(run: ScoredRun) -> None:
    """Delete what describes files that are about to change."""
    for name in (MANIFEST, *run.RESULTS):
        storage.remove(run.path(name))
    remove_pages(run.uri)


def _tell(out: str, facts: Mapping[str, Any], save: SaveConfig) -> None:
    print(f"{facts['num_images']} images in {out}/images.parquet, {facts['num_failures']} in {out}/failures.parquet")
    if facts["num_images"]:  # else there is nothing to look at
        print(f"look at {out}/contact_sheet.png")
    print(f"submit {f'{out}/segmentation.zip or ' if save.archive else ''}{out}/detection.json")


def _refuse_inputs_as_out(source: str, items: Sequence[Item], ensemble_uri: str, out: str) -> None:
    """Refuse a folder of outputs that would be listed as input, or that holds an image."""
    require_apart(out, {"data.images": source, "ensemble.uri": ensemble_uri}, listed=["data.images"])
    folders = sorted({item["image_uri"].rpartition("/")[0] for item in items})
    require_apart(out, {f"an image of data.images = {source}, in": folder for folder in folders})


def _status(config: ScoreConfig, num_failed: int, num_inputs: int) -> int:
    return int(num_failed > config.max_failed_fraction * num_inputs)


def find_images(source: str, split: str | None = None) -> tuple[list[Item], list[Failure], dict[str, int]]:
    """Find the images to score.

    Returns items (id, image_uri, stamp) sorted by id, failure rows of ids that no file can be named by, and how many
    files of each other suffix were passed over.

    Raises:
        ConfigError: there is no image, or the list lacks a column or a path.
    """
    if source.endswith(".parquet"):
        found = listing.Listing(*listing.by_id(_listed(source, split)), {})
    elif split is not None:
        raise ConfigError(f"data.split = {split} needs a cohort.parquet as data.images, not {source}")
    else:
        found = listing.find(source, images.IMAGE_SUFFIXES)
    note = found.describe("data.images")
    if not found.uris and not found.refused:
        raise ConfigError(f"data.images = {source} holds no images ({', '.join(images.IMAGE_SUFFIXES)}); {note}")
    found = found.with_slides_refused()
    if note := found.describe("data.images"):
        print(note)
    refused = [Failure.of(image_id, STAGE, error) for image_id, error in found.refused]
    items = [
        Item(id=image_id, image_uri=uri, stamp=f"{uri} {stamp}", part=None)
        for (image_id, uri), stamp in zip(found.uris.items(), storage.stamps(list(found.uris.values())), strict=True)
    ]
    return items, refused, found.passed_over


def _listed(source: str, split: str | None) -> list[tuple[str, str]]:
    optional = ("id",) if split else ("id", "split")
    try:
        rows = tables.read_rows(source, ListedImage, optional=optional)
    except StorageError as error:
        raise ConfigError(f"data.images: {error}") from error
    if not rows:
        raise ConfigError(f"data.images = {source} has no rows; list an image in each")
    folder = source.rpartition("/")[0]
    found = []
    for number, row in enumerate(rows):
        if split is None or row.split == split:
            uri = storage.resolve(
                row.image_uri, folder, where=f"data.images = {source}, row {number}, column image_uri"
            )
            found.append((storage.stem_of(uri) if row.id is None else row.id, uri))
    if not found:
        raise ConfigError(f"data.split = {split}: {source} has {sorted({str(row.split) for row in rows})}; choose one")
    return found


def choose_models(
    config: ScoreConfig, out: str, checkpoints: Sequence[str], weights: str, *, use_gpu: bool
) -> Ensemble:
    """Choose the models and how they are applied; an earlier calibration of the same ensemble here still holds."""
    threads = config.resources.threads_per_actor
    ensemble = Ensemble(tuple(checkpoints), weights, config.inference, use_gpu=use_gpu, threads=threads)
    plan_uri = storage.join(out, PLAN)
    if config.inference.batch_size is None and use_gpu and storage.exists(plan_uri):
        settled = storage.read_record(plan_uri, "calibrated_for", "batch_size", "batch_px")
        if settled["calibrated_for"] == ensemble.key:
            return ensemble.with_batches(settled["batch_size"], settled["batch_px"])
    return ensemble


def make_work(config: ScoreConfig, out: str, ensemble: Ensemble) -> Work:
    """Return the work on each image: everything that its outputs depend on, nothing about the cluster."""
    return Work(ensemble, ScoreTask(out, ensemble.key, config.postprocess, config.save, config.limits))


def settle(
    config: ScoreConfig, out: str, ensemble: Ensemble, items: Sequence[Item], plan: ScorePlan
) -> tuple[Ensemble, ScorePlan]:
    """Choose batch size and number of actors, by a calibration if there are enough images to predict.

    The batch size is written down: later runs must keep it for equal bytes.
    """
    from workflows.scoring import pipeline

    wanted = config.resources
    unsettled = replace(ensemble, inference=config.inference)
    if wanted.calibrate and len(items) >= MIN_CALIBRATED * plan.actors:
        # The batch of an earlier run may not fit this one's GPU.
        otherwise = make_work(config, out, unsettled) if ensemble != unsettled else None
        found = pipeline.calibrate(make_work(config, out, ensemble), items, wanted, plan, otherwise=otherwise)
        if found is not None:
            print(f"calibrated: {found}", flush=True)
            ensemble = ensemble.with_batches(found.batch_size, found.batch_px)
            fitted = found.fit(plan)
            plan = fitted if wanted.actors is None else replace(fitted, actors=wanted.actors)
    plan = plan.in_even_blocks(len(items), ensemble.inference.batch_size or 1)
    settled = {"batch_size": ensemble.inference.batch_size or 1, "batch_px": ensemble.inference.batch_px}
    storage.write_json(storage.join(out, PLAN), settled | {"calibrated_for": unsettled.key})
    return ensemble, plan


if __name__ == "__main__":
    main(STAGE, ScoreConfig, run, __doc__ or "", plan=plan)
