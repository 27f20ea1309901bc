import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import ndimage

from stas_core.data import cohort, phantom, phantom_tissue, stain
from stas_core.data.annotations import AnnotationConfig, num_polygons, rasterise
from stas_core.data.labelme import parse_labelme, to_labelme
from stas_core.data.phantom import Phantom, PhantomConfig, make_phantom, phantom_id

SMALL = PhantomConfig(height=192, width=256, seed=1)
FULL_SIZE = (942, 1716)


@pytest.fixture(scope="module")
def fields() -> list[Phantom]:
    """Return sixteen fields of half the published side lengths, four of each slide."""
    return [make_phantom(PhantomConfig(height=471, width=858), index) for index in range(16)]


@pytest.fixture(scope="module")
def truths() -> list[np.ndarray]:
    """Return the masks of 150 fields of published size, planned and annotated but not painted."""
    masks = []
    for index in range(150):
        rng = np.random.default_rng([9, index])
        border = np.zeros(FULL_SIZE, bool)
        polygons = [phantom_tissue.annotate(nest, FULL_SIZE, rng) for nest in phantom._plan_nests(border, rng)]
        masks.append(rasterise(parse_labelme(to_labelme(polygons, FULL_SIZE, "x"), "x"), FULL_SIZE)[0])
    return masks


def test_an_image_depends_on_config_and_index_alone() -> None:
    first, other, again = make_phantom(SMALL, 3), make_phantom(SMALL, 4), make_phantom(SMALL, 3)
    assert first.image.tobytes() == again.image.tobytes() and first.labelme == again.labelme
    assert first.group == again.group and np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, other.image) and first.labelme != other.labelme
    for change in ({"seed": 2}, {"num_groups": 2}):
        assert not np.array_equal(first.image, make_phantom(SMALL.model_copy(update=change), 3).image)
    longer = make_phantom(SMALL.model_copy(update={"num_images": 999}), 3)
    assert np.array_equal(first.image, longer.image)


def test_ids_sort_as_their_images_do() -> None:
    assert phantom_id(7) == "phantom_0007"
    assert sorted(phantom_id(index) for index in range(120)) == [phantom_id(index) for index in range(120)]


@pytest.mark.parametrize("wrong", [{"height": 31}, {"num_groups": 0}, {"seed": -1}, {"tumour_border_share": 1.1}])
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        PhantomConfig.model_validate(wrong)


@settings(max_examples=25, deadline=None)
@given(st.integers(32, 200), st.integers(32, 200), st.integers(0, 99), st.sampled_from([0.0, 1.0]))
def test_any_size_has_a_target_and_its_truth_is_the_rasterised_annotation(
    height: int, width: int, index: int, tumour: float
) -> None:
    made = make_phantom(PhantomConfig(height=height, width=width, tumour_border_share=tumour), index)
    assert made.image.shape == (height, width, 3)
    annotation = parse_labelme(made.labelme, "x")
    mask, findings = rasterise(annotation, (height, width))
    assert np.array_equal(mask, made.mask) and mask.any() and not mask.all()
    assert not findings
    assert num_polygons(annotation, AnnotationConfig()) >= 1


def test_outlines_are_like_a_persons(fields: list[Phantom]) -> None:
    """Closely set points with fractions of a pixel, one per nest, and no specks that a crossed line would leave."""
    for made in fields:
        shapes = json.loads(made.labelme)["shapes"]
        assert {shape["label"] for shape in shapes} == {"STAS"}
        for shape in shapes:
            points = np.array(shape["points"])
            step = np.hypot(*np.diff(points, axis=0).T)
            assert len(points) >= 10 and 1 < np.median(step) < 5
            assert (points % 1 != 0).mean() > 0.3
        num_targets = ndimage.label(made.mask, np.ones((3, 3)))[1]
        assert num_targets == len(shapes)
        assert np.array_equal(ndimage.binary_fill_holes(made.mask), made.mask)


def test_targets_are_dark_cells_afloat_in_air(fields: list[Phantom]) -> None:
    """Nuclei make targets darker than the field, and a ring around each image's targets is mostly bright."""
    for made in fields:
        grey = cv2.cvtColor(made.image, cv2.COLOR_RGB2GRAY)
        near, far = (cv2.dilate(made.mask.view(np.uint8), np.ones((n, n), np.uint8)) > 0 for n in (5, 15))
        assert grey[made.mask].mean() < grey[~made.mask].mean() - 25
        assert np.median(grey[far & ~near]) > 190


def test_brightness_alone_does_not_find_the_targets(fields: list[Phantom]) -> None:
    """Tissue, macrophages and blood are as dark: the best threshold of the image stays far from the truth."""
    best = []
    for made in fields:
        grey = cv2.GaussianBlur(cv2.cvtColor(made.image, cv2.COLOR_RGB2GRAY), (0, 0), 6)
        scores = [2 * (made.mask & (grey < k)).sum() / (made.mask.sum() + (grey < k).sum()) for k in range(40, 220, 10)]
        best.append(max(scores))
    assert np.median(best) < 0.6


def test_a_tumour_border_is_the_same_tissue_but_no_target() -> None:
    with_border = [
        make_phantom(PhantomConfig(height=300, width=600, tumour_border_share=1), index) for index in range(4)
    ]
    without = [make_phantom(PhantomConfig(height=300, width=600, tumour_border_share=0), index) for index in range(4)]
    dark = [np.mean([(made.image.min(axis=2) < 120).mean() for made in group]) for group in (with_border, without)]
    assert dark[0] > dark[1] + 0.05
    assert max(made.mask.mean() for made in with_border) < 0.35


def test_counts_are_like_the_published_fields(truths: list[np.ndarray]) -> None:
    """285 real fields: 1 to 23, median 2, 39 % have one, 5 % have 8 or more."""
    counts = np.array([ndimage.label(mask, np.ones((3, 3)))[1] for mask in truths])
    assert counts.min() >= 1 and counts.max() <= 24 and np.median(counts) == 2
    assert 0.25 < (counts == 1).mean() < 0.5
    assert 0.02 < (counts >= 8).mean() < 0.2


def test_areas_are_like_the_published_fields(truths: list[np.ndarray]) -> None:
    """285 real fields: foreground share median 0.99 %, p5 0.24 %, p95 7.0 %; 51 % and 25 % in the lowest strata."""
    shares = np.array([mask.mean() for mask in truths])
    low, median, high = np.percentile(shares, [5, 50, 95])
    assert 0.0005 < low < 0.004 and 0.006 < median < 0.014 and 0.04 < high < 0.12
    strata = np.bincount([cohort.stratum_of(share) for share in shares], minlength=7) / len(shares)
    assert 0.4 < strata[0] < 0.65 and 0.1 < strata[1] < 0.35 and (strata > 0).all()


def test_slides_differ_in_stain_more_than_their_images_do(fields: list[Phantom]) -> None:
    by_slide: dict[str, list[np.ndarray]] = {}
    for made in fields:
        tissue = made.image[made.image.min(axis=2) < 200]
        by_slide.setdefault(made.group, []).append(tissue.mean(axis=0))
    assert sorted(by_slide) == [f"slide_{group}" for group in range(4)]
    means = np.array([np.mean(values, axis=0) for values in by_slide.values()])
    within = np.mean([np.std(values, axis=0) for values in by_slide.values()])
    assert means.std(axis=0).mean() > within


def test_stain_estimation_finds_the_slides_dyes(fields: list[Phantom]) -> None:
    """As on tissue, blood and carbon mislead a few estimates, so the median over images is held to the truth."""
    angles = []
    for index, made in enumerate(fields):
        estimate = stain.estimate(made.image)
        assert estimate is not None and estimate.matrix[0, 0] > estimate.matrix[0, 1] + 0.15
        slide = phantom_tissue.draw_look(np.random.default_rng(np.random.SeedSequence([0], spawn_key=(index % 4,))))
        dyes = slide.dyes[:, :2] / np.linalg.norm(slide.dyes[:, :2], axis=0)
        angles.append(np.degrees(np.arccos((estimate.matrix * dyes).sum(axis=0))))
    assert (np.median(angles, axis=0) < 8).all()
