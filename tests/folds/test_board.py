"""The table of folds shows what they send, to the end, and never gets between a run and what ended it."""

import threading
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RaySystemError

from workflows import run_metrics
from workflows.folds import board as boards

EPOCH = {"epoch": 1, "first_epoch": 1, "started": 0.0, "train_loss": 0.5, "val_dice": 0.25}


def board_that(snapshot: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a stand-in for the actor's handle."""
    monkeypatch.setattr("ray.get", lambda found: found)
    return SimpleNamespace(snapshot=SimpleNamespace(remote=snapshot))


def test_what_folds_sent_last_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    board = board_that(lambda: {3: EPOCH}, monkeypatch)
    with boards.watch(board, [3], 2):
        pass  # over before anything was shown
    assert capsys.readouterr().out == "fold 3  state training  epoch 1/2  loss 0.5000  Dice 0.2500\n"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return what is counted as done."""
    found = Counter[str]()
    monkeypatch.setattr(run_metrics, "done", lambda number, items: found.update({items: max(number, 0)}))
    return found


def test_epochs_and_maps_are_counted(monkeypatch: pytest.MonkeyPatch, counted: Counter[str]) -> None:
    board, stop = boards.Board(), SimpleNamespace(wait=lambda seconds: False)
    looks = boards._snapshots(board_that(board.snapshot, monkeypatch), cast(Any, stop), every_s=0.0)
    board.update(0, {"epoch": 4, "step": 1, "steps": 2})  # it goes on from an earlier run
    next(looks)
    assert not +counted
    for epoch in (4, 5, 6, 5, 6):  # between two looks; a worker was lost on the way
        board.update(0, {"epoch": epoch, "train_loss": 0.5, "val_dice": None})
    next(looks)
    assert +counted == {"epochs": 5}
    for number in (2, 4):  # of two workers, who count for both
        board.update(0, {"maps": number, "num_maps": 3})
        next(looks)
    next(looks)
    assert counted == {"epochs": 5, "maps": 3}


def test_a_trial_is_counted_and_not_printed(
    monkeypatch: pytest.MonkeyPatch, counted: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    board = boards.Board()
    board.update(0, {"epoch": 1, "train_loss": 0.5, "val_dice": 0.25})
    with boards.watch(board_that(board.snapshot, monkeypatch), [0], 2, is_trial=True):
        pass
    assert counted["epochs"] == 1 and capsys.readouterr().out == ""


def test_where_ray_is_gone_the_run_goes_on_to_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone() -> None:
        raise RaySystemError("the head is lost")

    ended: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", ended.append)
    with boards.watch(board_that(gone, monkeypatch), [0], 2):
        pass
    assert not ended and capsys.readouterr() == ("", "")


def test_in_a_log_no_fold_is_silent_for_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    board = boards.Board()
    monkeypatch.setattr(boards, "LINE_EVERY_S", -1.0)

    def said() -> list[str]:
        with boards.watch(board_that(board.snapshot, monkeypatch), [0], 4):
            pass
        return capsys.readouterr().out.splitlines()

    step = {"epoch": 1, "step": 2, "steps": 5, "reading": "", "validating": ""}
    assert said() == ["fold 0  state waiting"]
    board.update(0, {"epoch": 1, "reading": "7 images"})
    assert said() == ["fold 0  state reading 7 images  epoch 1/4"]
    board.update(0, step)
    assert said()[0].startswith("fold 0  state training  epoch 1/4 step 2/5  ETA ")
    board.update(0, step | {"step": 5})
    board.update(0, {"epoch": 1, "validating": "1/3"})
    assert said() == ["fold 0  state validating 1/3  epoch 1/4"]
    board.update(0, {"epoch": 1, "train_loss": 0.5, "val_dice": 0.25, "validating": ""})
    assert said()[0].startswith("fold 0  state training  epoch 1/4  loss 0.5000  Dice 0.2500  ETA ")
    board.update(0, {"maps": 1, "num_maps": 3})
    assert said() == ["fold 0  state maps 1/3  epoch 1/4  loss 0.5000  Dice 0.2500"]
    board.update(0, {"maps": 3, "num_maps": 3})
    assert said() == ["fold 0  state done  epoch 1/4  loss 0.5000  Dice 0.2500"]
