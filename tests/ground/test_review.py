"""The review queue: planted errors come first, and a finding is where its error was planted."""

import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core import review
from stas_core.arrays import Mask, ProbMapU8
from stas_core.review import ReviewField
from workflows.folds.reviewing import proposals

SIZE = (160, 200)
NESTS = [(40, 40), (40, 150), (120, 60), (110, 150)]
RADIUS = 18
TYPICAL = 1000.0


def disc(y: int, x: int, radius: int = RADIUS) -> Mask:
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    return np.asarray((rows - y) ** 2 + (columns - x) ** 2 <= radius**2)


def nests(*centres: tuple[int, int]) -> Mask:
    return np.asarray(np.any([disc(*centre) for centre in centres], axis=0))


def map_of(mask: Mask) -> ProbMapU8:
    """Return what a good model gives: sure within, soft at the outline."""
    return np.asarray(cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 3) * 250, np.uint8)


GOOD = map_of(nests(*NESTS))


@pytest.mark.parametrize(
    ("annotated", "kinds"),
    [
        (nests(*NESTS), []),
        (nests(*NESTS[1:]), ["unannotated"]),
        (nests(*NESTS) | disc(80, 100, 15), ["no_response"]),
        (nests(*NESTS[1:]) | disc(40, 60), ["outline_differs"] * 2),  # what it lacks, and what it has too much
        (np.zeros(SIZE, bool), ["unannotated"] * 4),
        (nests((80, 20), (80, 100)), ["unannotated"] * 4 + ["no_response"] * 2),  # of another field
    ],
)
def test_kinds_of_findings(annotated: Mask, kinds: list[str]) -> None:
    found = [finding.row.kind for finding in review.compare("a", GOOD, annotated, TYPICAL)]
    assert sorted(found) == sorted(kinds)


def test_a_finding_is_where_the_error_is() -> None:
    (found,) = review.compare("a", GOOD, nests(*NESTS[1:]), TYPICAL)
    row, (y, x) = found.row, NESTS[0]
    assert row.id == "a" and row.probability > 0.8 and 0.2 < row.priority < 0.6
    assert abs(row.area_px - disc(y, x).sum()) < 0.15 * row.area_px
    assert abs((row.x0 + row.x1) / 2 - x) <= 1 and abs((row.y0 + row.y1) / 2 - y) <= 1
    assert found.inside.sum() == row.area_px and found.inside.shape == (row.y1 - row.y0, row.x1 - row.x0)


@pytest.mark.parametrize("grown_px", [-2, 2])
def test_an_outline_that_is_a_little_off_is_no_finding(grown_px: int) -> None:
    annotated = np.any([disc(y, x, RADIUS + grown_px) for y, x in NESTS], axis=0)
    assert review.compare("a", GOOD, np.asarray(annotated), TYPICAL) == []


def test_an_unsure_model_says_less() -> None:
    lacks = nests(*NESTS[1:])
    sure, unsure = (review.compare("a", np.asarray(GOOD * share, np.uint8), lacks, TYPICAL) for share in (1.0, 0.65))
    assert sure[0].row.priority > 3 * sum(one.row.priority for one in unsure)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_findings_lie_within_the_field_and_where_map_and_annotation_differ(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prob = np.asarray(cv2.GaussianBlur(rng.integers(0, 256, (40, 50)).astype(np.float32), (0, 0), 4), np.float32)
    prob_u8 = np.asarray(255 * (prob > prob.mean()), np.uint8)
    truth = np.asarray(np.roll(prob_u8, rng.integers(-9, 9), 1) > 0)
    found = review.compare("a", prob_u8, truth, 50.0)
    masks = review.drawn(found, (40, 50))
    for kind, mask in masks.items():
        assert not (mask & ((prob_u8 >= 128) == truth)).any(), kind
    assert sum(int(mask.sum()) for mask in masks.values()) <= sum(one.row.area_px for one in found)
    assert [one.row.priority for one in found] == sorted((one.row.priority for one in found), reverse=True)


def test_the_queue_ranks_fields_and_those_without_findings_by_dice() -> None:
    fields = [
        ReviewField(0, name, f"{name}.png", priority, [], 0, dice)
        for name, priority, dice in (("a", 0.0, 0.9), ("b", 0.5, 0.9), ("c", 0.0, 0.2), ("d", 0.7, 0.95))
    ]
    assert [(field.rank, field.id) for field in review.queue(fields)] == [(1, "d"), (2, "b"), (3, "c"), (4, "a")]


def test_what_is_doubtful_of_scored_images() -> None:
    assert review.doubts_of(0.9, 0.5, [0.98], [500]) == {}
    assert review.doubts_of(None, None, [], []) == {}
    assert list(review.doubts_of(1.2, 3.0, [0.6], [500])) == ["disagreement", "uncertain", "drift"]


def test_proposals_have_classes_of_their_own() -> None:
    lacks = nests(*NESTS[1:])
    features = json.loads(proposals("a", lacks, review.compare("a", GOOD, lacks, TYPICAL)))["features"]
    names = [feature["properties"]["classification"]["name"] for feature in features]
    assert names == ["annotated"] * 3 + ["unannotated"]
    assert len({feature["id"] for feature in features}) == 4
