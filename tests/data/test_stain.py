from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stas_core.data import stain
from stas_core.data.images import decode_image
from stas_core.data.phantom import PhantomConfig, make_phantom
from stas_core.data.stain import REFERENCE_MATRIX, REFERENCE_MAX_C, Stain, Variant

VARIANTS: tuple[Variant, ...] = ("norm", "H", "E")


def plain_estimate(image: np.ndarray) -> Stain:
    """Macenko as it is written down: float64, every pixel, no shortcuts."""
    od = -np.log((image.reshape(-1, 3).astype(np.float64) + 1) / 240)
    tissue = od[~(od < 0.15).any(axis=1)]
    _, vectors = np.linalg.eigh(np.cov(tissue, rowvar=False))
    plane = vectors[:, 1:]
    angles = np.arctan2(tissue @ plane[:, 1], tissue @ plane[:, 0])
    low, high = np.percentile(angles, [1, 99], method="hazen")
    one, two = (plane @ [np.cos(angle), np.sin(angle)] for angle in (low, high))
    matrix = np.column_stack([one, two] if one[0] > two[0] else [two, one])
    concentrations = np.linalg.lstsq(matrix, od.T, rcond=None)[0]
    return Stain(matrix, np.percentile(concentrations, 99, axis=1, method="hazen"))


def plain_render(image: np.ndarray, estimate: Stain, variant: Variant) -> np.ndarray:
    od = -np.log((image.reshape(-1, 3).astype(np.float64) + 1) / 240)
    concentrations = np.linalg.lstsq(estimate.matrix, od.T, rcond=None)[0]
    concentrations *= (REFERENCE_MAX_C / estimate.max_c)[:, None]
    columns = {"norm": [0, 1], "H": [0], "E": [1]}[variant]
    light = 240 * np.exp(-REFERENCE_MATRIX[:, columns] @ concentrations[columns])
    return np.asarray(np.clip(np.floor(light.T + 0.5), 0, 255), np.uint8).reshape(image.shape)


def assert_equals_plain(image: np.ndarray) -> None:
    found, expected = stain.estimate(image), plain_estimate(image)
    assert found is not None
    assert np.allclose(found.matrix, expected.matrix, rtol=0, atol=1e-11)
    assert np.allclose(found.max_c, expected.max_c, rtol=1e-11)
    for variant in VARIANTS:
        assert np.array_equal(stain.render(image, found, variant), plain_render(image, expected, variant)), variant


def random_tissue(seed: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    stains = REFERENCE_MATRIX + rng.uniform(-0.1, 0.1, (3, 2))
    od = rng.exponential(0.5, (height, width, 2)) @ stains.T + rng.normal(0, 0.02, (height, width, 3))
    return np.asarray(np.clip(240 * np.exp(-od), 0, 255), np.uint8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(8, 70), st.integers(8, 70))
def test_equals_the_plain_definition_on_random_tissue(seed: int, height: int, width: int) -> None:
    assert_equals_plain(random_tissue(seed, height, width))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(VARIANTS))
def test_renders_any_colour_as_the_plain_definition_does(seed: int, variant: Variant) -> None:
    """Estimates are compared on tissue alone: of any colours, the two stains can be nearly parallel."""
    found = stain.estimate(random_tissue(seed, 60, 60))
    assert found is not None
    colours = np.random.default_rng(seed).integers(0, 256, (150, 160, 3), dtype=np.uint8)
    assert np.array_equal(stain.render(colours, found, variant), plain_render(colours, found, variant))


@pytest.mark.parametrize("index", range(3))
def test_equals_the_plain_definition_on_fields(index: int) -> None:
    assert_equals_plain(make_phantom(PhantomConfig(height=471, width=858), index).image)


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["tiatoolbox_target", "stardist_histo"])
def test_equals_the_published_code(shared: Path, name: str) -> None:
    def read(folder: str) -> np.ndarray:
        return np.asarray(Image.open(shared / "oracle" / "stain" / folder / f"{name}.png").convert("RGB"))

    image = read("in")
    found = stain.estimate(image)
    assert found is not None
    for variant in VARIANTS:
        assert np.array_equal(stain.render(image, found, variant), read(variant)), variant


@pytest.mark.real_data
def test_equals_the_plain_definition_on_real_fields(shared: Path) -> None:
    for path in sorted((shared / "data" / "stas" / "Train_Images").iterdir())[::95]:
        assert_equals_plain(np.ascontiguousarray(decode_image(path.read_bytes(), path.name)[:480, :860]))


def test_a_crop_renders_as_the_whole_image_does() -> None:
    image = make_phantom(PhantomConfig(height=200, width=300), 0).image
    found = stain.estimate(image)
    assert found is not None
    crop = np.ascontiguousarray(image[20:90, 50:170])
    assert np.array_equal(stain.render(crop, found, "norm"), stain.render(image, found, "norm")[20:90, 50:170])


@pytest.mark.parametrize(
    "image",
    [
        np.full((40, 50, 3), 255, np.uint8),
        np.full((40, 50, 3), 245, np.uint8),
        np.full((40, 50, 3), 120, np.uint8),
        np.zeros((40, 50, 3), np.uint8),
        np.repeat(np.arange(200, dtype=np.uint8).reshape(10, 20, 1), 3, axis=2),
        np.full((1, 1, 3), 100, np.uint8),
    ],
    ids=["white", "pale", "one colour", "black", "grey ramp", "one pixel"],
)
def test_images_without_two_stains_have_no_estimate(image: np.ndarray) -> None:
    assert stain.estimate(image) is None


def test_normalised_fields_of_two_slides_are_closer_than_the_fields() -> None:
    fields = [make_phantom(PhantomConfig(height=400, width=500, seed=seed), 0).image for seed in (1, 2, 3, 4)]
    normalised = []
    for image in fields:
        found = stain.estimate(image)
        assert found is not None
        normalised.append(stain.render(image, found, "norm"))

    def spread(images: list[np.ndarray]) -> float:
        dark = [image[image.sum(axis=2) < np.percentile(image.sum(axis=2), 10)].mean(axis=0) for image in images]
        return float(np.std(dark, axis=0).mean())

    assert spread(normalised) < spread(fields)
