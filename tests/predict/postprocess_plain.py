"""The threshold cascade as a person would write it with scikit-image and scipy: the definition the fast one is held to.

Also the baseline of `tests/bench/postprocess.py`.
"""

import numpy as np
from scipy import ndimage
from skimage.measure import label

from stas_core.arrays import Mask, ProbMapU8
from stas_core.predict.postprocess import PostprocessConfig, StepConfig

EIGHT = np.ones((3, 3), bool)


def postprocess(prob_u8: ProbMapU8, config: PostprocessConfig) -> tuple[Mask, int]:
    """Return the mask and the number of the step it comes from, 0 if the selection was too large."""
    mask = np.zeros(prob_u8.shape, bool)
    for number, step in enumerate(config.steps, start=1):
        selected = select(prob_u8, step)
        if number == 1 and too_large(selected, config):
            return np.zeros(prob_u8.shape, bool), 0
        mask = remove_small(fill_holes(close(selected, config), config), config.min_target_px)
        if mask.sum() >= config.min_foreground_px:
            return mask, number
    return mask, len(config.steps)


def select(prob_u8: ProbMapU8, step: StepConfig) -> Mask:
    components = label(prob_u8 >= step.drop, connectivity=2)
    selected = np.zeros(prob_u8.shape, bool)
    for component in range(1, components.max() + 1):
        pixels = components == component
        levels = prob_u8[pixels]
        if levels.max() >= step.high and (levels >= step.core).sum() >= step.ratio * levels.size:
            selected |= pixels & (prob_u8 >= step.low)
    return selected


def too_large(selected: Mask, config: PostprocessConfig) -> bool:
    share, pixels = config.max_foreground_share, config.max_foreground_px
    return (share is not None and selected.sum() > share * selected.size) or (
        pixels is not None and selected.sum() > pixels
    )


def close(mask: Mask, config: PostprocessConfig) -> Mask:
    square = np.ones((config.closing_px, config.closing_px), bool)
    for _ in range(config.closing_count):  # not iterations=: scipy 1.17 corrupts the heap with it on small images
        mask = ndimage.binary_dilation(mask, square)
    for _ in range(config.closing_count):
        mask = ndimage.binary_erosion(mask, square, border_value=1)
    return mask


def fill_holes(mask: Mask, config: PostprocessConfig) -> Mask:
    """Lay a line of ones outside each helped side in turn, fill, take the line away; at last fill without help."""
    sides = [((0, 0), (1, 0)), ((0, 0), (0, 1)), ((1, 0), (0, 0)), ((0, 1), (0, 0))]
    edges = [mask[:, 0], mask[:, -1], mask[0], mask[-1]]
    touched = [side for side, edge in zip(sides, edges, strict=True) if edge.any()]
    for side in {"each": touched, "first": touched[:1], "none": []}[config.border_fill]:
        filled = ndimage.binary_fill_holes(np.pad(mask, side, constant_values=True), EIGHT)
        (top, bottom), (left, right) = side
        inside = filled[top : filled.shape[0] - bottom, left : filled.shape[1] - right]
        mask = mask | small_holes(inside & ~mask, config.max_hole_px)
    return np.asarray(mask | small_holes(ndimage.binary_fill_holes(mask, EIGHT) & ~mask, config.max_hole_px))


def small_holes(holes: Mask, max_hole_px: int | None) -> Mask:
    if max_hole_px is None:
        return holes
    components = label(holes, connectivity=2)
    area = np.bincount(components.ravel())
    return np.asarray(holes & (area[components] <= max_hole_px))


def remove_small(mask: Mask, min_target_px: int) -> Mask:
    components = label(mask, connectivity=2)
    area = np.bincount(components.ravel())
    return np.asarray(mask & (area[components] >= min_target_px))
