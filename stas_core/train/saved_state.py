"""The state that an interrupted training resumes from: tensors as safetensors, the rest as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from stas_core import storage
from stas_core.errors import CheckpointError, StorageError
from stas_core.networks import checkpoints
from stas_core.networks.checkpoints import RankedEpoch
from stas_core.runs import EpochMetrics

TENSORS, RECORD = "state.safetensors", "state.json"


@dataclass(frozen=True)
class StateRecord:
    """The part of the state that is not tensors."""

    __pydantic_config__ = checkpoints.CHECKED

    epoch: checkpoints.Count
    history: list[EpochMetrics]
    best: list[RankedEpoch]
    ran_on: list[str]
    train_seconds: checkpoints.Finite


def tensors_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
) -> dict[str, torch.Tensor]:
    """Return every tensor that the next step depends on."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, parameter in enumerate(model.parameters()):
        for name, tensor in optimizer.state[parameter].items():
            tensors[f"optimizer.{index}.{name}"] = tensor
    if average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    return tensors


def save(folder: Path, tensors: Mapping[str, torch.Tensor], record: StateRecord) -> None:
    """Write a state into a folder."""
    (folder / TENSORS).write_bytes(checkpoints.dump_tensors(tensors))
    (folder / RECORD).write_text(json.dumps(asdict(record)))


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None) -> StateRecord:
    """Load a folder's state into model, optimiser and average; return its record.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model.
    """
    try:
        record = checkpoints.read_checked(StateRecord, str(folder / RECORD), "the record of a saved state")
        if [row.epoch for row in record.history] != list(range(1, record.epoch + 1)):
            raise CheckpointError(f"{folder / RECORD} is of epoch {record.epoch}, but its history is of others")
        source = str(folder / TENSORS)
        tensors = checkpoints.load_tensors(storage.read_bytes(source), source)
        checkpoints.load_weights(model, _with_prefix(tensors, "model."), source)
        if average is not None:
            checkpoints.load_weights(average, _with_prefix(tensors, "average."), source)
        _load_optimizer(model, optimizer, tensors, source)
    except (CheckpointError, StorageError) as error:
        raise CheckpointError(f"a saved state cannot be gone on from: {error}; or start over with --force") from error
    return record


def _load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], source: str
) -> None:
    for index, parameter in enumerate(model.parameters()):
        saved = _with_prefix(tensors, f"optimizer.{index}.")
        shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        expected = shapes if parameter.requires_grad else {}
        if {name: tensor.shape for name, tensor in saved.items()} != expected:
            raise CheckpointError(f"{source} does not fit the optimiser: parameter {index} has other moments")
        # The fused kernel walks memory in storage order, so the moments must be laid out like their parameter
        # (channels-last), not as the file has them.
        optimizer.state[parameter] = {
            name: tensor.to(parameter.device) if tensor.ndim == 0 else torch.empty_like(parameter).copy_(tensor)
            for name, tensor in saved.items()
        }


def _with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
