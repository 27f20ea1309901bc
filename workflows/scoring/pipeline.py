"""score_images on a cluster: its calibration, and the Ray Data pipelines that predict and finish images."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray.data

from stas_core import tables
from workflows.progress import doing
from workflows.scoring import tasks as scoring_tasks
from workflows.scoring.plan import Ensemble, ScorePlan, ScoreResources, Work
from workflows.scoring.rehearsal import NotMeasured, rehearse
from workflows.scoring.restarts import run_restarting
from workflows.scoring.suspects import Announced, announced
from workflows.scoring.tasks import FinishedRow, Item, PredictedRow, SaveConfig

if TYPE_CHECKING:
    from workflows.scoring.actor import ScoreActor

BLOCK_S = 4.0
"""Seconds of prediction in a block of images: what an actor takes at a time, and loses when it dies."""
MAX_TASK_RETRIES = 2
"""How often a block is predicted anew after its actor died; then the pipeline fails, and is started anew."""


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
        return dataclasses.replace(plan, share=share).fit(plan.actors)

    def __str__(self) -> str:
        return (
            f"per image: decode {1000 * self.decode_s:.0f} ms, predict {1000 * self.predict_s:.0f} ms, finish "
            f"{1000 * self.finish_s:.0f} ms; batch size {self.batch_size}"
        )


@doing("timing the first images, to choose batch size and actors")
def calibrate(
    work: Work, items: Sequence[Item], wanted: ScoreResources, plan: ScorePlan, *, otherwise: Work | None = None
) -> Calibration | None:
    """Time the steps on the first readable image with an actor's resources; None: none is readable, or it failed.

    To be called within `asking_for_nodes`: where no actor fits, nodes are asked for.

    Args:
        otherwise: what to calibrate where the batch size that `work` fixes does not fit.

    Raises:
        ResourceError: nodes were lost or are at fault, and what is left cannot hold an actor.
    """
    steps = partial(time_steps, work, list(items[:4]), otherwise)
    try:
        return rehearse(steps, wanted, plan, num_items=len(items))
    except NotMeasured as error:
        print(f"no calibration: {error}", flush=True)
        return None  # an image may be the cause: the pipeline finds out which


def time_steps(work: Work, items: Sequence[Item], otherwise: Work | None = None) -> Calibration | None:
    """Time the steps in this process; see `calibrate`."""
    import torch

    task, ensemble = work.task, work.ensemble
    once = dataclasses.replace(task, limits=task.limits.model_copy(update={"retries": 0}))
    decoded = [scoring_tasks.decode(once, tables.to_table(Item, [item])) for item in items]
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


def _time_batch(work: Work, decoded: pa.Table, batch_size: int) -> tuple[float, PredictedRow] | None:
    """Return the seconds per image of a batch of copies of one, and what came of it; None: it failed."""
    actor = start_actor(work.ensemble.with_batches(batch_size, None), work.task.save)
    batch = pa.concat_tables([decoded] * batch_size)
    actor(batch)  # the first pass compiles, allocates and reads libraries
    start = time.perf_counter()
    predicted = actor(batch)
    seconds = (time.perf_counter() - start) / batch_size
    if any(reason is not None for reason in predicted["reason"].to_pylist()):
        return None
    return seconds, tables.from_table(PredictedRow, predicted.slice(0, 1))[0]


def score(
    work: Work, items: Sequence[Item], wanted: ScoreResources, plan: ScorePlan, *, finished: Item | None = None
) -> Iterator[FinishedRow]:
    """Predict and finish images; yield what was recorded of each, in the order in which they finish.

    Args:
        finished: an image that an earlier run finished, to tell faults of images from others.
    """
    yield from run_restarting(predict_and_finish, work, items, wanted, plan, finished)


def finish_from_maps(
    work: Work, items: Sequence[Item], wanted: ScoreResources, plan: ScorePlan
) -> Iterator[FinishedRow]:
    """Finish images anew from their saved maps; yield what was recorded of each."""
    yield from run_restarting(_finish_from_maps, work, items, wanted, plan)


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
