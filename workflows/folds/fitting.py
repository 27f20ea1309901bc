"""One fold on the cluster: its TorchTrainer, and another node where one cannot do the work."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from stas_core import storage
from stas_core.config import Config
from stas_core.errors import ResourceError
from stas_core.runs import TrainingRun
from stas_core.train.recipe import FoldRecipe, FoldTask
from workflows.cluster import Demand, Plan, cluster_nodes, plan_groups
from workflows.node_faults import beside


class ResourcesConfig(Config):
    """Resources of each fold; null values are derived from the cluster."""

    workers_per_fold: int = Field(1, ge=1)
    """Workers (DDP ranks) of one fold."""
    cpus_per_worker: int | None = Field(None, ge=1)
    """CPUs of one worker, which are also its threads."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs of one worker; a fraction lets several one-worker folds share a GPU."""
    parallel_folds: int | None = Field(None, ge=1)
    """Most folds at once; on a cluster that starts empty and grows this is taken at its word."""
    max_restarts: int = Field(3, ge=0)
    """How often a fold may lose a worker and go on from its last state."""
    backend: str | None = None
    """torch.distributed backend; null = nccl with whole GPUs and several workers, else gloo."""
    logical_gpus: bool = False
    """The cluster's GPUs are logical only (tests, dry runs of a layout): workers reserve them and compute on CPUs."""

    def on_gpu(self, plan: Plan) -> bool:
        """Tell whether workers compute on GPUs."""
        return plan.gpus_per_worker > 0 and not self.logical_gpus


@dataclass(frozen=True)
class SharedCluster:
    """Resources and progress board that tune_training shares between concurrent runs."""

    plan: Plan
    board: Any
    """Handle of the board that the folds report to."""
    cpu_share: float
    """Part of each worker's CPUs that is reserved, to leave some for the caller's own actors."""
    ends_together: bool
    """Whether one fold's failure ends the others too."""
    within: str | None = None
    """Folder of the search that the run is a trial of."""


def fit_where_it_can(
    recipe: FoldRecipe, resources: ResourcesConfig, host: SharedCluster, task: FoldTask, out: str, avoid: set[str]
) -> str | None:
    """Train a fold, on another node where the fault is that of the one it is on; return why it failed for good, if so.

    Args:
        recipe: of the training.
        resources: of each fold.
        host: the cluster and its plan.
        task: of the fold.
        out: folder of the training.
        avoid: ids of the nodes that cannot train; those that are found are added.
    """
    import ray

    while True:
        try:
            failure = _fit(recipe, resources, host, task, out, avoid)
        except Exception as error:  # noqa: BLE001 - Ray wraps whatever went wrong in its own types
            # Of several workers, others than the one that met the fault may be the first to end.
            failure = ray.get(host.board.failure.remote(task.fold)) or _root_cause(error)
        bad = ray.get(host.board.take_blamed.remote(task.fold))
        if failure is None or bad is None:
            return failure
        kind, _, why = failure.partition(": ")
        failure = f"{kind}: node {bad.address}: {why}"
        if not _fits_beside(host.plan, {*avoid, bad.node_id}):
            return failure
        avoid.add(bad.node_id)
        print(f"fold {task.fold} goes on elsewhere, and that node is left out: {failure}", flush=True)


def _fits_beside(plan: Plan, avoid: Collection[str]) -> bool:
    """Tell whether a fold fits on the cluster, as it is or may grow, without these nodes."""
    one = Demand(1, plan.workers_per_group, plan.cpus_per_worker, plan.gpus_per_worker)
    try:
        plan_groups([node for node in cluster_nodes() if node.node_id not in avoid], one)
    except ResourceError:
        return False
    return True


def _fit(
    recipe: FoldRecipe,
    resources: ResourcesConfig,
    host: SharedCluster,
    task: FoldTask,
    out: str,
    avoid: Collection[str],
) -> str | None:
    import ray.train
    from ray.train.torch import TorchTrainer

    from workflows.folds.launch import FoldBackend, run_worker
    from workflows.ray_internals import fit_without_datasets, require_own_states

    plan = host.plan
    use_gpu = plan.gpus_per_worker > 0
    on_gpu = resources.on_gpu(plan)
    backend = resources.backend or ("nccl" if on_gpu and plan.workers_per_group > 1 else "gloo")
    reserved = {"CPU": host.cpu_share * plan.cpus_per_worker} | ({"GPU": plan.gpus_per_worker} if use_gpu else {})
    run = TrainingRun(out)
    state = run.state(task.fold)
    filesystem, folder = storage.as_arrow(run.state())
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={
            "recipe": recipe,
            "task": task,
            "board": host.board,
            "num_threads": plan.threads_per_worker,
            "backend": backend,
            "on_gpu": on_gpu,
        },
        torch_config=FoldBackend(backend),
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.workers_per_group,
            use_gpu=use_gpu,
            resources_per_worker=reserved,
            label_selector=beside(avoid) or None,
        ),
        run_config=ray.train.RunConfig(
            name=storage.name_of(state),
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=resources.max_restarts),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    require_own_states(state)
    failure: str | None = fit_without_datasets(trainer).return_value
    if run.fold(task.fold).is_done:  # and never resumed; one that was stopped may be
        storage.remove(state)
    return failure


def _root_cause(error: BaseException) -> str:
    """Unwrap the worker's own error from Ray's, in one line."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = failures[min(failures)]
    cause: BaseException = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner
    return f"{type(cause).__name__}: {cause}".strip().replace("\n", " ")[:2000]
