"""How a stage ends when it is told to: Ctrl-C, SIGTERM (Kubernetes, Slurm, `ray job stop`), SIGHUP (a closed terminal).

Each arrives in the main thread as a `Stopped`, a KeyboardInterrupt: what has begun is ended as by Ctrl-C, and what was
kept stays. A second signal ends the process at once, and so does the grace period of SIGTERM and SIGHUP, whose senders
kill soon after. Nothing is lost by that either: every stage goes on after a kill -9.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 12.0
"""Seconds from SIGTERM or SIGHUP until the process ends at once."""
EXIT_S = 30
"""Seconds until a worker process that hangs in its exit is ended."""


class Stopped(KeyboardInterrupt):
    """A signal told the process to end."""

    def __init__(self, signum: int):
        super().__init__(f"{signal.Signals(signum).name}")
        self.status = 128 + signum


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` in the block at the first signal; signals that were ignored before (`nohup`) stay so."""
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    ended = threading.Event()

    def end_at_once(signum: int, _: FrameType | None) -> None:
        _end_at_once(signum, "a second signal came")

    def end_in_time(signum: int) -> None:
        if not ended.wait(GRACE_S):
            _end_at_once(signum, f"it had not ended {GRACE_S:g} s after {signal.Signals(signum).name}")

    def stop(signum: int, _: FrameType | None) -> None:
        for number in heard:
            signal.signal(number, end_at_once)
        if signum != signal.SIGINT:
            threading.Thread(target=end_in_time, args=(signum,), name="grace", daemon=True).start()
        raise Stopped(signum)

    with kept_signals():
        for number in heard:
            signal.signal(number, stop)
        try:
            yield
        finally:
            ended.set()


@contextmanager
def kept_signals() -> Iterator[None]:
    """Put the handlers back that the block replaces: Ray's own handler of SIGTERM aborts the process with its trace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_in_time(status: int) -> None:
    """End the process at once if it has not exited by itself in the grace period: what Ray does at exit may hang."""

    def end() -> None:
        time.sleep(GRACE_S)
        os._exit(status)

    threading.Thread(target=end, name="exit", daemon=True).start()


def end_hung_exit() -> None:
    """Let the kernel end this process, should it hang when it exits: no thread of Python runs any more by then.

    A worker of Ray 2.60 that is told to end as it starts can wait for ever in the exit handlers of Ray's C++. Its node
    has signed it off, and nobody else looks for it: it would keep its memory, that of a GPU too.
    """
    atexit.register(lambda: signal.alarm(EXIT_S))


def _end_at_once(signum: int, why: str) -> None:
    print(f"ended at once: {why}; the same command again goes on where it was", file=sys.stderr, flush=True)
    os._exit(128 + signum)
