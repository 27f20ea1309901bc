"""What is measured before the pipelines begin: in a task with an actor's resources, on a node that can do it."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray

from workflows.cluster import own_error
from workflows.node_faults import NodeFault, beside, naming_this_node
from workflows.scoring.plan import ScorePlan, ScoreResources
from workflows.scoring.restarts import fit_to_cluster, fits_beside, leave_out, reason_of
from workflows.scoring.suspects import NodeBlame
from workflows.waiting import end_task, first_of

R = TypeVar("R")


class NotMeasured(Exception):
    """Nothing came of a measurement, and no node is known to be at fault; what is measured may be."""


def rehearse(step: Callable[[], R], wanted: ScoreResources, plan: ScorePlan, *, num_items: int = 1) -> R:
    """Return what a step returns, with an actor's resources; a node that lacks what it promises is left out.

    To be called within `asking_for_nodes`: where no actor fits, nodes are asked for.

    Args:
        num_items: how many items are to do later, which tells how many nodes to ask for.

    Raises:
        NodeFault: no other node holds an actor.
        ResourceError: nodes were lost, and what is left cannot hold an actor.
        NotMeasured: the task failed, or took too long.
        StasError: the step met what no further attempt mends.
    """
    hosts, began = NodeBlame(), time.monotonic()
    fault: NodeFault | None = None

    def look() -> None:
        if fault is not None and not fits_beside(wanted, plan, hosts.left_out):  # the others have been lost since
            leave_out(hosts, fault, wanted, plan)
        fit_to_cluster(plan, wanted, hosts.left_out, num_items=num_items)
        if time.monotonic() - began > wanted.stall_timeout_s:
            raise NotMeasured(f"nothing was measured within {wanted.stall_timeout_s:g} s")

    while True:
        reference = _start(step, plan, hosts.left_out)
        try:
            measured: R = ray.get(first_of([reference], look))
            return measured
        except ray.exceptions.RayError as error:
            own = own_error(error)
            if own is None:
                raise NotMeasured(reason_of(error)) from error
            if not isinstance(own, NodeFault):
                raise own from None
            fault = own
            leave_out(hosts, fault, wanted, plan)
        finally:
            end_task(reference)


def _start(step: Callable[[], Any], plan: ScorePlan, avoid: set[str]) -> Any:
    task: Any = ray.remote(
        num_cpus=plan.cpus_per_actor, num_gpus=plan.gpus_per_actor, max_retries=1, label_selector=beside(avoid)
    )(_here)
    return task.remote(step)


def _here(step: Callable[[], R]) -> R:
    with naming_this_node():
        return step()
