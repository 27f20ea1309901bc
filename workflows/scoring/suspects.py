"""Which images are in work and on which node, announced before each step begins: after a crash these are the suspects.

A step waits until its images are noted, so a process that dies has always told of them. The ledger is an actor on the
driver's node: it outlives the processes that tell it, and loads nothing heavy. A node that fails whatever it is given
(a full disk, a broken driver) is told from bad images by running one of its suspects elsewhere.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import pyarrow as pa
import ray

from workflows.cluster import this_node
from workflows.node_faults import naming_this_node

T = TypeVar("T")
Step = Callable[[pa.Table], pa.Table]
ANSWER_S = 30.0
SUSPICIOUS_FAILURES = 2
"""Pipelines that fail over images of one node alone before one of these images is run on another node at once."""


class Ledger:
    """Counts how often a step was begun on each image; what a worker began before its latest step is done."""

    def __init__(self) -> None:
        self._latest: dict[str, list[tuple[str, str]]] = {}
        self._begun: dict[str, Counter[str]] = {}
        """By image, how often each step."""
        self._nodes: dict[str, str] = {}
        """Of these images alone: of a run of millions, few are begun at any time."""

    def begin(self, worker: str, step: str, ids: Sequence[str], node: str = "") -> None:
        """Record what a worker is about to begin, and on which node."""
        for done_step, image_id in self._latest.get(worker, ()):
            steps = self._begun.get(image_id, Counter())
            del steps[done_step]
            if not steps:
                self._begun.pop(image_id, None)
                self._nodes.pop(image_id, None)
        self._latest[worker] = [(step, image_id) for image_id in ids]
        for image_id in ids:
            self._begun.setdefault(image_id, Counter())[step] += 1
        self._nodes |= dict.fromkeys(ids, node)

    def begun(self) -> list[tuple[str, int, str]]:
        """Return each image of a step that was begun and not followed by the worker's next, how often, where last."""
        return [
            (image_id, times, self._nodes[image_id])
            for image_id, steps in self._begun.items()
            for times in steps.values()
        ]


def start_ledger() -> Any:
    """Start a ledger's actor beside the driver and return its handle."""
    return ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=this_node()).remote()


def in_work(ledger: Any, unfinished: Collection[str]) -> list[tuple[str, int, str]]:
    """Return the unfinished images that are in a step, as `Ledger.begun` does."""
    try:
        begun: list[tuple[str, int, str]] = ray.get(ledger.begun.remote(), timeout=ANSWER_S)
    except (ray.exceptions.RayError, TimeoutError):  # the ledger's own process was killed: nobody knows
        return []
    return [one for one in begun if one[0] in unfinished]


def suspected(begun: Sequence[tuple[str, int, str]]) -> dict[str, str]:
    """Return those of the images in work that were begun most often, and the node where each was begun last.

    One that ends its process is begun with each retry.
    """
    left = sorted(begun, key=lambda one: one[1])
    times = {image_id: count for image_id, count, _ in left}
    return {image_id: node for image_id, _, node in left if times[image_id] == max(times.values())}


def announced(ledger: Any, name: str, step: Step, table: pa.Table) -> pa.Table:
    """Tell the ledger which images a step begins, wait until that is noted, and do the step."""
    here = ray.get_runtime_context()
    ray.get(ledger.begin.remote(here.get_worker_id(), name, table["id"].to_pylist(), here.get_node_id()))
    return step(table)


class Announced:
    """An actor's step that is announced."""

    def __init__(self, ledger: Any, name: str, make: Callable[[], Step]):
        self._ledger, self._name = ledger, name
        with naming_this_node():
            self._step = make()

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


@dataclass
class NodeBlame:
    """Tells a node that fails whatever it is given from images that fail everywhere."""

    left_out: set[str] = field(default_factory=set)
    """Nodes that get no more work."""
    _failures: Counter[str] = field(default_factory=Counter)
    """Pipelines all of whose suspects were begun on one node, by node."""
    _failed_on: dict[str, set[str]] = field(default_factory=dict)
    """Nodes on which each suspect was begun last when a pipeline failed."""

    def note(self, suspects: Mapping[str, str]) -> bool:
        """Note a failed pipeline; tell whether its node is to be put on trial: a suspect is to run elsewhere now."""
        for item_id, node in suspects.items():
            self._failed_on.setdefault(item_id, set()).add(node)
        nodes = set(suspects.values()) - {""}
        self._failures.update(nodes if len(nodes) == 1 else ())
        return len(nodes) == 1 and self._failures[min(nodes)] >= SUSPICIOUS_FAILURES

    def to_avoid(self, ids: Sequence[str]) -> list[set[str]]:
        """Return which nodes these images should not run on, the best choice first."""
        failed = self._failed_on.get(ids[0], set()) - {""} if len(ids) == 1 else set()
        return [self.left_out | failed, self.left_out, failed - self.left_out]

    def finished(self, item_id: str) -> set[str]:
        """Note that an image was finished; return the nodes to leave out: they failed it, and others too."""
        nodes = {node for node in self._failed_on.pop(item_id, ()) if self._failures[node] >= SUSPICIOUS_FAILURES}
        new = nodes - self.left_out
        self.left_out |= new
        return new

    def at_fault(self, item_id: str) -> None:
        """Note that an image is to blame for its own failures: the nodes on which it failed are acquitted of one."""
        for node in self._failed_on.pop(item_id, ()):
            self._failures[node] = max(0, self._failures[node] - 1)
