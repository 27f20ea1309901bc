"""Predict probability maps of whole images: an ensemble with flip test-time augmentation, on one device."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stas_core.arrays import AnyRgbImage, ProbMapU8, RgbImage
from stas_core.data import images
from stas_core.data.images import padded_size
from stas_core.errors import CheckpointError, NotFinite
from stas_core.networks.model import SegmentationModel
from stas_core.networks.tensors import Images
from stas_core.predict.inference import Amp, Flip, InferenceConfig

FLIP_AXES: dict[Flip, tuple[int, ...]] = {"identity": (), "lr": (-1,), "ud": (-2,), "both": (-2, -1)}
Forward = Callable[[Tensor], list[Tensor]]


class Member(NamedTuple):
    """A model of an ensemble. Members are summed in the order of their names."""

    name: str
    model: SegmentationModel
    scale: float = 1.0
    """What images are shrunk by before they enter the model."""


@dataclass(frozen=True)
class Prediction:
    """An ensemble's result for an image, at native size."""

    prob: Tensor
    """Probability (h, w), float32, on the predictor's device."""
    std: Tensor
    """Standard deviation of the members' probabilities (h, w): their disagreement."""
    members: Tensor
    """Probability of each member (n, h, w), in the order of their names."""
    num_passes: int
    """Forward passes through a member that the image took."""

    def prob_u8(self) -> ProbMapU8:
        """Return the probability as k / 255, rounded to the nearest k.

        Raises:
            NotFinite: it has none; in 8 bits it would pass for an empty map.
        """
        if not torch.isfinite(self.prob).all():
            raise NotFinite(
                "the models' probabilities of this image are not finite, though their weights are: set "
                "inference.amp=none, or find the member by scoring with each alone, and leave it out"
            )
        return _to_u8(self.prob)

    def member_u8(self, index: int) -> ProbMapU8:
        """Return a member's probability as k / 255."""
        return _to_u8(self.members[index])

    def std_u8(self) -> ProbMapU8:
        """Return the standard deviation as k / 510, k in 0..255: the largest possible is one half."""
        return _to_u8(2 * self.std)


class Transform(NamedTuple):
    """A flip, before which the image may be turned about its diagonal; together they make the 90-degree turns."""

    flip: Flip
    transpose: bool

    def apply(self, batch: Tensor) -> Tensor:
        """Transform the last two axes."""
        return _flipped(batch.transpose(-1, -2) if self.transpose else batch, self.flip)

    def undo(self, batch: Tensor) -> Tensor:
        """Invert the transform."""
        upright = _flipped(batch, self.flip)
        return upright.transpose(-1, -2) if self.transpose else upright


def _flipped(batch: Tensor, flip: Flip) -> Tensor:
    # No flip of no axes: ONNX cannot express it.
    return batch.flip(FLIP_AXES[flip]) if FLIP_AXES[flip] else batch


class Predictor:
    """An ensemble on one device, applied to whole images of any size.

    All members stay on the device. An image is shrunk to a member's scale, reflect-padded to its stride, predicted in
    every flip, cropped, averaged over flips, brought back to native size and averaged over members, all on the
    device. Members may differ in architecture, scale and normalisation.

    Example:
        >>> from stas_core.networks.architecture import ModelConfig
        >>> from stas_core.networks.model import build_model
        >>> small = ModelConfig(encoder="mobilenetv3_small_050", encoder_weights="none")
        >>> members = [Member("fold_0", build_model(small), scale=0.5)]
        >>> predictor = Predictor(members, device=torch.device("cpu"), config=InferenceConfig(flips=("identity", "lr")))
        >>> predictor.predict_u8(np.zeros((50, 70, 3), np.uint8)).shape
        (50, 70)
    """

    def __init__(self, members: Sequence[Member], *, device: torch.device, config: InferenceConfig):
        if not members:
            raise CheckpointError("an ensemble needs at least one member")
        self._members = sorted(members, key=lambda member: member.name)
        for member in self._members:
            # Weights in the layout of the input, or cuDNN converts them in every pass.
            member.model.to(device).to(memory_format=torch.channels_last).eval()
        self._forwards: list[Forward] = [_compiled(m.model) if config.compile else m.model for m in self._members]
        self._statistics = [[_channels(v, device) for v in (m.model.mean, m.model.std)] for m in self._members]
        self._device = device
        self._config = config

    def predict_u8(self, image: RgbImage) -> ProbMapU8:
        """Return the probability map of one image as k / 255, rounded to the nearest k."""
        return self.predict([image])[0].prob_u8()

    def predict(self, batch: Sequence[AnyRgbImage]) -> list[Prediction]:
        """Predict images of any sizes, in their order; those of one size share forward passes."""
        found = dict(self.each(batch))
        return [found[index] for index in range(len(batch))]

    def each(self, batch: Sequence[AnyRgbImage]) -> Iterator[tuple[int, Prediction]]:
        """Yield index and prediction of each image as soon as it is there, those of one size one after another.

        A prediction takes 4 bytes a pixel for each member and 8 more: who needs 8-bit maps alone need not hold many.
        """
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(batch):
            by_size.setdefault(image.shape, []).append(index)
        for indices in by_size.values():
            batch_size = self._batch_size(batch[indices[0]].shape)
            for start in range(0, len(indices), batch_size):
                chosen = indices[start : start + batch_size]
                yield from zip(chosen, self._predict_same_size([batch[i] for i in chosen]), strict=True)

    def _batch_size(self, shape: tuple[int, ...]) -> int:
        """Batch size for images of one shape; by shape alone, so results never depend on what shares a batch."""
        batch_size, batch_px = self._config.batch_size or 1, self._config.batch_px
        return batch_size if batch_px is None else max(1, min(batch_size, batch_px // (shape[0] * shape[1])))

    @torch.inference_mode()  # here, not on the generator: what is around it may hide that it is one
    def _predict_same_size(self, batch: Sequence[AnyRgbImage]) -> list[Prediction]:
        """Predict at most `batch_size` images of one size."""
        inputs = {scale: self._input(batch, scale) for scale in {member.scale for member in self._members}}
        sums = [torch.zeros((len(batch), *inputs[m.scale].size), device=self._device) for m in self._members]
        num_passes = [0] * len(batch)
        active = list(range(len(batch)))
        for round_ in self._rounds():
            latest = []
            for index, member in enumerate(self._members):
                probs = self._forward_flips(index, inputs[member.scale].select(active), round_)
                total = sums[index]
                if len(active) == len(batch):
                    total += probs.sum(dim=1)
                else:  # a list as index is copied to the device, which waits for it
                    total[active] += probs.sum(dim=1)
                latest.append(probs)
            for index in active:
                num_passes[index] += len(round_)
            if self._config.adaptive_px is not None:
                active = self._unsettled(active, sums, num_passes, latest)
            if not active:
                break
        native, found = batch[0].shape[:2], []
        for index, passes in enumerate(num_passes):
            means = torch.stack([_resize(total[index] / passes, native) for total in sums])
            std = means.std(dim=0, correction=0) if len(means) > 1 else torch.zeros_like(means[0])
            found.append(Prediction(means.mean(dim=0).clamp(0, 1), std, means, passes))
        return found

    def _rounds(self) -> list[tuple[Transform, ...]]:
        """Group the transforms that go through a model together: those of one shape, or one at a time if adaptive."""
        upright = tuple(Transform(flip, False) for flip in self._config.flips)
        turned = tuple(Transform(flip, True) for flip in self._config.flips) if self._config.turns else ()
        if self._config.adaptive_px is not None:
            return [(transform,) for transform in (*upright, *turned)]
        return [transforms for transforms in (upright, turned) if transforms]

    def _input(self, batch: Sequence[AnyRgbImage], scale: float) -> "_Input":
        small = np.stack([images.resize(image, scale) for image in batch])
        stride = math.lcm(*(member.model.stride for member in self._members if member.scale == scale))
        height, width = small.shape[1:3]
        to_height, to_width = padded_size((height, width), multiple=stride)
        rim = ((0, 0), (0, to_height - height), (0, to_width - width), (0, 0))
        pixels = torch.from_numpy(np.pad(small, rim, mode="reflect"))
        if self._device.type == "cuda":
            pixels = pixels.pin_memory().to(self._device, non_blocking=True)
        return _Input(pixels.permute(0, 3, 1, 2), (height, width), self._batch_size(batch[0].shape))

    def _forward_flips(self, member: int, given: "_Input", transforms: Sequence[Transform]) -> Tensor:
        """Return a member's upright probabilities (n, transforms, h, w) of the images given."""
        full = given.filled()
        flipped = torch.cat([transform.apply(full) for transform in transforms])
        mean, std = self._statistics[member]
        batch = normalise(flipped, mean, std).contiguous(memory_format=torch.channels_last)
        with autocast(self._device, self._config.amp):
            logits = self._forwards[member](batch)[0]
        probs = torch.softmax(logits.float(), dim=1)[:, 1].chunk(len(transforms))
        height, width = given.size
        upright = [t.undo(p)[: given.num_images, :height, :width] for t, p in zip(transforms, probs, strict=True)]
        return torch.stack(upright, dim=1)

    def _unsettled(
        self, active: Sequence[int], sums: Sequence[Tensor], num_passes: Sequence[int], latest: Sequence[Tensor]
    ) -> list[int]:
        """Return the images whose masks still differ between members (one member: between mean and latest flip)."""
        size = tuple(sums[0].shape[1:])
        unsettled = []
        for row, index in enumerate(active):
            votes = [_resize(total[index] / num_passes[index], size) >= 0.5 for total in sums]
            if len(votes) == 1:
                votes.append(latest[0][row, -1] >= 0.5)
            disputed = torch.stack([vote != votes[0] for vote in votes[1:]]).any(dim=0).sum()
            # The first flip of a single member has nothing to disagree with.
            if disputed > (self._config.adaptive_px or 0) or (len(sums) == 1 and num_passes[index] == 1):
                unsettled.append(index)
        return unsettled


@dataclass(frozen=True)
class _Input:
    """8-bit images (n, 3, h, w) padded to the stride, on the device, with the size of the crop that counts."""

    pixels: Tensor
    size: tuple[int, int]
    batch_size: int

    @property
    def num_images(self) -> int:
        return self.pixels.shape[0]

    def select(self, indices: Sequence[int]) -> "_Input":
        return self if len(indices) == self.num_images else replace(self, pixels=self.pixels[list(indices)])

    def filled(self) -> Tensor:
        """Repeat the last image until the batch is full."""
        missing = self.batch_size - self.num_images
        return torch.cat([self.pixels, self.pixels[-1:].expand(missing, -1, -1, -1)]) if missing else self.pixels


def _compiled(model: SegmentationModel) -> Forward:
    # One graph per image size: the compiler would make a graph for all sizes at the second one, and results would
    # depend on the order of sizes.
    compiled: Forward = torch.compile(model, dynamic=False)
    return compiled


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def _resize(prob: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(prob.shape) == size:
        return prob
    return functional.interpolate(prob[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def _to_u8(prob: Tensor) -> ProbMapU8:
    return np.asarray((prob.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def autocast(device: torch.device, amp: Amp) -> torch.autocast:
    """Return the autocast context for a device: bfloat16, or off.

    `auto` leaves CPUs at float32: without AMX, torch's bfloat16 convolutions make a training step 1.4 times slower
    (tf_efficientnet_lite0 U-Net, one thread of an AVX512-BF16 Xeon).
    """
    return torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=amp == "bf16" or (amp == "auto" and device.type == "cuda")
    )


def normalise(batch: Tensor, mean: Tensor, std: Tensor) -> Images:
    """Turn 8-bit images (n, 3, h, w) into the encoder's normalised floats, on their device."""
    return (batch.float() / 255 - mean) / std
