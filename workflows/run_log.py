"""A run's log as JSON lines, for the log collector of a cluster: `STAS_LOG_JSON` says where they go.

The environment variable is `stderr`, `stdout`, or the absolute path of a file that lines are appended to; without it
there are none. Each line has `time` (UTC), `level`, `run_id` (the lease's, which the manifest has too), `stage`, `out`
and `event`:

    begun      the run has taken its folder; `goes_on`: from an earlier run
    progress   `items`, `done` and `total` of them, `rate_per_s`, `eta_s`; `failed` and `retried` so far, of scoring
    fold       an epoch, or its validation, has ended: `fold`, `epoch`, `train_loss`, `val_dice`, `images_per_s`
    restarted  a pipeline is started anew: `why`, `left` items, of which `retried` were in a step that is done again
    warning    what a library of ours warns of, such as an object store that is away: `message`
    finished   the manifest is written: its numbers, under their names there, and `verdict`
    ended      `status` is done, interrupted or failed, then with `error`; `failed` and `retried` items, `seconds`

`failed` of what is done is the manifest's number, also where there was nothing to do. Done says that the run came to
its end: its exit status follows from `failed`, `verdict` and the limits in its settings. A pipeline's stages are runs
of their own, with ids of their own; its `failed` and `retried` are their sums. What cannot be logged is lost: no run
ends for it.
"""

import json
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from stas_core.errors import ConfigError
from stas_core.spelling import without_passwords

VARIABLE = "STAS_LOG_JSON"
_LIBRARY = logging.getLogger("stas_core")


@dataclass(frozen=True)
class _Run:
    """Whose the lines are, and what they have counted."""

    about: Mapping[str, str]
    handler: logging.Handler
    counted: Counter[str] = field(default_factory=Counter)

    def tell(self, event: str, level: int, facts: Mapping[str, Any]) -> None:
        """Write a line."""
        record = logging.LogRecord(__name__, level, "", 0, event, None, None)
        record.facts = facts
        self.handler.handle(record)


_run: ContextVar[_Run | None] = ContextVar("logged_run", default=None)


class JsonLines(logging.Formatter):
    """Writes records as lines of JSON."""

    def __init__(self, about: Mapping[str, str]):
        super().__init__()
        self._about = about

    def format(self, record: logging.LogRecord) -> str:
        """Return the line: an event with its facts, or what a library warns of."""
        facts: Mapping[str, Any] | None = getattr(record, "facts", None)
        told = {"event": "warning", "message": record.getMessage()} if facts is None else {"event": record.msg, **facts}
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        values = {"time": at, "level": record.levelname.lower(), **self._about, **told}
        return json.dumps({name: _shown(one) for name, one in values.items()}, ensure_ascii=False)


class _Lines(logging.StreamHandler):  # type: ignore[type-arg] # CPython 3.10 takes none
    """Writes lines to a terminal or file; one that takes no more ends no run."""

    _is_told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say once that lines are lost, where logging would print a traceback for each."""
        if self._is_told:
            return
        self._is_told = True
        with suppress(OSError):  # the terminal itself may be what takes no more
            print(
                f"{VARIABLE} = {os.environ.get(VARIABLE)!r}: {sys.exc_info()[1]}; from here on the log of this run has "
                "gaps, the run goes on",
                file=sys.stderr,
                flush=True,
            )


def _shown(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # of a fold that diverged: JSON has no such number
    return without_passwords(value) if isinstance(value, str) else value


@contextmanager
def of_run(stage: str, out: str, run_id: str, *, goes_on: bool) -> Iterator[None]:
    """Log the run that the block is, if the environment asks for that.

    Raises:
        ConfigError: it names no place where lines can go.
    """
    handler = _handler()
    if handler is None:
        yield
        return
    outer, run = _run.get(), _Run({"run_id": run_id, "stage": stage, "out": out}, handler)
    handler.setFormatter(JsonLines(run.about))
    token, began = _run.set(run), time.monotonic()
    # With a handler of its own, a library's warnings no longer go to the terminal by themselves.
    last = None if _LIBRARY.hasHandlers() else logging.lastResort
    _swap(None if outer is None else outer.handler, handler)
    _swap(None, last)
    run.tell("begun", logging.INFO, {"goes_on": goes_on})
    end: dict[str, Any] = {"status": "done"}
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        end = {"status": "interrupted" if stopped else "failed", "error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        end |= {name: run.counted[name] for name in ("failed", "retried")}
        level = logging.INFO if end["status"] == "done" else logging.ERROR
        run.tell("ended", level, end | {"seconds": round(time.monotonic() - began, 1)})
        _run.reset(token)
        _swap(last, None)
        _swap(handler, None if outer is None else outer.handler)
        if outer is not None:
            outer.counted.update(run.counted)
        _close(handler)


def require_place() -> None:
    """Check, before anything is claimed, that lines can go where the environment says.

    Raises:
        ConfigError: they cannot.
    """
    if (handler := _handler()) is not None:
        _close(handler)


def _swap(old: logging.Handler | None, new: logging.Handler | None) -> None:
    """Have one handler instead of another take what the library warns of: that of the innermost run alone."""
    if old is not None:
        _LIBRARY.removeHandler(old)
    if new is not None:
        _LIBRARY.addHandler(new)


def _close(handler: _Lines) -> None:
    handler.close()
    if handler.stream not in (sys.stderr, sys.stdout):
        with suppress(OSError):  # a full disk, which has been told: it must not hide how the run ended
            handler.stream.close()


def _handler() -> _Lines | None:
    place = os.environ.get(VARIABLE, "")
    if place in ("stderr", "stdout"):
        return _Lines(getattr(sys, place))
    if not place:
        return None
    try:
        if not Path(place).is_absolute():  # that of a job lies in a folder which ends with the cluster
            raise OSError("it is neither stdout nor stderr, nor an absolute path")
        return _Lines(Path(place).open("a", encoding="utf-8", errors="backslashreplace"))
    except OSError as error:
        raise ConfigError(
            f"{VARIABLE} = {place!r}: {error}; give stderr, stdout, or the absolute path of a file that may be written"
        ) from error


def event(name: str, *, level: int = logging.INFO, **facts: Any) -> None:
    """Log what happens to the run; without a log, do nothing."""
    if (run := _run.get()) is not None:
        run.tell(name, level, facts)


def count(name: str, number: int = 1) -> None:
    """Count items that `failed` or were `retried`."""
    if (run := _run.get()) is not None:
        run.counted[name] += number


def progress(items: str, done: int, total: int, *, rate_per_s: float | None, eta_s: float | None) -> None:
    """Log how far the run is."""
    if (run := _run.get()) is not None:
        far = {"items": items, "done": done, "total": total, "rate_per_s": _rounded(rate_per_s)}
        counted = {name: run.counted[name] for name in ("failed", "retried")}
        run.tell("progress", logging.INFO, far | {"eta_s": _rounded(eta_s)} | counted)


def finished(manifest: Mapping[str, Any]) -> None:
    """Log the numbers of the manifest that the run has written, and its verdict."""
    numbers: dict[str, Any] = {name: one for name, one in manifest.items() if isinstance(one, int | float)}
    verdict = manifest.get("verdict")
    event("finished", **numbers | {"verdict": verdict.get("level") if isinstance(verdict, Mapping) else None})


def settle(manifest: Mapping[str, Any]) -> None:
    """Count as `failed` what the manifest of a run that is done counts, whether or not this run has written it."""
    number = manifest.get("num_failures", manifest.get("num_missing"))  # evaluate's: of the truth, without a score
    if (run := _run.get()) is not None and number is not None:
        run.counted["failed"] = number


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
