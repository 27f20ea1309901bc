"""Train the folds of a run in parallel: the work of train_folds, and of each trial of a search."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stas_core import storage, verdicts
from stas_core.config import Uri
from stas_core.data.cohort import CohortRow, folds_of, read_cohort
from stas_core.data.reference import common_mpp, is_same_mpp, reference_of
from stas_core.errors import ConfigError
from stas_core.networks.architecture import ModelConfig
from stas_core.runs import FoldScores, TrainingRun, read_reference
from stas_core.scores import bootstrap
from stas_core.train.recipe import FoldRecipe, FoldTask
from stas_core.verdicts import Verdict, VerdictConfig
from workflows import next_step, tracking
from workflows.cluster import Demand, Plan, plan_groups, ray_session
from workflows.conclusion import is_judged, recorded
from workflows.folds.fitting import ResourcesConfig, SharedCluster, fit_where_it_can
from workflows.out_folder import (
    OutFolder,
    Outputs,
    claim_for_stage,
    code_version,
    require_apart,
    require_out,
    require_uri,
)
from workflows.progress import at, doing
from workflows.tracking import TrackingConfig

if TYPE_CHECKING:
    from stas_core.train.initial import Start

OUTPUTS = Outputs("train_folds", TrainingRun.PATTERNS)


class TrainFoldsConfig(FoldRecipe):
    """Settings of train_folds."""

    out: Uri | None = None
    """Folder of the run; path or URI that every node can reach."""
    folds: tuple[int, ...] | None = None
    """Which folds to train; null trains every fold of the cohort."""
    resources: ResourcesConfig = ResourcesConfig()
    verdict: VerdictConfig = VerdictConfig()
    """Limits of the verdict that the stage ends with."""
    accept_warnings: bool = False
    """Exit with status 0 even where the verdict is `do not use`."""
    tracking: TrackingConfig = TrackingConfig()
    """Whether MLflow is told of the run."""

    @property
    def recipe(self) -> FoldRecipe:
        """The settings that decide what is learnt."""
        return FoldRecipe(**{name: getattr(self, name) for name in FoldRecipe.model_fields})


def train(config: TrainFoldsConfig, force: bool, host: SharedCluster | None = None) -> dict[int, str]:
    """Train the folds.

    Returns:
        the reason of each fold that did not finish, by fold number."""
    opened = open_training(config)
    ids, within = [row.id for row in opened.rows], None if host is None else host.within
    with claim_for_stage(opened.out, OUTPUTS, force=force, work=opened.work, ids=ids, within=within) as folder:
        return _train_claimed(opened, folder, host)


@dataclass(frozen=True)
class Opened:
    """A training that could begin."""

    config: TrainFoldsConfig
    """Completed by what the cohort states."""
    out: str
    rows: Sequence[CohortRow]
    folds: list[int]
    work: tuple[FoldRecipe, str]
    """What makes it the same training: recipe and fingerprint of the inputs."""
    start: "Start | None"
    """The models that folds go on from, if they do."""


def open_training(config: TrainFoldsConfig) -> Opened:
    """Read what a training starts from, before anything is written.

    Raises:
        ConfigError: a setting is wrong, or contradicts the cohort.
    """
    out = require_out(config.out, "/data/runs/a")
    cohort_uri = require_uri("data.cohort", config.data.cohort, "/data/cohort/cohort.parquet")
    config = config.model_copy(update={"data": config.data.model_copy(update={"cohort": cohort_uri})})
    rows = read_cohort(cohort_uri)
    folds = chosen_folds(config, rows)
    config = with_stated_mpp(config, rows)
    config = config.model_copy(update={"model": with_absolute_start(config.model, "model.init_from")})
    weights = {"model.encoder_weights": config.model.weights_file, "model.init_from": config.model.init_from}
    require_apart(out, {"data.cohort": cohort_uri} | weights, listed=["model.init_from"])
    start = start_of(config, out, rows, folds)
    # Cohort and models count by their content: another path to the same files is the same work.
    recipe = config.recipe
    anonymous = {
        "data": recipe.data.model_copy(update={"cohort": None}),
        "model": recipe.model.model_copy(update={"init_from": None if start is None else start.fingerprint}),
    }
    inputs = storage.fingerprint(*(f"{row.id} {row.content} {row.fold}" for row in rows))
    return Opened(config, out, rows, folds, (recipe.model_copy(update=anonymous), inputs), start)


def with_absolute_start(model: ModelConfig, key: str) -> ModelConfig:
    """Return the settings with `init_from`, if it is set, as every node finds it.

    Raises:
        ConfigError: as `require_uri`.
    """
    if model.init_from is None:
        return model
    uri = require_uri(key, model.init_from, "/data/runs/a/ensemble.json")
    return model.model_copy(update={"init_from": uri})


def with_stated_mpp(config: TrainFoldsConfig, rows: Sequence[CohortRow]) -> TrainFoldsConfig:
    """Return the settings with the um per pixel that the cohort states, where they have none.

    Raises:
        ConfigError: they contradict each other.
    """
    return config.model_copy(update={"data": config.data.model_copy(update={"mpp": _mpp(config, rows)})})


def start_of(config: TrainFoldsConfig, out: str, rows: Sequence[CohortRow], folds: Sequence[int]) -> "Start | None":
    """Return the models that folds go on from; None: they begin with an encoder's weights.

    Raises:
        ConfigError: as `initial.check_start`; or a model lies in `out`.
    """
    if config.model.init_from is None:
        return None
    from stas_core.train import initial

    with doing(f"opening the models of model.init_from = {config.model.init_from}"):
        start = initial.check_start(config.recipe, rows, folds, config.verdict.max_drift, tell=at)
    require_apart(out, {f"model.init_from of fold {fold}": folder for fold, folder in start.by_fold.items()})
    return start


def _train_claimed(opened: Opened, folder: OutFolder, host: SharedCluster | None) -> dict[int, str]:
    config, rows, folds, (identity, inputs) = opened.config, opened.rows, opened.folds, opened.work
    out, cohort_uri = folder.uri, str(config.data.cohort)
    storage.write_bytes(storage.join(out, "config.resolved.yaml"), _resolved(config, out, cohort_uri).encode())
    done = [fold for fold in folds if TrainingRun(out).fold(fold).is_done]
    for fold in done:
        print(f"fold {fold}: done already, skipped")
    all_inputs = storage.fingerprint(inputs, *map(str, folds))
    if done == folds and folder.is_finished(identity, all_inputs) and is_judged(out, config.verdict):
        print(f"nothing to do: {out} is up to date")
        return {}
    for note in () if opened.start is None or host is not None else opened.start.notes:
        print(note, flush=True)
    tracking.begin()
    is_left = done != folds or (host is None and lacks_disagreement(out, folds, rows))
    trained = _train(opened, host) if is_left else Trained({}, None, _disagreement(out))
    failures = trained.failures
    for fold in folds:
        tracking.log_fold(fold)
    folder.verify()
    done = [fold for fold in folds if fold not in failures]
    if done:
        _summarise(out, done, rows, trained.disagreement)
    for fold, message in failures.items():
        print(f"fold {fold} FAILED: {message}")
    if failures:
        return failures
    drop_states(out, folds)
    folder.account.num_gpus = 0.0 if trained.plan is None else trained.plan.num_gpus
    verdict = judge(out, folds, rows, config.verdict, opened.start)
    facts = _facts(out, folds, trained.plan) | recorded(verdict, config.verdict)
    folder.write_manifest(identity, all_inputs, facts | next_step.recorded(*next_step.after_training(out)))
    print(f"ensemble: {out}/ensemble.json; fold table: {out}/folds.parquet; curves: {out}/figures/")
    print(f"look again at these annotations first: {out}/review.parquet, {out}/review/")
    return {}


def _mpp(config: TrainFoldsConfig, rows: Sequence[CohortRow]) -> float | None:
    """Return the um per pixel of the images: what is set, else what the cohort states.

    Raises:
        ConfigError: they contradict each other.
    """
    given, stated = config.data.mpp, common_mpp(rows)
    if given is None or stated is None:
        return stated if given is None else given
    if not is_same_mpp(given, stated):
        raise ConfigError(
            f"data.mpp = {given:g}, and the images of the cohort have {stated:g} um per pixel; leave it out, or give "
            "data.mpp to prepare_data where the files state it wrongly"
        )
    return given


@dataclass(frozen=True)
class Trained:
    """What became of the folds."""

    failures: dict[int, str]
    """Why each fold that failed or was stopped did."""
    plan: Plan | None
    """None: there was nothing to train."""
    disagreement: float | None
    """Of the members on hold-out images; None: not known."""


def lacks_disagreement(out: str, folds: Sequence[int], rows: Sequence[CohortRow]) -> bool:
    """Tell whether a run ended before it measured how far its members disagree: the same command then does."""
    from workflows.folds.disagreement import is_measurable

    return _disagreement(out) is None and is_measurable(len(folds), rows)


def _disagreement(out: str) -> float | None:
    """Return what was measured when the folds were trained."""
    known = read_reference(out)
    return None if known is None else known.disagreement


def chosen_folds(config: TrainFoldsConfig, rows: Sequence[CohortRow]) -> list[int]:
    """Return the folds to train.

    Raises:
        ConfigError: the cohort has not all of them, or only one, whose images no model would be trained on.
    """
    known = folds_of(rows)
    if len(known) < 2:
        raise ConfigError(
            f"data.cohort has the folds {known}; a fold is validated by a model of the others, so two or more are "
            "needed: make the cohort with another split"
        )
    folds = known if config.folds is None else sorted(set(config.folds))
    unknown = sorted(set(folds) - set(known))
    if unknown:
        raise ConfigError(f"folds = {unknown}: the cohort has folds {known}")
    return folds


def _resolved(config: TrainFoldsConfig, out: str, cohort_uri: str) -> str:
    from stas_core import config as configs

    data = config.data.model_copy(update={"cohort": cohort_uri})
    return configs.dump(config.model_copy(update={"out": out, "data": data}))


def _train(opened: Opened, host: SharedCluster | None) -> Trained:
    """Run the unfinished folds."""
    config, rows, folds, out = opened.config, opened.rows, opened.folds, opened.out

    from workflows.folds.board import start_board, watch
    from workflows.folds.disagreement import on_hold_out

    todo, disagreement = [fold for fold in folds if not TrainingRun(out).fold(fold).is_done], None
    alone = host is None
    with ray_session() as nodes:
        if host is None:
            # The plan is that of all folds, even where only some are left: with more threads than it began with, a
            # resumed fold would get other bytes.
            host = SharedCluster(
                plan_groups(nodes, demand(config.resources, len(folds))), start_board(), 1.0, ends_together=False
            )
        plan = host.plan
        print(f"{plan.reason}; {plan.threads_per_worker} thread(s) per worker", flush=True)
        provenance = {"commit": code_version()["commit"]}
        if opened.start is not None:
            provenance["init_from"] = opened.start.fingerprint
        failures, avoid = dict[int, str](), set[str]()

        def train_one(fold: int) -> None:
            task = FoldTask(fold, rows, TrainingRun(out).fold(fold).uri, provenance)
            failure = fit_where_it_can(config.recipe, config.resources, host, task, out, avoid)
            if failure is None and TrainingRun(out).fold(fold).is_done:
                return
            failures[fold] = failure or "stopped before its last epoch"
            if failure is not None and host.ends_together:
                host.board.stop.remote()

        # Threads, not Ray tasks: their controllers stay on the driver's node and die with it alone.
        shown = watch(host.board, todo, config.training.epochs, is_trial=not alone)
        with ThreadPoolExecutor(plan.slots) as pool, shown:
            try:
                list(pool.map(train_one, todo))
            except KeyboardInterrupt:
                print("interrupted: folds end at their next step, and keep their last saved state", flush=True)
                host.board.stop.remote()
                raise
        if alone and not failures:  # of a trial nobody asks
            members = [TrainingRun(out).fold(fold).last for fold in folds]
            on_gpu = config.resources.on_gpu(plan)
            disagreement = on_hold_out(members, rows, config.inference, plan, avoid, on_gpu=on_gpu)
    return Trained(failures, plan, disagreement)


def demand(resources: ResourcesConfig, num_folds: int) -> Demand:
    """Return what `num_folds` folds ask of the cluster."""
    return Demand(
        num_groups=num_folds,
        workers_per_group=resources.workers_per_fold,
        cpus_per_worker=resources.cpus_per_worker,
        gpus_per_worker=resources.gpus_per_worker,
        parallel_groups=resources.parallel_folds,
    )


def drop_states(out: str, folds: Sequence[int]) -> None:
    """Delete what folds that never go on would go on from: a driver may have died before it did."""
    run = TrainingRun(out)
    for fold in folds:
        storage.remove(run.state(fold))
    if not storage.entries(run.state()):
        storage.remove(run.state())


def fold_table(out: str, folds: Sequence[int], rows: Sequence[CohortRow]) -> list[FoldScores]:
    """Return one row per finished fold: mean, sd and interval over its out-of-fold images or their groups."""
    table, group_of = [], {row.id: row.group for row in rows}
    for number in folds:
        fold = TrainingRun(out).fold(number)
        scores, result = fold.oof(), fold.result()
        statistics: dict[str, Any] = {}
        groups = [group_of[score.id] for score in scores]
        for name in ("dice", "precision", "recall"):
            values = np.array([getattr(score, name) for score in scores])
            low, high = bootstrap.interval_if_enough(values, groups)
            sd = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            statistics |= {f"{name}_mean": float(values.mean()), f"{name}_sd": sd}
            statistics |= {f"{name}_low": low, f"{name}_high": high}
        chosen = {"last_val_dice": result.last_val_dice, "best_val_dice": result.best_val_dice}
        table.append(FoldScores(number, len(scores), **statistics, **chosen, best_epoch=result.best_epoch))
    return table


def _summarise(out: str, folds: Sequence[int], rows: Sequence[CohortRow], disagreement: float | None) -> None:
    """Write the fold table, the ensemble and the figures of the finished folds, and print the table."""
    from workflows.folds.drawing import write_figures
    from workflows.folds.reviewing import write_review

    table, run = fold_table(out, folds, rows), TrainingRun(out)
    run.write_folds(table, reference_of(rows, disagreement))
    write_figures(run, folds, rows)
    write_review(run, folds, rows)
    print(_fold_lines(table, {score.id: score.dice for fold in folds for score in run.fold(fold).oof()}, rows))
    for fold in folds:
        if len(ran_on := run.fold(fold).result().ran_on) > 1:
            print(
                f"fold {fold} went on with other resources after an interruption ({', then '.join(ran_on)}): "
                "its weights and maps are not those of an undisturbed run to the last digit"
            )


def judge(
    out: str, folds: Sequence[int], rows: Sequence[CohortRow], limits: VerdictConfig, start: "Start | None" = None
) -> Verdict:
    """Judge finished folds of a run by their out-of-fold maps and their course."""
    found = {number: TrainingRun(out).fold(number) for number in folds}
    histories = {number: fold.metrics() for number, fold in found.items()}
    verdict = verdicts.of_folds([score for fold in found.values() for score in fold.oof()], histories, rows, limits)
    return verdict if start is None else replace(verdict, unchecked=(*verdict.unchecked, *start.unchecked))


def _fold_lines(table: Sequence[FoldScores], all_dice: Mapping[str, float], rows: Sequence[CohortRow]) -> str:
    lines = ["fold  images  Dice (95 % interval)    sd      precision  recall  best epoch: its Dice - last (optimism)"]
    for row in table:
        best, last = row.best_val_dice, row.last_val_dice
        lines.append(
            f"{row.fold:>4}  {row.num_images:>6}  "
            f"{row.dice_mean:.4f} {_bounds(row.dice_low, row.dice_high)}  {row.dice_sd:.4f}  "
            f"{row.precision_mean:.4f}     {row.recall_mean:.4f}  "
            f"{row.best_epoch}: {best:.4f} - {last:.4f} = {best - last:+.4f}"
        )
    group_of, values = {row.id: row.group for row in rows}, list(all_dice.values())
    bounds = bootstrap.interval_if_enough(values, [group_of[name] for name in all_dice])
    lines.append(f" all  {len(values):>6}  {np.mean(values):.4f} {_bounds(*bounds)}".rstrip())
    if any(row.dice_low is None for row in table):
        lines.append(f"n/a: fewer than {bootstrap.MIN_RESAMPLED} images, or groups of them, give no interval")
    return "\n".join(lines)


def _bounds(low: float | None, high: float | None) -> str:
    return f"({bootstrap.in_words(low, high, to='-')})".ljust(len("(0.1234-0.1234)"))


def _facts(out: str, folds: Sequence[int], plan: Plan | None) -> dict[str, Any]:
    """Return the manifest's facts: time and resources of each fold."""
    done = {fold: TrainingRun(out).fold(fold).facts() for fold in folds}
    return {
        "folds": {
            str(fold): {name: values[name] for name in ("seconds", "cpu_hours", "gpu_hours")}
            for fold, values in done.items()
        },
        "plan": None if plan is None else asdict(plan),
        "finished_unix_time_s": round(time.time()),
    }
