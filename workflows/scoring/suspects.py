"""Which images are in work, announced before each step begins: after a crash these are the suspects.

A step waits until its images are noted, so a process that dies has always told of them. The ledger is an actor on the
driver's node: it outlives the processes that tell it, and loads nothing heavy.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

T = TypeVar("T")
Step = Callable[[pa.Table], pa.Table]
ANSWER_S = 30.0


class Ledger:
    """Counts how often a step was begun on each image; what a worker began before its latest step is done."""

    def __init__(self) -> None:
        self._latest: dict[str, list[tuple[str, str]]] = {}
        self._begun: Counter[tuple[str, str]] = Counter()

    def begin(self, worker: str, step: str, ids: Sequence[str]) -> None:
        """Record what a worker is about to begin."""
        for done in self._latest.get(worker, ()):
            del self._begun[done]
        self._latest[worker] = [(step, image_id) for image_id in ids]
        self._begun.update(self._latest[worker])

    def begun(self) -> list[tuple[str, int]]:
        """Return each image of a step that was begun and not followed by the worker's next, and how often it was."""
        return [(image_id, times) for (_, image_id), times in self._begun.items()]


def start_ledger() -> Any:
    """Start a ledger's actor beside the driver and return its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=here).remote()


def suspected(ledger: Any, unfinished: Collection[str]) -> list[str]:
    """Return the unfinished images that were begun most often: one that ends its process is begun with each retry."""
    try:
        begun: list[tuple[str, int]] = ray.get(ledger.begun.remote(), timeout=ANSWER_S)
    except (ray.exceptions.RayError, TimeoutError):  # the ledger's own process was killed: no suspects
        return []
    times = {image_id: count for image_id, count in sorted(begun, key=lambda one: one[1]) if image_id in unfinished}
    return [image_id for image_id, count in times.items() if count == max(times.values())]


def announced(ledger: Any, name: str, step: Step, table: pa.Table) -> pa.Table:
    """Tell the ledger which images a step begins, wait until that is noted, and do the step."""
    worker = ray.get_runtime_context().get_worker_id()
    ray.get(ledger.begin.remote(worker, name, table["id"].to_pylist()))
    return step(table)


class Announced:
    """An actor's step that is announced."""

    def __init__(self, ledger: Any, name: str, make: Callable[[], Step]):
        self._ledger, self._name, self._step = ledger, name, make()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Announce the rows, then do the step."""
        return announced(self._ledger, self._name, self._step, table)


@dataclass
class Blame(Generic[T]):
    """Who is to blame for pipelines that failed: one of their images, or the machine."""

    crashed: list[tuple[T, str]] = field(default_factory=list)
    """Images that failed alone twice since an image was last finished, with the reason."""
    _num_failed: int = 0
    """Pipelines of several images that failed since."""
    _alone: set[str] = field(default_factory=set)

    @property
    def failures(self) -> int:
        """Failures since an image was last finished; if there are many, perhaps no image is to blame."""
        return max(self._num_failed, len(self.crashed))

    def divide(self, rest: Sequence[tuple[T, bool]]) -> tuple[list[T], list[T]]:
        """Split the unfinished images of a failed pipeline into those to run now and those (suspects) to hold back.

        Where one pipeline after the other finishes nothing, the next begins ever further on: images that can be
        finished, which shows that all else is well, may lie behind many that cannot.
        """
        self._num_failed += 1
        others = [item for item, is_suspect in rest if not is_suspect]
        start = (2 ** (self._num_failed - 1) - 1) % max(1, len(others))
        return others[start:] + others[:start], [item for item, is_suspect in rest if is_suspect]

    def failed_alone(self, image_id: str, item: T, reason: str) -> bool:
        """Note that a pipeline failed over one image alone; return whether to retry it."""
        if image_id in self._alone:
            self.crashed.append((item, reason))
            return False
        self._alone.add(image_id)
        return True

    def settle(self) -> list[tuple[T, str]]:
        """Forget all failures, as an image was finished; return the images that are to blame for their own."""
        self._num_failed = 0
        crashed, self.crashed = self.crashed, []
        return crashed
