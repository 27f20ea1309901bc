"""Small maps of a few validation images at a few epochs: how a fold came to see what it sees."""

from collections.abc import Sequence

import cv2
import numpy as np

from stas_core.arrays import ProbMapU8, ResizedMapU8
from stas_core.data.cohort import CohortRow
from stas_core.train.recipe import TrainingConfig

MOST_IMAGES = 3
MOST_EPOCHS = 8
SIDE_PX = 256
"""Longer side of a small map."""


def epochs_shown(config: TrainingConfig) -> list[int]:
    """Return the epochs after which maps are kept: of those that are validated, closer together at the start.

    Example:
        >>> epochs_shown(TrainingConfig(epochs=150))
        [1, 2, 4, 9, 18, 36, 73, 150]
        >>> epochs_shown(TrainingConfig(epochs=20, validate_every=8))
        [8, 16, 20]
    """
    validated = np.array([*range(config.validate_every, config.epochs, config.validate_every), config.epochs])
    wanted = np.geomspace(validated[0], validated[-1], MOST_EPOCHS)
    nearest = np.abs(validated[:, None] - wanted).argmin(axis=0)
    return sorted({int(epoch) for epoch in validated[nearest]})


def images_shown(rows: Sequence[CohortRow]) -> list[str]:
    """Return the ids of the images whose maps are kept: with small, usual and large targets; few have none.

    Only the cohort decides, so that every run shows the same.
    """
    with_targets = [row for row in rows if row.num_targets]
    chosen = with_targets if len(with_targets) >= MOST_IMAGES else rows
    ordered = sorted(chosen, key=lambda row: (row.foreground_share, row.id))
    num = min(MOST_IMAGES, len(ordered))
    return [ordered[(2 * place + 1) * len(ordered) // (2 * num)].id for place in range(num)]


def small(prob_u8: ProbMapU8) -> ResizedMapU8:
    """Return a map with a longer side of at most `SIDE_PX`, by averaging."""
    height, width = prob_u8.shape
    factor = SIDE_PX / max(height, width)
    if factor >= 1:
        return prob_u8
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(cv2.resize(prob_u8, size, interpolation=cv2.INTER_AREA))
