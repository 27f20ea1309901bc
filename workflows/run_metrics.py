"""What monitoring sees of a run, through the exporters of Ray's nodes; cluster/monitoring draws it.

Each figure bears the stage, the folder and the id of its run. Where no Ray is open there is nobody to see it.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Figure:
    """A figure of a run; Prometheus knows it as `ray_<name>`, counters with `_total` behind."""

    kind: Literal["counter", "gauge"]
    what: str
    labels: tuple[str, ...] = ()
    """Beside `stage`, `run` and `run_id`."""


FIGURES: Mapping[str, Figure] = {
    "stas_items_done": Figure("counter", "Images, slides, blocks, maps or settings done", ("items",)),
    "stas_items_failed": Figure("counter", "Images or slides that failed", ("reason",)),
    "stas_step_seconds": Figure("counter", "Seconds of each step, summed over processes", ("step",)),
    "stas_restarts": Figure("counter", "Times that a pipeline was started anew for what was left"),
    "stas_actors": Figure("gauge", "Actors that predict"),
    "stas_gpu_busy": Figure("gauge", "Share of the time that GPUs were busy predicting, so far"),
    "stas_fold_epoch": Figure("gauge", "Epoch that a fold is in", ("fold",)),
    "stas_fold_loss": Figure("gauge", "Training loss of a fold's last epoch", ("fold",)),
    "stas_fold_dice": Figure("gauge", "Validation Dice of a fold's last validation", ("fold",)),
    "stas_fold_images_per_second": Figure("gauge", "Training images a second of a fold", ("fold",)),
}
_run: ContextVar[Mapping[str, str] | None] = ContextVar("run", default=None)
_made: dict[str, Any] = {}


@contextmanager
def of_run(stage: str, out: str, run_id: str) -> Iterator[None]:
    """Attribute what the block counts and shows to a run."""
    token = _run.set({"stage": stage, "run": out, "run_id": run_id})
    try:
        yield
    finally:
        _run.reset(token)


def count(name: str, value: float = 1.0, **labels: str) -> None:
    """Add to a counter of the run."""
    if value > 0 and (found := _metric(name)) is not None:
        found.inc(value, tags={**(_run.get() or {}), **labels})


def show(name: str, value: float | None, **labels: str) -> None:
    """Set a gauge of the run; None: it is not known.

    What is not set anew within seconds is no longer exported.
    """
    if value is not None and (found := _metric(name)) is not None:
        found.set(value, tags={**(_run.get() or {}), **labels})


def _metric(name: str) -> Any:
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or _run.get() is None:
        return None
    if name not in _made:
        from ray.util.metrics import Counter, Gauge

        figure = FIGURES[name]
        cls = {"counter": Counter, "gauge": Gauge}[figure.kind]
        _made[name] = cls(name, description=figure.what, tag_keys=("stage", "run", "run_id", *figure.labels))
    return _made[name]
