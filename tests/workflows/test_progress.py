import pytest

from workflows.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
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
