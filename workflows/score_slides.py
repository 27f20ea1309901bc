"""Score whole slides with a trained ensemble: maps, masks, targets and the numbers of each slide.

    python workflows/score_slides.py 'slides=/data/*.svs' ensemble.uri=/data/stas/folds/ensemble.json out=/data/slides

Writes for every slide, as configured, below <out> maps/<id>.tif and masks/<id>.tif (pyramids), geojson/<id>.geojson
(QuPath), targets/<id>.parquet (GeoParquet), overviews/<id>.png, galleries/<id>.png, thumbnails/<id>.* and
tissue/<id>.png; over all slides slides.parquet, failures.parquet, timings.parquet, seams.json, report.md and, last,
manifest.json.

A slide is read, predicted and kept in blocks of tiles, and finished the moment its last block is there, while others
are predicted. Blocks are what a run that was killed goes on from; it ends with the same bytes. Targets and outlines are
in pixels of level 0, maps and masks of the resolution that the models were trained at.
"""

import sys

if __name__ == "__main__" and not (__package__ or getattr(sys.flags, "safe_path", False)):  # a script
    import environment  # noqa: F401 - ends where this Python lacks what follows

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

from pydantic import Field

from stas_core import config as configs
from stas_core import places, storage
from stas_core.config import Config, Uri
from stas_core.errors import TRY_AGAIN, ConfigError, StasError, StorageError
from stas_core.failures import Failure
from stas_core.predict.inference import InferenceConfig
from stas_core.scored_runs import RECORDS
from stas_core.slides.blocks import TileConfig
from stas_core.slides.phantom import PHANTOM_PATTERNS, PhantomSlideConfig, make_slide, slide_files
from stas_core.slides.resolution import COARSEST_MPP, FINEST_MPP
from stas_core.slides.run import FAILED, SURVEYS, SlideRun
from stas_core.slides.thresholds import SlidePostprocessConfig
from stas_core.slides.tissue import TissueConfig
from stas_core.verdicts import VerdictConfig
from workflows import next_step, run_log, run_metrics, tracking
from workflows.autoscaling import asking_for_nodes
from workflows.cli import main
from workflows.cluster import ray_session
from workflows.conclusion import conclude_again
from workflows.forecast import Failing, Forecast, begin, bytes_there, nodes_at_hand
from workflows.out_folder import (
    MANIFEST,
    OutFolder,
    Outputs,
    claim_for_stage,
    require_apart,
    require_out,
    require_uri,
)
from workflows.progress import Progress, doing, duration
from workflows.report_pages import remove_pages
from workflows.scoring.plan import Ensemble, EnsembleConfig, ScorePlan, ScoreResources, plan_scoring
from workflows.scoring.slide_list import STAGE, GivenConfig, SlideSource, find_slides
from workflows.scoring.slide_plan import (
    CacheConfig,
    SlideItem,
    SlideLimits,
    SlideSaveConfig,
    SlideTask,
    at_once,
    must_score,
    windows,
)
from workflows.scoring.slide_results import Judge, usual_looks, write_results
from workflows.scoring.slide_tasks import FinishedSlide, OpenSlide, open_slide, record_failure
from workflows.scoring.slide_times import SlideTimes
from workflows.tracking import TrackingConfig
from workflows.waiting import Need, results

OUTPUTS = Outputs(STAGE, (*SlideRun.PATTERNS, *(f"phantom/*/{name}" for name in PHANTOM_PATTERNS)))
SURVEY = "survey: "
"""What the slides of a survey are counted as; cluster/monitoring/alerts.yaml holds failures against them."""


Found = tuple[list[SlideItem], list[Failure], dict[str, int]]
"""Slides, those that cannot be scored, and how many files of each other suffix were passed over."""


class ScoreSlidesConfig(Config):
    """Settings of score_slides."""

    out: Uri | None = None
    """Folder of the outputs; path or URI."""
    slides: Uri | None = None
    """Folder, glob or file of slides, or a .parquet list with columns slide_uri and, if wanted, id and mpp."""
    phantom: PhantomSlideConfig | None = None
    """Make these phantom slides below `out` and score them, instead of reading `slides`."""
    mpp_csv: Uri | None = None
    """CSV with columns image_id and mpp: um per level-0 pixel, for slides that do not say it, or say it wrongly."""
    mpp: float | None = Field(None, ge=FINEST_MPP, le=COARSEST_MPP)
    """um per level-0 pixel of every slide that mpp_csv or the list has no value for, whatever its file says."""
    model_mpp: float | None = Field(None, ge=FINEST_MPP, le=COARSEST_MPP)
    """um per pixel of the images that the models were trained on; null: what their checkpoints say, else 0.5."""
    given: GivenConfig = GivenConfig()
    cohort: Uri | None = None
    """cohort.parquet whose stains slides are held against, in place of the ranges that the ensemble has of its training
    images: slides of other stains are scored with a warning (verdict.max_drift)."""
    ensemble: EnsembleConfig = EnsembleConfig()
    inference: InferenceConfig = InferenceConfig()
    tile: TileConfig = TileConfig()
    tissue: TissueConfig = TissueConfig()
    postprocess: SlidePostprocessConfig = SlidePostprocessConfig()
    save: SlideSaveConfig = SlideSaveConfig()
    limits: SlideLimits = SlideLimits()
    cache: CacheConfig = CacheConfig()
    resources: ScoreResources = ScoreResources()
    """Shares of the cluster. `calibrate` has no effect on slides: their tiles are of one size, and go one by one unless
    `inference.batch_size` says more."""
    max_failed_fraction: float = Field(0.0, ge=0, le=1)
    """Exit with status 1 when a larger share of the slides failed."""
    verdict: VerdictConfig = VerdictConfig()
    """Limits of the verdict that the stage ends with."""
    accept_warnings: bool = False
    """Exit with status 0 even where the verdict is `do not use`."""
    tracking: TrackingConfig = TrackingConfig()
    """Whether MLflow is told of the run."""


def run(config: ScoreSlidesConfig, force: bool) -> int:
    """Score the slides; return the exit status."""
    config, out, found, checkpoints = _opened(config)
    with claim_for_stage(out, OUTPUTS, force=force) as folder:
        if config.phantom is not None:
            config = _make_phantom_inputs(config, config.phantom)
        items, refused, passed_over = found or _find(config)
        folder.name_ids(item["id"] for item in items)
        status = _score(config, folder, checkpoints, items, refused, passed_over)
    return conclude_again(out, accept_warnings=config.accept_warnings) or status


def _opened(config: ScoreSlidesConfig) -> tuple[ScoreSlidesConfig, str, Found | None, list[str]]:
    """Find slides (None: they are to be made) and checkpoints; return the settings with absolute paths, and `out`.

    Raises:
        ConfigError: a setting is wrong, or there is no slide.
        CheckpointError: there is no ensemble.
    """
    out = require_out(config.out, "/data/slides")
    ensemble_uri = require_uri("ensemble.uri", config.ensemble.uri, "/data/folds/ensemble.json")
    given = {f"given.{name}": uri for name, uri in config.given.model_dump().items()}
    read = {"ensemble.uri": ensemble_uri, "mpp_csv": config.mpp_csv, "cohort": config.cohort, **given}
    ensemble = config.ensemble.model_copy(update={"uri": ensemble_uri})
    config = config.model_copy(update={"out": out, "ensemble": ensemble})
    if config.phantom is None:
        config = config.model_copy(update={"slides": require_uri("slides", config.slides, "'/data/*.svs'")})
        require_apart(out, read | {"slides": config.slides}, listed=["slides", *given])
    else:
        if config.slides is not None and not places.is_within(config.slides, storage.join(out, "phantom")):
            raise ConfigError(f"slides = {config.slides} beside phantom, which is scored instead; leave one out")
        require_apart(out, read, listed=list(given))
    found = None if config.phantom is not None else _find(config)
    from stas_core.predict import ensemble as ensembles  # loads torch: after the cheap checks

    return config, out, found, ensembles.find_checkpoints(ensemble_uri, top_k=config.ensemble.top_k)


def plan(config: ScoreSlidesConfig, force: bool) -> list[Forecast]:
    """Say what scoring the slides would take, from the tissue of a few and some of their tiles."""
    from stas_core.predict import ensemble as ensembles
    from workflows.scoring import estimate

    config, out, found, checkpoints = _opened(config)
    base, nodes = begin(out, OUTPUTS, force=force), nodes_at_hand()
    laid = plan_scoring(nodes, config.resources)
    base = replace(base, num_gpus=laid.num_gpus)
    resolution = ensembles.resolution_of(checkpoints, config.model_mpp)
    weights = storage.fingerprint(*sorted(ensembles.checkpoint_fingerprint(uri) for uri in checkpoints))
    ensemble = _ensemble(config, checkpoints, weights, laid)
    usual_looks(config.cohort, str(config.ensemble.uri))  # refused now where it would be refused later
    task = make_task(config, out, ensemble, frame_mpp=resolution.value)
    models = f"with {len(checkpoints)} model(s) of {resolution.value:g} um/px"
    if config.phantom is not None:
        work = f"{config.phantom.num_slides} phantom slides to make and score {models}"
        return [replace(base, work=work, layout=laid.reason, basis="the slides are not made yet")]
    items, refused, _ = found or ([], [], {})
    there = {kind: task.run.files(kind) for kind in task.save.kinds()}
    records = {} if force or not storage.exists(out) else {record.id: record for record in task.run.records()}
    todo = [item for item in items if must_score(task, item, records.get(item["id"]), there)]
    written = (uris[item["id"]] for uris in there.values() for item in todo if item["id"] in uris)
    work = f"{len(items)} slides, {len(todo)} to score {models}"
    base = replace(base, work=work, layout=laid.reason).in_place_of(bytes_there(written))
    held = records.keys() & ({item["id"] for item in items} - {item["id"] for item in todo})
    failed = [records[name] for name in sorted(held) if records[name].reason is not None]
    known = [*refused, *(Failure(one.id, STAGE, str(one.reason), one.message or "") for one in failed)]
    failing = Failing(known, len(items) + len(refused), config.max_failed_fraction)
    return [estimate.of_slides(base, ensemble, task, todo, estimate.Cluster(nodes, laid), failing)]


def _ensemble(config: ScoreSlidesConfig, checkpoints: Sequence[str], weights: str, laid: ScorePlan) -> Ensemble:
    use_gpu = laid.gpus_per_actor > 0 and not config.resources.logical_gpus
    threads = config.resources.threads_per_actor
    return Ensemble(tuple(checkpoints), weights, config.inference, use_gpu=use_gpu, threads=threads)


def _find(config: ScoreSlidesConfig) -> Found:
    assert config.slides is not None
    return find_slides(SlideSource(config.slides, config.mpp, config.mpp_csv, config.given))


def phantom_folder(out: str, phantom: PhantomSlideConfig) -> str:
    """Return where phantom slides of a config lie; their truth is in `targets` there."""
    return storage.join(out, "phantom", storage.fingerprint(phantom.model_dump_json()))


def _make_phantom_inputs(config: ScoreSlidesConfig, phantom: PhantomSlideConfig) -> ScoreSlidesConfig:
    """Make the phantom slides that are not there yet, as Ray tasks; return the config that reads them.

    Raises:
        ConfigError: `out` is no local folder.
    """
    import ray

    assert config.out is not None
    if not storage.is_local(config.out):
        raise ConfigError(f"out = {config.out}: phantom slides are written to local folders only; give one")
    folder = phantom_folder(config.out, phantom)
    where = storage.local_path(folder)
    missing = [index for index in range(phantom.num_slides) if not slide_files(phantom, index, where).exist()]
    if missing:
        print(f"making {len(missing)} phantom slide(s) of {phantom.width_px}x{phantom.height_px} px", flush=True)
        with ray_session():
            make = ray.remote(make_slide)
            results([make.remote(phantom, index, where) for index in missing], Need("the making of a slide").look)
    given = config.given
    if given.tumour is None:
        given = given.model_copy(update={"tumour": storage.join(folder, "tumours")})
    return config.model_copy(update={"slides": storage.join(folder, "slides"), "given": given})


def _score(
    config: ScoreSlidesConfig,
    folder: OutFolder,
    checkpoints: Sequence[str],
    items: Sequence[SlideItem],
    refused: Sequence[Failure],
    passed_over: Mapping[str, int],
) -> int:
    import torch

    from stas_core.predict import ensemble as ensembles

    out = folder.uri
    weights = storage.fingerprint(*sorted(ensembles.checkpoint_fingerprint(folder) for folder in checkpoints))
    resolution = ensembles.resolution_of(checkpoints, config.model_mpp)
    looks = usual_looks(config.cohort, str(config.ensemble.uri))
    given = [json.dumps(item, sort_keys=True) for item in items]
    inputs = storage.fingerprint(weights, str(looks), str(resolution.value), *given, *(one.message for one in refused))
    identity = config.model_copy(update={"accept_warnings": False})
    if folder.is_finished(identity, inputs):
        failed = SlideRun(out).failures()
        if not {failure.reason for failure in failed} & TRY_AGAIN:
            print(f"nothing to do: {out} is up to date ({len(items)} slides)")
            return _status(config, len(failed), len(items) + len(refused))
    start = time.monotonic()
    assumed = " (assumed: no checkpoint says it; set model_mpp)" if resolution.is_assumed else ""
    print(f"models of {resolution.value:g} um/px{assumed}", flush=True)
    members = ensembles.load_members(checkpoints, torch.device("cpu"))  # a bad checkpoint should fail here
    with ray_session() as nodes, asking_for_nodes():
        plan = plan_scoring(nodes, config.resources)
        folder.account.num_gpus = plan.num_gpus
        ensemble = _ensemble(config, checkpoints, weights, plan)
        task = make_task(config, out, ensemble, frame_mpp=resolution.value)
        del members
        for name in (MANIFEST, *SlideRun.RESULTS):  # they describe files that are about to change
            storage.remove(storage.join(out, name))
        remove_pages(out)
        storage.write_bytes(storage.join(out, "config.resolved.yaml"), configs.dump(config).encode())
        tracking.begin()
        num_cpus = sum(node.num_cpus for node in nodes)
        work = _Run(task, ensemble, config.resources, plan=plan, num_cpus=num_cpus)
        work.score(items)
    folder.verify()
    assumed_mpp = resolution.value if resolution.is_assumed else None
    facts = write_results(task, items, refused, own=folder.ids, judge=Judge(config.verdict, assumed_mpp, looks))
    facts |= {"passed_over": passed_over, "seconds": round(time.monotonic() - start, 1)}
    facts |= {"times": work.times.facts(), "model_mpp": resolution.value, "model_mpp_is_assumed": resolution.is_assumed}
    truth = None if config.phantom is None else storage.join(phantom_folder(out, config.phantom), "targets")
    folder.write_manifest(identity, inputs, facts | next_step.recorded(next_step.after_slides(out, truth)))
    print(f"{facts['num_slides']} slides in {out}/slides.parquet, {facts['num_failures']} in {out}/failures.parquet")
    return _status(config, facts["num_failures"], len(items) + len(refused))


def _status(config: ScoreSlidesConfig, num_failed: int, num_inputs: int) -> int:
    return int(num_failed > config.max_failed_fraction * num_inputs)


def make_task(config: ScoreSlidesConfig, out: str, ensemble: Ensemble, *, frame_mpp: float) -> SlideTask:
    """Return what the tasks need to know: everything that outputs depend on, nothing about the cluster.

    Raises:
        ConfigError: the post-processing does not fit the models' resolution.
    """
    config.postprocess.in_pixels(frame_mpp)
    return SlideTask(
        out=out,
        ensemble_key=ensemble.key,
        num_members=len(ensemble.checkpoints),
        frame_mpp=frame_mpp,
        tile=config.tile,
        tissue=config.tissue,
        postprocess=config.postprocess,
        save=config.save,
        limits=config.limits,
        cache=config.cache,
    )


class _Run:
    """Brings slides from their files to their records."""

    def __init__(
        self, task: SlideTask, ensemble: Ensemble, wanted: ScoreResources, *, plan: ScorePlan, num_cpus: float
    ) -> None:
        self._task, self._ensemble, self._wanted, self._plan = task, ensemble, wanted, plan
        self._num_cpus = num_cpus
        self._failed: Counter[str] = Counter()
        self.times = SlideTimes()

    def score(self, items: Sequence[SlideItem]) -> None:
        """Score the slides that have no record yet that holds."""
        task = self._task
        there = {kind: task.run.files(kind) for kind in task.save.kinds()}
        records = at_once(task.run.record, [item["id"] for item in items])
        todo = [item for item, one in zip(items, records, strict=True) if must_score(task, item, one, there)]
        stale = [task.run.file(RECORDS, item["id"]) for item in todo]  # a record must not vouch for files that change
        at_once(storage.remove, [*stale, *(storage.join(task.blocks(item), FAILED) for item in todo)])
        print(f"{len(items)} slides: {len(todo)} to score", flush=True)
        try:
            for window in windows(todo, int(task.cache.max_gb * 1e9)):
                self._predict(self._open(window))
        except StasError:
            self._tell_reasons()  # the error says what ended the run, these counts what may have led to it
            raise
        self._tell_reasons()
        for line in self.times.lines():
            print(line, flush=True)

    def _survey(self, items: Sequence[SlideItem]) -> set[str]:
        """Survey slides; return the ids of those that cannot be scored."""
        from workflows.scoring import slide_pipeline

        failed = set()
        progress = Progress(len(items), "slides", label=SURVEY)
        for row in slide_pipeline.survey(self._task, items, self._wanted, self._plan) if items else ():
            self.times.add(row["id"], survey_s=row["survey_s"])
            self._count(row["reason"])
            if row["reason"] is not None:
                failed.add(row["id"])
            progress.step(facts=f"{len(failed)} failed")
        return failed

    def _open(self, items: Sequence[SlideItem]) -> list[OpenSlide]:
        """Survey the slides that are not surveyed yet; return all that can be scored, in their order."""
        look = partial(open_slide, self._task)
        opened = {item["id"]: one for item, one in zip(items, at_once(look, items), strict=True)}
        unknown = [item for item in items if opened[item["id"]] is None]
        # Monitoring holds failures against all slides that were looked at, an earlier run's surveys among them.
        run_metrics.done(len(items) - len(unknown), f"{SURVEY}slides")
        failed = self._survey(unknown)
        known = [item for item in unknown if item["id"] not in failed]
        opened |= {item["id"]: one for item, one in zip(known, at_once(look, known), strict=True)}
        found: list[OpenSlide] = []
        for slide_id, one in opened.items():
            if one is None and slide_id not in failed:
                raise StorageError(
                    f"{self._task.run.file(SURVEYS, slide_id)} was made just now, and is not there or is another by "
                    "now; run again when no other run works there"
                )
            if one is not None and one.reason is not None:
                self._count(one.reason)
            elif one is not None:
                found.append(one)
        return found

    @doing("measuring what halos are worth to these models")
    def _measure_seams(self, item: SlideItem) -> None:
        """Measure what halos are worth to this ensemble, unless an earlier run has."""
        from stas_core.slides import halo
        from workflows.scoring import slide_pipeline

        task = self._task
        uri = task.run.path(SlideRun.SEAMS)
        if storage.exists(uri) and storage.read_record(uri, "key")["key"] == task.seams_key:
            return
        job = slide_pipeline.BlockJob(self._ensemble, task)
        found = slide_pipeline.measure_seams(job, item, self._wanted, self._plan)
        if found is not None:
            for line in halo.describe(found, task.tile.halo_px, blended=task.tile.blend):
                print(f"seams: {line}", flush=True)
            storage.write_json(
                uri, {"key": task.seams_key, "slide": item["id"], "rows": [asdict(one) for one in found]}
            )

    def _predict(self, slides: Sequence[OpenSlide]) -> None:
        """Predict the blocks that are missing, and finish each slide with its last one."""
        from workflows.scoring import slide_pipeline

        task = self._task
        finishing = slide_pipeline.Finishing(task, self._plan, self._num_cpus)
        waiting = {slide.item["id"]: len(slide.missing) for slide in slides}
        missing = [block for slide in slides for block in slide.missing]
        by_id = {slide.item["id"]: slide.item for slide in slides}
        for slide_id in [slide_id for slide_id, count in waiting.items() if not count]:
            finishing.begin(by_id[slide_id], self.times.of(slide_id))
        if missing and task.tile.measure:
            self._measure_seams(by_id[missing[0]["slide"]])
        if missing:
            each = f"{len(self._ensemble.checkpoints)} model(s), {self._ensemble.threads} thread(s) each"
            print(f"{self._plan.reason}\n{self._plan.actors} actor(s) of {each}; {len(missing)} blocks", flush=True)
        progress, num_done, start = Progress(len(missing), "blocks"), 0, time.monotonic()
        first, last = 0.0, start
        failures: dict[str, tuple[int, int, str, str]] = {}
        num_px = 0
        try:
            job = slide_pipeline.BlockJob(self._ensemble, task)
            for row in slide_pipeline.predict(job, missing, self._wanted, self._plan) if missing else ():
                slide_id = row["slide"]
                num_px += row["num_px"] or 0
                last = time.monotonic()
                first = first or last
                self.times.add(slide_id, decode_s=row["decode_s"], idle_s=row["idle_s"], predict_s=row["predict_s"])
                self.times.add(slide_id, keep_s=row["write_s"])
                self.times.add_gpu(row["gpu_watched_s"], row["gpu_busy_s"])
                if row["reason"] is not None:
                    found = (row["row"], row["col"], row["reason"], row["message"] or "")
                    failures[slide_id] = min(found, failures.get(slide_id, found))
                waiting[slide_id] -= 1
                if not waiting[slide_id]:
                    if slide_id in failures:
                        self._fail(by_id[slide_id], *failures[slide_id][2:])
                    else:
                        finishing.begin(by_id[slide_id], self.times.of(slide_id))
                num_done += self._take(finishing.ended())
                speed = num_px / 1e6 / max(1e-9, time.monotonic() - start)
                gpu = "" if self.times.gpu_busy is None else f"GPU busy {self.times.gpu_busy:.0%}, "
                progress.step(facts=f"{speed:.2f} Mpx/s, {gpu}{num_done} of {len(slides)} slides done")
            with doing("finishing the last slides"):
                num_done += self._take(finishing.ended(wait=True))
            after_s = time.monotonic() - last
            self.times.add_window(first_s=max(first - start, 0.0), inference_s=last - start, after_s=after_s)
        finally:
            finishing.cancel()
        print(f"{num_done} slides finished in {duration(time.monotonic() - start)}", flush=True)

    def _fail(self, item: SlideItem, reason: str, message: str) -> None:
        record_failure(self._task, item, reason, message)
        self._count(reason)
        run_metrics.done(1, "slides")

    def _take(self, ended: Iterable[FinishedSlide]) -> int:
        num_ended = 0
        for one in ended:
            self.times.add(one["id"], **one["seconds"])
            self._count(one["reason"])
            run_metrics.done(1, "slides")
            num_ended += 1
        return num_ended

    def _count(self, reason: str | None) -> None:
        if reason is not None:
            self._failed[reason] += 1
            run_metrics.count("stas_items_failed", reason=reason)
            run_log.count("failed")

    def _tell_reasons(self) -> None:
        """Print how many slides have failed so far, and why."""
        if self._failed:
            print(
                "failed: " + ", ".join(f"{count} {reason}" for reason, count in sorted(self._failed.items())),
                flush=True,
            )


if __name__ == "__main__":
    main(STAGE, ScoreSlidesConfig, run, __doc__ or "", plan=plan)
