"""The plan of score_images: models, actors and their shares of the cluster. Loads neither torch nor Ray."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from stas_core import storage
from stas_core.config import Config, Uri
from stas_core.errors import ResourceError
from stas_core.predict.inference import InferenceConfig
from workflows.cluster import Node, default_gpus, describe
from workflows.scoring.tasks import FinishedRow, Item, LimitsConfig, ScoreTask, record_crash

IMAGE_BYTES = 1716 * 942 * 5
"""A field's pixels, and its map and disagreement."""
MIN_CALIBRATED = 24
"""With fewer images than this per actor, a calibration costs more than it saves."""


BLOCKS_PER_ACTOR = 8
"""At least, in a run that has so many images: actors that end together differ by at most a block."""


class EnsembleConfig(Config):
    """Which models are applied."""

    uri: Uri | None = None
    """An ensemble.json, a checkpoint folder, a fold's folder or a training run's folder."""
    top_k: int | None = Field(None, ge=1)
    """Of every fold of a run the best kept epochs, instead of the weights it ended with."""


class ScoreResources(Config):
    """Shares of the cluster; null: derived from it."""

    actors: int | None = Field(None, ge=1)
    """Copies of the ensemble; null: one per GPU, or on CPUs as many as keep the cores busy."""
    gpus_per_actor: float | None = Field(None, ge=0)
    """GPUs of an actor, also a fraction; null: 1 where the cluster has GPUs, else 0."""
    cpus_per_actor: float | None = Field(None, gt=0)
    """CPUs that Ray reserves for an actor; null: 1 beside a GPU, 0.75 per thread without."""
    threads_per_actor: int = Field(1, ge=1)
    """Threads of an actor's arithmetic. Results depend on it in the last bit, so it does not follow the machine."""
    cpus_per_task: float | None = Field(None, gt=0)
    """CPUs reserved for reading or finishing a batch; null: 1 beside GPUs with CPUs to spare, else 0.25."""
    object_store_mb: int | None = Field(None, ge=64)
    """Memory limit for images and maps in flight; null: that of two blocks of 1716 x 942 px images per
    actor in each step, and at least 512 MB."""
    calibrate: bool = True
    """Time a few images first, to choose batch size (GPU) and number of actors (CPU)."""
    stall_timeout_s: float = Field(900.0, gt=0)
    """Restart the pipeline after this many seconds without a finished image, on top of the time that one block may
    spend in reader timeouts (`limits.timeout_s` for each image and retry)."""
    node_timeout_s: float = Field(900.0, gt=0)
    """On a cluster that grows by itself: how long to wait for the first node that an actor fits on."""
    logical_gpus: bool = False
    """The cluster's GPUs are logical only (tests, dry runs of a layout): actors reserve them and compute on CPUs."""


@dataclass(frozen=True)
class ScorePlan:
    """How the work is laid on a cluster; `reason` is the arithmetic in words."""

    actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    cpus_per_task: float
    object_store_mb: int | None
    reason: str
    images_per_block: int = 4
    share: float = 1.0
    """Part of the actors that fit which are started: without GPUs, tasks need the other cores."""
    image_bytes: int = IMAGE_BYTES
    """Of what an image is between two steps."""

    @property
    def num_gpus(self) -> float:
        """GPUs that all actors hold."""
        return self.actors * self.gpus_per_actor

    def task_slots(self, num_cpus: float) -> int:
        """Return how many tasks, which read and finish images, run at once beside all actors."""
        return max(1, math.floor((num_cpus - self.actors * self.cpus_per_actor) / self.cpus_per_task + 1e-9))

    def in_even_blocks(self, num_images: int, batch_size: int) -> "ScorePlan":
        """Return the plan with blocks so small that each actor gets some: with one each, most wait for the last.

        They are not made smaller than they are without a calibration: it takes time to lay out a block.
        """
        per_actor = num_images / self.actors / BLOCKS_PER_ACTOR
        most = max(ScorePlan.images_per_block, batch_size * math.floor(per_actor / batch_size))
        return replace(self, images_per_block=min(self.images_per_block, most))

    def fit(self, fitting: int) -> "ScorePlan":
        """Return the plan for a cluster that `fitting` actors fit in."""
        return replace(self, actors=max(1, math.ceil(fitting * self.share - 1e-9)))

    @property
    def run_ahead_bytes(self) -> int:
        """Bytes of results that a step may have waiting before it pauses; for reading and prediction alike."""
        if self.object_store_mb is not None:
            return self.object_store_mb * 2**20 // 2
        return max(256 * 2**20, 2 * self.actors * self.images_per_block * self.image_bytes)


def plan_scoring(nodes: Sequence[Node], wanted: ScoreResources) -> ScorePlan:
    """Plan how many actors run and what they and the CPU tasks reserve.

    Actors hold their CPUs for the whole run, so a node is never filled with them: a CPU task must fit beside, or
    nothing would ever be read.

    Raises:
        ResourceError: not one actor fits, or fewer than asked for; the message has the arithmetic.
    """
    gpus = default_gpus(nodes) if wanted.gpus_per_actor is None else wanted.gpus_per_actor
    threads = wanted.threads_per_actor
    hosts = [node for node in nodes if node.num_gpus > 0] if gpus else list(nodes)
    roomy = bool(hosts) and all(node.num_cpus >= 2 * max(1, node.fitting(gpus) or 0) for node in hosts)
    cpus = wanted.cpus_per_actor or ((1.0 if roomy else 0.5) if gpus else 0.75 * threads)
    task_cpus = wanted.cpus_per_task or (1.0 if gpus and roomy else 0.25)
    fitting = sum(actors_on(node, gpus, cpus, task_cpus, threads) for node in nodes)
    arithmetic = (
        f"{describe(nodes)}: {fitting} actor(s) of {cpus:g} CPU and {gpus:g} GPU fit beside tasks of {task_cpus:g} "
        f"CPU, {threads} thread(s) each"
    )
    if fitting == 0 or (wanted.actors or 0) > fitting:
        asked = f"resources.actors = {wanted.actors}" if wanted.actors else "not one"
        raise ResourceError(
            f"{arithmetic}; asked for: {asked}; lower resources.actors, resources.cpus_per_actor, "
            "resources.gpus_per_actor or resources.cpus_per_task, or add nodes"
        )
    return ScorePlan(wanted.actors or fitting, gpus, cpus, task_cpus, wanted.object_store_mb, arithmetic)


def actors_on(node: Node, gpus: float, cpus: float, task_cpus: float, threads: int) -> int:
    """Return how many actors of so many GPUs, CPUs and threads fit on a node, beside a task."""
    by_cpu, by_gpu = math.floor((node.num_cpus - task_cpus) / cpus + 1e-9), node.fitting(gpus)
    return max(0, min(by_cpu, int(node.num_cpus // threads) if by_gpu is None else by_gpu))


@dataclass(frozen=True)
class Ensemble:
    """Which models are applied, and how."""

    checkpoints: tuple[str, ...]
    weights: str
    """Fingerprint of the checkpoints."""
    inference: InferenceConfig
    use_gpu: bool
    threads: int

    @property
    def key(self) -> str:
        """Cache key of a probability map: weights, inference settings, device, threads."""
        settings = self.inference.model_copy(update={"batch_size": self.inference.batch_size or 1})
        device = "gpu" if self.use_gpu else "cpu"
        return storage.fingerprint(self.weights, settings.model_dump_json(), device, str(self.threads))

    def with_batches(self, batch_size: int, batch_px: int | None) -> "Ensemble":
        """Return the ensemble with a settled batch size."""
        settled = {"batch_size": batch_size, "batch_px": batch_px}
        return replace(self, inference=self.inference.model_copy(update=settled))


@dataclass(frozen=True)
class Work:
    """What is done to images: predict with the ensemble, then finish."""

    ensemble: Ensemble
    task: ScoreTask

    @property
    def what(self) -> str:
        """Return what the items are."""
        return "images"

    @property
    def limits(self) -> LimitsConfig:
        """Return beyond which limits an image is given up."""
        return self.task.limits

    def record_crash(self, item: Item, cause: str) -> list[FinishedRow]:
        """Record that an image ended every process that worked on it."""
        return record_crash(self.task, item, cause)
