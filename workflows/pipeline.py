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

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any, TypeVar

from stas_core import config as configs
from stas_core import local_files, storage
from stas_core.config import Config, Uri
from stas_core.data import cohort as cohorts
from stas_core.data.cohort import HOLD_OUT
from stas_core.data.reference import common_mpp
from stas_core.errors import ConfigError, ForeignOutputError, StaleOutputError
from stas_core.predict.postprocess import PostprocessConfig
from stas_core.runs import TrainingRun
from stas_core.search.threshold_search import prepare_space
from stas_core.verdicts import LEVELS, OK
from workflows import evaluate, next_step, prepare_data, score_images, score_slides, train_folds, tune_postprocess
from workflows.cli import main
from workflows.cluster import plan_groups, ray_session
from workflows.conclusion import verdict_of
from workflows.evaluate import EvaluateConfig
from workflows.evaluation.pairing import TruthConfig
from workflows.folds import training
from workflows.folds.estimate import of_folds
from workflows.folds.training import TrainFoldsConfig
from workflows.forecast import Forecast, nodes_at_hand, short_of_disk
from workflows.next_step import NextStep
from workflows.out_folder import (
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

LATER = "known when the stage before has run: plan again then"
"""What there is to do for a stage whose inputs are not made yet."""
OUTPUTS = Outputs("pipeline", ())
FOLDERS = ("cohort", "folds", "thresholds", "scores", "evaluation", "slides", "slides_evaluation")
"""Of the stages, below `out`."""
RECOMMENDED = "postprocess.tuned.yaml"
"""What tune_postprocess recommends, in its folder."""
C = TypeVar("C", bound=Config)


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
    """Truth of these slides, as `truth.slides` of evaluate has it; null: that of phantom slides, else none."""
    accept_warnings: bool = False
    """Go on after a stage whose verdict is `do not use`, too, and exit with status 0."""
    tracking: TrackingConfig = TrackingConfig()
    """Whether MLflow is told of all stages; their runs lie within the pipeline's."""


def run(config: PipelineConfig, force: bool) -> int:
    """Run the stages; return the exit status."""
    config, out = _opened(config)
    with claim_for_stage(out, OUTPUTS, force=False) as folder:  # each stage discards what is its own
        storage.write_bytes(storage.join(out, "config.resolved.yaml"), configs.dump(config).encode())
        status = _run_stages(_accepting(config) if config.accept_warnings else config, out, force)
        found = {name: verdict for name in FOLDERS if (verdict := verdict_of(storage.join(out, name))) is not None}
        worst = max((one.level for one in found.values()), key=LEVELS.index, default=OK)
        facts = {"verdict": {"level": worst}, "verdicts": {name: one.to_json() for name, one in found.items()}}
        folder.write_manifest(config, "", facts | next_step.recorded(None if status else _next(config, out)))
    print(f"VERDICT of all stages: {worst}")
    for name, one in found.items():
        print(f"  {name}: {one.level}")
        for reason in one.reasons:
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


def plan(config: PipelineConfig, force: bool) -> list[Forecast]:
    """Say what each stage whose inputs are there would take, and all of these together."""
    config, out = _opened(config)
    require_claimable(out, OUTPUTS, force=False)
    stages = _plan_stages(config, out, force)
    return [*stages, together(out, stages)]


def _plan_stages(config: PipelineConfig, out: str, force: bool) -> list[Forecast]:
    """Plan the stages up to the first whose inputs an earlier one has yet to make, which is named with those after."""
    cohort, folds = storage.join(out, "cohort"), storage.join(out, "folds")
    prepare = config.prepare.model_copy(update={"out": cohort})
    opened = prepare_data.open_cohort(prepare)
    forecasts = prepare_data.plan_opened(prepare, opened, force)
    of_slides = [] if config.slides is None else ["score_slides"]
    after_training = [*(["tune_postprocess"] if config.tune.space else []), "score_images", "evaluate", *of_slides]
    if not storage.exists(_table(out)):
        return [*forecasts, *_plan_training(config, opened, folds), _later(after_training, out)]
    forecasts += train_folds.plan(config.train.model_copy(update=_train_links(config, out)), force)
    if not storage.exists(TrainingRun(folds).path(TrainingRun.ENSEMBLE)):
        return [*forecasts, _later(after_training, out)]
    if config.tune.space:
        forecasts += tune_postprocess.plan(config.tune.model_copy(update=_tune_links(config, out)), force)
    if config.slides is not None:
        forecasts += score_slides.plan(config.slides.model_copy(update=_slides_links(config.slides, out)), force)
    slides_are_judged = config.slides is not None and (config.slides_truth or config.slides.phantom)
    if (held_out := _held_out(config, out)) is None:
        return [*forecasts, _later(["evaluate"], out)] if slides_are_judged else forecasts
    is_searched = config.tune.space and storage.exists(storage.join(out, "thresholds", RECOMMENDED))
    thresholds = _recommended(out) if is_searched else config.score.postprocess
    links = _score_links(config, out, held_out, thresholds)
    forecasts += score_images.plan(config.score.model_copy(update=links), force)
    if not storage.exists(storage.join(out, "scores", MANIFEST)):
        return [*forecasts, _later(["evaluate"], out)]
    return forecasts + evaluate.plan(config.evaluate.model_copy(update=_evaluate_links(out, held_out)), force)


def together(out: str, stages: Sequence[Forecast]) -> Forecast:
    """Return the forecast of all stages, by those that have one; it names the others."""
    later = [one.stage for one in stages if one.work == LATER]
    planned = [one for one in stages if one.work != LATER]
    without = [*(one.stage for one in planned if one.seconds is None), *later]
    seconds = [one.seconds for one in planned if one.seconds is not None]
    gpu_hours = sum(one.gpu_hours or 0.0 for one in planned)
    memory = [one.memory_bytes for one in planned if one.memory_bytes is not None]
    disk = [one.disk_bytes for one in planned if one.disk_bytes is not None]
    total = Forecast(
        OUTPUTS.stage,
        out,
        f"all stages but {', '.join(without)}" if without else "all stages",
        "one after the other",
        seconds=sum(seconds) if seconds else None,
        basis=f"without {', '.join(without)}" if without else "",
        num_gpus=3600 * gpu_hours / sum(seconds) if gpu_hours else 0.0,  # on average
        memory_bytes=max(memory, default=None),
        disk_bytes=sum(disk) if disk else None,
        scratch_bytes=max((one.scratch_bytes for one in planned), default=0.0),
    )
    return short_of_disk(total)


def _plan_training(config: PipelineConfig, opened: prepare_data.Opened, folds: str) -> list[Forecast]:
    """Plan the training on a cohort that is still to be made."""
    with local_files.temporary_folder() as folder:
        rows = prepare_data.expected_rows(config.prepare, opened, folder)
        if not rows:
            return [_later(["train_folds"], folds)]
        chosen = training.chosen_folds(config.train, rows)
        laid = plan_groups(nodes_at_hand(), training.demand(config.train.resources, len(chosen)))
        return [of_folds(config.train.recipe, rows, chosen, laid, stage="train_folds", out=folds)]


def _later(stages: Sequence[str], out: str) -> Forecast:
    return Forecast(", ".join(stages), out, LATER, "")


def _next(config: PipelineConfig, out: str) -> NextStep | None:
    """Return the command that scores other images as the hold-out was, or with the thresholds, where there are any."""
    again = next_step.after_evaluation(storage.join(out, "scores"), of_slides=False)
    if again is not None or not config.tune.space:
        return again
    return next_step.after_threshold_search(storage.join(out, "thresholds"), storage.join(out, "folds"))


def _run_stages(config: PipelineConfig, out: str, force: bool) -> int:
    """Run the stages; stop at the first that fails, with its exit status."""
    with ray_session():
        if status := _run_stage(prepare_data.run, config.prepare, {"out": storage.join(out, "cohort")}, force):
            return status
        if status := _run_stage(train_folds.run, config.train, _train_links(config, out), force):
            return status
        thresholds = config.score.postprocess
        if config.tune.space:
            if status := _run_stage(tune_postprocess.run, config.tune, _tune_links(config, out), force):
                return status
            thresholds = _recommended(out)
        held_out = _held_out(config, out)
        if held_out is not None and (status := _score_hold_out(config, out, held_out, thresholds, force)):
            return status
        return 0 if config.slides is None else _score_slides(config, config.slides, out, force)


def _held_out(config: PipelineConfig, out: str) -> ImagesConfig | None:
    """Return the images that were held out; None: there are none."""
    table = _table(out)
    rows = cohorts.read_cohort(table)
    if all(row.split != HOLD_OUT for row in rows):
        return None
    return ImagesConfig(images=table, split=HOLD_OUT, mpp=config.train.data.mpp or common_mpp(rows))


def _recommended(out: str) -> PostprocessConfig:
    """Return the post-processing that the search recommends."""
    uri = storage.join(out, "thresholds", RECOMMENDED)
    return configs.build(PostprocessConfig, configs.parse_yaml(storage.read_bytes(uri).decode(), uri))


def _table(out: str) -> str:
    return storage.join(out, "cohort", "cohort.parquet")


def _train_links(config: PipelineConfig, out: str) -> dict[str, Any]:
    return {"out": storage.join(out, "folds"), "data": config.train.data.model_copy(update={"cohort": _table(out)})}


def _tune_links(config: PipelineConfig, out: str) -> dict[str, Any]:
    folds, tuned = storage.join(out, "folds"), storage.join(out, "thresholds")
    return {"out": tuned, "run": folds, "cohort": _table(out), "default": config.score.postprocess}


def _slides_links(slides: ScoreSlidesConfig, out: str) -> dict[str, Any]:
    ensemble = _ensemble(storage.join(out, "folds"), slides.ensemble.top_k)
    return {"out": storage.join(out, "slides"), "ensemble": ensemble}


def _score_links(
    config: PipelineConfig, out: str, held_out: ImagesConfig, thresholds: PostprocessConfig
) -> dict[str, Any]:
    ensemble = _ensemble(storage.join(out, "folds"), config.score.ensemble.top_k)
    return {"out": storage.join(out, "scores"), "data": held_out, "ensemble": ensemble, "postprocess": thresholds}


def _score_hold_out(
    config: PipelineConfig, out: str, held_out: ImagesConfig, thresholds: PostprocessConfig, force: bool
) -> int:
    """Score the hold-out images and evaluate that; return the exit status."""
    links = _score_links(config, out, held_out, thresholds)
    if status := _run_stage(score_images.run, config.score, links, force):
        return status
    return _run_stage(evaluate.run, config.evaluate, _evaluate_links(out, held_out), force)


def _evaluate_links(out: str, held_out: ImagesConfig) -> dict[str, Any]:
    truth = TruthConfig(cohort=held_out.images, split=HOLD_OUT)
    return {"out": storage.join(out, "evaluation"), "run": storage.join(out, "scores"), "truth": truth}


def _score_slides(config: PipelineConfig, slides: ScoreSlidesConfig, out: str, force: bool) -> int:
    """Score slides, and evaluate that where there is a truth of them; return the exit status."""
    scores = storage.join(out, "slides")
    if status := _run_stage(score_slides.run, slides, _slides_links(slides, out), force):
        return status
    truth = config.slides_truth
    if truth is None and slides.phantom is not None:
        truth = storage.join(score_slides.phantom_folder(scores, slides.phantom), "targets")
    if truth is None:
        return 0
    wanted = config.evaluate
    judged = EvaluateConfig(
        bootstrap=wanted.bootstrap.model_copy(update={"by": "image"}),  # slides have no groups
        max_missing_fraction=wanted.max_missing_fraction,
        verdict=wanted.verdict,
        accept_warnings=wanted.accept_warnings,
    )
    links = {"out": storage.join(out, "slides_evaluation"), "run": scores, "truth": TruthConfig(slides=truth)}
    return _run_stage(evaluate.run, judged, links, force)


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


def _run_stage(run: Callable[[C, bool], int], config: C, links: Mapping[str, Any], force: bool) -> int:
    """Run one stage with its links to the others; return its exit status.

    Raises:
        StaleOutputError: its folder holds other work; the message says how to redo this stage alone.
    """
    print(f"== {run.__module__.rpartition('.')[2]}", flush=True)
    try:
        return run(config.model_copy(update=dict(links)), force)
    except ForeignOutputError:
        raise
    except StaleOutputError as error:
        raise StaleOutputError(
            f"{error}. In a pipeline --force starts every stage over; to redo this one alone, delete {links['out']}"
        ) from error


if __name__ == "__main__":
    main("pipeline", PipelineConfig, run, __doc__ or "", plan=plan)
