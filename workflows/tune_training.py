"""Search training settings across folds: Ray Tune proposes and stops, Ray Train trains the folds of each trial.

    python workflows/tune_training.py --config configs/tune_training_cpu.yaml \\
        train.data.cohort=/data/cohort/cohort.parquet out=/data/search

A trial is a setting; it trains its folds side by side and is judged by the mean of their validation Dice after the same
epoch. ASHA stops weak settings early. Every trial is a run folder <out>/trials/<number>/ like those of train_folds.

Writes <out>/search.json (what was tried, and how it went), report.md (start there), trials.parquet and history.parquet,
train_folds.best.yaml (the best setting, ready for train_folds), figures/*.png and, last, manifest.json. Run again with
the same settings, it goes on where it was.
"""

import sys

if __name__ == "__main__" and not (__package__ or getattr(sys.flags, "safe_path", False)):  # a script
    import environment  # noqa: F401 - ends where this Python lacks what follows

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stas_core import config as configs
from stas_core import storage, tables
from stas_core.config import Config, SettingsOf, Uri
from stas_core.data import cohort as cohorts
from stas_core.data.cohort import CohortRow
from stas_core.errors import ConfigError
from stas_core.search import space as spaces
from stas_core.search.space import Dimension, SearchConfig, Setting, Space
from stas_core.verdicts import Verdict
from workflows import next_step, tracking
from workflows.cli import CONFIGS, main
from workflows.cluster import Node, Plan, plan_groups, ray_session
from workflows.conclusion import conclude, conclude_again, is_judged, recorded
from workflows.folds import training
from workflows.folds.estimate import faster_trials, of_folds
from workflows.folds.ledger import LEDGER, OPEN, Ledger, TrialRecord, trial_name
from workflows.folds.training import TrainFoldsConfig
from workflows.folds.trial_tables import TrialEpoch, history_of, table_of, trials_markdown
from workflows.forecast import Forecast, begin, bytes_in, nodes_at_hand
from workflows.out_folder import (
    OutFolder,
    Outputs,
    claim_for_stage,
    require_apart,
    require_out,
    require_uri,
)
from workflows.progress import doing
from workflows.tracking import TrackingConfig

if TYPE_CHECKING:
    from stas_core.train.initial import Start

OUTPUTS = Outputs(
    "tune_training",
    (
        *("report.md", "train_folds.best.yaml", "trials.parquet", "history.parquet", LEDGER),
        *("state/**", "trials/*/failed.json"),  # left by 0.1.0
        *(f"figures/{name}.png" for name in ("score_over_time", "parallel_coordinates", "importance")),
        *("trials/*/stopped.json", *training.OUTPUTS.below("trials/*")),
    ),
)
OWN_KEYS = ("out", "folds", "data.cohort", "training.epochs", "model.init_from")
"""Keys of train_folds, besides resources, that the search itself sets: they must be the same for all trials."""


class StoppingConfig(Config):
    """When weak settings are stopped (ASHA, Li et al. 2020)."""

    enabled: bool = True
    """Stop trials that are behind others at the same epoch; false: all train to the end."""
    grace_epochs: int = Field(1, ge=1)
    """No trial is stopped before this epoch."""
    reduction_factor: float = Field(3, gt=1)
    """At each rung, one trial in so many goes on; rungs are grace_epochs times powers of it."""


class TuneTrainingConfig(Config):
    """Settings of tune_training."""

    out: Uri | None = None
    """Folder of the outputs; path or URI."""
    base: Uri | None = None
    """A YAML file of train_folds that `train` is laid over: a path, or a name in configs/."""
    train: Annotated[dict[str, Any], SettingsOf(TrainFoldsConfig)] = Field({})
    """Settings of train_folds that all trials share; folds: those a trial is judged by."""
    space: dict[str, Dimension] = Field({})
    """Keys of train_folds and what each is searched over."""
    known: tuple[dict[str, Any], ...] = ()
    """Settings to try first, of some keys or all; other keys are as in the shared settings, which themselves come
    before all others if they lie in the space."""
    search: SearchConfig = SearchConfig(num_settings=20, num_random=6)
    stopping: StoppingConfig = StoppingConfig()
    parallel_trials: int | None = Field(None, ge=1)
    """Most trials at once; null: as many as have room for all their folds."""
    accept_warnings: bool = False
    """Exit with status 0 even where the verdict of the best trial, by `train.verdict`, is `do not use`."""
    tracking: TrackingConfig = TrackingConfig()
    """Whether MLflow is told of the search; a run for each trial lies within the search's."""

    def base_config(self) -> TrainFoldsConfig:
        """Return the settings that all trials share."""
        values: dict[str, Any] = {}
        if self.base is not None:
            values = configs.read_yaml(self.base if Path(self.base).is_file() else CONFIGS / self.base)
        return configs.build(TrainFoldsConfig, configs.merge(values, self.train))


@dataclass(frozen=True)
class SearchTask:
    """Arguments of every trial, besides its setting."""

    base: TrainFoldsConfig
    folds: tuple[int, ...]
    out: str
    plan: Plan


@dataclass(frozen=True)
class Opened:
    """A search that could begin."""

    config: TuneTrainingConfig
    """With its space checked."""
    base: TrainFoldsConfig
    out: str
    known: list[Setting]
    """Settings that are tried first."""
    rows: list[CohortRow]
    folds: list[int]
    work: tuple[TuneTrainingConfig, str]
    """What makes it the same search: settings and fingerprint of the inputs."""
    start: "Start | None"
    """The models that folds go on from, if they do."""


def run(config: TuneTrainingConfig, force: bool) -> int:
    """Search; return the exit status: 1 if no trial was finished."""
    opened = _opened(config)
    ids = [row.id for row in opened.rows]
    with claim_for_stage(opened.out, OUTPUTS, force=force, work=opened.work, ids=ids) as folder:
        return _tune(opened, folder)


def _opened(config: TuneTrainingConfig) -> Opened:
    """Read what a search starts from, before anything is written.

    Raises:
        ConfigError: a setting is wrong, or contradicts the cohort.
    """
    out = require_out(config.out, "/data/search")
    base = config.base_config()
    if base.tracking.is_on:
        raise ConfigError("train.tracking: trials are told of with their search; set tracking instead")
    cohort_uri = require_uri("train.data.cohort", base.data.cohort, "/data/cohort/cohort.parquet")
    model = training.with_absolute_start(base.model, "train.model.init_from")
    links = {"data": base.data.model_copy(update={"cohort": cohort_uri}), "model": model, "out": None}
    base = base.model_copy(update=links)
    config = config.model_copy(update={"space": _checked_space(config, base)})
    known = first_settings(config, base)
    spaces.grid_points(config.space, config.search)  # a bad grid is refused before anything starts
    rows = cohorts.read_cohort(cohort_uri)
    folds = training.chosen_folds(base, rows)
    weights = {"train.model.encoder_weights": model.weights_file, "train.model.init_from": model.init_from}
    base_file = config.base if config.base is not None and Path(config.base).is_file() else None
    require_apart(out, {"train.data.cohort": cohort_uri, "base": base_file} | weights, listed=["train.model.init_from"])
    start = training.start_of(training.with_stated_mpp(base, rows), out, rows, folds)
    # Resources and parallelism change no score: a search may resume with other ones.
    identity = config.model_copy(
        update={
            "out": None,
            "base": None,
            "parallel_trials": None,
            "accept_warnings": False,
            "train": _shared(base, start),
        }
    )
    inputs = storage.fingerprint(*(f"{row.id} {row.content} {row.fold}" for row in rows))
    return Opened(config, base, out, known, rows, folds, (identity, inputs), start)


def plan(config: TuneTrainingConfig, force: bool) -> list[Forecast]:
    """Say what the search would take if every trial were trained to its end, from a few steps that are tried here."""
    opened = _opened(config)
    config, folds = opened.config, opened.folds
    base = begin(opened.out, OUTPUTS, opened.work, force=force, is_for_one=True)
    if base.is_nothing:
        return [base]
    laid, parallel = plan_trials(nodes_at_hand(), opened.base, len(folds), config)
    points = spaces.grid_points(config.space, config.search)
    num_trials = len(opened.known) + len(points) if points else config.search.num_settings
    records = [] if force else Ledger(opened.out, config.space, opened.base.training.epochs).records
    num_left = num_trials - sum(record.state != OPEN for record in records)
    begun = [trial_name(number) for number, record in enumerate(records) if record.state == OPEN]
    base = base.in_place_of(bytes_in(storage.join(opened.out, "trials", name) for name in begun))
    one = of_folds(base, opened.base.recipe, opened.rows, folds, laid)
    rounds, (faster, faster_costs) = math.ceil(num_left / parallel), faster_trials(num_left, parallel)
    early = ("weak settings are stopped early, so that a search takes far less",) if config.stopping.enabled else ()
    forecast = replace(
        one,
        work=f"{num_left} of {num_trials} trials, {parallel} at once, each of {one.work}",
        seconds=None if one.seconds is None else rounds * one.seconds,
        num_gpus=parallel * one.num_gpus,
        disk_bytes=None if one.disk_bytes is None else num_left * one.disk_bytes,
        scratch_bytes=num_left * one.scratch_bytes,
        faster=faster,
        faster_costs=faster_costs,
        notes=(*early, *(() if opened.start is None else opened.start.notes)),
    )
    return [forecast]


def _tune(opened: Opened, folder: OutFolder) -> int:
    config, base, folds, work = opened.config, opened.base, tuple(opened.folds), opened.work
    out, start = folder.uri, time.monotonic()
    if folder.is_finished(*work) and is_judged(out, base.verdict):
        print(f"nothing to do: {out} is up to date")
        return conclude_again(out, accept_warnings=config.accept_warnings)
    ledger = Ledger(out, config.space, base.training.epochs)
    storage.write_bytes(storage.join(out, "config.resolved.yaml"), configs.dump(config).encode())
    with ray_session() as nodes:
        plan, parallel = plan_trials(nodes, base, len(folds), config)
        folder.account.num_gpus = parallel * plan.num_gpus
        print(f"{plan.reason}; {parallel} trial(s) at once", flush=True)
        tracking.begin()
        for note in () if opened.start is None else opened.start.notes:
            print(note, flush=True)
        with nullcontext() if sys.stdout.isatty() else doing("searching"):  # a terminal has a table
            errors = _search(config, SearchTask(base, folds, out, plan), ledger, opened.known, parallel)
    folder.verify()
    trials = [_describe(number, record, errors) for number, record in enumerate(ledger.records)]
    verdict = _write_results(opened, trials, history_of(out, trials, folds))
    if verdict is None:
        return 1
    _drop_states(out, trials, folds)
    facts = {"num_trials": len(trials), "seconds": round(time.monotonic() - start, 1)}
    then = next_step.recorded(next_step.after_training_search(out, str(base.data.cohort)))
    folder.write_manifest(*work, facts | recorded(verdict, base.verdict) | then)
    return conclude(verdict, accept_warnings=config.accept_warnings)


def _drop_states(out: str, trials: Sequence[Mapping[str, Any]], folds: Sequence[int]) -> None:
    """Delete what trials would go on from, but for those that a later run of the search may try again."""
    from workflows.folds.trial import trial_uri

    for row in trials:
        if row["state"] != "failed":
            training.drop_states(trial_uri(out, row["trial"]), folds)


def _checked_space(config: TuneTrainingConfig, base: TrainFoldsConfig) -> Space:
    for key in config.space:
        if key in OWN_KEYS or key.startswith("resources."):
            raise ConfigError(
                f"space.{key}: trials are compared after the same epochs, on the same folds and data, from the same "
                f"models, with the same resources; set train.{key} instead"
            )
    given = {f"model.{name}" for name in base.model.architecture()} if base.model.init_from is not None else set()
    if fixed := sorted(given & config.space.keys()):
        raise ConfigError(
            f"space.{fixed[0]}: train.model.init_from is set, and weights go with their architecture; give space= (and "
            f"known=) without {', '.join(fixed)}"
        )
    return spaces.check_space(config.space, base)


def first_settings(config: TuneTrainingConfig, base: TrainFoldsConfig) -> list[Setting]:
    """Return the settings that are tried first, each with a value for every key of the space.

    Raises:
        ConfigError: a key of a known setting is not searched, or a value lies outside of the space.
    """
    space, own = config.space, spaces.setting_of(base, config.space)
    for key in (key for setting in config.known for key in setting):
        if key not in space:
            raise ConfigError(f"known: {key} is not searched; did you mean {configs.nearest(key, list(space))}?")
    # Through the config, so that a value has its key's type: 2 is 2.0 where numbers are meant.
    known = [spaces.setting_of(spaces.apply(base, setting), space) for setting in config.known]
    for key, value in (item for setting in known for item in setting.items()):
        if not space[key].holds(value):
            raise ConfigError(f"known: {key} = {value!r} lies outside of space.{key}; widen it, or give another value")
    first = [own] if all(space[key].holds(value) for key, value in own.items()) else []
    return [*first, *(setting for index, setting in enumerate(known) if setting not in [*first, *known[:index]])]


def _shared(base: TrainFoldsConfig, start: "Start | None") -> dict[str, Any]:
    values = base.model_dump(mode="json", exclude={"resources", "verdict", "accept_warnings", "tracking"})
    values["data"]["cohort"] = None  # cohort and models count by their content
    values["model"]["init_from"] = None if start is None else start.fingerprint
    return values


def plan_trials(
    nodes: Sequence[Node], base: TrainFoldsConfig, num_folds: int, config: TuneTrainingConfig
) -> tuple[Plan, int]:
    """Plan what the folds of a trial get, and how many trials run at once.

    As many trials as have room for all their folds; at least one, whose folds then take turns.

    Raises:
        ResourceError: not one fold fits; the message has the arithmetic.
    """
    most = config.parallel_trials or config.search.num_settings
    plan = plan_groups(nodes, training.demand(base.resources, num_folds * most))
    parallel = max(1, min(most, plan.slots // num_folds))
    return replace(plan, slots=min(plan.slots, num_folds)), parallel


def _search(
    config: TuneTrainingConfig, task: SearchTask, ledger: Ledger, first: Sequence[Setting], parallel: int
) -> dict[str, str]:
    """Run or resume the search.

    Returns:
        the error of each trial that was lost with a machine, by its name.

    Raises:
        WriteError: an output of a trial, or the record of the search, could not be written.
    """
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler

    from workflows.folds.proposals import Proposals, ResumedASHA
    from workflows.folds.trial import TRIAL_CPUS, Trial, TrialTable
    from workflows.full_disk import tune_state

    known = len(ledger.records)
    points = spaces.grid_points(config.space, config.search)
    num_settings = len(first) + len(points) if points else config.search.num_settings
    proposals = Proposals(ledger, config.search, [*first, *points], num_settings)
    if known:
        print(f"going on with an earlier run: {num_settings - proposals.num_left} trial(s) have ended", flush=True)
    if not proposals.num_left:
        return {}
    scheduler = FIFOScheduler()
    if config.stopping.enabled:
        scheduler = ResumedASHA(
            time_attr="epoch",
            metric="dice",
            mode="max",
            max_t=ledger.epochs,
            grace_period=min(config.stopping.grace_epochs, ledger.epochs),
            reduction_factor=config.stopping.reduction_factor,
        )
        scheduler.add_ended(ledger)
    trainable = tune.with_resources(tune.with_parameters(Trial, task=task), {"cpu": TRIAL_CPUS})
    with tune_state() as state:  # not in `out`, where others may write
        results = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=proposals,
                scheduler=scheduler,
                num_samples=proposals.num_left,
                max_concurrent_trials=parallel,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=state,
                stop=proposals.until,
                callbacks=[TrialTable(ledger.epochs, num_settings)],
                failure_config=tune.FailureConfig(max_failures=2),  # a lost node: its folds go on from their states
                # Folds save themselves; a checkpoint of Tune's would need a folder that all nodes can reach.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()
        proposals.until.raise_noted()
        return {result.config["trial"]: _root_cause(result.error) for result in results if result.error is not None}


def _describe(number: int, record: TrialRecord, errors: Mapping[str, str]) -> dict[str, Any]:
    """Return a trial as a row: its last epoch and its score there."""
    name = trial_name(number)
    return {
        "trial": name,
        "state": "failed" if record.state == OPEN else record.state,
        "epoch": record.epoch,
        "dice": record.dice,
        "seconds": record.seconds,
        "error": record.error or errors.get(name),
        **record.setting,
    }


def _root_cause(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[-1][:2000]


@doing("drawing the figures, writing the tables")
def _write_results(
    opened: Opened, trials: Sequence[Mapping[str, Any]], history: Sequence[TrialEpoch]
) -> Verdict | None:
    """Write tables, the best setting, figures and the report; return the verdict, None if no trial was finished."""
    config, base, out = opened.config, opened.base, opened.out
    ranked = sorted(trials, key=lambda row: (row["state"] != "done", -row["epoch"], -(row["dice"] or 0.0)))
    tables.write_table(storage.join(out, "trials.parquet"), table_of(ranked, config.space))
    tables.write_rows(storage.join(out, "history.parquet"), TrialEpoch, history)
    lines = trials_markdown(ranked, config.space)
    print(lines)
    for row in ranked:
        if row["error"]:
            print(f"trial {row['trial']} FAILED: {row['error']}")
    done = [row for row in ranked if row["state"] == "done"]
    if not done:
        print(
            "not one trial was trained to its end; the errors are in trials.parquet. Where a machine was to blame, run "
            "again: its trials go on; else search other settings, with another out= or --force"
        )
        return None
    best = done[0]
    setting = {key: best[key] for key in config.space}
    verdict = _judge(opened, best["trial"])
    evidence = [
        f"Best of {len(trials)} settings ({len(done)} trained to the end): mean validation Dice {best['dice']:.4f} of "
        f"its folds after {base.training.epochs} epochs, trial {best['trial']}.",
        "It was chosen by this very score, which therefore flatters it; train it on all folds, and score a hold-out.",
    ]
    chosen = spaces.apply(base, setting).model_copy(update={"folds": None, "out": None})
    header = "".join(f"# {line}\n" for line in evidence)
    storage.write_bytes(storage.join(out, "train_folds.best.yaml"), (header + configs.dump(chosen)).encode())
    figures = _draw_figures(config, ranked, history)
    for name, data in figures.items():
        storage.write_bytes(storage.join(out, "figures", f"{name}.png"), data)
    report = "\n\n".join(
        [
            "# Training settings searched",
            verdict.markdown(),
            " ".join(evidence),
            "## Trials",
            "Dice is the mean over the folds of validation Dice after the trial's last epoch; ASHA stopped some early.",
            lines,
            *_waiting(out, ranked),
            "## Figures",
            "![Dice over time](figures/score_over_time.png)",
            "![Parallel coordinates](figures/parallel_coordinates.png)",
            *(["![Importance](figures/importance.png)"] if "importance" in figures else []),
        ]
    )
    storage.write_bytes(storage.join(out, "report.md"), (report + "\n").encode())
    print(f"look at {out}/report.md")
    return verdict


def _judge(opened: Opened, trial: str) -> Verdict:
    """Judge the best trial, as train_folds judges a run."""
    from workflows.folds.trial import trial_uri

    uri = trial_uri(opened.out, trial)
    return training.judge(uri, opened.folds, opened.rows, opened.base.verdict, opened.start)


def _waiting(out: str, trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Report how long stopped trials held their CPUs and GPUs before the next could begin."""
    from workflows.folds.trial import STOPPED, trial_uri

    uris = [storage.join(trial_uri(out, row["trial"]), STOPPED) for row in trials if row["state"] == "stopped"]
    waits = [
        storage.read_record(uri, "seconds_until_freed")["seconds_until_freed"] for uri in uris if storage.exists(uri)
    ]
    if not waits:
        return []
    return [
        f"Stopped trials gave back what they held {median(waits):.1f} s after they were told to end (median of "
        f"{len(waits)}; longest {max(waits):.1f} s)."
    ]


def _draw_figures(
    config: TuneTrainingConfig, ranked: Sequence[Mapping[str, Any]], history: Sequence[TrialEpoch]
) -> dict[str, bytes]:
    from stas_core.figures import searches

    scored = [row for row in ranked if row["dice"] is not None]
    settings = [{key: row[key] for key in config.space} for row in scored]
    dice = [row["dice"] for row in scored]
    states = {row["trial"]: row["state"] for row in ranked}
    figures = {
        "score_over_time": searches.score_over_time([asdict(row) for row in history], states),
        "parallel_coordinates": searches.parallel_coordinates(config.space, settings, dice),
    }
    if shares := searches.importance(config.space, settings, dice):
        figures["importance"] = searches.importance_bars(shares)
    return figures


if __name__ == "__main__":
    main("tune_training", TuneTrainingConfig, run, __doc__ or "", plan=plan)
