"""score_images on a cluster: calibration, the Ray Data pipeline, and its restarts.

The pipeline runs inside a Ray task of its own on the driver's node. Where a node is lost or nothing moves any more, the
driver ends that task, and with it everything the pipeline owns, and starts one that fits what is left of the cluster.
Nothing is lost by that: finished images have their records, the others are simply still to do.
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import pyarrow as pa
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stas_core.errors import StasError
from workflows.cluster import cluster_nodes, own_error, quieten_ray_data
from workflows.ray_internals import limit_run_ahead
from workflows.scoring import tasks as scoring_tasks
from workflows.scoring.plan import Ensemble, ScorePlan, ScoreResources, Work, plan_scoring
from workflows.scoring.suspects import Announced, Blame, announced, start_ledger, suspected
from workflows.scoring.tasks import ITEM, Item, LimitsConfig, SaveConfig

if TYPE_CHECKING:
    from workflows.scoring.actor import ScoreActor

BLOCK_S = 4.0
"""Seconds of prediction in a block of images: what an actor takes at a time, and loses when it dies."""
LOOK_S = 2.0
"""How often the driver looks at the cluster while no image comes in."""
MAX_TASK_RETRIES = 2
"""How often a block is predicted anew after its actor died; then the pipeline fails, and is started anew."""
MAX_FRUITLESS = 8
"""Pipelines in a row that finished nothing, or images that failed alone, before an image that was finished is run
again, to tell a broken machine from bad images."""


@dataclass(frozen=True)
class Calibration:
    """Seconds per image of each step, and the batch size that was fastest."""

    decode_s: float
    predict_s: float
    finish_s: float
    batch_size: int
    batch_px: int | None = None
    """Pixels of a batch, on a GPU: larger images go in smaller batches, which take no more of its memory."""

    def fit(self, plan: ScorePlan) -> ScorePlan:
        """Fit the plan to what was measured.

        A block is a few seconds of prediction. Without GPUs, actors and tasks share the cores, and actors get the share
        that prediction needs.
        """
        per_block = self.batch_size * max(1, min(16, round(BLOCK_S / self.predict_s / self.batch_size)))
        plan = dataclasses.replace(plan, images_per_block=per_block)
        if plan.gpus_per_actor:
            return plan
        share = self.predict_s / (self.decode_s + self.predict_s + self.finish_s)
        return dataclasses.replace(plan, actors=max(1, math.ceil(plan.actors * share - 1e-9)))

    def __str__(self) -> str:
        return (
            f"per image: decode {1000 * self.decode_s:.0f} ms, predict {1000 * self.predict_s:.0f} ms, finish "
            f"{1000 * self.finish_s:.0f} ms; batch size {self.batch_size}"
        )


Row = dict[str, Any]


class Job(Protocol):
    """What a pipeline does to its items: all that their results depend on, nothing about the cluster."""

    @property
    def what(self) -> str:
        """Return what its items are called, such as images."""

    @property
    def limits(self) -> LimitsConfig:
        """Return beyond which limits an item is given up."""

    def record_crash(self, item: Mapping[str, Any], cause: str) -> list[Row]:
        """Record that an item ended every process that worked on it; return its finished rows."""


J = TypeVar("J", bound=Job)
Pipeline = Callable[[ray.data.Dataset, J, ScorePlan, Any], ray.data.Dataset]
"""From a dataset of items to one of finished rows; the last is the ledger that its steps tell of what they begin."""


def calibrate(
    work: Work, items: Sequence[Item], wanted: ScoreResources, plan: ScorePlan, *, otherwise: Work | None = None
) -> Calibration | None:
    """Time the steps on the first readable image with an actor's resources; None: none is readable, or it failed.

    Args:
        otherwise: what to calibrate where the batch size that `work` fixes does not fit.

    Raises:
        ResourceError: nodes were lost, and what is left cannot hold an actor.
    """
    cpus, gpus = plan.cpus_per_actor, plan.gpus_per_actor
    timing: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(time_steps)
    reference = timing.remote(work, list(items[:4]), otherwise)
    start = time.monotonic()
    while not ray.wait([reference], timeout=LOOK_S)[0]:
        plan = fit_to_cluster(plan, wanted)
        if time.monotonic() - start > wanted.stall_timeout_s:
            ray.cancel(reference, force=True)
            print(f"no calibration: nothing was timed within {wanted.stall_timeout_s:g} s", flush=True)
            return None
    try:
        found: Calibration | None = ray.get(reference)
    except ray.exceptions.RayError as error:
        if own_error(error) is not None:
            raise
        print(f"no calibration: {_reason(error)}", flush=True)
        return None  # an image may be the cause: the pipeline finds out which
    return found


def time_steps(work: Work, items: Sequence[Item], otherwise: Work | None = None) -> Calibration | None:
    """Time the steps in this process; see `calibrate`."""
    import torch

    task, ensemble = work.task, work.ensemble
    once = dataclasses.replace(task, limits=task.limits.model_copy(update={"retries": 0}))
    decoded = [scoring_tasks.decode(once, _table([item])) for item in items]
    good = [table for table in decoded if table["reason"][0].as_py() is None]
    if not good:
        return None
    best, best_s, row = 1, math.inf, None
    fixed = ensemble.inference.batch_size
    on_gpu = ensemble.use_gpu and torch.cuda.is_available()
    for batch_size in [fixed] if fixed else [1, 2, 4, 8] if on_gpu else [1]:
        timed = _time_batch(work, good[-1], batch_size)
        if timed is None:
            break  # larger ones will not fit either
        if timed[0] < 0.95 * best_s:
            best, (best_s, row) = batch_size, timed
    if row is None:
        return None if otherwise is None else time_steps(otherwise, items)
    scoring_tasks.make_outputs(task, row)
    start = time.perf_counter()
    scoring_tasks.make_outputs(task, row)
    finish_s = time.perf_counter() - start
    batch_px = ensemble.inference.batch_px
    if on_gpu and not fixed and batch_px is None:
        batch_px = best * row["height"] * row["width"]
    return Calibration(good[-1]["decode_s"][0].as_py(), best_s, finish_s, best, batch_px)


def _time_batch(work: Work, decoded: pa.Table, batch_size: int) -> tuple[float, dict[str, Any]] | None:
    """Return the seconds per image of a batch of copies of one, and what came of it; None: it failed."""
    actor = start_actor(work.ensemble.with_batches(batch_size, None), work.task.save)
    batch = pa.concat_tables([decoded] * batch_size)
    actor(batch)  # the first pass compiles, allocates and reads libraries
    start = time.perf_counter()
    predicted = actor(batch)
    seconds = (time.perf_counter() - start) / batch_size
    if any(reason is not None for reason in predicted["reason"].to_pylist()):
        return None
    row: dict[str, Any] = predicted.slice(0, 1).to_pylist()[0]
    return seconds, row


def score(
    work: Work, items: Sequence[Item], wanted: ScoreResources, plan: ScorePlan, *, finished: Item | None = None
) -> Iterator[dict[str, Any]]:
    """Predict and finish images; yield what was recorded of each, in the order in which they finish.

    Args:
        finished: an image that an earlier run finished, to tell faults of images from others.
    """
    yield from run_restarting(predict_and_finish, work, items, wanted, plan, finished)


def finish_from_maps(
    work: Work, items: Sequence[Item], wanted: ScoreResources, plan: ScorePlan
) -> Iterator[dict[str, Any]]:
    """Finish images anew from their saved maps; yield what was recorded of each."""
    yield from run_restarting(_finish_from_maps, work, items, wanted, plan)


def run_restarting(
    pipeline: Pipeline[J],
    work: J,
    items: Sequence[Mapping[str, Any]],
    wanted: ScoreResources,
    plan: ScorePlan,
    finished: Mapping[str, Any] | None = None,
) -> Iterator[Row]:
    """Run the pipeline until every item (an image, a slide, a block of one) is finished or recorded as failed.

    Where one fails, the items that it had begun are suspects: the others go on, and the suspects are run alone at the
    end. One that fails alone twice is recorded as failed, as soon as another item shows that all else is well.

    Raises:
        StasError: nothing can be finished any more, not even an item that was finished before (or none ever was): the
            fault is not the items'.
    """
    groups, blame = deque([list(items)]), Blame[Mapping[str, Any]]()
    while groups:
        group = groups.popleft()
        todo = {item["id"]: item for item in group}
        plan = fit_to_cluster(plan, wanted)
        error = Interrupted("it ended without them")
        try:
            for row in follow(pipeline, work, group, _for_group(plan, group), wanted.stall_timeout_s):
                if (item := todo.pop(row["id"], None)) is not None:
                    yield row
                    if row["reason"] is None:
                        finished = item
                        yield from record_crashes(work, blame)
        except Interrupted as caught:
            error = caught
            print(f"interrupted ({error}); {len(todo)} of {len(group)} {work.what} are left", flush=True)
        rest = list(todo.values())
        if not rest:
            continue
        if isinstance(error, NodeLost):
            groups.appendleft(rest)
            continue
        if len(group) > 1:
            others, aside = blame.divide([(item, item["id"] in error.suspects) for item in rest])
            groups.extendleft([others] if others else [])
            groups.extend([item] for item in aside)
        elif blame.failed_alone(group[0]["id"], group[0], str(error)):
            groups.appendleft(group)
        if blame.failures >= MAX_FRUITLESS or (blame.crashed and finished is not None and not groups):
            nameless = len(group) > 1 and not error.suspects
            if nameless or finished is None or not _finishes(pipeline, work, finished, plan, wanted):
                raise StasError(
                    f"pipelines failed one after the other without any of the {work.what} to blame, at last over "
                    f"{len(rest)}: {error}; see whether the nodes have the memory and the drivers that the models "
                    "need, and run again"
                ) from error
            yield from record_crashes(work, blame)
    yield from record_crashes(work, blame)


def _for_group(plan: ScorePlan, group: Sequence[Mapping[str, Any]]) -> ScorePlan:
    """Return the plan with no more actors than images."""
    return dataclasses.replace(plan, actors=min(plan.actors, len(group)))


def _finishes(pipeline: Pipeline[J], work: J, item: Mapping[str, Any], plan: ScorePlan, wanted: ScoreResources) -> bool:
    """Tell whether an image that was finished before can still be finished; its files get the same bytes."""
    try:
        found = follow(pipeline, work, [item], _for_group(plan, [item]), wanted.stall_timeout_s)
        return any(row["reason"] is None for row in found)
    except NodeLost:
        return _finishes(pipeline, work, item, fit_to_cluster(plan, wanted), wanted)
    except Interrupted:
        return False


def _reason(error: Exception) -> str:
    """Return an error's type and last line, which is the informative one in errors that Ray wraps."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"


def record_crashes(work: Job, blame: Blame[Mapping[str, Any]]) -> Iterator[Row]:
    """Record as failed the items that failed alone twice; another was finished since, so the fault is theirs."""
    for item, cause in blame.settle():
        yield from work.record_crash(item, cause)


def fit_to_cluster(plan: ScorePlan, wanted: ScoreResources) -> ScorePlan:
    """Fit the plan to the cluster as it is now; report if fewer actors fit.

    Raises:
        ResourceError: it holds none; the message has the arithmetic.
    """
    settled = {"gpus_per_actor": plan.gpus_per_actor, "cpus_per_actor": plan.cpus_per_actor, "actors": None}
    fitting = plan_scoring(cluster_nodes(), wanted.model_copy(update=settled | {"cpus_per_task": plan.cpus_per_task}))
    if fitting.actors >= plan.actors:
        return plan
    print(f"going on with {fitting.actors} of {plan.actors} actor(s): {fitting.reason}", flush=True)
    return dataclasses.replace(plan, actors=fitting.actors)


class Interrupted(Exception):
    """The pipeline must be restarted; `suspects` are the images that it had begun."""

    def __init__(self, message: str, suspects: Collection[str] = ()):
        super().__init__(message)
        self.suspects = suspects


class NodeLost(Interrupted):
    """It must be restarted, and none of its images is to blame."""


def follow(
    pipeline: Pipeline[J], work: J, items: Sequence[Mapping[str, Any]], plan: ScorePlan, stall_s: float
) -> Iterator[Row]:
    """Run one pipeline; yield its rows until it ends.

    Raises:
        Interrupted: a process died once too often, or nothing has moved for too long.
        NodeLost: a node is gone.
        StasError: a step met what no further attempt mends.
    """
    limits = work.limits
    stall_s += (1 + limits.retries) * limits.timeout_s * plan.images_per_block
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # max_calls: a forced end may come late, and must not hit the next pipeline in the same process.
    apart: Any = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(conduct).options(scheduling_strategy=here)
    ledger, unfinished = start_ledger(), {item["id"] for item in items}
    rows = apart.remote(pipeline, work, items, plan, ledger)
    capacity, last = _capacity(), time.monotonic()
    try:
        while True:
            ready, _ = ray.wait([rows], timeout=LOOK_S)
            if ready:
                try:
                    reference = next(rows)
                except StopIteration:
                    return
                found = ray.get(reference)
                unfinished -= {row["id"] for row in found}
                yield from found
                last = time.monotonic()
            elif _shrunk(capacity):
                raise NodeLost("a node was lost")
            elif time.monotonic() - last > stall_s:
                raise Interrupted(
                    f"none of the {work.what} was finished for {stall_s:g} s", suspected(ledger, unfinished)
                )
    except ray.exceptions.RayError as error:
        if (own := own_error(error)) is not None:
            raise own from None
        if _shrunk(capacity):
            raise NodeLost(f"a node was lost: {_reason(error)}") from error
        raise Interrupted(_reason(error), suspected(ledger, unfinished)) from error
    finally:
        ray.cancel(rows, force=True)


def _capacity() -> tuple[float, float]:
    nodes = cluster_nodes()
    return sum(node.num_cpus for node in nodes), sum(node.num_gpus for node in nodes)


def _shrunk(capacity: tuple[float, float]) -> bool:
    return any(now < then for now, then in zip(_capacity(), capacity, strict=True))


def conduct(
    pipeline: Pipeline[J], work: J, items: Sequence[Mapping[str, Any]], plan: ScorePlan, ledger: Any
) -> Iterator[list[Row]]:
    """Build and run a Ray Data pipeline; yield finished rows."""
    quieten_ray_data()
    context = ray.data.DataContext.get_current()
    limit_run_ahead(context, plan.run_ahead_bytes)
    found = ray.data.from_items(list(items), override_num_blocks=max(1, math.ceil(len(items) / plan.images_per_block)))
    rows = pipeline(found, work, plan, ledger)
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield cast(pa.Table, batch).to_pylist()


def start_actor(ensemble: Ensemble, save: SaveConfig) -> "ScoreActor":
    """Return the actor, in the process that predicts: only there torch is loaded."""
    from workflows.scoring.actor import ScoreActor

    return ScoreActor(ensemble, save)


def predict_and_finish(found: ray.data.Dataset, work: Work, plan: ScorePlan, ledger: Any) -> ray.data.Dataset:
    """Build the pipeline of an image: read, predict, finish."""
    tasks: Mapping[str, Any] = {"batch_format": "pyarrow", "batch_size": 1, "num_cpus": plan.cpus_per_task}
    decode, finish = (partial(step, work.task) for step in (scoring_tasks.decode, scoring_tasks.finish))
    decoded = found.map_batches(partial(announced, ledger, "decode", decode), **tasks)
    predicted = decoded.map_batches(
        Announced,
        fn_constructor_args=(ledger, "predict", partial(start_actor, work.ensemble, work.task.save)),
        batch_format="pyarrow",
        batch_size=work.ensemble.inference.batch_size or 1,
        num_cpus=plan.cpus_per_actor,
        num_gpus=plan.gpus_per_actor or None,
        max_task_retries=MAX_TASK_RETRIES,
        compute=ray.data.ActorPoolStrategy(size=plan.actors),
    )
    return predicted.map_batches(partial(announced, ledger, "finish", finish), **tasks)


def _finish_from_maps(found: ray.data.Dataset, work: Work, plan: ScorePlan, ledger: Any) -> ray.data.Dataset:
    refinish = partial(announced, ledger, "finish", partial(scoring_tasks.refinish, work.task))
    return found.map_batches(refinish, batch_format="pyarrow", batch_size=1, num_cpus=plan.cpus_per_task)


def _table(items: Sequence[Item]) -> pa.Table:
    return pa.Table.from_pylist(list(items), schema=pa.schema(ITEM))
