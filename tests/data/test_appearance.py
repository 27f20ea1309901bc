from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stas_core import storage
from stas_core.arrays import RgbImage
from stas_core.data import appearance, stain
from stas_core.data.appearance import Look
from stas_core.data.phantom import PhantomConfig, make_phantom
from stas_core.data.reference import CohortReference, parse_reference, reference_of
from stas_core.errors import CheckpointError
from stas_core.runs import TrainingRun, read_reference, write_ensemble
from tests.ground.test_verdicts import made_row

PHANTOM = PhantomConfig(num_images=14, height=256, width=320, seed=3)


@pytest.fixture(scope="module")
def fields() -> list[RgbImage]:
    return [make_phantom(PHANTOM, index).image for index in range(PHANTOM.num_images)]


def restained(image: RgbImage) -> RgbImage:
    """Return the image as a laboratory with half the hematoxylin and a redder eosin would have it."""
    found = stain.estimate(image)
    assert found is not None
    density = -np.log((image.astype(float) + 1) / 240)
    amounts = density.reshape(-1, 3) @ np.linalg.pinv(found.matrix).T
    other = np.array([[0.45, 0.05], [0.80, 0.95], [0.40, 0.30]])
    pixels = 240 * np.exp(-(amounts * [0.5, 1.0]) @ (other / np.linalg.norm(other, axis=0)).T)
    return np.asarray(np.clip(pixels, 0, 255).reshape(image.shape), np.uint8)


def twice_as_large(image: RgbImage) -> RgbImage:
    return np.asarray(cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC), np.uint8)


def dimmed(image: RgbImage) -> RgbImage:
    return np.asarray(image * 0.5, np.uint8)


def test_images_of_the_cohort_lie_within_and_others_are_told_apart(fields: list[RgbImage]) -> None:
    cohort = appearance.ranges([appearance.measure(image) for image in fields[:10]])
    stains = set(appearance.NAMES) - {"brightness", "sharpness"}

    def drifts(change: Callable[[RgbImage], RgbImage]) -> list[appearance.Drift]:
        found = [appearance.drift(appearance.measure(change(image)), cohort) for image in fields[10:]]
        return [one for one in found if one is not None]

    assert np.median([one.score for one in drifts(lambda image: image)]) < 1.5
    for change, figures in (
        (restained, stains),
        (twice_as_large, {"sharpness"}),
        (dimmed, {"brightness", *stains}),  # glass that is grey counts as stained
    ):
        found = drifts(change)
        assert min(one.score for one in found) > 1.5
        assert {one.figure for one in found} <= figures


def test_a_stain_of_some_pixels_is_that_of_all(fields: list[RgbImage]) -> None:
    large = twice_as_large(twice_as_large(fields[0]))
    some = appearance.measure(large)
    found = appearance.of_stain(stain.estimate(large), *appearance.measure_light(large))
    assert some.hematoxylin == pytest.approx(found.hematoxylin, rel=0.05)
    assert some.eosin_blue == pytest.approx(found.eosin_blue, abs=0.02)


LOOKS = st.builds(Look, *[st.none() | st.floats(0, 255)] * 8)


@given(st.lists(LOOKS, min_size=1, max_size=12), LOOKS)
def test_drift_is_a_distance_in_half_ranges(cohort: list[Look], look: Look) -> None:
    ranges = appearance.ranges(cohort)
    assert all(low <= high for low, high in ranges.values())
    found = appearance.drift(look, ranges)
    shared = [name for name in ranges if getattr(look, name) is not None]
    assert (found is None) == (not shared)
    if found is not None:
        assert found.score >= 0 and found.figure in shared and found.value == getattr(look, found.figure)
        middle = Look(**{name: sum(bounds) / 2 for name, bounds in ranges.items()})
        assert (appearance.drift(middle, ranges) or found).score == pytest.approx(0, abs=1e-6)


def test_what_an_ensemble_was_trained_on_travels_with_it(tmp_path: Path) -> None:
    rows = [made_row(number, 0.1 * (number % 2), brightness=100.0 + number, sharpness=0.5) for number in range(8)]
    held_out = made_row(9, 0.9, brightness=0.0, fold=None, split="hold-out")
    known = reference_of([*rows, held_out], disagreement=0.01)
    assert known is not None and known.num_images == 8 and known.empty_share == 0.5 and known.large_share == 0
    assert known.looks["brightness"][0] > 99
    uri = TrainingRun(str(tmp_path)).path(TrainingRun.ENSEMBLE)
    write_ensemble(uri, [{"checkpoint": "fold_0"}], known)
    assert read_reference(uri) == read_reference(str(tmp_path)) == known
    assert (tmp_path / "ensemble.json").stat().st_size < 2000
    assert parse_reference({"num_images": 1, "empty_share": 0, "large_share": 0, "looks": {}}, uri).disagreement is None
    write_ensemble(uri, [{"checkpoint": "fold_0"}])
    assert read_reference(uri) is None and read_reference(f"{tmp_path}/fold_0/checkpoints/last") is None
    storage.write_json(uri, {"members": [], "cohort": {"num_images": 0}})
    with pytest.raises(CheckpointError, match=r"ensemble\.json: cohort\.num_images = '0'.*copy it again"):
        read_reference(uri)
    assert reference_of([held_out]) is None and isinstance(known, CohortReference)
