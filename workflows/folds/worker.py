"""What one worker of a fold's TorchTrainer does: stand behind `TrainContext` and run `train_fold`."""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
from pyarrow.fs import LocalFileSystem
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from stas_core import local_files, process, storage
from stas_core.errors import ConfigError, DivergedError, LocalDiskError, ResourceError, WriteError
from stas_core.runs import FoldFolder
from stas_core.train.loop import train_fold
from stas_core.train.recipe import FoldRecipe, FoldTask
from workflows.ray_internals import quieten_train_reports

T = TypeVar("T")
GROUP_TIMEOUT = timedelta(minutes=30)
"""How long a worker waits for the others."""


class StoppedFold(Exception):
    """The board asked the fold to stop: its setting is not worth more epochs."""


def join_group(backend: str) -> None:
    """Make the process group of a fold's workers, if there are several; its store listens on rank 0's address alone."""
    worker = ray.train.get_context()
    rank, world_size = worker.get_world_rank(), worker.get_world_size()
    if world_size == 1:
        return
    host, port, listener = ray.util.get_node_ip_address(), 0, None
    if rank == 0:
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
    if host == "127.0.0.1":  # else gloo and NCCL take the interface that the host's name leads to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    host, port = broadcast_from_rank_zero((host, port))
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        world_size,
        is_master=listener is not None,
        timeout=GROUP_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)


@contextmanager
def downloaded(checkpoint: ray.train.Checkpoint) -> Iterator[Path]:
    """Give a saved state as a folder of this machine; Ray's own way leaves behind what it got of one it cannot get."""
    if isinstance(checkpoint.filesystem, LocalFileSystem):
        yield Path(checkpoint.path)
        return
    with local_files.temporary_folder() as folder:
        yield Path(checkpoint.to_directory(folder))


class RayContext:
    """`TrainContext` of a Ray Train worker."""

    def __init__(self, fold: int, num_threads: int, board: Any, *, on_gpu: bool):
        worker = ray.train.get_context()
        self.rank = worker.get_world_rank()
        self.world_size = worker.get_world_size()
        self.num_threads = num_threads
        self.device = process.device(on_gpu=on_gpu, remedy="set resources.gpus_per_worker=0 to train on CPUs")
        if on_gpu:
            self.device = get_device()  # which of those that several workers of this node see
        self._fold = fold
        self._board = board
        self._shown = 0.0
        self._answer: Any = None
        self._stopping = False

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model in DDP where there are several workers."""
        if self.world_size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def gather(self, items: list[T]) -> list[T]:
        """Return all ranks' items, in rank order, on every rank."""
        if self.world_size == 1:
            return items
        parts: list[Any] = [None] * self.world_size
        distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def report(self, metrics: Mapping[str, Any], state: Path | None) -> None:
        """Report to Ray Train, which keeps the state as the run's latest checkpoint."""
        checkpoint = None if state is None else ray.train.Checkpoint.from_directory(str(state))
        ray.train.report(
            dict(metrics), checkpoint=checkpoint, checkpoint_dir_name=f"epoch_{metrics['epoch']:04d}" if state else None
        )
        # Ranks end together, or those that go on would wait for the others for ever.
        if self.world_size > 1 and any(self.gather([self._stopping])):
            raise StoppedFold

    @contextmanager
    def saved_state(self) -> Iterator[Path | None]:
        """Give the folder of the latest checkpoint, or None."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with downloaded(checkpoint) as folder:
            yield folder

    def progress(self, values: Mapping[str, Any]) -> None:
        """Send the values to the driver's table: of steps, at most twice a second.

        Raises:
            StoppedFold: the board has asked the fold to end, and it is this worker's alone.
        """
        now = time.monotonic()
        if "train_loss" in values or values.get("reading") or now - self._shown > 0.5:
            self._shown = now
            # The answer to the previous message: no step blocks on a reply.
            if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
                self._stopping = ray.get(self._answer)
            self._answer = self._board.update.remote(self._fold, dict(values))
        if self._stopping and self.world_size == 1:
            raise StoppedFold


def run_worker(config: Mapping[str, Any]) -> str | None:
    """Train a fold on this worker; rank 0 writes fold.json last, which marks the fold as done.

    Returns:
        Why the fold failed for good, if it did: what is raised, Ray Train tries again, and no retry mends a setting or
        a full disk. One of several workers has to raise it, for the others may not have met it and wait for this one;
        they all find it on the board when Ray Train starts them again. The board says, too, whose
        fault it was where it was the node's.
    """
    quieten_train_reports()
    board, fold = config["board"], config["task"].fold
    is_alone = ray.train.get_context().get_world_size() == 1
    if not is_alone and (why := ray.get(board.failure.remote(fold))) is not None:
        return str(why)
    try:
        _train(config)
    except StoppedFold:
        return None
    except (ConfigError, DivergedError, ResourceError, WriteError) as error:
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, LocalDiskError | ResourceError):
            from workflows.folds.board import BadNode

            node = BadNode(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())
            ray.get(board.blame.remote(fold, node))
        if not is_alone:
            ray.get(board.fail.remote(fold, why))
            raise
        return why
    return None


def _train(config: Mapping[str, Any]) -> None:
    recipe: FoldRecipe = config["recipe"]
    task: FoldTask = config["task"]
    start = time.monotonic()
    context = RayContext(task.fold, config["num_threads"], config["board"], on_gpu=config["on_gpu"])
    join_group(config["backend"])
    with storage.telling_full_disk(f"the saved state of fold {task.fold}, which Ray Train copies to the run"):
        result = train_fold(context, recipe, task)
    if context.rank != 0:
        return
    # Training time is summed over restarts; what follows it (maps) is this attempt's.
    hours = (time.monotonic() - start) / 3600 * context.world_size
    gpus = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)
    facts = {
        "seconds": round(time.monotonic() - start, 1),
        "cpu_hours": round(hours * context.num_threads, 4),
        "gpu_hours": round(hours * gpus, 4),
        "num_workers": context.world_size,
        "num_threads": context.num_threads,
        "device": str(context.device),
    }
    FoldFolder(task.uri).finish(result, facts)
