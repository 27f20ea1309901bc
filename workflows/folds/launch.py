"""What a fold's controller loads: how its workers start, without torch.

Ray Train gives every fold a controller in a process of its own. It only passes on what the workers run, so it must not
pay for it: torch and all that training needs are three quarters of what starting a fold costs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.train.backend import Backend, BackendConfig


class _SeesItsNodesGpus(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True


@dataclass
class FoldBackend(BackendConfig):  # type: ignore[misc]
    """Workers of a TorchTrainer that make their process group themselves (`worker.join_group`).

    Ray's own listens on every address of its node, also for a fold of one worker.
    """

    backend: str
    """Of torch.distributed; Ray Train watches groups of NCCL."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Return a backend that does nothing when the workers start."""
        return _SeesItsNodesGpus


def run_worker(config: Mapping[str, Any]) -> str | None:
    """Run `worker.run_worker`, in a process that is a worker."""
    from workflows.folds import worker

    return worker.run_worker(config)
