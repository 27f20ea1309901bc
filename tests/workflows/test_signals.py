"""A stage that is told to end keeps what it has, says so, and is gone in time."""

import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

STAGE = """
import os, sys, time
from stas_core.config import Config
from workflows import cli, signals
signals.GRACE_S = {grace}
def run(config, force):
    try:
        print("begun", flush=True)
        time.sleep({first})
    finally:
        print("ending", flush=True)
        time.sleep({then})
        print("kept", flush=True)
    return 0
sys.argv += ["--config", os.devnull]
cli.main("a_stage", Config, run, "doc", plan=lambda config, force: [])
"""


def ended_by(sent: Sequence[signal.Signals], *, then: float = 0, grace: float = 60) -> tuple[int, str, str]:
    """Return status, output and errors of a stage that got these signals, the second while it was ending."""
    heard = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # `nohup make test` would have it ignored
    code = heard + STAGE.format(first=60, then=then, grace=grace)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as stage:
        assert stage.stdout is not None
        seen = ""
        for number, after in zip(sent, ("begun", "ending"), strict=False):
            while after not in seen:
                line = stage.stdout.readline()
                assert line, seen
                seen += line
            stage.send_signal(number)
        out, errors = stage.communicate()
    return stage.returncode, seen + out, errors


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGINT, 130, "interrupted; the same command again goes on where it was\n"),
        (signal.SIGTERM, 143, "stopped by SIGTERM; the same command again goes on where it was\n"),
        (signal.SIGHUP, 129, "stopped by SIGHUP; the same command again goes on where it was\n"),
    ],
)
def test_a_signal_ends_a_stage_in_order(number: signal.Signals, status: int, message: str) -> None:
    ended = ended_by([number])
    assert ended[0] == status and ended[1].endswith("begun\nending\nkept\n") and ended[2] == message


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(second: signal.Signals) -> None:
    status, out, errors = ended_by([signal.SIGINT, second], then=60)
    assert status == 128 + second and "kept" not in out
    assert errors == "ended at once: a second signal came; the same command again goes on where it was\n"


def test_what_does_not_end_in_time_is_ended_before_its_sender_kills_it() -> None:
    status, out, errors = ended_by([signal.SIGTERM], then=60, grace=0.2)
    assert status == 143 and "kept" not in out
    assert errors.startswith("ended at once: it had not ended 0.2 s after SIGTERM;")


def test_a_signal_that_was_ignored_stays_so() -> None:
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + STAGE.format(first=0.5, then=0, grace=60)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as stage:
        assert stage.stdout is not None
        while stage.stdout.readline() != "begun\n":
            pass
        stage.send_signal(signal.SIGHUP)
        assert stage.communicate()[0] == "ending\nkept\n" and stage.returncode == 0


def test_a_worker_that_hangs_in_its_exit_is_ended() -> None:
    """As Ray's exit handlers make it hang, which run when Python has ended."""
    code = """
import ctypes, sys
sys.argv = ["/ray/default_worker.py"]
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.pause, None, None)
from workflows import signals
signals.EXIT_S = 1
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGALRM
