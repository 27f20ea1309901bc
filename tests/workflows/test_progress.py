import time
from pathlib import Path

import pytest

from workflows import planned, progress
from workflows.out_folder import Outputs, claim_for_stage
from workflows.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_said", now[0])
    return now


def test_lines_come_every_two_seconds_and_at_the_end(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    shown = Progress(10, label="maps: ")
    for _ in range(10):
        shown.step(facts="0 failed")
        clock[0] += 0.5
    assert capsys.readouterr().out.splitlines() == [
        "maps: 5/10 images, 2.00 images/s, ETA 0:02, 0 failed",
        "maps: 9/10 images, 2.00 images/s, ETA 0:00, 0 failed",
        "maps: 10/10 images, 2.00 images/s, ETA 0:00, 0 failed",
    ]


def test_a_block_that_comes_at_once_has_no_rate(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    shown = Progress(3)
    shown.step(3)
    assert capsys.readouterr().out == "3/3 images\n"


def test_what_takes_long_is_said_again_by_who_asks_whether_it_is_silent(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with progress.doing("starting", at_once=True), progress.doing("drawing"):
        for seconds in (2, 6, 4):
            clock[0] += seconds
            progress.still()
        progress.at("1 of 2")
        clock[0] += 9
        progress.at("2 of 2")
    assert capsys.readouterr().out.splitlines() == [
        "starting ...",
        "drawing ..., 0:08 so far",
        "drawing ..., 2 of 2, 0:21 so far",
    ]
    progress.still()
    assert capsys.readouterr().out == ""


def test_items_that_take_long_are_no_silence(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    shown = Progress(3, "slides")
    for _ in range(3):
        clock[0] += 8
        progress.still()
        shown.step()
    clock[0] += 60
    progress.still()  # it has ended
    assert capsys.readouterr().out.splitlines() == [
        "3 slides ..., 0:08 so far",
        "3 slides ..., 1 done, 0:16 so far",
        "2/3 slides, 0.12 slides/s, ETA 0:08",
        "3 slides ..., 2 done, 0:24 so far",
        "3/3 slides, 0.12 slides/s, ETA 0:00",
    ]


def test_a_run_that_is_silent_is_heard_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned, "TICK_S", 0.01)
    monkeypatch.setattr(progress, "QUIET_S", 0.05)
    monkeypatch.setattr(progress, "INTERVAL_S", 0.05)
    with claim_for_stage(str(tmp_path / "out"), Outputs("train", ()), force=False), progress.doing("waiting"):
        time.sleep(0.3)
    assert "waiting ..., 0:00 so far" in capsys.readouterr().out
