"""The seam between the training loop and what runs it: one process here, a Ray Train worker in `workflows`."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

T = TypeVar("T")


@runtime_checkable
class TrainContext(Protocol):
    """Where a fold is trained: one process here, or a worker of a Ray TorchTrainer."""

    rank: int
    world_size: int
    num_threads: int
    device: torch.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model made ready for `world_size` workers (DDP)."""

    def gather(self, items: list[T]) -> list[T]:
        """Return all ranks' items, in rank order, on every rank."""

    def report(self, metrics: Mapping[str, Any], state: Path | None) -> None:
        """Report an epoch; every rank calls it. Rank 0 may hand over a folder with the state to resume from."""

    def saved_state(self) -> AbstractContextManager[Path | None]:
        """Return a context manager giving the folder of the latest reported state, or None."""

    def progress(self, values: Mapping[str, Any]) -> None:
        """Show the fold's progress; cheap, may be dropped."""


@dataclass
class LocalContext:
    """One process, no cluster: states go to `<folder>/state`."""

    folder: Path
    num_threads: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rank: int = 0
    world_size: int = 1
    on_progress: Callable[[Mapping[str, Any]], None] = lambda values: None

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model as it is."""
        return model

    def gather(self, items: list[T]) -> list[T]:
        """Return the items as they are."""
        return items

    def report(self, metrics: Mapping[str, Any], state: Path | None) -> None:
        """Keep the state as the latest."""
        if state is None:
            return
        fresh, current, old = (self.folder / name for name in ("state.tmp", "state", "state.old"))
        for stale in (fresh, old):
            shutil.rmtree(stale, ignore_errors=True)
        shutil.copytree(state, fresh)
        if current.exists():
            os.replace(current, old)
        os.replace(fresh, current)
        shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def saved_state(self) -> Iterator[Path | None]:
        """Give the folder of the latest state, or None."""
        # A stop between the two renames of `report` leaves the state before it, whole, under `state.old`.
        found = [self.folder / name for name in ("state", "state.old") if (self.folder / name).exists()]
        yield found[0] if found else None

    def progress(self, values: Mapping[str, Any]) -> None:
        """Pass the values on."""
        self.on_progress(values)
