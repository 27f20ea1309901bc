"""What a search of training settings has tried and found, and what it tries next: the JSON that it goes on from.

Ray Tune's own state is pickled, and is therefore kept where nobody else can write, and never read back. A run that goes
on starts Tune anew from <out>/search.json: trials that have ended are told to the sampler and to ASHA, those that have
not come first, under their own numbers, and then come new ones.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import optuna
from optuna.trial import TrialState, create_trial
from pydantic import Field
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from stas_core import config as configs
from stas_core import storage
from stas_core.config import Config
from stas_core.errors import ConfigError, StaleOutputError, StorageError
from stas_core.search import space as spaces
from stas_core.search.space import Scalar, SearchConfig, Setting, Space

LEDGER = "search.json"
OPEN: Literal["open"] = "open"
"""State of a trial that has not ended: it is training, or was when its run ended, or a machine failed it."""


class Score(Config):
    """How good a trial was after an epoch."""

    epoch: int = Field(ge=1)
    dice: float = Field(ge=0, le=1, allow_inf_nan=False)


class TrialRecord(Config):
    """A trial as the ledger keeps it."""

    setting: dict[str, Scalar]
    state: Literal["open", "done", "stopped", "failed"] = OPEN
    """failed: by its setting, so that trying it again would end alike."""
    scores: tuple[Score, ...] = ()
    seconds: float = Field(0.0, ge=0, allow_inf_nan=False)
    error: str | None = None

    @property
    def epoch(self) -> int:
        """The last epoch that was scored, or 0."""
        return self.scores[-1].epoch if self.scores else 0

    @property
    def dice(self) -> float | None:
        """The score after that epoch."""
        return self.scores[-1].dice if self.scores else None


class _Records(Config):
    trials: tuple[TrialRecord, ...]


class Ledger:
    """The trials of a search in the order in which they were proposed, kept in a file."""

    def __init__(self, out: str, space: Space, epochs: int):
        self.space, self.epochs = space, epochs
        self._uri = storage.join(out, LEDGER)
        self.records: list[TrialRecord] = []
        if storage.exists(self._uri):
            self.records = self._read()
        elif storage.exists(storage.join(out, "trials")) and storage.entries(storage.join(out, "trials")):
            raise StaleOutputError(
                f"{self._uri}, which says what was searched, is gone, but {out}/trials holds trials; restore it, use "
                "another out=, or --force to start over"
            )

    def _read(self) -> list[TrialRecord]:
        try:
            values = storage.read_record(self._uri, "trials")
            records = list(configs.build(_Records, values).trials)
            for number, record in enumerate(records):
                self._check(record, f"trials.{number}")
        except (ConfigError, StorageError) as error:
            raise StaleOutputError(
                f"{self._uri} is not what a search writes: {error}; restore it, or --force to start over"
            ) from error
        return records

    def _check(self, record: TrialRecord, where: str) -> None:
        if record.setting.keys() != self.space.keys():
            raise ConfigError(f"{where}.setting has the keys {sorted(record.setting)}, expected {sorted(self.space)}")
        for key, value in record.setting.items():
            if not self.space[key].holds(value):
                raise ConfigError(f"{where}.setting: {key} = {value!r} lies outside of space.{key}")
        epochs = [score.epoch for score in record.scores]
        if epochs != sorted(set(epochs)) or record.epoch > self.epochs:
            raise ConfigError(f"{where}.scores has the epochs {epochs}, expected ascending ones up to {self.epochs}")
        fits = {
            OPEN: True,
            "done": record.epoch == self.epochs,
            "stopped": 0 < record.epoch < self.epochs,
            "failed": record.error is not None,
        }
        if not fits[record.state]:
            raise ConfigError(f"{where}.state = {record.state} after epoch {record.epoch} of {self.epochs}")

    def save(self) -> None:
        """Write the file."""
        storage.write_json(self._uri, {"trials": [record.model_dump(mode="json") for record in self.records]})

    def change(self, number: int, **values: Any) -> None:
        """Replace values of a trial's record."""
        self.records[number] = self.records[number].model_copy(update=values)
        self.save()


class Proposals(tune.search.Searcher):  # type: ignore[misc]
    """Tells Tune what to try, and keeps the ledger.

    A proposal is a function of the seed, its number and the trials that have ended by then, so that going on needs no
    state of the sampler: with one trial at a time a search that was killed proposes what an undisturbed one does.
    """

    def __init__(self, ledger: Ledger, search: SearchConfig, first: Sequence[Setting], num_settings: int):
        super().__init__(metric="dice", mode="max")
        self._ledger, self._search, self._first, self._num_settings = ledger, search, first, num_settings
        self._distributions = {key: dimension.distribution() for key, dimension in ledger.space.items()}
        self._study = optuna.create_study(direction="maximize")
        self._numbers: dict[str, int] = {}
        self._seconds = [record.seconds for record in ledger.records]
        self._waiting = [number for number, record in enumerate(ledger.records) if record.state == OPEN]
        for number, record in enumerate(ledger.records):
            self._add(record.setting)
            if record.state != OPEN:
                self._tell(number)

    @property
    def num_left(self) -> int:
        """How many trials are still to be run."""
        return len(self._waiting) + max(0, self._num_settings - len(self._ledger.records))

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the next trial: its name, its setting, and its scores so far."""
        if not self.num_left:
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
            self._study.sampler = spaces.make_sampler(self._ledger.space, one)[0]
            setting = self._study.ask(self._distributions).params
        self._ledger.records.append(TrialRecord(setting=setting))
        self._seconds.append(0.0)
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
        """Note an epoch."""
        number = self._numbers[trial_id]
        record = self._ledger.records[number]
        scores = {score.epoch: score for score in record.scores}  # a trial that went on may repeat an epoch
        if "failed" not in result:
            scores[result["epoch"]] = Score(epoch=result["epoch"], dice=result["dice"])
        seconds = self._seconds[number] + result["time_total_s"]
        self._ledger.change(number, scores=tuple(scores[epoch] for epoch in sorted(scores)), seconds=seconds)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Note how a trial ended; one that a machine failed stays open."""
        if error or result is None:
            return
        self.on_trial_result(trial_id, result)
        number = self._numbers[trial_id]
        why = result.get("failed")
        done = self._ledger.records[number].epoch >= self._ledger.epochs
        self._ledger.change(number, state="failed" if why else "done" if done else "stopped", error=why)
        self._tell(number)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Save nothing: the ledger is what a search goes on from."""

    def get_state(self) -> dict[str, Any]:
        """Return nothing, likewise."""
        return {}


class ResumedASHA(ASHAScheduler):  # type: ignore[misc]
    """ASHA whose rungs hold what earlier runs reported; what it decided then stands."""

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


def trial_name(number: int) -> str:
    """Return what a trial is called by: its place in the order of proposals."""
    return f"{number:04d}"
