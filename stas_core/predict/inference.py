"""Settings of inference; they need no torch."""

from typing import Literal

from pydantic import Field, field_validator

from stas_core.config import Config

Amp = Literal["auto", "bf16", "none"]


Flip = Literal["identity", "lr", "ud", "both"]


ALL_FLIPS: tuple[Flip, ...] = ("identity", "lr", "ud", "both")


class InferenceConfig(Config):
    """How models are applied to a whole image."""

    flips: tuple[Flip, ...] = Field(ALL_FLIPS, min_length=1)
    """Test-time flips; the mean of their probabilities is the result."""
    turns: bool = False
    """Also predict every flip of the image turned by 90 degrees (twice the work)."""
    batch_size: int | None = Field(None, ge=1)
    """Images per forward pass, each in all its flips; smaller batches are filled up to it, so that the shape, and with
    it the last bit of a result, never varies. null: 1, or what a calibration finds on a GPU."""
    batch_px: int | None = Field(None, ge=1)
    """Most native pixels per forward pass: larger images go in smaller batches, down to one image. null: no limit, or
    what a calibration found to fit a GPU."""
    amp: Amp = "auto"
    """Arithmetic of convolutions and matrix products: bf16, none (float32), or auto: bf16 on CUDA only. Probabilities
    are float32 either way."""
    compile: bool = False
    """Compile the models with torch.compile: minutes once per process and image size, then faster."""
    adaptive_px: int | None = Field(None, ge=0)
    """Adaptive TTA: after each flip, an image is settled once the members (with one member: its flips so far) disagree
    on at most this many pixels at the models' scale, and its remaining flips are saved. null: every flip of every
    image."""

    @field_validator("flips")
    @classmethod
    def _once_each(cls, flips: tuple[Flip, ...]) -> tuple[Flip, ...]:
        if len(set(flips)) < len(flips):
            raise ValueError(f"flips {', '.join(flips)}: name each flip once")
        return tuple(flip for flip in ALL_FLIPS if flip in flips)  # one order of summation
