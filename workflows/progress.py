"""Progress of a stage, as lines of text: how far its items are, and what else it is at where nothing is heard of it.

What prints only when something is done would be silent while it waits: a thread that watches the run calls `still`,
which says so again.
"""

import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from workflows import run_log, run_metrics

T = TypeVar("T")
INTERVAL_S = 2.0
"""Seconds between two lines."""
QUIET_S = 8.0
"""What a run is at is said again after this; `still` is called every two seconds."""


class _UnderWay:
    """Something that a run is at."""

    def __init__(self, what: str):
        self.at = ""
        """How far it is."""
        self._what = what
        self._began = time.monotonic()
        _under_way.append(weakref.ref(self))

    def say_again(self) -> None:
        """Print it, if nothing was said lately; what takes no time is not worth a line."""
        now = time.monotonic()
        if now - _said >= QUIET_S and now - self._began >= INTERVAL_S:
            _heard()
            so_far = f"{duration(now - self._began)} so far"
            print(", ".join(filter(None, (f"{self._what} ...", self.at, so_far))), flush=True)

    def end(self) -> None:
        """Say it no more."""
        _under_way[:] = [one for one in _under_way if one() not in (self, None)]


_said = time.monotonic()
"""When the last line came from here."""
_under_way: list[weakref.ref[_UnderWay]] = []
"""The innermost last; weak, as what counts items may be left by an error."""


def _heard() -> None:
    global _said
    _said = time.monotonic()


@contextmanager
def doing(what: str, *, at_once: bool = False) -> Iterator[None]:
    """Say what the block, or the function that this decorates, is at, if it takes longer than some seconds.

    Args:
        what: it does.
        at_once: say it at the start, too.
    """
    if at_once:
        print(f"{what} ...", flush=True)
        _heard()
    under_way = _UnderWay(what)
    try:
        yield
    finally:
        under_way.end()


def at(text: str, *, is_said: bool = False) -> None:
    """Tell how far the innermost `doing` is; `is_said`: a line that was printed just now has told it."""
    if (latest := _latest()) is not None:
        latest.at = text
        if is_said:
            _heard()
        else:
            latest.say_again()


def told(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield the items, and tell before each how many of them the innermost `doing` has done."""
    for number, item in enumerate(items):
        at(f"{number} of {len(items)} {what}")
        yield item


def still() -> None:
    """Say again what the run is at, where that was not said lately."""
    if (latest := _latest()) is not None:
        latest.say_again()


def _latest() -> _UnderWay | None:
    return next((found for one in reversed(_under_way) if (found := one()) is not None), None)


class Progress:
    """Prints items done, rate and ETA every two seconds, and at the end.

    The rate counts from the first item on, because workers start up before it.
    """

    def __init__(self, total: int, what: str = "images", *, label: str = ""):
        self._total, self._what, self._label = total, what, label
        self._done = self._first = 0
        self._start: float | None = None
        self._printed = 0.0
        self._under_way = _UnderWay(f"{label}{total} {what}")
        if not total:
            self._under_way.end()

    def step(self, count: int = 1, *, facts: str = "") -> None:
        """Count items that are done; `facts` are added to a line that is due."""
        self.reach(self._done + count, facts=facts)

    def reach(self, done: int, *, facts: str = "") -> None:
        """Set the number of items done."""
        now = time.monotonic()
        run_metrics.done(done - self._done, f"{self._label}{self._what}")
        self._done = done
        self._under_way.at = f"{done} done"
        if self._start is None:
            self._first, self._start, self._printed = done, now, now
        if done < self._total and now - self._printed < INTERVAL_S:
            return
        self._printed = now
        _heard()
        if done >= self._total:
            self._under_way.end()
        rate = self._rate(now - self._start)
        eta_s = None if rate is None else (self._total - done) / rate
        run_log.progress(f"{self._label}{self._what}", done, self._total, rate_per_s=rate, eta_s=eta_s)
        parts = [f"{self._label}{done}/{self._total} {self._what}"]
        if rate is not None and eta_s is not None:
            speed = f"{rate:.2f}" if rate < 10 else f"{rate:.0f}"
            parts += [f"{speed} {self._what}/s", f"ETA {duration(eta_s)}"]
        print(", ".join([*parts, facts] if facts else parts), flush=True)

    def _rate(self, elapsed_s: float) -> float | None:
        rate = (self._done - self._first) / elapsed_s if elapsed_s > 0 else 0.0
        # Items of a block come at once: an early rate would be far too high.
        return None if elapsed_s < 1 or not rate else rate


def duration(seconds: float) -> str:
    """Write a duration as h:mm:ss or m:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def size(num_bytes: float) -> str:
    """Write a number of bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
