"""Which epochs and images of a training are shown as examples."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stas_core.data.cohort import CohortRow
from stas_core.train import examples
from stas_core.train.recipe import TrainingConfig


@given(st.integers(1, 400), st.integers(1, 60))
def test_epochs_are_few_validated_and_end_with_the_last(epochs: int, every: int) -> None:
    shown = examples.epochs_shown(TrainingConfig(epochs=epochs, validate_every=every))
    assert 1 <= len(shown) <= examples.MOST_EPOCHS and shown[-1] == epochs
    assert all(epoch % every == 0 for epoch in shown[:-1])
    assert shown[0] == min(every, epochs)


def test_images_have_small_usual_and_large_targets_whatever_their_order(cohort_rows: list[CohortRow]) -> None:
    rows = [
        replace(cohort_rows[0], id=name, foreground_share=share, num_targets=int(share > 0))
        for name, share in {"a": 0.0, "b": 0.3, "c": 0.1, "d": 0.2, "e": 0.0}.items()
    ]
    assert examples.images_shown(rows) == examples.images_shown(rows[::-1]) == ["c", "d", "b"]
    assert examples.images_shown(rows[:2]) == ["a", "b"]
    assert examples.images_shown([rows[0], rows[1], rows[4]]) == ["a", "e", "b"]


@pytest.mark.parametrize(("size", "shown"), [((942, 1716), (141, 256)), ((40, 50), (40, 50)), ((3000, 2), (256, 1))])
def test_maps_are_small(size: tuple[int, int], shown: tuple[int, int]) -> None:
    found = examples.small(np.full(size, 77, np.uint8))
    assert found.shape == shown and np.all(found == 77)
