"""Pipelines of Ray Data that are started anew until every item is finished or known to be at fault.

A pipeline runs inside a Ray task of its own on the driver's node. Where nodes are lost or joined, or nothing moves any
more, the driver ends that task, and with it everything the pipeline owns, and starts one that fits the cluster anew.
Nothing is lost by that: finished items have their records, the others are simply still to do.
"""

import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypedDict, TypeVar, cast

import pyarrow as pa
import ray
import ray.data

from stas_core.errors import ResourceError, StasError
from workflows import run_log, run_metrics
from workflows.autoscaling import ask_for, asking_for_nodes, node_groups
from workflows.cluster import (
    Node,
    address_of,
    cluster_nodes,
    live_nodes,
    lost_nodes,
    own_error,
    quieten_ray_data,
    this_node,
)
from workflows.node_faults import NodeFault, beside
from workflows.ray_internals import ask_for_no_nodes, limit_run_ahead
from workflows.scoring.guarded_reader import LimitsConfig
from workflows.scoring.plan import ScorePlan, ScoreResources, actors_on, plan_scoring
from workflows.scoring.suspects import Blame, NodeBlame, in_work, start_ledger, suspected
from workflows.waiting import LOOK_S, await_room

SETTLED_S = 20.0
"""Seconds that a pipeline runs before it is started anew for the sake of nodes that joined."""
MAX_FRUITLESS = 8
"""Pipelines in a row that finished nothing, or images that failed alone, before an image that was finished is run
again, to tell a broken machine from bad images."""


class Identified(TypedDict):
    """What every row has, of an item and of what came of it."""

    id: str


class Finished(Identified):
    """What every row has of an item that is finished."""

    reason: str | None
    """Code of why it failed; None: it did not."""


T = TypeVar("T", bound=Identified, contravariant=True)
F = TypeVar("F", bound=Finished)


class Job(Protocol[T, F]):
    """What a pipeline does to its items: all that their results depend on, nothing about the cluster."""

    @property
    def what(self) -> str:
        """Return what its items are called, such as images."""

    @property
    def limits(self) -> LimitsConfig:
        """Return beyond which limits an item is given up."""

    def record_crash(self, item: T, cause: str) -> list[F]:
        """Record that an item ended every process that worked on it; return its finished rows."""


Pipeline = Callable[[ray.data.Dataset, Any, ScorePlan, Any], ray.data.Dataset]
"""From a dataset of items to one of finished rows; besides, the job, its plan, and the ledger that its steps tell of
what they begin."""


def run_restarting(
    pipeline: Pipeline,
    work: Job[T, F],
    items: Sequence[T],
    wanted: ScoreResources,
    plan: ScorePlan,
    finished: T | None = None,
) -> Iterator[F]:
    """Run the pipeline until every item (an image, a slide, a block of one) is finished or recorded as failed.

    Where one fails, the items that it had begun are suspects: the others go on, and the suspects are run alone at the
    end, on another node if there is one. One that fails alone twice is recorded as failed, as soon as another item
    shows that all else is well. A node over whose items pipelines fail is left out if one of them can be finished
    elsewhere. As nodes come and go, the pipeline is started anew to fit them.

    Raises:
        StasError: nothing can be finished any more, not even an item that was finished before (or none ever was): the
            fault is not the items'.
    """
    with asking_for_nodes():
        yield from _until_settled(pipeline, work, items, wanted, plan, finished)


def ask_for_nodes(plan: ScorePlan, wanted: ScoreResources, num_items: int, avoid: Collection[str] = ()) -> None:
    """Ask the autoscaler, if there is one, for the nodes on which so many items keep an actor busy, and no more.

    To be called within `asking_for_nodes`, now and then: only the last request counts, and Ray Data puts in one every
    20 seconds, for nothing.
    """
    if not node_groups():
        return
    blocks = math.ceil(num_items / plan.images_per_block)
    left = math.ceil(min(blocks, wanted.actors or blocks) / plan.share - 1e-9)
    shapes = []
    for node in cluster_nodes():
        fitting = actors_on(
            node, plan.gpus_per_actor, plan.cpus_per_actor, plan.cpus_per_task, wanted.threads_per_actor
        )
        if fitting and (left > 0 or node.node_id in avoid):  # those to avoid count as there for the autoscaler
            shapes.append({"CPU": node.num_cpus} | ({"GPU": node.num_gpus} if node.num_gpus else {}))
            left -= 0 if node.node_id in avoid else fitting
    ask_for(shapes)


def _until_settled(
    pipeline: Pipeline,
    work: Job[T, F],
    items: Sequence[T],
    wanted: ScoreResources,
    plan: ScorePlan,
    finished: T | None,
) -> Iterator[F]:
    groups, blame, hosts = deque([list(items)]), Blame[T](), NodeBlame()
    while groups:
        group = groups.popleft()
        todo = {item["id"]: item for item in group}
        avoid = _first_that_fits(plan, wanted, hosts.to_avoid(list(todo)))
        plan = _adopt(plan, fit_to_cluster(plan, wanted, avoid, num_items=len(group)), group)
        error = Interrupted("it ended without them")
        try:
            for row in follow(pipeline, work, group, _for_group(plan, group), wanted, avoid):
                run_metrics.show("stas_actors", _for_group(plan, group).actors)
                if (item := todo.pop(row["id"], None)) is not None:
                    yield row
                    if row["reason"] is None:
                        finished = item
                        _tell_left_out(hosts.finished(row["id"]), "what failed there was finished elsewhere")
                        yield from record_crashes(work, blame, hosts)
        except Interrupted as caught:
            error = caught
            _tell_interrupted(caught, work.what, len(todo), len(group))
        finally:
            run_metrics.forget("stas_actors")
        rest = list(todo.values())
        if isinstance(error, NodesChanged):
            leave_out(hosts, error.__cause__, wanted, plan)
            groups.extendleft([rest] if rest else [])
        if not rest or isinstance(error, NodesChanged):
            continue
        on_trial = hosts.note(error.suspects) and fits_beside(wanted, plan, set(error.suspects.values()))
        if len(group) > 1:
            others, aside = blame.divide([(item, item["id"] in error.suspects) for item in rest])
            groups.extendleft([others] if others else [])
            groups.extendleft([[aside.pop(0)]] if on_trial and aside else [])
            groups.extend([item] for item in aside)
        elif blame.failed_alone(group[0]["id"], group[0], str(error)):
            groups.appendleft(group)
        if blame.failures >= MAX_FRUITLESS or (blame.crashed and finished is not None and not groups):
            nameless = len(group) > 1 and not error.suspects
            if nameless or finished is None or not _finishes(pipeline, work, finished, plan, wanted, hosts.left_out):
                raise StasError(
                    f"pipelines failed one after the other without any of the {work.what} to blame, at last over "
                    f"{len(rest)}: {error}; see whether the nodes have the memory and the drivers that the models "
                    "need, and run again"
                ) from error
            yield from record_crashes(work, blame, hosts)
    yield from record_crashes(work, blame, hosts)


def _adopt(plan: ScorePlan, fitting: ScorePlan, group: Sequence[Identified]) -> ScorePlan:
    """Return the plan to go on with, and report a change; a group of one says nothing about those to come."""
    if len(group) == 1 or fitting.actors == plan.actors:
        return plan
    print(f"going on with {fitting.actors} instead of {plan.actors} actor(s): {fitting.reason}", flush=True)
    return fitting


def _for_group(plan: ScorePlan, group: Sequence[Identified]) -> ScorePlan:
    """Return the plan with no more actors than images."""
    return dataclasses.replace(plan, actors=min(plan.actors, len(group)))


def _finishes(
    pipeline: Pipeline,
    work: Job[T, F],
    item: T,
    plan: ScorePlan,
    wanted: ScoreResources,
    left_out: set[str],
) -> bool:
    """Tell whether an image that was finished before can still be finished; its files get the same bytes."""
    avoid = _first_that_fits(plan, wanted, [left_out])
    try:
        found = follow(pipeline, work, [item], _for_group(plan, [item]), wanted, avoid)
        return any(row["reason"] is None for row in found)
    except NodesChanged:
        return _finishes(pipeline, work, item, fit_to_cluster(plan, wanted, avoid), wanted, left_out)
    except Interrupted:
        return False


def record_crashes(work: Job[T, F], blame: Blame[T], hosts: NodeBlame) -> Iterator[F]:
    """Record as failed the items that failed alone twice; another was finished since, so the fault is theirs."""
    for item, cause in blame.settle():
        hosts.at_fault(item["id"])
        yield from work.record_crash(item, cause)


class Interrupted(Exception):
    """The pipeline must be restarted.

    `suspects` are the images that may be to blame, with the node of each; `in_work` those that were in a step.
    """

    def __init__(self, message: str, suspects: Mapping[str, str] | None = None, *, in_work: Collection[str] = ()):
        super().__init__(message)
        self.suspects = suspects or {}
        self.in_work = {*in_work, *self.suspects}


class NodesChanged(Interrupted):
    """It must be restarted as nodes were lost or joined, and none of its images is to blame."""


def _tell_interrupted(error: Interrupted, what: str, left: int, total: int) -> None:
    run_metrics.count("stas_restarts")
    run_log.count("retried", len(error.in_work))
    run_log.event("restarted", level=logging.WARNING, why=str(error), left=left, retried=len(error.in_work))
    print(f"interrupted ({error}); {left} of {total} {what} are left", flush=True)


def fit_to_cluster(
    plan: ScorePlan, wanted: ScoreResources, avoid: Collection[str] = (), *, num_items: int = 1
) -> ScorePlan:
    """Fit the plan to the live nodes but those to avoid; where no actor fits yet, ask and wait for nodes.

    To be called within `asking_for_nodes`.

    Args:
        plan: the plan so far.
        wanted: what was asked for.
        avoid: ids of nodes that are left out.
        num_items: how many items are to do, which tells how many nodes to ask for.

    Raises:
        ResourceError: it holds none, and none is to come; the message has the arithmetic.
    """
    fitting = await_room(
        lambda: _fitting_beside(plan, wanted, avoid),
        lambda: _fitting(plan, wanted, cluster_nodes()),
        "an actor",
        timeout_s=wanted.node_timeout_s,
        ask=lambda: ask_for_nodes(plan, wanted, num_items, avoid),
    )
    return fitting if fitting.actors != plan.actors else plan


def _fitting(plan: ScorePlan, wanted: ScoreResources, nodes: Sequence[Node]) -> ScorePlan:
    """Return the plan with the actors that fit on the nodes, no more than asked for."""
    settled = {"gpus_per_actor": plan.gpus_per_actor, "cpus_per_actor": plan.cpus_per_actor, "actors": None}
    found = plan_scoring(nodes, wanted.model_copy(update=settled | {"cpus_per_task": plan.cpus_per_task}))
    fitting = dataclasses.replace(plan, reason=found.reason).fit(found.actors)
    return dataclasses.replace(fitting, actors=min(fitting.actors, wanted.actors or fitting.actors))


def _fitting_beside(plan: ScorePlan, wanted: ScoreResources, avoid: Collection[str]) -> ScorePlan:
    """Return the plan with the actors that fit on the live nodes beside those to avoid."""
    return _fitting(plan, wanted, [node for node in live_nodes() if node.node_id not in avoid])


def fits_beside(wanted: ScoreResources, plan: ScorePlan, avoid: Collection[str]) -> bool:
    """Tell whether an actor fits on the live nodes beside those to avoid."""
    try:
        _fitting_beside(plan, wanted, avoid)
    except ResourceError:
        return False
    return True


def _first_that_fits(plan: ScorePlan, wanted: ScoreResources, choices: Sequence[set[str]]) -> set[str]:
    """Return the first choice of nodes to avoid beside which an actor fits; none, if no choice is left."""
    return next((choice for choice in choices if choice and fits_beside(wanted, plan, choice)), set())


def leave_out(hosts: NodeBlame, fault: BaseException | None, wanted: ScoreResources, plan: ScorePlan) -> None:
    """Leave out a node that cannot do what the cluster promises of it, if that is what is wrong.

    Raises:
        NodeFault: there is no other node that holds an actor.
    """
    if not isinstance(fault, NodeFault):
        return
    if not fits_beside(wanted, plan, hosts.left_out | {fault.node_id}):
        num_before = len(hosts.left_out - {fault.node_id})
        others = f"no other holds an actor{f'; left out before: {num_before}' if num_before else ''}"
        raise NodeFault(f"node {address_of(fault.node_id)}: {fault} ({others})", fault.node_id) from fault
    hosts.left_out.add(fault.node_id)
    _tell_left_out({fault.node_id}, str(fault))


def _tell_left_out(node_ids: Collection[str], why: str) -> None:
    for node_id in node_ids:
        print(
            f"node {address_of(node_id)} is left out: {why}; look at its disk, memory and driver, and restart it there",
            flush=True,
        )


def follow(
    pipeline: Pipeline,
    work: Job[T, F],
    items: Sequence[T],
    plan: ScorePlan,
    wanted: ScoreResources,
    avoid: Collection[str] = (),
) -> Iterator[F]:
    """Run one pipeline; yield its rows until it ends.

    Raises:
        Interrupted: a process died once too often, or nothing has moved for too long.
        NodesChanged: a node is gone, or enough joined for more actors.
        StasError: a step met what no further attempt mends.
    """
    limits = work.limits
    stall_s = wanted.stall_timeout_s + (1 + limits.retries) * limits.timeout_s * plan.images_per_block
    # max_calls: a forced end may come late, and must not hit the next pipeline in the same process.
    apart: Any = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(conduct).options(scheduling_strategy=this_node())
    ledger, unfinished = start_ledger(), {item["id"] for item in items}
    nodes = live_nodes()
    ask_for_nodes(plan, wanted, len(items), avoid)
    rows = apart.remote(pipeline, work, items, plan, ledger, sorted(avoid))
    began = last = looked = time.monotonic()
    try:
        while True:
            ready, _ = ray.wait([rows], timeout=LOOK_S)
            if ready:
                try:
                    reference = next(rows)
                except StopIteration:
                    return
                found: list[F] = ray.get(reference)
                unfinished -= {row["id"] for row in found}
                yield from found
                last = time.monotonic()
            if (now := time.monotonic()) - looked < LOOK_S:
                continue
            looked = now
            ask_for_nodes(plan, wanted, len(unfinished), avoid)
            changed = f"lost {', '.join(lost)}" if (lost := lost_nodes(nodes)) else ""
            if not changed and now - began > SETTLED_S and len(unfinished) > plan.actors * plan.images_per_block:
                changed = _room_for_more(plan, wanted, avoid)
            if changed:
                raise NodesChanged(changed, in_work=_ids(in_work(ledger, unfinished)))
            if now - last > stall_s:
                begun = in_work(ledger, unfinished)
                reason = f"none of the {work.what} was finished for {stall_s:g} s"
                raise Interrupted(reason, suspected(begun), in_work=_ids(begun))
    except ray.exceptions.RayError as error:
        own = own_error(error)
        if own is not None and not isinstance(own, NodeFault):
            raise own from None
        raise _interruption(error, own, in_work(ledger, unfinished), nodes) from own or error
    finally:
        ray.cancel(rows, force=True)


def _interruption(
    error: Exception, fault: StasError | None, begun: Sequence[tuple[str, int, str]], nodes: Sequence[Node]
) -> Interrupted:
    """Return what an error of Ray, and the fault of a node behind it, mean for the items that were begun."""
    if fault is not None:
        return NodesChanged(str(fault), in_work=_ids(begun))
    if lost_nodes(nodes):
        return NodesChanged(f"a node was lost: {reason_of(error)}", in_work=_ids(begun))
    return Interrupted(reason_of(error), suspected(begun), in_work=_ids(begun))


def _ids(begun: Sequence[tuple[str, int, str]]) -> set[str]:
    return {item_id for item_id, *_ in begun}


def _room_for_more(plan: ScorePlan, wanted: ScoreResources, avoid: Collection[str]) -> str:
    """Say how many more actors fit by now; empty: none."""
    try:
        fitting = _fitting_beside(plan, wanted, avoid)
    except ResourceError:  # the nodes went in this moment: the next look tells
        return ""
    return f"{fitting.actors} actor(s) fit by now, not {plan.actors}" if fitting.actors > plan.actors else ""


def conduct(
    pipeline: Pipeline,
    work: Any,
    items: Sequence[Identified],
    plan: ScorePlan,
    ledger: Any,
    avoid: Sequence[str] = (),
) -> Iterator[list[dict[str, Any]]]:
    """Build and run a Ray Data pipeline, beside the nodes to avoid; yield finished rows."""
    quieten_ray_data()
    ask_for_no_nodes()
    context = ray.data.DataContext.get_current()
    if avoid:
        context.execution_options.label_selector = beside(avoid)
    limit_run_ahead(context, plan.run_ahead_bytes)
    found = ray.data.from_items(list(items), override_num_blocks=max(1, math.ceil(len(items) / plan.images_per_block)))
    rows = pipeline(found, work, plan, ledger)
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield cast(pa.Table, batch).to_pylist()


def reason_of(error: Exception) -> str:
    """Return an error's type and last line, which is the informative one in errors that Ray wraps."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
