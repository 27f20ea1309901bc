"""Waiting for Ray with an eye on the cluster: Ray itself waits without end for what no node can hold any more."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from stas_core.errors import ResourceError
from workflows.cluster import Node, address_of, cluster_nodes, describe, live_nodes, own_error
from workflows.node_faults import NodeFault, beside

if TYPE_CHECKING:
    from ray.data import Dataset

LOOK_S = 2.0
"""How often the driver looks at the cluster while nothing comes in."""
NODE_LOOK_S = 10.0
"""How often it looks for a first node."""
NODE_TIMEOUT_S = 1800.0
"""How long it waits for one that an autoscaler may add."""

T = TypeVar("T")
Look = Callable[[], None]
"""Returns where a node has room for what is waited for, waits for one that may come, or raises ResourceError."""


@dataclass(frozen=True)
class Need:
    """What each of some tasks asks of a node; `what` is one of them, for messages."""

    what: str
    cpus: float = 1.0
    gpus: float = 0.0
    avoid: frozenset[str] = frozenset()
    """Ids of nodes that get none of them."""
    fault: NodeFault | None = None
    """For which the latest of these was left out while the tasks ran."""

    def task(self, function: Callable[..., Any]) -> Any:
        """Return a function as a remote one that asks for this."""
        import ray

        return ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, label_selector=beside(self.avoid))(function)

    def on_other_nodes(self, error: Exception) -> "Need":
        """Leave out the node that a task's error blames, and return what others are to be asked for.

        Raises:
            NodeFault: no other node has room, nor will one come.
            Exception: the error, if it blames no node.
        """
        fault = own_error(error)
        if not isinstance(fault, NodeFault):
            raise error
        rest = replace(self, avoid=self.avoid | {fault.node_id}, fault=fault)
        try:
            rest.require(cluster_nodes())
        except ResourceError:
            raise rest._no_other(fault) from None
        if fault.node_id not in self.avoid:
            print(f"node {address_of(fault.node_id)} is left out: {fault}", flush=True)
        return rest

    def look(self) -> None:
        """See that a live node has room for one, or wait for a node that an autoscaler may add.

        Raises:
            ResourceError: there is none, and none is to come; the message has the arithmetic.
            NodeFault: the same, where a node was left out.
        """
        try:
            await_room(lambda: self.require(live_nodes()), lambda: self.require(cluster_nodes()), self.what)
        except ResourceError as error:
            raise error if self.fault is None else self._no_other(self.fault) from None

    def _no_other(self, fault: NodeFault) -> NodeFault:
        where = f"node {address_of(fault.node_id)}"
        return NodeFault(f"{where}: {fault} (no other node has room for {self.what})", fault.node_id)

    def require(self, nodes: Sequence[Node]) -> None:
        """See that one of these nodes has room.

        Raises:
            ResourceError: none has; the message has the arithmetic.
        """
        for node in nodes:
            by_gpu = node.fitting(self.gpus)
            if node.node_id not in self.avoid and node.num_cpus >= self.cpus - 1e-9 and (by_gpu is None or by_gpu > 0):
                return
        raise ResourceError(
            f"{describe(nodes)}: none has room for {self.what}, of {self.cpus:g} CPU and {self.gpus:g} GPU; bring lost "
            "nodes back or add others, and run the same command again"
        )


def await_room(
    now: Callable[[], T],
    ever: Callable[[], object],
    what: str,
    *,
    timeout_s: float = NODE_TIMEOUT_S,
    ask: Callable[[], None] = lambda: None,
) -> T:
    """Return what fits the cluster; where nothing does, wait for nodes as long as some may come.

    Args:
        now: returns what fits the live nodes; raises ResourceError where nothing does.
        ever: the same for the live nodes and those that an autoscaler may add.
        what: is to fit on a node.
        ask: asks the autoscaler for nodes; tasks that are waiting ask by themselves.

    Raises:
        ResourceError: nothing fits, and no node is to come, or none came in time.
    """
    began = time.monotonic()
    while True:
        try:
            return now()
        except ResourceError:
            ever()
            if time.monotonic() - began > timeout_s:
                raise
            print(f"waiting for a node that {what} fits on", flush=True)
            ask()
            time.sleep(NODE_LOOK_S)


def first_of(references: Sequence[Any], look: Look) -> Any:
    """Return the reference of a task that is done; look at the cluster while none is."""
    import ray

    while True:
        ready, _ = ray.wait(list(references), timeout=LOOK_S)
        if ready:
            return ready[0]
        look()


def results(references: Sequence[Any], look: Look) -> list[Any]:
    """Return what tasks have returned; look at the cluster while one is not done."""
    import ray

    return [ray.get(first_of([reference], look)) for reference in references]


def end_task(reference: Any) -> None:
    """End a task that has not ended: Ray 2.60 aborts the driver that cancels one whose result is just coming in."""
    import ray

    if not ray.wait([reference], timeout=0)[0]:
        ray.cancel(reference, force=True)


def streamed(pipeline: "Dataset", look: Look) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Ray Data pipeline as they come; look at the cluster now and then."""
    from workflows.ray_internals import EndedByLook, looked_at

    try:
        yield from looked_at(pipeline, look, LOOK_S).iter_rows()
    except EndedByLook as error:
        raise (error.__cause__ or error) from None
