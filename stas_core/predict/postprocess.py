"""From an 8-bit probability map to a binary mask and its targets: the threshold cascade of TEAM_1137.

Each step asks less of a component than the one before; the first whose mask is large enough gives the result. Every
threshold is an integer k of the 8-bit map (probability k / 255), so that no result hangs on the rounding of a float.
`tests/predict/postprocess_plain.py` states the same rules with scikit-image and scipy, for reading.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, field_validator

from stas_core import storage
from stas_core.arrays import Labels, Mask, ProbMapU8, label_components
from stas_core.config import Config, OrFile, parse_yaml, read_yaml

BorderFill = Literal["each", "first", "none"]
GreyLevel = Field(ge=0, le=255)
SIDES: tuple[Any, ...] = (np.s_[:, 0], np.s_[:, -1], np.s_[0], np.s_[-1])
"""Pixels along each side: left, right, top, bottom."""


class StepConfig(Config):
    """One step: which components of the map are kept, and which of their pixels."""

    drop: int = GreyLevel
    """Components are 8-connected regions of k >= drop."""
    high: int = GreyLevel
    """A component is kept only if some k >= high."""
    core: int = GreyLevel
    """Core pixels have k >= core."""
    ratio: float = Field(ge=0, le=1)
    """A component is kept only if at least this share of it is core."""
    low: int = GreyLevel
    """Of a kept component, the pixels with k >= low."""


PUBLISHED_STEPS = (
    StepConfig(drop=26, high=90, core=81, ratio=0.4, low=64),
    StepConfig(drop=26, high=77, core=69, ratio=0.2, low=26),
    StepConfig(drop=13, high=52, core=46, ratio=0.2, low=13),
    StepConfig(drop=3, high=26, core=23, ratio=0.2, low=3),
)
"""Probabilities .10/.10/.05/.01 (drop), .35/.30/.20/.10 (high), 0.9 high (core), .25/.10/.05/.01 (low) as integers."""


class PostprocessConfig(Config):
    """The threshold cascade. Pixel limits hold for 1716 x 942 px at native scale; they do not follow the image."""

    former_names: ClassVar[Mapping[str, str]] = {"stages": "steps"}

    steps: tuple[StepConfig, ...] = Field(PUBLISHED_STEPS, min_length=1)
    """The steps in their order."""
    closing_px: int = Field(9, ge=1)
    """Side of the square that gaps are closed with, odd; 1 closes nothing."""
    closing_count: int = Field(1, ge=0)
    """How often to dilate, and then to erode, in the closing; 0 closes nothing."""
    border_fill: BorderFill = "each"
    """Fill holes that the image border cuts open: at each side that the mask touches, one side at a time; at the first
    of left, right, top, bottom (the published code); or not at all."""
    max_hole_px: int | None = Field(None, ge=0)
    """Holes with more pixels stay open; null: all are filled (the published code); 0: none is."""
    min_target_px: int = Field(150, ge=0)
    """Targets (8-connected) with fewer pixels are removed."""
    min_foreground_px: int = Field(1000, ge=1)
    """A step that leaves fewer pixels gives way to the next; the last step keeps what it has."""
    max_foreground_share: float | None = Field(0.5, gt=0, le=1)
    """The mask is empty if step 1 selects more than this share of the image; null: no such limit."""
    max_foreground_px: int | None = Field(None, ge=0)
    """The same limit in pixels, whatever the size of the image (the published code: 808236); null: no such limit."""

    @field_validator("closing_px")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"closing_px {value} is even: the square needs a centre, use {value - 1} or {value + 1}")
        return value


def _from_file(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if storage.is_local(value):
        return read_yaml(storage.local_path(value).expanduser())
    return parse_yaml(storage.read_bytes(value).decode(), value)  # tune_postprocess may have written it to a bucket


PostprocessChoice = Annotated[PostprocessConfig, BeforeValidator(_from_file), OrFile()]
"""A cascade as a section of a stage's config, or as the path or URI of a YAML file of one."""


@dataclass(frozen=True)
class Cascade:
    """The cascade's mask, and the step (from 1) that gave it; 0: emptied, because step 1 selected too much."""

    mask: Mask
    step: int


def cut_at(level: int) -> PostprocessConfig:
    """Return the cascade that does nothing but cut a map at k >= level."""
    step = StepConfig(drop=level, high=level, core=level, ratio=0, low=level)
    return PostprocessConfig(
        steps=(step,),
        closing_count=0,
        border_fill="none",
        max_hole_px=0,
        min_target_px=0,
        min_foreground_px=1,
        max_foreground_share=None,
    )


def postprocess(prob_u8: ProbMapU8, config: PostprocessConfig) -> Mask:
    """Return the binary mask of an 8-bit probability map (h, w) of any size."""
    return run_cascade(prob_u8, config).mask


def run_cascade(prob_u8: ProbMapU8, config: PostprocessConfig) -> Cascade:
    """Run the cascade: the first step that leaves at least `min_foreground_px` gives the result.

    Example:
        >>> prob_u8 = np.zeros((100, 100), np.uint8)
        >>> prob_u8[20:60, 20:60] = 200
        >>> found = run_cascade(prob_u8, PostprocessConfig())
        >>> int(found.mask.sum()), found.step
        (1600, 1)
    """
    components = functools.cache(lambda drop: _label(prob_u8, drop))
    limit = foreground_limit(prob_u8.size, config)
    mask = np.zeros(prob_u8.shape, np.uint8)
    for number, step in enumerate(config.steps, start=1):
        selected = components(step.drop).select(step)
        if number == 1 and len(selected) > limit:
            return Cascade(mask.view(bool), 0)
        mask = np.zeros(prob_u8.shape, np.uint8)
        if len(selected) == 0:
            continue
        mask.ravel()[selected] = 1
        _clean(mask, config)
        if np.count_nonzero(mask) >= config.min_foreground_px:
            return Cascade(mask.view(bool), number)
    return Cascade(mask.view(bool), len(config.steps))


@dataclass(frozen=True)
class Targets:
    """Measured targets in the order of their first pixels, as columns; number 1 is in row 0."""

    area_px: npt.NDArray[np.int64]
    centroid_x: npt.NDArray[np.float64]
    """In px, of the middles of pixels: pixel 0 is at 0."""
    centroid_y: npt.NDArray[np.float64]
    bbox: npt.NDArray[np.int64]
    """(n, 4): x0, y0, x1, y1 in px; x1 and y1 are the first outside."""
    mean_prob: npt.NDArray[np.float64]
    peak_prob: npt.NDArray[np.float64]
    sides: npt.NDArray[np.bool_]
    """(n, 4): whether it touches the image's left, right, top, bottom."""

    @property
    def touches_border(self) -> npt.NDArray[np.bool_]:
        """Tell which targets touch any side of the image."""
        return np.asarray(self.sides.any(axis=1))

    def __len__(self) -> int:
        return len(self.area_px)


def find_targets(mask: Mask, prob_u8: ProbMapU8) -> tuple[Labels, Targets]:
    """Find the 8-connected components of a mask, and measure them with the probabilities they lie on.

    Returns:
        for each pixel the number of its target, from 1 in the order of their first pixels (0: none); and their table.

    Example:
        >>> mask = np.zeros((10, 10), bool)
        >>> mask[2:4, 5:8] = True
        >>> labels, targets = find_targets(mask, np.full((10, 10), 255, np.uint8))
        >>> int(labels.max()), targets.area_px.tolist(), targets.bbox.tolist(), targets.mean_prob.tolist()
        (1, [6], [[5, 2, 8, 4]], [1.0])
    """
    height, width = mask.shape
    num_labels, found, stats, centroids = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    labels = np.asarray(found, np.int32)
    at = np.flatnonzero(mask)
    label = labels.ravel()[at]
    first = np.zeros(num_labels, np.int64)
    first[label[::-1]] = at[::-1]  # of several values, the last one stays
    order = np.argsort(first[1:]) + 1  # OpenCV numbers components by blocks of rows
    number = np.zeros(num_labels, np.int32)
    number[order] = np.arange(1, num_labels)
    levels = prob_u8.ravel()[at]
    peak = np.zeros(num_labels, np.uint8)
    np.maximum.at(peak, label, levels)
    sum_level = np.bincount(label, levels, minlength=num_labels)[order]
    x0, y0, box_width, box_height, area = stats[order].astype(np.int64).T
    x1, y1 = x0 + box_width, y0 + box_height
    # Sums of integers are exact in float64, so that no order of pixels matters.
    targets = Targets(
        area_px=area,
        centroid_x=centroids[order, 0],
        centroid_y=centroids[order, 1],
        bbox=np.stack([x0, y0, x1, y1], axis=1),
        mean_prob=sum_level / area / 255,
        peak_prob=peak[order] / 255,
        sides=np.stack([x0 == 0, x1 == width, y0 == 0, y1 == height], axis=1),
    )
    return (np.take(number, labels) if (np.diff(order) < 0).any() else labels), targets


def foreground_limit(num_px: int, config: PostprocessConfig) -> float:
    """Return the most pixels that step 1 may select in an image of `num_pixels`."""
    share = float("inf") if config.max_foreground_share is None else config.max_foreground_share * num_px
    pixels = float("inf") if config.max_foreground_px is None else config.max_foreground_px
    return min(share, pixels)


@dataclass(frozen=True)
class _Components:
    """Pixels of the map that reach the grey level `drop`, as flat lists: far fewer than the map has."""

    at: npt.NDArray[np.intp]  # flat index of each pixel
    level: npt.NDArray[np.uint8]  # its k
    label: npt.NDArray[np.int32]  # its component, from 1
    area: npt.NDArray[np.intp]  # pixels of each component; 0 has none

    def select(self, step: StepConfig) -> npt.NDArray[np.intp]:
        """Return the flat indices of the pixels that a step keeps."""
        has_peak = np.zeros(len(self.area), bool)
        has_peak[self.label[self.level >= step.high]] = True
        core = np.bincount(self.label[self.level >= step.core], minlength=len(self.area))
        kept = has_peak & (core >= step.ratio * self.area)
        return self.at[kept[self.label] & (self.level >= step.low)]


def _label(prob_u8: ProbMapU8, drop: int) -> _Components:
    mask = prob_u8 >= drop
    at = np.flatnonzero(mask)  # of booleans: eight times as fast as of bytes
    _, labels = label_components(mask)
    label = labels.ravel()[at]
    return _Components(at, prob_u8.ravel()[at], label, np.bincount(label))


def _clean(mask: npt.NDArray[np.uint8], config: PostprocessConfig) -> None:
    """Close gaps, fill holes and remove small targets of a mask (0 or 1) that is not empty, in place."""
    x, y, width, height = cv2.boundingRect(mask)
    # A rim of background is left wherever the crop does not end with the image.
    margin = closing_reach(config.closing_px, config.closing_count) + 1
    crop = mask[max(0, y - margin) : y + height + margin, max(0, x - margin) : x + width + margin]
    close_gaps(crop, config.closing_px, config.closing_count)
    fill_holes(crop, helped_sides(touched_sides(crop), config.border_fill), config.max_hole_px)
    _remove_small(crop, config.min_target_px)


def closing_reach(closing_px: int, closing_count: int) -> int:
    """Return how far (px) the closing of a mask can depend on its pixels."""
    return closing_count * (closing_px // 2)


def close_gaps(crop: npt.NDArray[np.uint8], closing_px: int, closing_count: int) -> None:
    """Close a mask (0 or 1) in place; beyond the crop's border nothing is dilated and nothing eroded."""
    if closing_reach(closing_px, closing_count):
        square = np.ones((closing_px, closing_px), np.uint8)
        crop[:] = cv2.morphologyEx(crop, cv2.MORPH_CLOSE, square, iterations=closing_count)


def touched_sides(crop: npt.NDArray[np.uint8]) -> list[int]:
    """Return the sides that the mask touches; 0 to 3: left, right, top, bottom."""
    return [number for number, side in enumerate(SIDES) if crop[side].any()]


def helped_sides(touched: Sequence[int], border_fill: BorderFill) -> Sequence[int]:
    """Return the touched sides at which holes are filled."""
    return {"each": touched, "first": touched[:1], "none": []}[border_fill]


def fill_holes(crop: npt.NDArray[np.uint8], helped: Sequence[int], max_hole_px: int | None) -> None:
    """Fill, in place, the 8-connected background components that touch no side, or only one helped side.

    This is what a line of ones beside the helped side, a fill, and a fill without the line come to: the line keeps
    open whatever touches a further side. So one labelling serves every side.
    """
    if max_hole_px == 0:
        return
    num_labels, labels = label_components(1 - crop)
    touched = np.zeros((len(SIDES), num_labels), bool)
    for number, side in enumerate(SIDES):
        touched[number, labels[side]] = True
    num_sides = touched.sum(axis=0)
    closed = num_sides == 0
    for number in helped:
        closed |= touched[number] & (num_sides == 1)
    closed[0] = False  # the mask itself
    if max_hole_px is not None and closed.any():
        closed &= np.bincount(labels.ravel(), minlength=num_labels) <= max_hole_px
    if closed.any():
        crop |= np.take(closed.view(np.uint8), labels, mode="clip")  # half the time of indexing


def _remove_small(crop: npt.NDArray[np.uint8], min_target_px: int) -> None:
    _, labels = label_components(crop)
    area = np.bincount(labels[crop.view(bool)])
    if (area[1:] < min_target_px).any():
        kept = area >= min_target_px
        kept[0] = False
        crop[:] = np.take(kept.view(np.uint8), labels, mode="clip")
