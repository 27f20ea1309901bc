from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core.data.cohort import CohortRow
from stas_core.data.fields import load_image
from stas_core.errors import SizeMismatch
from stas_core.train import dataset
from stas_core.train.dataset import Key, MicroBatch, TrainingSet
from stas_core.train.recipe import AugmentConfig, DataConfig

sizes = st.integers(1, 60)


@settings(max_examples=60)
@given(sizes, st.integers(1, 16), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))
def test_an_epoch_uses_every_sample_once(num: int, batch: int, micro: int, world: int, epoch: int) -> None:
    ranks = [
        dataset.plan_epoch(
            num, epoch=epoch, seed=1, batch_size=batch, micro_batch_size=micro, rank=rank, world_size=world
        )
        for rank in range(world)
    ]
    seen = [k.sample for plan in ranks for step in plan for m in step.micro_batches if not m.filler for k in m.keys]
    assert sorted(seen) == list(range(num))
    assert {len(plan) for plan in ranks} == {-(-num // batch)}
    for steps in zip(*ranks, strict=True):
        own = [sum(len(m.keys) for m in step.micro_batches if not m.filler) for step in steps]
        assert {step.num_samples for step in steps} == {sum(own)} and sum(own) <= batch
        assert all(step.micro_batches for step in steps)  # every rank takes part in every gradient exchange
        assert all(len(m.keys) <= micro for step in steps for m in step.micro_batches)
    step_sizes = [step.num_samples for step in ranks[0]]
    assert max(step_sizes) - min(step_sizes) <= 1


def test_epochs_are_shuffled_differently_and_seeded() -> None:
    def order(epoch: int, seed: int) -> list[Key]:
        plan = dataset.plan_epoch(50, epoch=epoch, seed=seed, batch_size=8, micro_batch_size=8)
        return [key for step in plan for micro in step.micro_batches for key in micro.keys]

    assert order(1, 0) == order(1, 0)
    assert [k.sample for k in order(1, 0)] != [k.sample for k in order(2, 0)]
    assert [k.sample for k in order(1, 0)] != [k.sample for k in order(1, 1)]


def make_set(rows: list[CohortRow], **data: object) -> TrainingSet:
    settings = DataConfig.model_validate({"crop_px": 64, **data})
    return TrainingSet(rows, data=settings, config=AugmentConfig(norm_p=0.5), seed=5, num_epochs=9)


def test_a_sample_depends_on_its_key_alone(cohort_rows: list[CohortRow]) -> None:
    cached, uncached = make_set(cohort_rows), make_set(cohort_rows, cache="none")
    keys = [(Key(epoch, sample), False) for epoch in (1, 2) for sample in range(len(cohort_rows))]
    samples = [cached[key] for key in keys]
    for key, sample in reversed(list(zip(keys, samples, strict=True))):
        again = uncached[key]
        assert np.array_equal(sample.image, again.image) and np.array_equal(sample.mask, again.mask)
    assert any(not np.array_equal(a.image, b.image) for a, b in zip(samples[:8], samples[8:], strict=True))


def test_loader_processes_give_the_same_batches(cohort_rows: list[CohortRow]) -> None:
    micro = [MicroBatch([Key(1, 0), Key(1, 1)], False), MicroBatch([Key(1, 2)], True)]

    def run(num_workers: int) -> list[dataset.Batch]:
        samples = make_set(cohort_rows)
        return list(dataset.batches(samples, micro, stride=32, num_workers=num_workers, pin_memory=False))

    for here, there in zip(run(0), run(1), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert [batch.weights.tolist() for batch in run(0)] == [[1, 1], [0]]


def test_padding_is_marked_invalid_and_holds_no_target() -> None:
    mixed = [
        dataset.Sample(np.full((40, 70, 3), 9, np.uint8), np.ones((40, 70), bool), 1.0),
        dataset.Sample(np.full((33, 31, 3), 9, np.uint8), np.ones((33, 31), bool), 1.0),
    ]
    batch = dataset.collate(mixed, stride=32)
    assert batch.images.shape == (2, 3, 64, 96) and batch.images.is_contiguous(memory_format=torch.channels_last)
    assert [int(valid.sum()) for valid in batch.valid] == [40 * 70, 33 * 31]
    assert torch.equal(batch.targets, batch.valid)


def test_scale_and_whole_images(cohort_rows: list[CohortRow]) -> None:
    sample = make_set(cohort_rows, crop_px=None, scale=0.5)[Key(1, 0), False]
    assert sample.image.shape == (48, 64, 3) and sample.mask.shape == (48, 64)


def test_an_image_that_changed_size_since_is_refused(cohort_rows: list[CohortRow]) -> None:
    with pytest.raises(SizeMismatch, match=r"is now 128x96 px, the cohort says 128x95; run prepare_data again"):
        load_image(replace(cohort_rows[0], height=95), 1.0)
