"""One live table for all folds: workers send what they do, the driver shows it."""

import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from rich.console import Console
from rich.live import Live
from rich.table import Table

from workflows import run_log, run_metrics, tracking
from workflows.cluster import this_node
from workflows.progress import duration

SHOWN = {
    "epoch": "stas_fold_epoch",
    "train_loss": "stas_fold_loss",
    "val_dice": "stas_fold_dice",
    "images_per_s": "stas_fold_images_per_second",
}
"""What monitoring sees of a fold's values."""
LINE_EVERY_S = 30.0
"""In a log, a fold that trains is silent for no longer."""
COLUMNS = ("fold", "state", "epoch", "loss", "Dice", "precision", "recall", "lr", "images/s", "ETA")


@dataclass(frozen=True)
class BadNode:
    """A node that cannot train: its disk is full, or it has no GPU where it should."""

    node_id: str
    address: str


class Board:
    """Holds the latest values of each fold; a Ray actor owned by the driver, gone with it."""

    def __init__(self) -> None:
        self._folds: dict[int, dict[str, Any]] = {}
        self._scores: dict[int, dict[int, float]] = {}
        self._failures: dict[int, str] = {}
        self._blamed: dict[int, BadNode] = {}
        self._stopped = False

    def update(self, fold: int, values: dict[str, Any]) -> bool:
        """Update a fold's values; return whether the fold should stop."""
        known = self._folds.setdefault(fold, {})
        if "started" not in known and not values.get("reading"):
            # ETA counts from here: a resumed fold starts somewhere in the middle, and images are read once.
            known |= {"started": time.time(), "first_epoch": values.get("epoch", 1)}
        known.update(values)
        if "train_loss" in values and values["epoch"] != known.get("last_ended"):  # one that is done again counts again
            known |= {"last_ended": values["epoch"], "num_ended": known.get("num_ended", 0) + 1}
        if "train_loss" in values and values.get("val_dice") is not None:
            self._scores.setdefault(fold, {})[values["epoch"]] = values["val_dice"]
        return self._stopped

    def stop(self) -> None:
        """Ask every fold to end at its next report."""
        self._stopped = True

    def fail(self, fold: int, why: str) -> None:
        """Record why a fold failed for good; the first reason stands."""
        self._failures.setdefault(fold, why)

    def failure(self, fold: int) -> str | None:
        """Return why a fold failed for good, if it did."""
        return self._failures.get(fold)

    def blame(self, fold: int, node: BadNode) -> None:
        """Record that a fold failed by a fault of the node it was on."""
        self._blamed.setdefault(fold, node)

    def take_blamed(self, fold: int) -> BadNode | None:
        """Return the node whose fault it was that a fold failed, if it was; the fold is free to try another."""
        if (node := self._blamed.pop(fold, None)) is not None:
            self._failures.pop(fold, None)
        return node

    def scores(self) -> dict[int, dict[int, float]]:
        """Return each fold's validation Dice by epoch."""
        return self._scores

    def snapshot(self) -> dict[int, dict[str, Any]]:
        """Return all folds' values."""
        return self._folds


def start_board() -> Any:
    """Start the board's actor beside this process and return its handle."""
    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=this_node()).remote()


@contextmanager
def watch(board: Any, folds: Sequence[int], num_epochs: int, *, is_trial: bool = False) -> Iterator[None]:
    """Show the board while the body runs: a live table in a terminal, else a line for each epoch and every 30 s.

    Of a trial it is shown to monitoring and the run's log alone: the search has a table of all trials.
    """
    stop = threading.Event()
    show = _show_nothing if is_trial else _show_table if sys.stdout.isatty() else _show_lines
    context = copy_context()  # of the run whose metrics these are
    thread = threading.Thread(target=context.run, args=(show, board, folds, num_epochs, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _show_table(board: Any, folds: Sequence[int], num_epochs: int, stop: threading.Event) -> None:
    with Live(console=Console(), refresh_per_second=2) as live:
        for values in _snapshots(board, stop, every_s=0.5):
            table = Table(*COLUMNS)
            for fold in folds:
                table.add_row(*row_of(fold, values.get(fold), num_epochs, time.time()))
            live.update(table)


def _show_lines(board: Any, folds: Sequence[int], num_epochs: int, stop: threading.Event) -> None:
    shown: dict[int, tuple[Any, Any]] = {}
    said_s = dict.fromkeys(folds, time.monotonic())
    for snapshot in _snapshots(board, stop, every_s=1.0):
        for fold in folds:
            values, now_s = snapshot.get(fold, {}), time.monotonic()
            mark = (values.get("train_loss"), "num_maps" in values)
            due = not _is_done(values) and now_s - said_s[fold] > LINE_EVERY_S
            if due or mark != shown.get(fold, (None, False)):
                shown[fold], said_s[fold] = mark, now_s
                cells = row_of(fold, values or None, num_epochs, time.time())
                line = (f"{name} {cell}" for name, cell in zip(COLUMNS, cells, strict=True) if cell)
                print("  ".join(line), flush=True)


def _show_nothing(board: Any, folds: Sequence[int], num_epochs: int, stop: threading.Event) -> None:
    for _ in _snapshots(board, stop, every_s=1.0):
        pass


def _snapshots(board: Any, stop: threading.Event, *, every_s: float) -> Iterator[dict[int, dict[str, Any]]]:
    """Yield the folds' values now and then, and once more at the end; where Ray is gone, the run itself says so."""
    stopped, told, counted = False, dict[int, Any](), dict[tuple[int, str], int]()
    while not stopped:
        stopped = stop.wait(every_s)
        try:
            values = ray.get(board.snapshot.remote())
        except RayError:
            return
        for fold, known in values.items():
            ended = (known.get("train_loss"), known.get("val_dice"))  # of the last epoch; its row is written by now
            if ended != told.setdefault(fold, (None, None)):
                told[fold] = ended
                tracking.log_fold(fold)
                run_log.event("fold", fold=fold, **{key: known.get(key) for key in SHOWN})
            for items, number in finished(known).items():
                run_metrics.done(number - counted.get((fold, items), 0), items)
                counted[fold, items] = number
            for key, figure in SHOWN.items():
                run_metrics.show(figure, known.get(key), fold=str(fold))
        yield values


def finished(values: Mapping[str, Any]) -> dict[str, int]:
    """Return how many of what a fold has finished since the run's process began."""
    return {"epochs": values.get("num_ended", 0), "maps": min(values.get("maps", 0), values.get("num_maps", 0))}


def _is_done(values: Mapping[str, Any]) -> bool:
    return bool(values.get("maps", 0) >= values.get("num_maps", float("inf")))


def _doing(values: Mapping[str, Any]) -> str:
    """Say what a fold is at."""
    if _is_done(values):
        return "done"
    if "num_maps" in values:
        return f"maps {values.get('maps', 0)}/{values['num_maps']}"
    for what in ("reading", "validating"):
        if values.get(what):
            return f"{what} {values[what]}"
    return "training"


def row_of(fold: int, values: dict[str, Any] | None, num_epochs: int, now: float) -> list[str]:
    """Return a fold's cells, in the order of `COLUMNS`; what is not known yet is empty."""
    if values is None:
        return [str(fold), "waiting", *[""] * (len(COLUMNS) - 2)]
    state, epoch = _doing(values), values.get("epoch", 0)
    step, steps = values.get("step", 0), values.get("steps", 1)
    part, rate = step / steps, values.get("images_per_s")
    finished = epoch - values.get("first_epoch", epoch) + part
    eta = ""
    if finished > 0 and state == "training":
        eta = duration((now - values["started"]) / finished * (num_epochs - epoch + 1 - part))
    return [
        str(fold),
        state,
        f"{epoch}/{num_epochs}" + (f" step {step}/{steps}" if 0 < step < steps else ""),
        *(_number(values.get(name)) for name in ("train_loss", "val_dice", "val_precision", "val_recall")),
        f"{values['lr']:.1e}" if "lr" in values else "",
        "" if rate is None else f"{rate:.1f}",
        eta,
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
