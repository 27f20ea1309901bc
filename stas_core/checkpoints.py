"""Weights as safetensors with a JSON record beside them, and the training state that a run resumes from.

    checkpoints/epoch_0012/weights.safetensors   the tensors
    checkpoints/epoch_0012/checkpoint.json       model config, scale, fold, epoch, scores, provenance

Neither holds a time, so equal training gives equal bytes. Nothing is ever unpickled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from stas_core import config as configs
from stas_core import storage
from stas_core.errors import CheckpointError, ConfigError
from stas_core.model import ModelConfig, SegmentationModel, build_model

WEIGHTS, RECORD = "weights.safetensors", "checkpoint.json"


@dataclass(frozen=True)
class CheckpointRecord:
    """What is needed to use a checkpoint and to know where it came from."""

    model: dict[str, Any]
    scale: float
    fold: int
    epoch: int
    averaged: bool
    """Whether the weights are the exponential moving average."""
    scores: dict[str, float]
    provenance: dict[str, str]


def save_checkpoint(uri: str, weights: Mapping[str, torch.Tensor], record: CheckpointRecord) -> None:
    """Write a checkpoint folder; the record goes last, so a folder with a record is whole."""
    storage.write_bytes(storage.join(uri, WEIGHTS), dump_tensors(weights))
    storage.write_json(storage.join(uri, RECORD), asdict(record))


def load_checkpoint(uri: str, device: torch.device) -> tuple[SegmentationModel, CheckpointRecord]:
    """Build the model of a checkpoint folder with its weights, on a device, in evaluation mode.

    Raises:
        CheckpointError: the folder is incomplete, or its weights do not fit its record.
    """
    if not storage.exists(storage.join(uri, RECORD)):
        raise CheckpointError(f"{uri} holds no {RECORD}; give the folder of a finished checkpoint")
    record = read_record(uri)
    try:
        model_config = configs.build(ModelConfig, record.model)
    except ConfigError as error:
        raise CheckpointError(f"{uri}/{RECORD} has a model this version does not know: {error}") from error
    model = build_model(model_config, pretrained=False)
    load_weights(model, load_tensors(storage.read_bytes(storage.join(uri, WEIGHTS)), uri), uri)
    return model.to(device).eval(), record


def read_record(uri: str) -> CheckpointRecord:
    """Read the record of a checkpoint folder."""
    values = storage.read_json(storage.join(uri, RECORD))
    try:
        return CheckpointRecord(**values)
    except TypeError as error:
        raise CheckpointError(f"{uri}/{RECORD} is not a checkpoint record: {error}") from error


def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy weights into a model; every tensor must be there with its shape, and none may be left over."""
    try:
        model.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"the weights of {source} do not fit the model: {error}") from error


def dump_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Serialise tensors as safetensors, contiguous, on the CPU."""
    # A clone each: safetensors refuses tensors that share memory, as tied weights do.
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())})


def load_tensors(data: bytes, source: str) -> dict[str, torch.Tensor]:
    """Read safetensors bytes."""
    try:
        return load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{source} is not a whole safetensors file: {error}; copy it again") from error


@dataclass(frozen=True)
class RankedEpoch:
    """A saved epoch and the score it is ranked by."""

    epoch: int
    dice: float


def keep_best(ranked: Sequence[RankedEpoch], new: RankedEpoch, top_k: int) -> list[RankedEpoch]:
    """Return the `top_k` best epochs after `new`, best first; of equals the earlier one ranks higher."""
    others = [entry for entry in ranked if entry.epoch != new.epoch]
    return sorted([*others, new], key=lambda entry: (-entry.dice, entry.epoch))[:top_k]


def epoch_folder(fold_uri: str, epoch: int) -> str:
    """Return the checkpoint folder of an epoch of a fold."""
    return storage.join(fold_uri, "checkpoints", f"epoch_{epoch:04d}")


def last_folder(fold_uri: str) -> str:
    """Return the checkpoint folder of the weights a fold ended with."""
    return storage.join(fold_uri, "checkpoints", "last")
