import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core import cohort, stain
from stas_core.annotations import parse_labelme, rasterise
from stas_core.phantom import Phantom, PhantomConfig, make_phantom, phantom_id

SMALL = PhantomConfig(height=192, width=256, seed=1)


@pytest.fixture(scope="module")
def fields() -> list[Phantom]:
    """Return twelve fields of half the published side lengths."""
    return [make_phantom(PhantomConfig(height=471, width=858), index) for index in range(12)]


def test_an_image_depends_on_config_and_index_alone() -> None:
    first, again, other = make_phantom(SMALL, 3), make_phantom(SMALL, 3), make_phantom(SMALL, 4)
    assert np.array_equal(first.image, again.image) and first.labelme == again.labelme
    assert not np.array_equal(first.image, other.image)
    reseeded = make_phantom(SMALL.model_copy(update={"seed": 2}), 3)
    assert not np.array_equal(first.image, reseeded.image)
    assert phantom_id(7) == "phantom_0007"


@settings(max_examples=15, deadline=None)
@given(st.integers(32, 160), st.integers(32, 160), st.integers(0, 99))
def test_any_size_has_a_target_and_its_truth_is_the_rasterised_annotation(height: int, width: int, index: int) -> None:
    made = make_phantom(PhantomConfig(height=height, width=width), index)
    assert made.image.shape == (height, width, 3)
    mask, findings = rasterise(parse_labelme(made.labelme, "x"), (height, width))
    assert np.array_equal(mask, made.mask) and mask.any() and not mask.all()
    assert {finding.kind for finding in findings} <= {"points_outside"}


def test_targets_are_compact_cells_afloat_in_air(fields: list[Phantom]) -> None:
    """Nuclei make targets darker than the field, and a ring around them is mostly bright."""
    inside, ring, field = [], [], []
    for made in fields:
        grey = cv2.cvtColor(made.image, cv2.COLOR_RGB2GRAY)
        near, far = (cv2.dilate(made.mask.view(np.uint8), np.ones((n, n), np.uint8)) > 0 for n in (5, 17))
        inside.append(grey[made.mask].mean())
        ring.append(np.median(grey[far & ~near]))
        field.append(grey.mean())
    assert np.median(inside) < np.median(field) - 60
    assert np.median(ring) > 200


def test_counts_and_areas_are_like_the_published_fields() -> None:
    """Plans only, at full size: 285 real fields have median 2 targets, 4731 px, 0.95 % foreground, largest 37 %."""
    from stas_core import phantom

    counts, shares, areas = [], [], []
    for index in range(150):
        nests = phantom._plan_nests(np.zeros((942, 1716), bool), np.random.default_rng(index))
        area = [np.pi * nest.radius**2 for nest in nests]
        counts.append(len(nests))
        areas += area
        shares.append(sum(area) / (942 * 1716))
    assert min(counts) >= 1 and max(counts) <= 24 and np.median(counts) in (1, 2, 3)
    assert 2500 < np.median(areas) < 9000
    assert 0.004 < np.median(shares) < 0.02 and np.percentile(shares, 95) > 0.03
    assert len({cohort.stratum_of(share) for share in shares}) >= 5


def test_slides_differ_in_stain_more_than_their_images_do(fields: list[Phantom]) -> None:
    by_slide: dict[str, list[np.ndarray]] = {}
    for made in fields:
        estimate = stain.estimate(made.image)
        assert estimate is not None
        by_slide.setdefault(made.group, []).append(made.image[made.mask].mean(axis=0))
    assert len(by_slide) > 1
    means = np.array([np.mean(values, axis=0) for values in by_slide.values()])
    within = np.mean([np.std(values, axis=0).mean() for values in by_slide.values() if len(values) > 1])
    assert means.std(axis=0).mean() > within / 2
