"""What a search of training settings tries next: a Ray Tune searcher and ASHA that resume from the ledger."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from optuna.trial import TrialState, create_trial
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from stas_core.search import space as spaces
from stas_core.search.space import SearchConfig, Setting
from workflows.folds.ledger import OPEN, Ledger, Score, TrialRecord, trial_name
from workflows.full_disk import UNWRITABLE, UntilFullDisk


class Proposals(tune.search.Searcher):  # type: ignore[misc]
    """Tells Tune what to try, and keeps the ledger.

    A proposal is a function of the seed, its number and the trials that have ended by then, so that going on needs no
    state of the sampler: with one trial at a time a search that was killed proposes what an undisturbed one does.
    """

    def __init__(self, ledger: Ledger, search: SearchConfig, first: Sequence[Setting], num_settings: int):
        super().__init__(metric="dice", mode="max")
        self._ledger, self._search, self._first, self._num_settings = ledger, search, first, num_settings
        self.until = UntilFullDisk()
        """What ends the search when the ledger or a trial cannot be written."""
        self._distributions = {key: dimension.distribution() for key, dimension in ledger.space.items()}
        self._study = spaces.empty_study()
        self._numbers: dict[str, int] = {}
        self._seconds = [record.seconds for record in ledger.records]
        self._waiting = [number for number, record in enumerate(ledger.records) if record.state == OPEN]
        for number, record in enumerate(ledger.records):
            self._add(record.setting)
            if record.state != OPEN:
                self._tell(number)

    @property
    def num_left(self) -> int:
        """Number of trials left to run."""
        return len(self._waiting) + max(0, self._num_settings - len(self._ledger.records))

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the next trial: its name, its setting, and its scores so far."""
        if not self.num_left or self.until.stop_all():
            return str(tune.search.Searcher.FINISHED)
        number = self._numbers[trial_id] = self._waiting.pop(0) if self._waiting else self._propose()
        record = self._ledger.records[number]
        scores = [(score.epoch, score.dice) for score in record.scores]
        return {"trial": trial_name(number), "setting": record.setting, "scores": scores}

    def _propose(self) -> int:
        number = len(self._ledger.records)
        if number < len(self._first):
            setting = dict(self._first[number])
            self._add(setting)
        else:
            seed = int(np.random.SeedSequence([self._search.seed, number]).generate_state(1)[0])
            one = self._search.model_copy(update={"seed": seed})
            self._study.sampler = spaces.make_sampler(self._ledger.space, one)
            setting = self._study.ask(self._distributions).params
        self._ledger.records.append(TrialRecord(setting=setting))
        self._seconds.append(0.0)
        with self.until.noting():
            self._ledger.save()
        return number

    def _add(self, setting: Setting) -> None:
        known = create_trial(state=TrialState.RUNNING, params=dict(setting), distributions=self._distributions)
        self._study.add_trial(known)

    def _tell(self, number: int) -> None:
        record = self._ledger.records[number]
        if record.state == "failed" or record.dice is None:
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, record.dice)

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Record an epoch."""
        number = self._numbers[trial_id]
        record = self._ledger.records[number]
        scores = {score.epoch: score for score in record.scores}  # a trial that went on may repeat an epoch
        if "failed" not in result:
            scores[result["epoch"]] = Score(epoch=result["epoch"], dice=result["dice"])
        seconds = self._seconds[number] + result["time_total_s"]
        with self.until.noting():
            self._ledger.change(number, scores=tuple(scores[epoch] for epoch in sorted(scores)), seconds=seconds)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Record how a trial ended; one that was lost with a machine, or to a full disk, stays open."""
        if error or result is None or UNWRITABLE in result:
            return
        self.on_trial_result(trial_id, result)
        number = self._numbers[trial_id]
        why = result.get("failed")
        done = self._ledger.records[number].epoch >= self._ledger.epochs
        with self.until.noting():
            self._ledger.change(number, state="failed" if why else "done" if done else "stopped", error=why)
        self._tell(number)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Save nothing: the ledger is what a search goes on from."""

    def get_state(self) -> dict[str, Any]:
        """Return nothing, likewise."""
        return {}


class ResumedASHA(ASHAScheduler):  # type: ignore[misc]
    """ASHA whose rungs start with the scores of earlier runs; their decisions stand."""

    def add_ended(self, ledger: Ledger) -> None:
        """Fill the rungs with the scores of the trials that have ended."""
        for number, record in enumerate(ledger.records):
            if record.state != OPEN:
                scores = [(score.epoch, score.dice) for score in record.scores]
                self.on_trial_add(None, SimpleNamespace(trial_id=trial_name(number), config={"scores": scores}))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take up a trial with the scores that it has."""
        super().on_trial_add(tune_controller, trial)
        for epoch, dice in trial.config["scores"]:
            self.on_trial_result(tune_controller, trial, {"epoch": epoch, "dice": dice})
