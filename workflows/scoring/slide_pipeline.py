"""score_slides on a cluster: which pipelines survey slides and predict their blocks, and how a slide is finished.

Blocks stream through the actors in the order of their slides. A slide's finishing is a task of its own, begun the
moment its last block is kept, so that the actors never wait for it.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data

from stas_core.errors import CrashedPrediction, InputError
from stas_core.slides import halo
from workflows import run_metrics
from workflows.cluster import own_error
from workflows.node_faults import NodeFault, beside, naming_this_node
from workflows.scoring import slide_tasks
from workflows.scoring.guarded_reader import LimitsConfig
from workflows.scoring.pipeline import MAX_TASK_RETRIES
from workflows.scoring.plan import Ensemble, ScorePlan, ScoreResources
from workflows.scoring.rehearsal import NotMeasured, rehearse
from workflows.scoring.restarts import run_restarting
from workflows.scoring.slide_plan import BlockItem, SlideItem, SlideTask
from workflows.scoring.slide_tasks import FinishedSlide, KeptBlock, SurveyedRow
from workflows.scoring.suspects import Announced, announced
from workflows.waiting import Need, end_task, first_of

MOST_BLOCKS = 4096
"""Blocks of one pipeline: each is a row that the driver holds, and Ray Data a block of its own."""

SURVEY_CPUS = 0.5
"""Least CPUs of a survey. It computes as long as it reads: more than two to a core would only wait for each other."""


@dataclass(frozen=True)
class SurveyJob:
    """Survey slides."""

    task: SlideTask

    @property
    def what(self) -> str:
        """Return what the items are."""
        return "slides"

    @property
    def limits(self) -> LimitsConfig:
        """Return beyond which limits a slide is given up."""
        return self.task.limits.of_survey()

    def record_crash(self, item: SlideItem, cause: str) -> list[SurveyedRow]:
        """Record that a slide ended every process that looked at it."""
        message = f"{item['slide_uri']}: the process that surveyed it alone failed, twice ({cause}); look at the file"
        slide_tasks.record_failure(self.task, item, CrashedPrediction.reason, message)
        return [{"id": item["id"], "reason": CrashedPrediction.reason, "message": message, "survey_s": 0.0}]


@dataclass(frozen=True)
class BlockJob:
    """Predict blocks of slides."""

    ensemble: Ensemble
    task: SlideTask

    @property
    def what(self) -> str:
        """Return what the items are."""
        return "blocks"

    @property
    def limits(self) -> LimitsConfig:
        """Return beyond which limits a block is given up."""
        return self.task.limits

    def record_crash(self, item: BlockItem, cause: str) -> list[KeptBlock]:
        """Record that a block ended every process that worked on it."""
        return slide_tasks.record_crash(self.task, item, cause)


def survey(
    task: SlideTask, items: Sequence[SlideItem], wanted: ScoreResources, plan: ScorePlan
) -> Iterator[SurveyedRow]:
    """Survey slides; yield what is told of each."""
    yield from run_restarting(_survey, SurveyJob(task), items, wanted, dataclasses.replace(plan, images_per_block=1))


def _survey(found: ray.data.Dataset, job: SurveyJob, plan: ScorePlan, ledger: Any) -> ray.data.Dataset:
    step = partial(announced, ledger, "survey", partial(slide_tasks.survey, job.task))
    return found.map_batches(step, batch_format="pyarrow", batch_size=1, num_cpus=max(SURVEY_CPUS, plan.cpus_per_task))


def predict(job: BlockJob, items: Sequence[BlockItem], wanted: ScoreResources, plan: ScorePlan) -> Iterator[KeptBlock]:
    """Predict blocks and keep them; yield what is told of each, in the order in which they are kept."""
    side_px = job.task.tile.block * job.task.tile.px + 2 * job.task.tile.halo_px
    plan = dataclasses.replace(plan, images_per_block=1, image_bytes=3 * side_px**2)
    try:
        for start in range(0, len(items), MOST_BLOCKS):
            yield from run_restarting(predict_and_keep, job, items[start : start + MOST_BLOCKS], wanted, plan)
    finally:
        run_metrics.forget("stas_gpu_busy")  # slides are finished without GPUs


def predict_and_keep(found: ray.data.Dataset, job: BlockJob, plan: ScorePlan, ledger: Any) -> ray.data.Dataset:
    """Build the pipeline of a block: read, predict, keep."""
    tasks: Mapping[str, Any] = {"batch_format": "pyarrow", "batch_size": 1, "num_cpus": plan.cpus_per_task}
    read, keep = (partial(step, job.task) for step in (slide_tasks.read, slide_tasks.keep))
    pixels = found.map_batches(partial(announced, ledger, "read", read), **tasks)
    predicted = pixels.map_batches(
        Announced,
        fn_constructor_args=(ledger, "predict", partial(_start_actor, job.ensemble, job.task)),
        batch_format="pyarrow",
        batch_size=1,
        num_cpus=plan.cpus_per_actor,
        num_gpus=plan.gpus_per_actor or None,
        max_task_retries=MAX_TASK_RETRIES,
        compute=ray.data.ActorPoolStrategy(size=plan.actors),
    )
    return predicted.map_batches(partial(announced, ledger, "keep", keep), **tasks)


def _start_actor(ensemble: Ensemble, task: SlideTask) -> Callable[[pa.Table], pa.Table]:
    from workflows.scoring.slide_actor import SlideActor  # loads torch

    return SlideActor(ensemble, task)


def measure_seams(job: BlockJob, item: SlideItem, wanted: ScoreResources, plan: ScorePlan) -> list[halo.Seam] | None:
    """Measure on a surveyed slide how much halos are worth to an ensemble; None: it failed, and why is printed.

    Raises:
        ResourceError: nodes were lost or are at fault, and what is left cannot hold an actor.
        StasError: the task met what no further attempt mends.
    """
    try:
        return rehearse(partial(_seams, job.ensemble, job.task, item), wanted, plan)
    except (InputError, NotMeasured) as error:
        why = error if isinstance(error, NotMeasured) else error.reason
        print(f"no seam table: {why}, on {item['id']}; its blocks will tell what is wrong", flush=True)
        return None


def _seams(ensemble: Ensemble, task: SlideTask, item: SlideItem) -> list[halo.Seam]:
    from workflows.scoring.slide_actor import measure_seams as measure  # loads torch

    return measure(ensemble, task, item)


def _finish(task: SlideTask, item: SlideItem, seconds: dict[str, float]) -> FinishedSlide:
    with naming_this_node():
        return slide_tasks.finish(task, item, seconds)


class Finishing:
    """The tasks that finish slides, while blocks of others are predicted; no more at a time than half of the CPUs."""

    def __init__(self, task: SlideTask, plan: ScorePlan, num_cpus: float) -> None:
        self._task = task
        # Each in a process of its own, whose memory goes with it.
        self._finish: Any = ray.remote(num_cpus=plan.cpus_per_task, max_retries=2, max_calls=1)(_finish)
        self._need = Need("the finishing of a slide", plan.cpus_per_task)
        self._most = max(1, int(num_cpus // 2))
        self._waiting: deque[tuple[SlideItem, dict[str, float]]] = deque()
        self._running: dict[Any, tuple[SlideItem, dict[str, float]]] = {}

    def begin(self, item: SlideItem, seconds: dict[str, float]) -> None:
        """Finish a slide whose blocks are all kept, as soon as there is room; `seconds` are of its steps so far."""
        self._waiting.append((item, seconds | {"begun_unix_s": time.time()}))
        self._start()

    def ended(self, *, wait: bool = False) -> Iterator[FinishedSlide]:
        """Yield what is told of the slides that are finished by now, or, if told to wait, of all.

        Raises:
            ResourceError: nodes were lost, and what is left has no room for a task.
            StasError: a task met what no further attempt mends.
        """
        while self._running:
            running = list(self._running)
            ready = [first_of(running, self._need.look)] if wait else ray.wait(running, timeout=0)[0]
            if not ready:
                return
            if (finished := self._result(ready[0])) is not None:
                yield finished
            self._start()

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._most:
            item, seconds = self._waiting.popleft()
            task = self._finish.options(label_selector=beside(self._need.avoid))
            self._running[task.remote(self._task, item, seconds)] = item, seconds

    def _result(self, reference: Any) -> FinishedSlide | None:
        """Return what is told of a slide; None: its node was at fault, and it waits for another."""
        item, seconds = self._running.pop(reference)
        try:
            finished: FinishedSlide = ray.get(reference)
        except ray.exceptions.RayError as error:
            if isinstance(own := own_error(error), NodeFault):
                self._need = self._need.on_other_nodes(error)
                self._waiting.appendleft((item, seconds))
                return None
            if own is not None:
                raise own from None
            message = (
                f"{item['slide_uri']}: the process that finished it failed each time "
                f"({type(error).__name__}); if memory ran out, give a node more"
            )
            slide_tasks.record_failure(self._task, item, CrashedPrediction.reason, message)
            return {"id": item["id"], "reason": CrashedPrediction.reason, "seconds": {}}
        return finished

    def cancel(self) -> None:
        """End what is running."""
        for reference in self._running:
            end_task(reference)
