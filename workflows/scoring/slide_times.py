"""How long score_slides took: seconds of each step, of each slide and of all, and how busy the actors were."""

from collections import defaultdict
from typing import Any

from workflows import run_metrics
from workflows.progress import duration


class SlideTimes:
    """Adds up the seconds of a run's steps."""

    def __init__(self) -> None:
        self._of_slide: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._of_step: defaultdict[str, float] = defaultdict(float)
        self._gpu_watched_s = self._gpu_busy_s = 0.0
        self._first_s = self._inference_s = self._after_s = 0.0

    def add(self, slide_id: str, **seconds: float | None) -> None:
        """Add what steps of a slide took."""
        for step, value in seconds.items():
            self._of_slide[slide_id][step] += value or 0.0
            self._of_step[step] += value or 0.0
            run_metrics.count("stas_step_seconds", value or 0.0, step=step.removesuffix("_s"))

    def add_gpu(self, watched_s: float | None, busy_s: float | None) -> None:
        """Add how long a GPU was watched, and how much of that it was busy."""
        self._gpu_watched_s += watched_s or 0.0
        self._gpu_busy_s += busy_s or 0.0
        run_metrics.show("stas_gpu_busy", self.gpu_busy)

    def add_window(self, *, first_s: float, inference_s: float, after_s: float) -> None:
        """Add how long slides took that were predicted together, by the clock.

        Args:
            first_s: until their first block was kept: pipeline and actors start meanwhile.
            inference_s: until their last block was kept.
            after_s: from then on, until the last of them was finished.
        """
        self._first_s += first_s
        self._inference_s += inference_s
        self._after_s += after_s

    def of(self, slide_id: str) -> dict[str, float]:
        """Return the seconds of each step of a slide, so far."""
        return dict(self._of_slide[slide_id])

    @property
    def gpu_busy(self) -> float | None:
        """Return which share of the time the GPUs were busy; None: there is none, or it does not say."""
        return self._gpu_busy_s / self._gpu_watched_s if self._gpu_watched_s else None

    @property
    def actors_busy(self) -> float | None:
        """Return which share of their time actors predicted, from when they were loaded to their last block.

        The rest they waited for pixels. None: nothing was predicted.
        """
        predict_s, idle_s = (self._of_step.get(step, 0.0) for step in ("predict_s", "idle_s"))
        return predict_s / (predict_s + idle_s) if predict_s else None

    def facts(self) -> dict[str, Any]:
        """Return all figures, for the manifest."""
        shares = {"actors_busy": self.actors_busy, "gpu_busy": self.gpu_busy}
        clock = {"first_block_s": self._first_s, "inference_s": self._inference_s, "after_inference_s": self._after_s}
        return {
            **{name: None if share is None else round(share, 3) for name, share in shares.items()},
            **{name: round(seconds, 1) for name, seconds in clock.items()},
            "steps_s": {step: round(seconds, 1) for step, seconds in self._of_step.items()},
        }

    def lines(self) -> list[str]:
        """Describe where the time went."""
        parts = [f"{step.removesuffix('_s')} {seconds:.1f} s" for step, seconds in self._of_step.items()]
        found = [f"{', '.join(parts)} (summed over workers)"] if parts else []
        if (busy := self.actors_busy) is not None:
            gpu = "" if self.gpu_busy is None else f", GPU busy {self.gpu_busy:.0%}"
            found.append(
                f"inference {duration(self._inference_s)}, its first block after {duration(self._first_s)}: "
                f"actors busy {busy:.0%}{gpu}; finishing went on for {duration(self._after_s)} after it"
            )
        return found
