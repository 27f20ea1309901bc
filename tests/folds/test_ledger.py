"""How a search of training settings goes on: from its own JSON, as if it had not been disturbed."""

import json
import math
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core import config
from stas_core.errors import StaleOutputError
from stas_core.search.space import Dimension, Scalar, SearchConfig
from workflows.folds.ledger import LEDGER, Ledger
from workflows.folds.proposals import Proposals, ResumedASHA

EPOCHS = 4
SPACE = {
    "optim.lr": config.build(Dimension, {"low": 1e-5, "high": 1e-1, "log": True}),
    "model.activation": config.build(Dimension, {"choices": ["relu", "mish"]}),
}
FIRST: list[dict[str, Scalar]] = [{"optim.lr": 1e-3, "model.activation": "relu"}]


class Killed(Exception):
    pass


class Machine:
    """Runs trials as Tune does, and dies when so many epochs have been reported."""

    def __init__(self, out: Path, sampler: str = "tpe", dies_after: float = math.inf, num_settings: int = 7):
        search = SearchConfig(sampler=sampler, num_settings=num_settings, num_random=2)
        self.ledger = Ledger(str(out), SPACE, EPOCHS)
        self.proposals = Proposals(self.ledger, search, FIRST, num_settings)
        self.asha = ResumedASHA(
            time_attr="epoch", metric="dice", mode="max", max_t=EPOCHS, grace_period=1, reduction_factor=2
        )
        self.asha.add_ended(self.ledger)
        self._left = dies_after
        self.begun: list[str] = []

    def run(self) -> "Machine":
        while isinstance(found := self.proposals.suggest(f"tune{len(self.begun)}"), dict):
            self._train(SimpleNamespace(config=found, trial_id=f"tune{len(self.begun)}"))
        return self

    def _train(self, trial: SimpleNamespace) -> None:
        self.begun.append(trial.config["trial"])
        self.asha.on_trial_add(None, trial)
        lr = trial.config["setting"]["optim.lr"]
        for epoch in range(len(trial.config["scores"]) + 1, EPOCHS + 1):
            if self._left == 0:
                raise Killed
            self._left -= 1
            dice = 1 / (1 + abs(math.log10(lr) + 3)) * epoch / EPOCHS
            result = {"epoch": epoch, "dice": dice, "time_total_s": 1.0 * epoch}
            if lr > 3e-2:
                result |= {"dice": math.nan, "failed": "DivergedError: lower optim.lr"}  # type: ignore[dict-item]
            if "failed" in result or self.asha.on_trial_result(None, trial, result) == "STOP":
                break
            self.proposals.on_trial_result(trial.trial_id, result)
        self.proposals.on_trial_complete(trial.trial_id, result)

    def outcome(self) -> list[Any]:
        return [record.model_dump(exclude={"seconds"}) for record in self.ledger.records]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@settings(max_examples=5)
@given(kills=st.lists(st.integers(0, 9), max_size=3))
def test_a_search_that_was_killed_ends_as_an_undisturbed_one(
    tmp_path_factory: pytest.TempPathFactory, sampler: str, kills: list[int]
) -> None:
    whole = Machine(tmp_path_factory.mktemp("whole"), sampler).run()
    out = tmp_path_factory.mktemp("killed")
    for dies_after in kills:
        with suppress(Killed):
            Machine(out, sampler, dies_after).run()
    assert Machine(out, sampler).run().outcome() == whole.outcome()
    assert {record.state for record in whole.ledger.records} >= {"done", "stopped"}


def test_ended_trials_are_not_repeated_and_open_ones_come_first_under_their_own_names(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Machine(tmp_path, dies_after=2 * EPOCHS + 1).run()
    killed = Ledger(str(tmp_path), SPACE, EPOCHS).records
    unfinished = len(killed) - 1
    assert [record.state for record in killed].count("open") == 1 and killed[-1].state == "open"
    again = Machine(tmp_path).run()
    assert again.begun == [f"{number:04d}" for number in range(unfinished, 7)]
    assert again.ledger.records[:unfinished] == killed[:unfinished]
    assert Machine(tmp_path).run().begun == []


def test_a_trial_that_a_machine_failed_stays_open(tmp_path: Path) -> None:
    machine = Machine(tmp_path, num_settings=1)
    assert isinstance(machine.proposals.suggest("a"), dict)
    machine.proposals.on_trial_complete("a", error=True)
    assert Machine(tmp_path, num_settings=1).run().begun == ["0000"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"setting": {"optim.lr": 1e-3}}, r"trials\.0\.setting has the keys \['optim\.lr'\]"),
        ({"setting": FIRST[0] | {"optim.lr": 5.0}}, r"trials\.0\.setting: optim\.lr = 5\.0 lies outside"),
        ({"setting": FIRST[0] | {"model.activation": "../.."}}, r"model\.activation = '\.\./\.\.' lies outside"),
        ({"state": "won"}, r"trials\.0\.state"),
        ({"state": "done", "scores": [{"epoch": 1, "dice": 0.5}]}, r"state = done after epoch 1 of 4"),
        ({"scores": [{"epoch": 2, "dice": 0.5}, {"epoch": 1, "dice": 0.5}]}, r"the epochs \[2, 1\]"),
        ({"scores": [{"epoch": 9, "dice": 0.5}]}, r"ascending ones up to 4"),
        ({"scores": [{"epoch": 1, "dice": math.nan}]}, r"trials\.0\.scores\.0\.dice"),
        ({"scores": [{"epoch": 1, "dice": 7}]}, r"trials\.0\.scores\.0\.dice"),
        ({"id": "../../x"}, r"trials\.0\.id"),
    ],
)
def test_a_ledger_that_no_search_wrote_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    (tmp_path / LEDGER).write_text(json.dumps({"trials": [{"setting": FIRST[0]} | changed]}))
    with pytest.raises(StaleOutputError, match=message) as error:
        Ledger(str(tmp_path), SPACE, EPOCHS)
    assert LEDGER in str(error.value) and "--force" in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"trials": 3}', "\x80"])
def test_a_damaged_ledger_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / LEDGER).write_text(text)
    with pytest.raises(StaleOutputError, match=LEDGER):
        Ledger(str(tmp_path), SPACE, EPOCHS)


def test_trials_without_their_ledger_are_neither_deleted_nor_searched_again(tmp_path: Path) -> None:
    (tmp_path / "trials" / "0000").mkdir(parents=True)
    (tmp_path / "trials" / "0000" / "manifest.json").write_text("{}")
    with pytest.raises(StaleOutputError, match=r"search\.json, which says what was searched, is gone"):
        Ledger(str(tmp_path), SPACE, EPOCHS)
    assert (tmp_path / "trials" / "0000" / "manifest.json").exists()
