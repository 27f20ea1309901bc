"""The threshold cascade over and over: what many settings share of a map, worked out once.

The components of all level sets {k >= level} of a map lie in each other as a tree. Its rows (area, peak, box of each
component; far fewer than pixels) decide which components a step keeps, and only what is kept is touched as pixels: in
crops, each worked out once for every closing and kept as the areas of the targets it leaves and their overlap with the
truth. `MapScorer.score` equals `metrics.count(postprocess(map, config), truth)` to the last pixel.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from stas_core.arrays import Mask, ProbMapU8, label_components
from stas_core.predict.postprocess import (
    BorderFill,
    PostprocessConfig,
    StepConfig,
    close_gaps,
    closing_reach,
    fill_holes,
    foreground_limit,
    helped_sides,
    touched_sides,
)
from stas_core.scores.metrics import Counts

Rows = npt.NDArray[np.intp]
MAX_GROUPED = 500
"""More components than this are not sorted into groups by the square of their number, but taken as one."""
CACHED_SELECTIONS, CACHED_CROPS = 1024, 8192
"""Results kept per map; each is a handful of numbers."""


@dataclass(frozen=True)
class LevelSets:
    """The components (8-connected) of every level set of a map.

    Rows `first[k]` to `first[k + 1]` are the components of {k >= level}, sorted by `start`. Leaves of the tree are
    numbered so that a component holds those from its `start` on, up to the next one's: a component of a higher level
    lies in the last one of a lower level whose start is not above its own.
    """

    first: npt.NDArray[np.int32]
    """257 row numbers."""
    start: npt.NDArray[np.int32]
    area: npt.NDArray[np.int32]
    """Pixels of each component."""
    peak: npt.NDArray[np.uint8]
    """Its highest level."""
    seed: npt.NDArray[np.int32]
    """Flat index of its first pixel."""
    box: npt.NDArray[np.int32]
    """(n, 4): x0, y0, x1, y1 in px; x1 and y1 are the first outside."""

    def rows(self, level: int) -> slice:
        """Return the rows of a level."""
        return slice(int(self.first[level]), int(self.first[level + 1]))


def find_level_sets(prob_u8: ProbMapU8) -> LevelSets:
    """Find the components of all level sets of a map (h, w).

    Example:
        >>> prob_u8 = np.array([[9, 0, 5], [9, 0, 0]], np.uint8)
        >>> found = find_level_sets(prob_u8)
        >>> found.area[found.rows(1)].tolist(), found.area[found.rows(6)].tolist()
        ([2, 1], [2])
    """
    levels = list(_levels(prob_u8))
    num_leaves = [np.ones(len(found.area), np.int64) for found in levels]
    peak = [np.full(len(found.area), level) for level, found in enumerate(levels)]
    for level in range(len(levels) - 2, -1, -1):
        inside = levels[level + 1].parent
        np.maximum.at(peak[level], inside, peak[level + 1])
        leaves = np.bincount(inside, weights=num_leaves[level + 1], minlength=len(num_leaves[level]))
        num_leaves[level] = np.maximum(leaves, 1).astype(np.int64)
    start = [np.zeros(1, np.int64)]
    for found, leaves in zip(levels[1:], num_leaves[1:], strict=True):
        start.append(_number_children(start[-1][found.parent], leaves))
    orders = [np.argsort(numbers) for numbers in start]

    def column(parts: Iterable[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
        return np.concatenate([part[order] for part, order in zip(parts, orders, strict=True)]).astype(dtype)

    first = np.full(257, sum(map(len, orders)), np.int32)
    first[: len(orders)] = np.cumsum([0] + [len(order) for order in orders[:-1]])
    return LevelSets(
        first=first,
        start=column(start, np.int32),
        area=column((found.area for found in levels), np.int32),
        peak=column(peak, np.uint8),
        seed=column((found.seed for found in levels), np.int32),
        box=column((found.box for found in levels), np.int32),
    )


def _number_children(parent_start: npt.NDArray[np.int64], num_leaves: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Give each component the first of its leaves' numbers: its parent's first, plus its elder siblings' leaves."""
    order = np.argsort(parent_start, kind="stable")
    parents, leaves = parent_start[order], num_leaves[order]
    before = np.cumsum(leaves) - leaves
    eldest = np.searchsorted(parents, parents)
    start = np.empty_like(parent_start)
    start[order] = parents + before - before[eldest]
    return start


class _Level(NamedTuple):
    """The components of one level set, as they were labelled."""

    area: npt.NDArray[np.int64]
    seed: npt.NDArray[np.int64]
    box: npt.NDArray[np.int64]
    parent: npt.NDArray[np.signedinteger[Any]]
    """Of each, the component of the level below that holds it."""


def _levels(prob_u8: ProbMapU8) -> Iterator[_Level]:
    """Yield the components of {k >= 0}, {k >= 1}... up to the map's highest level."""
    height, width = prob_u8.shape
    flat = prob_u8.ravel()
    at = np.arange(flat.size)
    below = np.ones(prob_u8.shape, np.int32)
    used = np.bincount(flat, minlength=256) > 0
    found = _Level(np.array([flat.size]), np.array([0]), np.array([[0, 0, width, height]]), np.array([0]))
    yield found
    for level in range(1, int(flat.max()) + 1):
        if not used[level - 1] and level > 1:  # the same set once more
            yield found._replace(parent=np.arange(len(found.area)))
            continue
        at = at[flat[at] >= level]
        num_labels, labels = label_components(_reached(prob_u8, level))
        label = labels.ravel()[at] - 1
        first, last = np.empty(num_labels - 1, np.int64), np.empty(num_labels - 1, np.int64)
        first[label[::-1]], last[label] = at[::-1], at  # where an index repeats, the last value stays
        x = at % width
        left, right = np.full(num_labels - 1, width), np.zeros(num_labels - 1, np.int64)
        np.minimum.at(left, label, x)
        np.maximum.at(right, label, x)
        box = np.stack([left, first // width, right + 1, last // width + 1], axis=1)
        found = _Level(np.bincount(label), first, box, below.ravel()[first] - 1)
        below = labels
        yield found


def _reached(prob_u8: ProbMapU8, level: int) -> npt.NDArray[np.uint8]:
    """Return where k >= level, for a level above 0."""
    return np.asarray(cv2.threshold(prob_u8, level - 1, 1, cv2.THRESH_BINARY)[1])  # faster than numpy's comparison


class Closing(NamedTuple):
    """The settings of closing and hole filling."""

    px: int
    times: int
    max_hole_px: int | None


class CleanedGroup(NamedTuple):
    """A group of components after closing and filling: the numbers that scores are summed from."""

    targets: tuple[tuple[int, int], ...]
    """Area (px) of each target, and how many of its pixels are true."""
    sides: tuple[int, ...]
    """The image's sides that it touches after closing."""


class MapScorer:
    """Owns a map, its truth and their level sets, and scores settings of the cascade on them."""

    def __init__(self, prob_u8: ProbMapU8, truth: Mask, level_sets: LevelSets):
        self._prob, self._truth, self._sets = prob_u8, truth.view(np.uint8), level_sets
        self._num_true = int(np.count_nonzero(truth))
        self._cleaned = functools.lru_cache(CACHED_SELECTIONS)(self._clean)
        self._cropped = functools.lru_cache(CACHED_CROPS)(self._clean_crop)

    @property
    def num_bytes(self) -> int:
        """Return the memory of map, truth and level sets."""
        columns: Iterable[npt.NDArray[Any]] = vars(self._sets).values()
        return self._prob.nbytes + self._truth.nbytes + sum(column.nbytes for column in columns)

    def score(self, config: PostprocessConfig) -> Counts:
        """Return the pixel counts of the mask that the cascade makes, against the truth."""
        limit = foreground_limit(self._prob.size, config)
        closing = Closing(config.closing_px, config.closing_count, config.max_hole_px)
        area, tp = 0, 0
        for number, step in enumerate(config.steps, start=1):
            level, rows = self._select(step)
            if number == 1 and self._sets.area[rows].sum() > limit:
                return Counts(0, 0, self._num_true)
            found = self._cleaned(level, rows.tobytes(), closing, config.border_fill) if len(rows) else ()
            targets = [target for target in found if target[0] >= config.min_target_px]
            area, tp = sum(size for size, _ in targets), sum(true for _, true in targets)
            if area >= config.min_foreground_px:
                break
        return Counts(tp, area - tp, self._num_true - tp)

    def _select(self, step: StepConfig) -> tuple[int, Rows]:
        """Return a level, and the rows of it whose components make up what the step keeps."""
        sets, level = self._sets, max(step.low, step.drop)
        dropped, core, low = sets.rows(step.drop), sets.rows(max(step.core, step.drop)), sets.rows(level)
        start = sets.start[dropped]
        holder = np.searchsorted(start, sets.start[core], side="right") - 1
        num_core = np.bincount(holder, weights=sets.area[core], minlength=len(start))
        kept = (sets.peak[dropped] >= step.high) & (num_core >= step.ratio * sets.area[dropped])
        holder = np.searchsorted(start, sets.start[low], side="right") - 1
        return level, low.start + np.flatnonzero(kept[holder])

    def _clean(self, level: int, rows: bytes, closing: Closing, border_fill: BorderFill) -> tuple[tuple[int, int], ...]:
        """Close and fill the components of some rows; return area and true pixels of each target."""
        groups = self._group(np.frombuffer(rows, np.intp), closing_reach(closing.px, closing.times))
        parts = [self._cropped(level, group, closing, ()) for group in groups]
        touched = sorted({side for part in parts for side in part.sides})
        helped = helped_sides(touched, border_fill)
        for index, group in enumerate(groups):
            here = tuple(side for side in parts[index].sides if side in helped)
            if here:
                parts[index] = self._cropped(level, group, closing, here)
        return tuple(target for part in parts for target in part.targets)

    def _group(self, rows: Rows, reach: int) -> list[bytes]:
        """Group components whose boxes overlap when closed; groups cannot influence each other."""
        if len(rows) > MAX_GROUPED:
            return [rows.tobytes()]
        groups: list[tuple[list[int], list[int]]] = []  # box, rows
        for row, (x0, y0, x1, y1) in zip(rows.tolist(), self._sets.box[rows].tolist(), strict=True):
            box, members = [x0 - reach, y0 - reach, x1 + reach, y1 + reach], [row]
            while near := next((group for group in groups if _touch(group[0], box)), None):
                groups.remove(near)
                box = [*map(min, near[0][:2], box[:2]), *map(max, near[0][2:], box[2:])]
                members += near[1]
            groups.append((box, members))
        return [np.array(sorted(members), np.intp).tobytes() for _, members in groups]

    def _clean_crop(self, level: int, rows: bytes, closing: Closing, helped: tuple[int, ...]) -> CleanedGroup:
        chosen = np.frombuffer(rows, np.intp)
        width = self._prob.shape[1]
        # A rim of background is left wherever the crop does not end with the image: a touched side is the image's.
        margin = closing_reach(closing.px, closing.times) + 1
        x0, y0 = np.maximum(self._sets.box[chosen, :2].min(axis=0) - margin, 0).tolist()
        x1, y1 = (self._sets.box[chosen, 2:].max(axis=0) + margin).tolist()
        window = np.s_[y0:y1, x0:x1]
        mask = _reached(self._prob[window], level) if level else np.ones_like(self._prob[window])
        at_level = self._sets.box[self._sets.rows(level)]
        if _touches(at_level, (x0, y0, x1, y1)).sum() > len(chosen):  # others lie, in part, within the crop
            num_labels, labels = label_components(mask)
            y, x = np.divmod(self._sets.seed[chosen], width)
            is_chosen = np.zeros(num_labels, np.uint8)
            is_chosen[labels[y - y0, x - x0]] = 1
            mask = np.take(is_chosen, labels, mode="clip")
        close_gaps(mask, closing.px, closing.times)
        sides = tuple(touched_sides(mask))
        fill_holes(mask, helped, closing.max_hole_px)
        num_labels, labels = label_components(mask)
        true = mask & self._truth[window]
        if num_labels == 2:
            return CleanedGroup(((cv2.countNonZero(mask), cv2.countNonZero(true)),), sides)
        area = np.bincount(labels[mask.view(bool)], minlength=num_labels)[1:]
        num_true = np.bincount(labels[true.view(bool)], minlength=num_labels)[1:]
        return CleanedGroup(tuple(zip(area.tolist(), num_true.tolist(), strict=True)), sides)


def _touches(boxes: npt.NDArray[np.int32], box: Sequence[int]) -> npt.NDArray[np.bool_]:
    x0, y0, x1, y1 = box
    return (boxes[:, 0] <= x1) & (boxes[:, 2] >= x0) & (boxes[:, 1] <= y1) & (boxes[:, 3] >= y0)


def _touch(one: Sequence[int], other: Sequence[int]) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]
