"""Progress of a stage, as lines of text."""

import time

from workflows import run_metrics

INTERVAL_S = 2.0
"""Seconds between two lines."""


class Progress:
    """Prints items done, rate and ETA every two seconds, and at the end.

    The rate counts from the first item on, because workers start up before it.
    """

    def __init__(self, total: int, what: str = "images", *, label: str = ""):
        self._total, self._what, self._label = total, what, label
        self._done = self._first = 0
        self._start: float | None = None
        self._printed = 0.0

    def step(self, count: int = 1, *, facts: str = "") -> None:
        """Count items that are done; `facts` are added to a line that is due."""
        self.reach(self._done + count, facts=facts)

    def reach(self, done: int, *, facts: str = "") -> None:
        """Set the number of items done."""
        now = time.monotonic()
        run_metrics.count("stas_items_done", done - self._done, items=f"{self._label}{self._what}")
        self._done = done
        if self._start is None:
            self._first, self._start, self._printed = done, now, now
        if done < self._total and now - self._printed < INTERVAL_S:
            return
        self._printed = now
        parts = [f"{self._label}{done}/{self._total} {self._what}", *self._timing(now - self._start)]
        print(", ".join([*parts, facts] if facts else parts), flush=True)

    def _timing(self, elapsed_s: float) -> list[str]:
        rate = (self._done - self._first) / elapsed_s if elapsed_s > 0 else 0.0
        if elapsed_s < 1 or not rate:  # items of a block come at once: an early rate would be far too high
            return []
        speed = f"{rate:.2f}" if rate < 10 else f"{rate:.0f}"
        return [f"{speed} {self._what}/s", f"ETA {duration((self._total - self._done) / rate)}"]


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
