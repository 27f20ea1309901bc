"""Weights as safetensors with a JSON record beside them.

    checkpoints/epoch_0012/weights.safetensors   the tensors
    checkpoints/epoch_0012/trained_on.txt        fingerprints of all images that it has seen, where that is known
    checkpoints/epoch_0012/checkpoint.json       model config, scale, um per pixel, fold, epoch, scores, provenance

None holds a time, so equal training gives equal bytes. Nothing is ever unpickled, and what is read is checked: the
files may have been copied in part, edited by hand, or made by another program.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, TypeVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from stas_core import config as configs
from stas_core import storage
from stas_core.errors import CheckpointError, ConfigError
from stas_core.networks.architecture import ModelConfig, Scale
from stas_core.networks.model import SegmentationModel, build_model

R = TypeVar("R")
WEIGHTS, TRAINED_ON, RECORD = "weights.safetensors", "trained_on.txt", "checkpoint.json"
Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
CHECKED = ConfigDict(extra="forbid", strict=True)
"""For dataclasses that `read_checked` reads: no unknown field, and no text for a number."""


@dataclass(frozen=True)
class CheckpointRecord:
    """What is needed to use a checkpoint and to know where it came from."""

    __pydantic_config__ = CHECKED

    model: dict[str, Any]
    scale: Scale
    fold: Count
    epoch: Count
    averaged: bool
    """Whether the weights are the exponential moving average."""
    scores: dict[str, Finite]
    provenance: dict[str, str]
    mpp: Annotated[float, Field(ge=0.05, le=5)] | None = None
    """um per pixel of the training images at native size; null: nobody said."""
    trained_on: str | None = None
    """Digest of `trained_on.txt`; null: nobody can tell what the weights have seen, as of 0.2.0 and before."""


def save_checkpoint(
    uri: str,
    weights: Mapping[str, torch.Tensor],
    record: CheckpointRecord,
    trained_on: Collection[str] | None = None,
) -> None:
    """Write a checkpoint folder; the record goes last, so a folder with a record is whole.

    Args:
        uri: the folder.
        weights: the tensors.
        record: what is needed to use them; its `trained_on` is filled in.
        trained_on: fingerprints of the images that they have seen; None: not known.
    """
    storage.write_bytes(storage.join(uri, WEIGHTS), dump_tensors(weights))
    digest = None
    if trained_on is not None:
        marks = "".join(f"{mark}\n" for mark in sorted(trained_on)).encode()
        storage.write_bytes(storage.join(uri, TRAINED_ON), marks)
        digest = storage.fingerprint(marks)
    storage.write_json(storage.join(uri, RECORD), asdict(replace(record, trained_on=digest)))


def load_checkpoint(uri: str, device: torch.device) -> tuple[SegmentationModel, CheckpointRecord]:
    """Build the model of a checkpoint folder with its weights, on a device, in evaluation mode.

    Raises:
        CheckpointError: the folder is incomplete, or its weights do not fit its record or are not finite.
    """
    record = read_record(uri)
    try:
        model = build_model(configs.build(ModelConfig, record.model), pretrained=False)
    except (ConfigError, RuntimeError) as error:  # RuntimeError: more channels than memory holds
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{uri}/{RECORD} has a model this version does not know: {reason}") from error
    load_weights(model, load_tensors(storage.read_bytes(storage.join(uri, WEIGHTS)), uri), uri)
    return model.to(device).eval(), record


def read_record(uri: str) -> CheckpointRecord:
    """Read the record of a checkpoint folder.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    path = storage.join(uri, RECORD)
    if not storage.exists(path):
        raise CheckpointError(f"{uri} holds no {RECORD}; give the folder of a finished checkpoint")
    return read_checked(CheckpointRecord, path, "a checkpoint record")


def read_trained_on(uri: str) -> frozenset[str] | None:
    """Return the fingerprints of the images that a checkpoint has seen; None: its record does not say.

    Raises:
        CheckpointError: the list that its record names is missing, cut off or another one.
        StorageError: it is empty, or a Git LFS pointer.
    """
    digest, path = read_record(uri).trained_on, storage.join(uri, TRAINED_ON)
    if digest is None:
        return None
    if not storage.exists(path):
        raise CheckpointError(f"{uri} lacks {TRAINED_ON}, which its {RECORD} names; copy it, too, from its run")
    data = storage.read_bytes(path)
    if storage.fingerprint(data) != digest:  # else its images would pass for unseen ones
        storage.refuse_stand_in(path, data, "fingerprint list")
        raise CheckpointError(
            f"{path} is not the list that {RECORD} beside it was written with: cut off, edited, or another "
            "checkpoint's; copy the whole folder again from its run"
        )
    return frozenset(data.decode().split())


def read_checked(cls: type[R], uri: str, what: str) -> R:
    """Read a JSON file as a dataclass whose `__pydantic_config__` is `CHECKED`, field by field.

    Raises:
        CheckpointError: naming the first field that is missing, unknown, or of another type or range than it must be.
    """
    values = storage.read_json(uri)
    try:
        # As text: strict JSON has lists where dataclasses have tuples, and objects where they have dataclasses.
        return TypeAdapter(cls).validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        value = "" if first["type"] == "missing" else f" = {str(first['input'])[:80]!r}"
        found = f"{path}{value}: " if path else ""
        raise CheckpointError(
            f"{uri} is not {what}: {found}{first['msg'][0].lower()}{first['msg'][1:]}; copy it again from its run"
        ) from error


def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy weights into a model; every tensor must be there with its shape, finite, and none may be left over.

    Raises:
        CheckpointError: naming the first tensor that is not as it should be.
    """
    expected = model.state_dict()
    faults = [f"Missing key {name}" for name in expected if name not in weights]
    faults += [f"Unexpected key {name}" for name in weights if name not in expected]
    for name in expected.keys() & weights.keys():
        wanted, found = expected[name], weights[name]
        # Floats of another width are converted, as in weights that were halved to send them.
        if (wanted.shape, wanted.is_floating_point()) != (found.shape, found.is_floating_point()):
            faults.append(
                f"{name} is {found.dtype} {tuple(found.shape)}, expected {wanted.dtype} {tuple(wanted.shape)}"
            )
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckpointError(
            f"the weights of {source} do not fit the model: {sorted(faults)[0]}{more}; is the file another model's?"
        )
    if (not_finite := first_not_finite(weights)) is not None:
        raise CheckpointError(
            f"the weights of {source} are not finite ({not_finite}): its training diverged, or the file is damaged; "
            "leave it out, or train it anew with a lower optim.lr"
        )
    model.load_state_dict(dict(weights), strict=True)


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity, or None."""
    return next((name for name, tensor in sorted(tensors.items()) if not torch.isfinite(tensor).all()), None)


def dump_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Serialise tensors as safetensors, contiguous, on the CPU."""
    # A clone each: safetensors refuses tensors that share memory, as tied weights do.
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())})


def load_tensors(data: bytes, source: str) -> dict[str, torch.Tensor]:
    """Read safetensors bytes."""
    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # the others: unknown dtypes
        raise CheckpointError(f"{source} is not a whole safetensors file: {error}; copy it again") from error


@dataclass(frozen=True)
class RankedEpoch:
    """A saved epoch and the score it is ranked by."""

    __pydantic_config__ = CHECKED

    epoch: Count
    dice: Finite


def keep_best(ranked: Sequence[RankedEpoch], new: RankedEpoch, top_k: int) -> list[RankedEpoch]:
    """Return the `top_k` best epochs including `new`, best first; ties go to the earlier epoch, NaN is never kept."""
    others = [entry for entry in ranked if entry.epoch != new.epoch]
    finite = [entry for entry in (*others, new) if math.isfinite(entry.dice)]
    return sorted(finite, key=lambda entry: (-entry.dice, entry.epoch))[:top_k]
