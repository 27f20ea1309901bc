"""What a search of training settings has tried and found: the JSON that it resumes from.

Ray Tune's own state is pickled, and is therefore kept where nobody else can write, and never read back. A run that goes
on starts Tune anew from <out>/search.json: trials that have ended are told to the sampler and to ASHA, those that have
not come first, under their own numbers, and then come new ones.
"""

from typing import Any, Literal

from pydantic import Field

from stas_core import config as configs
from stas_core import storage
from stas_core.config import Config
from stas_core.errors import ConfigError, StaleOutputError, StorageError
from stas_core.search.space import Scalar, Space

LEDGER = "search.json"
OPEN: Literal["open"] = "open"
"""State of a trial that has not ended: it is training, or was when its run ended, or a machine failed it."""


class Score(Config):
    """A trial's score after an epoch."""

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


def trial_name(number: int) -> str:
    """Return a trial's name: its number in the order of proposals."""
    return f"{number:04d}"
