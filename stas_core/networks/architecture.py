"""Settings of the network; they need no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stas_core.config import Config, Uri

BatchNormPolicy = Literal["auto", "local", "sync", "frozen"]


class ModelConfig(Config):
    """Which network is trained; the defaults are the published one."""

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
    init_from: Uri | None = None
    """Go on from a trained model instead of encoder_weights: an ensemble.json or the folder of a training run, of which
    each fold takes the model of its own number; or one checkpoint folder, which serves all folds. It must have the same
    architecture, and must not have seen the images that it is scored on."""

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

    @property
    def weights_file(self) -> str | None:
        """The file that the encoder's weights are read from, if it is one."""
        return None if self.encoder_weights in ("imagenet", "package", "none") else self.encoder_weights

    def architecture(self) -> dict[str, Any]:
        """Return the settings that decide which weights there are, and what is computed with them."""
        names = ["arch", "encoder"]
        if self.arch == "unet":
            names += ["activation", "norm", "upsampling", "deep_supervision", "decoder_channels"]
            names += ["norm_groups"] if self.norm == "group" else []
        return {name: getattr(self, name) for name in names}


Scale = Annotated[float, Field(ge=1 / 64, le=1)]
"""What images are shrunk by; at less than a 64th, a field is a few pixels."""
