"""Which fields and targets a second look would pay for most: where a confident model and the annotation differ.

Nothing here reads or writes files. Maps must come from models that did not train on the image: a model that did has
learned its errors, too.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt

from stas_core.arrays import Mask, ProbMapU8
from stas_core.tables import Int32

UNANNOTATED, NO_RESPONSE, OUTLINE_DIFFERS = "unannotated", "no_response", "outline_differs"
"""Kinds of findings: the model is sure of a target that the annotation lacks; it sees nothing in a target of it; both
have a target, and their outlines lie apart by more than the outline's own doubt."""
FINDINGS = (UNANNOTATED, NO_RESPONSE, OUTLINE_DIFFERS)
DRIFT, DISAGREEMENT, UNCERTAIN = "drift", "disagreement", "uncertain"
"""Reasons of scored images: one looks unlike the training, members disagree on it, its targets are doubtful."""
PROPOSED, QUESTIONED = "proposed", "questioned"
"""Classes of shapes that a person is to decide on: targets to be taken in, and targets to be left out."""
UNDECIDED = frozenset((PROPOSED, QUESTIONED))
LEAST_PRIORITY = 0.02
"""Of a finding that is listed."""
_CUT = 128
_DOUBTFUL = 0.75
"""A predicted target whose mean probability is lower is questioned."""
_OUTLINE = 0.08
"""Width of an outline's doubt on each side, as a share of a typical target's side."""
_SHARED = 0.1
"""Of a target, this share must lie on one of the other side's for the two to count as the same target."""


@dataclass(frozen=True)
class ReviewTarget:
    """A row of `review_targets.parquet`: a place in a field to look at."""

    id: str
    """Of the field."""
    kind: str
    """`unannotated`, `no_response` or `outline_differs`."""
    priority: float
    """0 to 1: how sure the model is, and how large the place is."""
    probability: float
    """Mean of the model's, over the place."""
    area_px: int
    x0: Int32
    """In px, like all that follows."""
    y0: Int32
    x1: Int32
    """The first column outside."""
    y1: Int32
    """The first row outside."""


@dataclass(frozen=True)
class ReviewField:
    """A row of `review.parquet`: a field in the queue."""

    rank: Int32
    """From 1: look at this one first."""
    id: str
    image_uri: str
    priority: float
    """0 to 1; comparable within a queue only."""
    reasons: list[str]
    """Kinds of what is found there, the weightiest first; of scored images `drift`, `disagreement` and `uncertain`."""
    num_findings: Int32
    dice: float | None
    """Of the map, cut at 0.5, with the annotation; null where there is none."""


@dataclass(frozen=True)
class Finding:
    """A finding and its pixels."""

    row: ReviewTarget
    inside: Mask
    """Of its box."""


def typical_px(areas_px: Iterable[int]) -> float:
    """Return the area of a typical target: the median; without any, 1000.

    Example:
        >>> typical_px([100, 300, 5000])
        300.0
    """
    listed = list(areas_px)
    return float(np.median(listed)) if listed else 1000.0


def compare(image_id: str, prob_u8: ProbMapU8, truth: Mask, typical: float) -> list[Finding]:
    """Return where a map and the annotation differ, the weightiest first.

    Args:
        image_id: of the field.
        prob_u8: its map, 8 bits.
        truth: what is annotated, of the same size.
        typical: area of a typical target in px: what is far smaller weighs little, and outlines are in doubt by a share
            of its side.
    """
    response = prob_u8 >= _CUT
    doubt_px = max(1, round(_OUTLINE * typical**0.5))
    found = []
    for extra, mine, other in ((True, response, truth), (False, truth, response)):
        of_whole = _components(mine)[0]
        shared = np.bincount(of_whole.ravel(), other.ravel()) / np.maximum(1, np.bincount(of_whole.ravel()))
        labels, stats = _components(_wide(mine & ~other, doubt_px))
        sums = np.bincount(labels.ravel(), prob_u8.ravel(), minlength=len(stats))
        for number in range(1, len(stats)):
            x0, y0, width, height, area = (int(value) for value in stats[number])
            inside = labels[y0 : y0 + height, x0 : x0 + width] == number
            whole = of_whole[y0 : y0 + height, x0 : x0 + width][inside][0]
            alone = UNANNOTATED if extra else NO_RESPONSE
            kind = alone if shared[whole] < _SHARED else OUTLINE_DIFFERS
            probability = float(sums[number] / area / 255)
            priority = weight(probability if extra else 1 - probability, area, typical)
            if priority >= LEAST_PRIORITY:
                box = (x0, y0, x0 + width, y0 + height)
                row = ReviewTarget(image_id, kind, priority, round(probability, 4), area, *box)
                found.append(Finding(row, inside))
    return sorted(found, key=lambda one: (-one.row.priority, one.row.y0, one.row.x0))


def weight(sureness: float, area_px: int, typical: float) -> float:
    """Return how much a finding weighs, 0 to 1: by how sure the model is (0.5: not at all), and how large it is.

    Example:
        >>> weight(1.0, 1000, 1000.0), weight(0.75, 1000, 1000.0), weight(0.5, 1000, 1000.0)
        (0.5, 0.125, 0.0)
    """
    return round(max(0.0, 2 * sureness - 1) ** 2 * area_px / (area_px + typical), 4)


def together(priorities: Iterable[float]) -> float:
    """Return the priority of a field: several findings make it more, and none less.

    Example:
        >>> together([0.5, 0.5])
        0.75
    """
    return float(1 - np.prod([1 - one for one in priorities]))


def doubts_of(
    drift: float | None, disagreement: float | None, probabilities: Sequence[float], areas_px: Sequence[int]
) -> dict[str, float]:
    """Return why a scored image deserves a look, each with its priority, the weightiest first.

    Args:
        drift: how far it looks from the training cohort; up to 1 it looks like it. None: not known.
        disagreement: of the members, over the most that hold-out images have. None: not known.
        probabilities: of its targets, means.
        areas_px: of its targets.

    Example:
        >>> doubts_of(4.0, None, [0.5, 1.0], [100, 300])
        {'drift': 0.75, 'uncertain': 0.0625}
    """
    beyond = {DRIFT: drift, DISAGREEMENT: disagreement}
    found = {name: 1 - 1 / value for name, value in beyond.items() if value is not None and value > 1}
    if areas_px:
        shares = [2 * (1 - max(0.5, one)) for one in probabilities]
        found[UNCERTAIN] = (sum(s * area for s, area in zip(shares, areas_px, strict=True)) / sum(areas_px)) ** 2
    weighty = {name: round(value, 4) for name, value in found.items() if value >= LEAST_PRIORITY}
    return dict(sorted(weighty.items(), key=lambda one: -one[1]))


def queue(fields: Iterable[ReviewField]) -> list[ReviewField]:
    """Return fields in the order in which to look at them, with their ranks; those without a finding come last."""
    return [replace(field, rank=rank) for rank, field in enumerate(sorted(fields, key=_place), start=1)]


def first(fields: Iterable[ReviewField], count: int) -> list[ReviewField]:
    """Return those `count` fields at which to look first, without ranks of their own."""
    return heapq.nsmallest(count, fields, key=_place)


def _place(field: ReviewField) -> tuple[float, float, str]:
    return -field.priority, 1.0 if field.dice is None else field.dice, field.id


def reasons_of(findings: Iterable[ReviewTarget]) -> list[str]:
    """Return the kinds of a field's findings, the weightiest first."""
    by_kind: dict[str, list[float]] = {}
    for one in findings:
        by_kind.setdefault(one.kind, []).append(one.priority)
    return sorted(by_kind, key=lambda kind: -together(by_kind[kind]))


def drawn(findings: Sequence[Finding], size: tuple[int, int]) -> dict[str, Mask]:
    """Return the pixels of findings by their kind, in masks of the field's size (height, width)."""
    masks: dict[str, Mask] = {}
    for one in findings:
        mask = masks.setdefault(one.row.kind, np.zeros(size, bool))
        mask[one.row.y0 : one.row.y1, one.row.x0 : one.row.x1] |= one.inside
    return masks


def to_decide(prob_u8: ProbMapU8, shapes: Mask, typical: float, *, annotated: bool) -> dict[str, Mask]:
    """Return what a person is to decide on, by class, as whole targets.

    `proposed`: the map is sure of targets that the shapes lack. `questioned`: of the shapes those in which it sees
    nothing or, where they are its own prediction, those of which it is unsure. Outlines that differ are neither.

    Args:
        prob_u8: the map, 8 bits.
        shapes: the annotation, or the targets that were made of the map.
        typical: area of a typical target in px, as in `compare`.
        annotated: whether a person drew the shapes.
    """
    differ = drawn(compare("", prob_u8, shapes, typical), (shapes.shape[0], shapes.shape[1]))
    none = np.zeros_like(shapes)
    proposed = _whole(differ.get(UNANNOTATED, none), prob_u8 >= _CUT)
    questioned = _whole(differ.get(NO_RESPONSE, none), shapes) if annotated else _unsure(prob_u8, shapes)
    return {PROPOSED: proposed, QUESTIONED: questioned}


def _whole(part: Mask, mask: Mask) -> Mask:
    """Return the components of a mask of which there is a part."""
    labels = _components(mask)[0]
    wanted = np.bincount(labels[part & mask], minlength=int(labels.max()) + 1) > 0
    return np.asarray(wanted[labels])


def _unsure(prob_u8: ProbMapU8, shapes: Mask) -> Mask:
    """Return the components in which the map's mean is low."""
    labels = _components(shapes)[0]
    flat = labels.ravel()
    means = np.bincount(flat, prob_u8.ravel()) / np.maximum(1, np.bincount(flat)) / 255
    return np.asarray((means < _DOUBTFUL)[labels] & shapes)


def _components(mask: Mask) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the 8-connected components, and for each from 0 (the rest) x0, y0, width, height and area."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return np.asarray(labels, np.int32), np.asarray(stats, np.int32)


def _wide(mask: Mask, doubt_px: int) -> Mask:
    """Return a mask without what is nowhere wider than an outline's doubt on its two sides."""
    if not mask.any():
        return mask
    padded = np.pad(mask.astype(np.uint8), doubt_px, mode="edge")
    core = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) > doubt_px
    if not core.any():
        return np.zeros_like(mask)
    near = cv2.distanceTransform(1 - core.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= doubt_px
    return np.asarray(near[doubt_px:-doubt_px, doubt_px:-doubt_px] & mask)
