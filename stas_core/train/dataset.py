"""From cohort rows to training batches.

A sample is a pure function of (seed, epoch, index), whichever worker makes it, so a resumed or re-distributed run
sees the same data. The plan of an epoch (which samples form which optimiser step on which rank) is pure too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from stas_core.arrays import Mask, RgbImage
from stas_core.data import images
from stas_core.data.cohort import CohortRow
from stas_core.data.fields import load_image, load_mask
from stas_core.data.stain import render
from stas_core.train import augment
from stas_core.train.recipe import AugmentConfig, DataConfig


@dataclass(frozen=True)
class DecodedField:
    """A decoded training image at the training scale."""

    image: RgbImage
    mask: Mask
    target_points: augment.TargetPoints


class Key(NamedTuple):
    """A sample of an epoch."""

    epoch: int
    sample: int


class Sample(NamedTuple):
    """One augmented sample: image (h, w, 3) 8-bit, mask (h, w), weight 0 for a filler that only keeps ranks in step."""

    image: RgbImage
    mask: Mask
    weight: float


class Batch(NamedTuple):
    """A micro-batch: images (n, 3, h, w) 8-bit, targets and valid (n, h, w) 0/1 float32, weights (n,)."""

    images: torch.Tensor
    targets: torch.Tensor
    valid: torch.Tensor
    weights: torch.Tensor


class MicroBatch(NamedTuple):
    """The samples one worker takes in one forward pass."""

    keys: list[Key]
    filler: bool
    """True where a worker has no sample of this step and repeats another's with weight 0."""


class Step(NamedTuple):
    """One optimiser step as one worker sees it."""

    micro_batches: list[MicroBatch]
    num_samples: int
    """Samples of this step over all workers: the loss is their mean."""


def plan_epoch(
    num_samples: int,
    *,
    epoch: int,
    seed: int,
    batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[Step]:
    """Shuffle an epoch's samples into optimiser steps of nearly equal size (none dropped) and cut out a rank's part.

    Steps are ceil(num_samples / batch_size); sizes differ by at most one, so no step is a tiny rest. Ranks take
    interleaved samples of each step; micro-batches of a rank are nearly equal too.

    Example:
        >>> steps = plan_epoch(10, epoch=1, seed=0, batch_size=4, micro_batch_size=2)
        >>> [step.num_samples for step in steps]
        [4, 3, 3]
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_samples)
    steps = []
    for members in np.array_split(order, -(-num_samples // batch_size)):
        own = members[rank::world_size]
        filler = len(own) == 0
        chosen = members[:1] if filler else own
        parts = np.array_split(chosen, -(-len(chosen) // micro_batch_size))
        micro = [MicroBatch([Key(epoch, int(index)) for index in part], filler) for part in parts]
        steps.append(Step(micro, len(members)))
    return steps


class TrainingSet(Dataset[Sample]):
    """The training images of a fold; `dataset[key]` makes one augmented sample. Owns the image cache."""

    def __init__(
        self, rows: Sequence[CohortRow], *, data: DataConfig, config: AugmentConfig, seed: int, num_epochs: int
    ):
        self._rows = rows
        self._data = data
        self._config = config
        self._seed = seed
        self._num_epochs = num_epochs
        self._cache: dict[int, DecodedField] = {}

    @property
    def rows(self) -> Sequence[CohortRow]:
        """Return the rows it samples from."""
        return self._rows

    @property
    def num_samples(self) -> int:
        """Return how many samples one epoch has."""
        return len(self._rows) * self._data.samples_per_image

    def fill_cache(self) -> None:
        """Decode all images now: forked loader workers then share one copy."""
        if self._data.cache == "memory":
            for index in range(len(self._rows)):
                self._field(index)

    def __getitem__(self, key: tuple[Key, bool]) -> Sample:
        """Make the sample of a key; the flag marks a filler."""
        (epoch, sample), filler = key
        row_index = sample % len(self._rows)
        rng = np.random.default_rng([self._seed, epoch, sample])
        field = self._field(row_index)
        image, mask = field.image, field.mask
        if self._data.crop_px is not None:
            image, mask = augment.crop(
                image,
                mask,
                size_px=self._data.crop_px,
                positive_fraction=self._data.positive_fraction,
                target_points=field.target_points,
                rng=rng,
            )
        variant = augment.draw_stain_variant(self._config, rng)
        estimate = self._rows[row_index].stain
        if variant != "image" and estimate is not None:
            image = render(np.ascontiguousarray(image), estimate, variant)
        policy_p = augment.policy_probability(self._config, epoch=epoch - 1, num_epochs=self._num_epochs)
        image, mask = augment.augment(image, mask, rng=rng, config=self._config, policy_p=policy_p)
        return Sample(image, mask, 0.0 if filler else 1.0)

    def _field(self, index: int) -> DecodedField:
        if index in self._cache:
            return self._cache[index]
        row = self._rows[index]
        mask = images.resize_mask(load_mask(row), self._data.scale)
        field = DecodedField(load_image(row, self._data.scale), mask, augment.target_points(mask))
        if self._data.cache == "memory":
            self._cache[index] = field
        return field


def collate(samples: Sequence[Sample], *, stride: int) -> Batch:
    """Stack samples, reflect-padded to the largest size among them, rounded up to the model's stride."""
    largest = np.max([sample.mask.shape for sample in samples], axis=0)
    height, width = images.padded_size((int(largest[0]), int(largest[1])), multiple=stride)
    padded = [images.pad(sample.image, sample.mask, height=height, width=width) for sample in samples]
    batch = torch.from_numpy(np.stack([image for image, _, _ in padded]))
    return Batch(
        batch.permute(0, 3, 1, 2),  # channels-last in memory, as convolutions want it
        torch.from_numpy(np.stack([mask for _, mask, _ in padded])).float(),
        torch.from_numpy(np.stack([valid for _, _, valid in padded])).float(),
        torch.tensor([sample.weight for sample in samples]),
    )


def batches(
    dataset: TrainingSet, micro_batches: Sequence[MicroBatch], *, stride: int, num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Yield the micro-batches in order, made ahead of time by `num_workers` processes."""
    loader = DataLoader(
        dataset,
        batch_sampler=[[(key, micro.filler) for key in micro.keys] for micro in micro_batches],
        collate_fn=partial(collate, stride=stride),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread if num_workers else None,
        prefetch_factor=4 if num_workers else None,
    )
    return iter(loader)


def _one_thread(_worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
