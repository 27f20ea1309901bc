"""What Ray Tune runs for tune_training: a trial that trains its folds, and the table of all trials."""

import math
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import ray
from ray import tune
from rich.console import Console
from rich.live import Live
from rich.table import Table

from stas_core import storage
from stas_core.errors import ConfigError, DeletedOutputError, DivergedError, LocalDiskError, StasError, WriteError
from stas_core.runs import TrainingRun
from stas_core.search import space as spaces
from stas_core.search.space import Setting
from workflows import run_metrics, tracking
from workflows.folds import training
from workflows.folds.board import start_board
from workflows.folds.fitting import SharedCluster
from workflows.full_disk import UNWRITABLE
from workflows.progress import at, duration

T = TypeVar("T")
CPU_SHARE = 0.9
"""Of each worker's CPUs, what Ray reserves: actors of trials need a little, or no worker would ever fit beside them."""
TRIAL_CPUS = 0.01
POLL_S = 0.2
STOP_S = 120.0
"""A stopped trial waits so long for its folds to end; then its process ends, and Ray ends what it owns."""
STOPPED = "stopped.json"
"""File in the folder of a stopped trial: its last epoch, and how long it held its CPUs and GPUs after that."""
FOR_GOOD = (DivergedError, ConfigError)
"""Errors of a setting: it would meet them again."""
ENDS_SEARCH = (WriteError, LocalDiskError, DeletedOutputError)
"""Errors of where a trial writes: other trials would meet them, too."""
COLUMNS = ("trial", "state", "epoch", "Dice", "ETA", "setting")


class Trial(tune.Trainable):  # type: ignore[misc]
    """Trains the folds of one setting; each step is an epoch that all of them have validated."""

    def setup(self, config: dict[str, Any], task: Any) -> None:
        """Start the folds, which go on from their saved states where there are any."""
        self._task = task
        self._uri = trial_uri(task.out, config["trial"])
        storage.remove(storage.join(self._uri, STOPPED))  # stopped, but killed before that was noted
        self._epochs = task.base.training.epochs
        self._reported = config["scores"][-1][0] if config["scores"] else 0
        self._failures: dict[int, str] | None = None
        self._error: BaseException | None = None
        self._board = start_board()
        host = SharedCluster(task.plan, self._board, CPU_SHARE, ends_together=True, within=task.out)
        self._thread = threading.Thread(target=self._train, args=(config["setting"], host), daemon=True)
        self._thread.start()

    def _train(self, setting: Setting, host: SharedCluster) -> None:
        try:
            settings = spaces.apply(self._task.base, setting).model_copy(update={"out": self._uri})
            self._failures = training.train(settings, False, host)
        except Exception as error:  # noqa: BLE001 - raised again where Tune sees it
            self._error = error

    def step(self) -> dict[str, Any]:
        """Wait for the next epoch that every fold has validated; return its mean Dice, or why there will be none.

        Raises:
            Exception: a fold failed, but neither by its setting nor for want of space: Tune tries again.
        """
        while True:
            ended = not self._thread.is_alive()  # asked before the scores, or the last ones could be missed
            if ended and (failure := failure_of(self._error, self._failures or {})):
                return {"epoch": self._reported, "dice": math.nan, **failure, tune.result.DONE: True}
            scores = ray.get(self._board.scores.remote())
            joint = joint_epochs([scores.get(fold, {}) for fold in self._task.folds])
            epoch = next((epoch for epoch in joint if epoch > self._reported), None)
            if epoch is not None and (epoch < self._epochs or ended):  # a trial is done when its maps are written too
                self._reported, dice = epoch, joint[epoch]
                values = {f"fold_{fold}": value for fold, value in zip(self._task.folds, dice, strict=True)}
                return values | self._result(epoch, sum(dice) / len(dice))
            if ended:
                return self._last()
            time.sleep(POLL_S)

    def _result(self, epoch: int, dice: float) -> dict[str, Any]:
        return {"epoch": epoch, "dice": dice, "run": self._uri, tune.result.DONE: epoch >= self._epochs}

    def _last(self) -> dict[str, Any]:
        """Return the result of folds that ended without a new epoch: they were done before."""
        table = TrainingRun(self._uri).folds()
        dice = [row.last_val_dice for row in table]
        values = {f"fold_{row.fold}": row.last_val_dice for row in table}
        return values | self._result(self._epochs, sum(dice) / len(dice))

    def cleanup(self) -> None:
        """End the folds, and wait until they have given back their CPUs and GPUs."""
        if not self._thread.is_alive():
            return
        start = time.monotonic()
        ray.get(self._board.stop.remote())
        self._thread.join(STOP_S)
        waited = {"epoch": self._reported, "seconds_until_freed": round(time.monotonic() - start, 2)}
        storage.write_json(storage.join(self._uri, STOPPED), waited)


def joint_epochs(folds: Sequence[Mapping[int, T]]) -> dict[int, list[T]]:
    """Return the epochs that every fold has validated, in their order, each with what the folds have of it.

    Args:
        folds: of each fold, what it has of each epoch that it has validated.
    """
    return {epoch: [fold[epoch] for fold in folds] for epoch in sorted(set.intersection(*map(set, folds)))}


def failure_of(error: BaseException | None, failures: Mapping[int, str]) -> dict[str, str]:
    """Return why a trial failed for good, as a part of its last result; empty: it did not fail.

    Args:
        error: what ended the trial as a whole.
        failures: why each fold failed, an error's type and message.

    Raises:
        Exception: what a further attempt may mend.
    """
    if error is not None:
        if isinstance(error, ENDS_SEARCH):
            return {UNWRITABLE: str(error)}
        if isinstance(error, FOR_GOOD):
            return {"failed": str(error)}
        raise error
    if not failures:
        return {}
    unwritable = [why for why in failures.values() if why.startswith(tuple(kind.__name__ for kind in ENDS_SEARCH))]
    if unwritable:
        return {UNWRITABLE: unwritable[0].partition(": ")[2]}
    message = "; ".join(f"fold {fold}: {why}" for fold, why in sorted(failures.items()))
    if not any(why.startswith(tuple(kind.__name__ for kind in FOR_GOOD)) for why in failures.values()):
        raise StasError(message)
    return {"failed": message}


def trial_uri(out: str, name: str) -> str:
    """Return the run folder of a trial."""
    return storage.join(out, "trials", name)


class TrialTable(tune.Callback):  # type: ignore[misc]
    """Shows the trials: a live table in a terminal, else a line for each change."""

    def __init__(self, num_epochs: int, num_trials: int):
        self._num_epochs, self._num_trials = num_epochs, num_trials
        self._rows: dict[str, tuple[str, ...]] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._live: Live | None = None

    def __getstate__(self) -> dict[str, Any]:  # Tune pickles its callbacks with the search; a terminal cannot be
        return self.__dict__ | {"_live": None}

    def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Show that a trial has begun."""
        self._show(trials, trial, "training", {})

    def on_trial_result(
        self, iteration: int, trials: Sequence[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """Show a trial's new epoch."""
        run_metrics.done(1, "epochs")
        self._show(trials, trial, "training", result)

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Show that a trial has ended, by itself or stopped."""
        run_metrics.done(1, "trials")
        done = trial.last_result.get("epoch", 0) >= self._num_epochs
        failed = trial.last_result.keys() & {"failed", UNWRITABLE}
        state = "failed" if failed else "done" if done else "stopped"
        self._show(trials, trial, state, trial.last_result)

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Show that a trial has failed."""
        run_metrics.done(1, "trials")
        self._show(trials, trial, "failed", trial.last_result)

    def on_experiment_end(self, trials: Sequence[Any], **info: Any) -> None:
        """Leave the table as it is."""
        if self._live is not None:
            self._live.stop()

    def _show(self, trials: Sequence[Any], trial: Any, state: str, result: Mapping[str, Any]) -> None:
        name = trial.config["trial"]
        epoch, dice = result.get("epoch", 0), result.get("dice", math.nan)
        since, first = self._started.setdefault(name, (time.monotonic(), epoch))
        eta = ""
        if state == "training" and epoch > first:
            eta = duration((time.monotonic() - since) / (epoch - first) * (self._num_epochs - epoch))
        setting = ", ".join(f"{key}={_short(value)}" for key, value in trial.config["setting"].items())
        score = "" if math.isnan(dice) else f"{dice:.4f}"
        row = (name, state, f"{epoch}/{self._num_epochs}", score, eta, setting)
        changed, self._rows[name] = self._rows.get(name) != row, row
        told = result if state == "training" else {}  # at a trial's end, its last epoch is told already
        figures = {key: told[key] for key in told if key == "dice" or key.startswith("fold_")}
        known = {key: value for key, value in figures.items() if isinstance(value, float) and math.isfinite(value)}
        tracking.log_trial(name, trial.config["setting"], epoch, known, state)
        if sys.stdout.isatty():
            self._draw()
        elif changed:
            line = "  ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, row, strict=True) if cell)
            print(f"[{int(name) + 1}/{self._num_trials}] {line}", flush=True)
            at(f"trial {name} at epoch {epoch}/{self._num_epochs}", is_said=True)

    def _draw(self) -> None:
        if self._live is None:
            self._live = Live(console=Console(), refresh_per_second=2)
            self._live.start()
        table = Table(*COLUMNS)
        for row in self._rows.values():
            table.add_row(*row)
        self._live.update(table)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
