"""Run the stages in order; each is skipped when its outputs are up to date.

    python workflows/pipeline.py prepare.data.images=/data/stas/Train_Images \\
        prepare.data.annotations=/data/stas/Train_Annotations out=/data/stas/pipeline

    python workflows/pipeline.py --config configs/demo.yaml out=runs/demo

Writes <out>/cohort (see prepare_data), <out>/folds (train_folds), <out>/thresholds (tune_postprocess, where
`tune.space` names keys to search), <out>/scores (score_images, of the hold-out images, with the thresholds recommended)
and <out>/evaluation (evaluate); without a hold-out these two are left out. With a section `slides`, whole slides are
scored by the same ensemble, too: <out>/slides (score_slides), and where there is a truth of them, evaluated:
<out>/slides_evaluation (evaluate).
"""

import sys

if __name__ == "__main__" and not (__package__ or getattr(sys.flags, "safe_path", False)):  # a script
    import environment  # noqa: F401 - ends where this Python lacks what follows

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from typing import Any, Protocol

from stas_core import config as configs
from stas_core import local_files, storage
from stas_core.config import Config, Uri
from stas_core.data import cohort as cohorts
from stas_core.data.annotations import AnnotationConfig
from stas_core.data.cohort import HOLD_OUT, CohortRow
from stas_core.data.reference import common_mpp
from stas_core.errors import ConfigError, ForeignOutputError, StaleOutputError
from stas_core.predict.postprocess import PostprocessConfig
from stas_core.runs import TrainingRun
from stas_core.search.threshold_search import prepare_space
from stas_core.verdicts import LEVELS, OK
from workflows import evaluate, next_step, prepare_data, score_images, score_slides, train_folds, tune_postprocess
from workflows.cli import main
from workflows.cluster import default_gpus, plan_groups, ray_session
from workflows.conclusion import verdict_of
from workflows.evaluate import EvaluateConfig
from workflows.evaluation.pairing import TruthConfig
from workflows.folds import training
from workflows.folds.estimate import of_folds
from workflows.folds.training import TrainFoldsConfig
from workflows.forecast import Forecast, begin, nodes_at_hand
from workflows.next_step import NextStep
from workflows.out_folder import (
    CLAIM,
    MANIFEST,
    Outputs,
    claim_for_stage,
    require_apart,
    require_claimable,
    require_out,
    require_uri,
)
from workflows.prepare_data import PrepareConfig
from workflows.score_images import ImagesConfig, ScoreConfig
from workflows.score_slides import ScoreSlidesConfig
from workflows.scoring.plan import EnsembleConfig
from workflows.tracking import TrackingConfig
from workflows.tune_postprocess import TunePostprocessConfig

STAGES = ("prepare", "train", "tune", "score", "evaluate", "slides")
"""Sections of the stages."""
LINKED = {
    "prepare.out": "set out",
    "train.out": "set out",
    "train.data.cohort": "the cohort is that of prepare",
    "tune.out": "set out",
    "tune.run": "the run is that of train",
    "tune.cohort": "the cohort is that of prepare",
    "tune.default": "set score.postprocess, which is the default of the search too",
    "score.out": "set out",
    "score.data": "the hold-out images of prepare are scored",
    "score.ensemble.uri": "the ensemble is that of train",
    "slides.out": "set out",
    "slides.ensemble.uri": "the ensemble is that of train",
    "evaluate.out": "set out",
    "evaluate.run": "the run is that of score",
    "evaluate.truth": "the truth is that of the hold-out images of prepare",
}
LINKED |= {f"{name}.tracking": "set tracking, which is of all stages" for name in STAGES}
"""Settings by which the pipeline links its stages, and what to do instead of giving them."""

OUTPUTS = Outputs("pipeline", ())
RECOMMENDED = "postprocess.tuned.yaml"
"""What tune_postprocess recommends, in its folder."""


class PipelineConfig(Config):
    """Settings of all stages; those that link them (outputs, cohort, ensemble...) follow from `out`."""

    out: Uri | None = None
    """Folder of all outputs; path or URI."""
    prepare: PrepareConfig = PrepareConfig()
    train: TrainFoldsConfig = TrainFoldsConfig()
    tune: TunePostprocessConfig = TunePostprocessConfig()
    score: ScoreConfig = ScoreConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    slides: ScoreSlidesConfig | None = None
    """Score these slides with the ensemble, too."""
    slides_truth: Uri | None = None
    """Truth of these slides, as `truth.slides` of evaluate has it; null: that of phantom slides, else none. Its
    outlines have the classes that `prepare.annotation` lists."""
    accept_warnings: bool = False
    """Go on after a stage whose verdict is `do not use`, too, and exit with status 0."""
    tracking: TrackingConfig = TrackingConfig()
    """Whether MLflow is told of all stages; their runs lie within the pipeline's."""


def run(config: PipelineConfig, force: bool) -> int:
    """Run the stages; return the exit status."""
    config, out = _opened(config)
    with claim_for_stage(out, OUTPUTS, force=False) as folder:  # each stage discards what is its own
        storage.write_bytes(storage.join(out, "config.resolved.yaml"), configs.dump(config).encode())
        status, ran = _run_stages(_accepting(config) if config.accept_warnings else config, out, force)
        found = {one.folder: verdict for one in ran if (verdict := verdict_of(storage.join(out, one.folder)))}
        worst = max((one.level for one in found.values()), key=LEVELS.index, default=OK)
        facts = {"verdict": {"level": worst}, "verdicts": {name: one.to_json() for name, one in found.items()}}
        folder.write_manifest(config, "", facts | next_step.recorded(None if status else _next(config, out)))
    print(f"VERDICT of all stages: {worst}")
    for name, verdict in found.items():
        print(f"  {name}: {verdict.level}")
        for reason in verdict.reasons:
            print(f"    {reason}")
    return status


def _opened(config: PipelineConfig) -> tuple[PipelineConfig, str]:
    """Return the settings with absolute paths, and `out`.

    Raises:
        ConfigError: a setting is wrong, of whichever stage.
    """
    out = require_out(config.out, "/data/runs/demo")
    _refuse_links(config)
    config = config.model_copy(update={"out": out, "prepare": _with_inputs(config.prepare)})
    data, split = config.prepare.data, config.prepare.split
    listed = {} if config.prepare.phantom else {"prepare.data.images": data.images}
    listed |= {} if config.prepare.phantom else {"prepare.data.annotations": data.annotations}
    csvs = {"prepare.split.groups_csv": split.groups_csv, "prepare.split.published_csv": split.published_csv}
    csvs |= {"prepare.data.mpp_csv": data.mpp_csv, "prepare.data.negatives": data.negatives}
    model = training.with_absolute_start(config.train.model, "train.model.init_from")
    config = config.model_copy(update={"train": config.train.model_copy(update={"model": model})})
    weights = {"train.model.encoder_weights": model.weights_file, "train.model.init_from": model.init_from}
    require_apart(out, listed | csvs | weights, listed=[*listed, "train.model.init_from"])
    if model.init_from is not None:
        from stas_core.train.initial import require_same_architecture

        require_same_architecture(model)  # whether its folds fit is known when there is a cohort
    if config.tune.space:
        prepare_space(config.tune.space, config.score.postprocess)
    return config, out


class Module(Protocol):
    """What the pipeline knows of a stage."""

    def run(self, config: Any, force: bool, /) -> int:
        """Run it; return the exit status."""

    def plan(self, config: Any, force: bool, /) -> list[Forecast]:
        """Say what that would take."""


@dataclass(frozen=True)
class Stage:
    """A stage that a pipeline runs."""

    name: str
    module: Module
    folder: str
    """Below the pipeline's `out`."""
    settings: Callable[[], Config]
    """Returns its settings, linked to what the stages before it have made."""
    reads: str = ""
    """What an earlier stage makes, and this one cannot begin without."""
    maker: str = ""
    """The stage that makes it."""
    gpus: float | None = 0.0
    """Of each of its processes; None: as many as the cluster gives."""


def stages(config: PipelineConfig, out: str, holds_out: Callable[[], bool]) -> Iterator[Stage]:
    """Yield the stages that are run, in order: for the run, its plan, and what either says.

    Args:
        config: of all.
        out: the folder of all.
        holds_out: tells whether the cohort has a hold-out; it is asked when the first stage is done with.
    """
    table, trained = _table(out), TrainingRun(storage.join(out, "folds")).path(TrainingRun.ENSEMBLE)
    prepare = config.prepare.model_copy(update={"out": storage.join(out, "cohort")})
    yield Stage("prepare_data", prepare_data, "cohort", lambda: prepare)
    gpus = config.train.resources.gpus_per_worker
    yield Stage("train_folds", train_folds, "folds", lambda: _to_train(config, out), table, "prepare_data", gpus)
    if config.tune.space:
        yield Stage(
            "tune_postprocess", tune_postprocess, "thresholds", lambda: _to_tune(config, out), trained, "train_folds"
        )
    if holds_out():
        scored, gpus = storage.join(out, "scores", MANIFEST), config.score.resources.gpus_per_actor
        to_score = partial(_to_score, config, out)
        yield Stage("score_images", score_images, "scores", to_score, trained, "train_folds", gpus)
        yield Stage("evaluate", evaluate, "evaluation", lambda: _to_evaluate(config, out), scored, "score_images")
    if (slides := config.slides) is not None:
        scored, gpus = storage.join(out, "slides", MANIFEST), slides.resources.gpus_per_actor
        to_slides = partial(_to_slides, slides, out)
        yield Stage("score_slides", score_slides, "slides", to_slides, trained, "train_folds", gpus)
        if (truth := _slides_truth(config, slides, out)) is not None:
            judged = _to_evaluate_slides(config, truth, out)
            yield Stage("evaluate", evaluate, "slides_evaluation", lambda: judged, scored, "score_slides")


def plan(config: PipelineConfig, force: bool) -> list[Forecast]:
    """Say what each stage whose inputs are there would take, and all of these together."""
    config, out = _opened(config)
    require_claimable(out, OUTPUTS, force=False)
    planned = _plan_stages(config, out, force)
    return [*planned, together(out, planned)]


def _plan_stages(config: PipelineConfig, out: str, force: bool) -> list[Forecast]:
    """Plan all stages; of one whose inputs an earlier one has yet to make it is said when it can be planned.

    What lies there of an earlier run is no such input where the stage that made it has something to do again.
    """
    prepare = config.prepare.model_copy(update={"out": storage.join(out, "cohort")})
    opened = prepare_data.open_cohort(prepare)
    planned = prepare_data.plan_opened(prepare, opened, force)
    is_made = storage.exists(_table(out)) and all(one.is_nothing for one in planned)
    changing = set() if is_made else {"prepare_data"}
    cluster_gpus = cache(lambda: default_gpus(nodes_at_hand()))
    with local_files.temporary_folder() as folder:
        rows = _rows(out) if is_made else prepare_data.expected_rows(prepare, opened, folder)
        expects_hold_out = _holds_out(rows) if rows else config.prepare.split.hold_out_fraction > 0
        for stage in stages(config, out, lambda: expects_hold_out):
            if stage.module is prepare_data:
                continue
            if stage.module is train_folds and rows and not is_made:
                found = [_plan_training(config, rows, storage.join(out, stage.folder), force)]
            elif stage.maker not in changing and storage.exists(stage.reads):
                found = stage.module.plan(stage.settings(), force)
            else:
                later = f"known when {stage.maker} has run: plan again then"
                found = [Forecast(stage.name, storage.join(out, stage.folder), later, "", basis=later)]
            if not all(one.is_nothing for one in found):
                changing.add(stage.name)
            takes_gpus = (cluster_gpus() if stage.gpus is None else stage.gpus) > 0
            planned += [replace(one, may_use_gpus=takes_gpus) for one in found]
    return planned


def together(out: str, planned: Sequence[Forecast]) -> Forecast:
    """Return the forecast of all stages, by those that have one; it names the others."""
    names = [one.stage for one in planned]
    titles = [
        n if names.count(n) == 1 else f"{n} ({storage.name_of(one.out)})" for n, one in zip(names, planned, strict=True)
    ]
    without = ", ".join(title for title, one in zip(titles, planned, strict=True) if one.seconds is None)
    seconds = [one.seconds for one in planned if one.seconds is not None]
    gpu_hours = sum(one.gpu_hours or 0.0 for one in planned)
    memory = [one.memory_bytes for one in planned if one.memory_bytes is not None]
    on_disk = [one for one in planned if one.disk_bytes is not None]
    return Forecast(
        OUTPUTS.stage,
        out,
        f"all stages but {without}" if without else f"all stages: {', '.join(titles)}",
        "one after the other",
        seconds=sum(seconds) if seconds else None,
        basis=f"without {without}" if without else "",
        num_gpus=3600 * gpu_hours / sum(seconds) if gpu_hours else 0.0,  # on average
        memory_bytes=max(memory, default=None),
        disk_bytes=sum(one.disk_bytes or 0.0 for one in on_disk) if on_disk else None,
        scratch_bytes=max((one.scratch_bytes for one in on_disk), default=0.0),
        replaced_bytes=sum(one.replaced_bytes for one in on_disk),
        uncounted=next((one.uncounted for one in on_disk if one.uncounted), ""),
        room_bytes=_room_of(on_disk),
    )


def _room_of(planned: Sequence[Forecast]) -> float:
    """Return the most room that stages need at any time; what a later one replaces still lies there for the first."""
    most = left = 0.0
    for one in planned:
        most = max(most, left + one.needed_bytes)
        left += (one.disk_bytes or 0.0) - one.replaced_bytes
    return most


def _plan_training(config: PipelineConfig, rows: Sequence[CohortRow], out: str, force: bool) -> Forecast:
    """Plan the training on a cohort that is still to be made."""
    base = begin(out, training.OUTPUTS, force=force)
    chosen = training.chosen_folds(config.train, rows)
    laid = plan_groups(nodes_at_hand(), training.demand(config.train.resources, len(chosen)))
    forecast = of_folds(base, config.train.recipe, rows, chosen, laid)
    if force or not storage.exists(storage.join(out, CLAIM)):
        return forecast
    note = f"{out} holds a training on the cohort as it is now: on another one it begins with --force only"
    return replace(forecast, notes=(*forecast.notes, note))


def _next(config: PipelineConfig, out: str) -> NextStep | None:
    """Return the command that scores other images as the hold-out was, or with the thresholds, where there are any."""
    again = next_step.after_evaluation(storage.join(out, "scores"), of_slides=False)
    if again is not None or not config.tune.space:
        return again
    return next_step.after_threshold_search(storage.join(out, "thresholds"), storage.join(out, "folds"))


def _run_stages(config: PipelineConfig, out: str, force: bool) -> tuple[int, list[Stage]]:
    """Run the stages; stop at the first that fails, and return its exit status and the stages that were run."""
    ran = list[Stage]()
    with ray_session():
        for stage in stages(config, out, lambda: _holds_out(_rows(out))):
            ran.append(stage)
            if status := _run_stage(stage, force):
                return status, ran
    return 0, ran


def _rows(out: str) -> list[CohortRow]:
    return cohorts.read_cohort(_table(out))


def _holds_out(rows: Sequence[CohortRow]) -> bool:
    return any(row.fold is None for row in rows)


def _held_out(config: PipelineConfig, out: str) -> ImagesConfig:
    """Return the images that were held out."""
    return ImagesConfig(images=_table(out), split=HOLD_OUT, mpp=config.train.data.mpp or common_mpp(_rows(out)))


def _recommended(out: str) -> PostprocessConfig:
    """Return the post-processing that the search recommends."""
    uri = storage.join(out, "thresholds", RECOMMENDED)
    return configs.build(PostprocessConfig, configs.parse_yaml(storage.read_bytes(uri).decode(), uri))


def _table(out: str) -> str:
    return storage.join(out, "cohort", "cohort.parquet")


def _to_train(config: PipelineConfig, out: str) -> TrainFoldsConfig:
    data = config.train.data.model_copy(update={"cohort": _table(out)})
    return config.train.model_copy(update={"out": storage.join(out, "folds"), "data": data})


def _to_tune(config: PipelineConfig, out: str) -> TunePostprocessConfig:
    links = {"out": storage.join(out, "thresholds"), "run": storage.join(out, "folds"), "cohort": _table(out)}
    return config.tune.model_copy(update={**links, "default": config.score.postprocess})


def _to_score(config: PipelineConfig, out: str) -> ScoreConfig:
    is_searched = config.tune.space and storage.exists(storage.join(out, "thresholds", RECOMMENDED))
    links = {
        "out": storage.join(out, "scores"),
        "data": _held_out(config, out),
        "ensemble": _ensemble(storage.join(out, "folds"), config.score.ensemble.top_k),
        "postprocess": _recommended(out) if is_searched else config.score.postprocess,
    }
    return config.score.model_copy(update=links)


def _to_evaluate(config: PipelineConfig, out: str) -> EvaluateConfig:
    truth = TruthConfig(cohort=_table(out), split=HOLD_OUT)
    links = {"out": storage.join(out, "evaluation"), "run": storage.join(out, "scores"), "truth": truth}
    return config.evaluate.model_copy(update=links)


def _to_slides(slides: ScoreSlidesConfig, out: str) -> ScoreSlidesConfig:
    ensemble = _ensemble(storage.join(out, "folds"), slides.ensemble.top_k)
    return slides.model_copy(update={"out": storage.join(out, "slides"), "ensemble": ensemble})


def _slides_truth(config: PipelineConfig, slides: ScoreSlidesConfig, out: str) -> str | None:
    """Return the truth of slides; None: there is none."""
    if config.slides_truth is None and slides.phantom is not None:
        return storage.join(score_slides.phantom_folder(storage.join(out, "slides"), slides.phantom), "targets")
    return config.slides_truth


def _to_evaluate_slides(config: PipelineConfig, truth: str, out: str) -> EvaluateConfig:
    wanted, annotation = config.evaluate, AnnotationConfig()
    if config.slides_truth is not None:  # phantoms have classes of their own
        read = config.prepare.annotation
        annotation = AnnotationConfig(labels=read.labels, unknown_labels=read.unknown_labels)
    return EvaluateConfig(
        out=storage.join(out, "slides_evaluation"),
        run=storage.join(out, "slides"),
        truth=TruthConfig(slides=truth, annotation=annotation),
        bootstrap=wanted.bootstrap.model_copy(update={"by": "image"}),  # slides have no groups
        max_missing_fraction=wanted.max_missing_fraction,
        verdict=wanted.verdict,
        accept_warnings=wanted.accept_warnings,
    )


def _accepting(config: PipelineConfig) -> PipelineConfig:
    """Return the config with every stage accepting what is not to be used."""
    stages = {
        name: section for name in type(config).model_fields if isinstance(section := getattr(config, name), Config)
    }
    accepting = {name: section.model_copy(update={"accept_warnings": True}) for name, section in stages.items()}
    return config.model_copy(update=accepting)


def _refuse_links(config: PipelineConfig) -> None:
    """Refuse settings that would be ignored.

    Raises:
        ConfigError: one that links the stages is not at its default, or slides have a truth and are not scored.
    """
    if config.slides_truth is not None and config.slides is None:
        raise ConfigError(f"slides_truth = {config.slides_truth} needs a section `slides`, which says what is scored")
    for known in configs.fields(PipelineConfig):
        key, default = known.name, known.default
        remedy = next((text for link, text in LINKED.items() if f"{key}.".startswith(f"{link}.")), None)
        if remedy is None or "<" in key:  # what a mapping or a list holds is compared with it
            continue
        value = reduce(partial(_setting, default=default), key.split("."), config)
        if value != default and not isinstance(value, Config):  # of a section, its keys follow
            raise ConfigError(f"{key} = {value}: in a pipeline this follows from the other stages; {remedy}")


def _setting(section: Any, name: str, *, default: Any) -> Any:
    """Return a setting of a section; of one that is left out, the default."""
    return getattr(section, name, default)


def _with_inputs(prepare: PrepareConfig) -> PrepareConfig:
    """Return the settings of prepare with absolute folders of images and annotations.

    Raises:
        ConfigError: there are neither images and annotations nor a phantom to make.
    """
    if prepare.phantom is not None:
        return prepare
    images = require_uri("prepare.data.images", prepare.data.images, "/data/images")
    annotations = require_uri("prepare.data.annotations", prepare.data.annotations, "/data/annotations")
    data = prepare.data.model_copy(update={"images": images, "annotations": annotations})
    return prepare.model_copy(update={"data": data})


def _ensemble(folds: str, top_k: int | None) -> EnsembleConfig:
    # An ensemble.json names its members itself: the best epochs are found in the run's folder.
    uri = TrainingRun(folds).path(TrainingRun.ENSEMBLE) if top_k is None else folds
    return EnsembleConfig(uri=uri, top_k=top_k)


def _run_stage(stage: Stage, force: bool) -> int:
    """Run a stage with its links to the others; return its exit status.

    Raises:
        StaleOutputError: its folder holds other work; the message says how to redo this stage alone.
    """
    print(f"== {stage.name}", flush=True)
    config = stage.settings()
    try:
        return stage.module.run(config, force)
    except ForeignOutputError:
        raise
    except StaleOutputError as error:
        raise StaleOutputError(
            f"{error}. In a pipeline --force starts every stage over; to redo this one alone, delete "
            f"{getattr(config, 'out', None)}"
        ) from error


if __name__ == "__main__":
    main("pipeline", PipelineConfig, run, __doc__ or "", plan=plan)
