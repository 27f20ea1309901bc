"""How far a scoring run is, and where its time went."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from stas_core import failures
from stas_core.failures import Failure
from stas_core.scored_runs import ScoredRun
from workflows import run_log, run_metrics
from workflows.progress import Progress, duration
from workflows.scoring.plan import ScorePlan
from workflows.scoring.tasks import STEPS


class ImageProgress:
    """Counts images, prints progress, and adds up the time of each step."""

    def __init__(self, total: int, plan: ScorePlan, num_cpus: float):
        self._progress = Progress(total)
        self._cpus = num_cpus
        self._plan = plan
        self._done = 0
        self._failed: list[Failure] = []
        self._seconds = dict.fromkeys((*STEPS, "gpu_watched_s", "gpu_busy_s"), 0.0)
        self._start = time.monotonic()

    def follow(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Consume the finished rows of a pipeline, until it ends."""
        try:
            for row in rows:
                self._add(row)
        finally:
            run_metrics.forget("stas_gpu_busy")

    def _add(self, row: Mapping[str, Any]) -> None:
        self._done += 1
        if row["reason"] is not None:
            self._failed.append(Failure(row["id"], ScoredRun.STAGE, row["reason"], ""))  # its record says more
            run_metrics.count("stas_items_failed", reason=row["reason"])
            run_log.count("failed")
        for key in self._seconds:
            self._seconds[key] += row[key] or 0.0
            if key in STEPS:
                run_metrics.count("stas_step_seconds", row[key] or 0.0, step=key.removesuffix("_s"))
        watched = self._seconds["gpu_watched_s"]
        if row["gpu_watched_s"]:  # not one that is finished from its map
            run_metrics.show("stas_gpu_busy", self._seconds["gpu_busy_s"] / watched)
        gpu = f"{self._seconds['gpu_busy_s'] / watched:.0%}" if watched else "n/a"
        self._progress.step(facts=f"GPU busy {gpu}, {len(self._failed)} failed")

    def tell_reasons(self) -> None:
        """Print how many images have failed so far, and why."""
        if self._failed:
            print(f"failed: {failures.count_reasons(self._failed)}", flush=True)

    def summarise(self) -> None:
        """Print the seconds of each step, and which one is the bottleneck."""
        if self._done == 0:
            return
        slots = self._plan.task_slots(self._cpus)
        steps = {"decode": "decode_s", "predict": "predict_s", "post-process": "postprocess_s", "write": "write_s"}
        load = {
            name: self._seconds[key] / (self._plan.actors if name == "predict" else slots)
            for name, key in steps.items()
        }
        parts = ", ".join(f"{name} {self._seconds[key]:.1f} s" for name, key in steps.items())
        print(f"{self._done} images in {duration(time.monotonic() - self._start)}: {parts} (summed over workers)")
        print(f"bottleneck: {max(load, key=lambda name: load[name])}")
