"""Predict probability maps of whole images with flip test-time augmentation."""

from typing import Literal

import cv2
import numpy as np
import torch
from pydantic import Field

from stas_core import images
from stas_core.arrays import Images, ProbMap, ProbMapU8, RgbImage
from stas_core.augment import padded_size
from stas_core.config import Config
from stas_core.model import SegmentationModel

Amp = Literal["auto", "bf16", "none"]
Flip = Literal["identity", "lr", "ud", "both"]
FLIP_AXES: dict[Flip, tuple[int, ...]] = {"identity": (), "lr": (-1,), "ud": (-2,), "both": (-2, -1)}
ALL_FLIPS: tuple[Flip, ...] = ("identity", "lr", "ud", "both")


class InferenceConfig(Config):
    """How a model is applied to a whole image."""

    flips: tuple[Flip, ...] = Field(ALL_FLIPS, min_length=1)
    """Test-time flips; the mean of their probabilities is the result."""
    amp: Amp = "auto"
    """Arithmetic of convolutions and matrix products: bf16, none (float32), or auto: bf16 on CUDA only. Probabilities
    are float32 either way."""


class Predictor:
    """One model on one device, applied to whole images of any size.

    The model is set to evaluation mode. An image is shrunk to the model's scale, reflect-padded to its stride,
    predicted in every flip at once, cropped, averaged and brought back to native size.
    """

    def __init__(self, model: SegmentationModel, *, scale: float, device: torch.device, config: InferenceConfig):
        self._model = model.eval()
        self._scale = scale
        self._device = device
        self._config = config
        self._mean = torch.tensor(model.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(model.std, device=device).view(1, 3, 1, 1)

    def predict(self, image: RgbImage) -> ProbMap:
        """Return the target probability of every pixel of an image at native size."""
        height, width = image.shape[:2]
        small = self._predict_small(images.resize(image, self._scale))
        if small.shape == (height, width):
            return small
        return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR))

    def predict_u8(self, image: RgbImage) -> ProbMapU8:
        """Return the probability map as k / 255, rounded to the nearest k."""
        return quantise(self.predict(image))

    @torch.inference_mode()
    def _predict_small(self, image: RgbImage) -> ProbMap:
        height, width = image.shape[:2]
        to_height, to_width = padded_size((height, width), multiple=self._model.stride)
        padded = np.pad(image, ((0, to_height - height), (0, to_width - width), (0, 0)), mode="reflect")
        batch = torch.from_numpy(padded).to(self._device).permute(2, 0, 1)[None]
        flipped = torch.cat([batch.flip(FLIP_AXES[flip]) for flip in self._config.flips])
        probs = self._forward(normalise(flipped, self._mean, self._std))
        upright = [probs[i].flip(FLIP_AXES[flip]) for i, flip in enumerate(self._config.flips)]
        mean = torch.stack(upright).mean(dim=0)[:height, :width]
        return np.asarray(mean.clamp(0, 1).cpu().numpy())

    def _forward(self, batch: Images) -> torch.Tensor:
        with autocast(self._device, self._config.amp):
            logits = self._model(batch.contiguous(memory_format=torch.channels_last))[0]
        return torch.softmax(logits.float(), dim=1)[:, 1]


def autocast(device: torch.device, amp: Amp) -> torch.autocast:
    """Return the autocast context for a device: bfloat16, or off.

    `auto` leaves CPUs at float32: without AMX, torch's bfloat16 convolutions make a training step 1.4 times slower
    (tf_efficientnet_lite0 U-Net, one thread of an AVX512-BF16 Xeon).
    """
    return torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=amp == "bf16" or (amp == "auto" and device.type == "cuda")
    )


def normalise(batch: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> Images:
    """Turn 8-bit images (n, 3, h, w) into the encoder's normalised floats, on their device."""
    return (batch.float() / 255 - mean) / std


def quantise(prob: ProbMap) -> ProbMapU8:
    """Round probabilities to k / 255."""
    return np.asarray(np.rint(prob * 255), np.uint8)
