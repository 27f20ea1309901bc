"""The published U-Net on any timm encoder, and the architectures of segmentation_models_pytorch by name.

Every model maps a normalised batch to a list of logits, finest first. Encoder weights come from timm's hub, an
offline pip package, a file, or nowhere; all of them are matched by name and shape, tensor by tensor.

timm and segmentation_models_pytorch are imported where a network is built: they take two seconds, and processes that
only read settings (drivers, controllers, trials) need neither.
"""

import difflib
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from stas_core.errors import ConfigError
from stas_core.networks import libraries
from stas_core.networks.architecture import BatchNormPolicy, ModelConfig
from stas_core.networks.encoder_weights import load_encoder_weights
from stas_core.networks.tensors import Images

_ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "mish": nn.Mish}
_SMP_PREFIX = "smp_"
_SMP_STRIDE = 32


class SegmentationModel(nn.Module):
    """A network with its input normalisation and stride.

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

    Example:
        >>> config = ModelConfig(encoder="mobilenetv3_small_050", encoder_weights="none")
        >>> build_model(config).stride
        32
    """
    libraries.load()
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
    expected = _timm_input(config.encoder)
    return SegmentationModel(network, stride=stride, mean=expected.mean, std=expected.std)


def _smp_network(config: ModelConfig) -> nn.Module:
    libraries.load()
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


class _Input(NamedTuple):
    """What an encoder expects of its input."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    one_size: bool


def _timm_input(name: str) -> _Input:
    libraries.load()
    import timm

    found = timm.get_pretrained_cfg(name)
    if found is None:
        raise ConfigError(f"model.encoder = {name}: timm {timm.__version__} does not say what its input is")
    (r, g, b), (r_sd, g_sd, b_sd) = found.mean, found.std
    return _Input((r, g, b), (r_sd, g_sd, b_sd), found.fixed_input_size)


def _timm_options(name: str) -> dict[str, Any]:
    # Windowed transformers default to one image size; this lets them take any multiple of the stride.
    return {"strict_img_size": False} if _timm_input(name).one_size else {}


def _timm_features(name: str) -> Any:
    libraries.load()
    import timm

    try:
        return timm.create_model(name, features_only=True, pretrained=False, **_timm_options(name))
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AssertionError, AttributeError) as error:
        raise ConfigError(
            f"model.encoder = {name!r} gives no feature maps ({error}); choose a convolutional or hierarchical encoder"
        ) from error


def _pyramid(encoder: Any, config: ModelConfig) -> list[int]:
    """Return the stride of each encoder level, after checking that each halves the resolution of the one before."""
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
    """Apply `ModelConfig.batch_norm`; call it before the optimiser and DDP are made.

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
    from timm.layers.norm_act import convert_sync_batchnorm

    # timm's converter, because torch's drops the activation that timm fuses into its BatchNorm layers.
    converted: SegmentationModel = convert_sync_batchnorm(model)
    return converted


def _is_batch_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm)
