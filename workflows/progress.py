"""How far a stage is, in lines that a person reads."""

import time


class Rate:
    """Counts items done, and says how fast and how long still."""

    def __init__(self, total: int):
        self._total = total
        self._done = 0
        self._first = 0
        self._start: float | None = None
        self._printed = 0.0

    def step(self, count: int = 1) -> str | None:
        """Count items that are done; return a line to print, at most every two seconds and at the end."""
        self._done += count
        now = time.monotonic()
        if self._start is None:  # workers start up before the first item; that is no measure of the rate
            self._first, self._start, self._printed = self._done, now, now
            return None
        if self._done < self._total and now - self._printed < 2:
            return None
        self._printed = now
        elapsed = now - self._start
        if elapsed < 1:  # items of a block come at once: over its first moments the rate would be fantastic
            return f"{self._done}/{self._total} images"
        rate = (self._done - self._first) / elapsed
        return (
            f"{self._done}/{self._total} images, {rate:.1f} images/s, ETA {duration((self._total - self._done) / rate)}"
        )


def duration(seconds: float) -> str:
    """Write a duration as h:mm:ss or m:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
