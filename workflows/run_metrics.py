"""What monitoring sees of a run, through the exporters of Ray's nodes; cluster/monitoring draws it.

Each figure bears the stage, the folder and the id of its run. Where no Ray is open there is nobody to see it.

A gauge that a process does not tell again is exported for 20 s more, and so tells whether its run is at work. Counters
stay in the exporter until its node ends, long after the run: what asks for them asks for `stas_running` as well.
"""

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

from stas_core.spelling import without_password

TELL_EVERY_S = 5.0
"""How often gauges are told again; Ray drops those that were not told between two of its reports, 10 s apart."""


@dataclass(frozen=True)
class Figure:
    """A figure of a run; Prometheus knows it as `ray_<name>`, counters with `_total` behind."""

    kind: Literal["counter", "gauge"]
    what: str
    labels: tuple[str, ...] = ()
    """Beside `stage`, `run` and `run_id`."""


FIGURES: Mapping[str, Figure] = {
    "stas_running": Figure("gauge", "1 as long as the run is at work"),
    "stas_quiet_seconds": Figure("gauge", "Seconds since the run, or a stage within it, has finished anything"),
    "stas_items_done": Figure("counter", "Images, slides, blocks, maps, settings, epochs or trials done", ("items",)),
    "stas_items_failed": Figure("counter", "Images or slides that could not be prepared or scored", ("reason",)),
    "stas_step_seconds": Figure("counter", "Seconds of each step, summed over processes", ("step",)),
    "stas_restarts": Figure("counter", "Times that a pipeline was started anew for what was left"),
    "stas_actors": Figure("gauge", "Actors that predict"),
    "stas_gpu_busy": Figure("gauge", "Share of the time that GPUs were busy predicting, so far"),
    "stas_fold_epoch": Figure("gauge", "Epoch that a fold is in", ("fold",)),
    "stas_fold_loss": Figure("gauge", "Training loss of a fold's last epoch", ("fold",)),
    "stas_fold_dice": Figure("gauge", "Validation Dice of a fold's last validation", ("fold",)),
    "stas_fold_images_per_second": Figure("gauge", "Training images a second of a fold", ("fold",)),
}


@dataclass
class _Run:
    """Whose the figures are, and what its gauges show."""

    labels: Mapping[str, str]
    heard_s: float
    """When it last finished something, or began."""
    gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)
    is_at_stage: bool = False
    """A stage runs within it, which is the one to finish things."""

    def tell(self) -> None:
        """Set its gauges anew."""
        if not self.is_at_stage:
            _set("stas_quiet_seconds", time.monotonic() - self.heard_s, self.labels)
        for (name, labels), value in self.gauges.copy().items():
            _set(name, value, {**self.labels, **dict(labels)})


_run: ContextVar[_Run | None] = ContextVar("run", default=None)
_made: dict[str, Any] = {}


@contextmanager
def of_run(stage: str, out: str, run_id: str) -> Iterator[None]:
    """Attribute what the block counts and shows to a run, which is at work as long as the block is.

    Args:
        stage: its name.
        out: its folder; a password in it is not shown.
        run_id: another one for each start.
    """
    outer = _run.get()
    run = _Run({"stage": stage, "run": without_password(out), "run_id": run_id}, time.monotonic())
    token, ended = _run.set(run), threading.Event()
    thread = threading.Thread(target=_keep_telling, args=(run, ended), name="metrics", daemon=True)
    show("stas_running", 1.0)
    if outer is not None:
        outer.is_at_stage = True
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _run.reset(token)
        if outer is not None:
            outer.is_at_stage, outer.heard_s = False, time.monotonic()


def _keep_telling(run: _Run, ended: threading.Event) -> None:
    while not ended.wait(TELL_EVERY_S):
        run.tell()


def done(number: float, items: str) -> None:
    """Count items that the run has finished."""
    if number > 0 and (run := _run.get()) is not None:
        run.heard_s = time.monotonic()
        count("stas_items_done", number, items=items)


def count(name: str, value: float = 1.0, **labels: str) -> None:
    """Add to a counter of the run."""
    if value > 0 and (run := _run.get()) is not None and (found := _metric(name)) is not None:
        found.inc(value, tags={**run.labels, **labels})


def show(name: str, value: float | None, **labels: str) -> None:
    """Have a gauge of the run show a value until it is to forget it, or the run ends; None: it is not known."""
    if value is not None and (run := _run.get()) is not None:
        run.gauges[name, tuple(labels.items())] = value
        _set(name, value, {**run.labels, **labels})


def forget(name: str) -> None:
    """Have a gauge of the run show nothing any more, whatever its labels: what it told of has ended."""
    if (run := _run.get()) is not None:
        for key in [key for key in run.gauges.copy() if key[0] == name]:
            del run.gauges[key]


def _set(name: str, value: float, labels: Mapping[str, str]) -> None:
    if (found := _metric(name)) is not None:
        found.set(value, tags=dict(labels))


def _metric(name: str) -> Any:
    """Return the figure as Ray has it; None: no Ray is open."""
    is_open = getattr(sys.modules.get("ray"), "is_initialized", None)  # another thread may be importing Ray just now
    if is_open is None or not is_open():
        return None
    if name not in _made:
        from ray.util.metrics import Counter, Gauge

        figure = FIGURES[name]
        cls = {"counter": Counter, "gauge": Gauge}[figure.kind]
        _made[name] = cls(name, description=figure.what, tag_keys=("stage", "run", "run_id", *figure.labels))
    return _made[name]
