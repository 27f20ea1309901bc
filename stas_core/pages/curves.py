"""What a threshold costs: Dice, precision and recall of maps cut at each grey level."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from stas_core import storage
from stas_core.data import images
from stas_core.errors import InputError, StorageError
from stas_core.pages.contents import Chart, Figure, Series
from stas_core.scores import metrics

MOST_IMAGES = 200
"""More are not read for a curve: these are spread evenly over all."""
_HALF, _THREADS = 128, 8
Floats = npt.NDArray[np.float64]


def cut_figure(pairs: Sequence[tuple[str, str]], marks: Sequence[tuple[float, str]] = ()) -> Figure | None:
    """Return the curve of maps cut at each level; None: none of them can be read, or none has a target.

    Args:
        pairs: the map and the true mask of each image.
        marks: probabilities that are marked, beside 0.5 and the best.
    """
    step = max(1, len(pairs) / MOST_IMAGES)
    chosen = [pairs[int(index * step)] for index in range(min(len(pairs), MOST_IMAGES))]
    with ThreadPoolExecutor(_THREADS) as pool:
        counted = [levels for levels in pool.map(_levels, chosen) if levels is not None]
    with_target = [levels for levels in counted if levels[:, 1].sum()]
    if not with_target:
        return None
    dice, precision, recall = curves_of(np.stack(with_target).astype(np.float64))
    best = int(dice.argmax())
    lines = [("Dice", dice), ("precision", precision), ("recall", recall)]
    series = [Series(name, [(k / 255, float(values[k])) for k in range(1, 256)]) for name, values in lines]
    of = f"{len(with_target)} images with targets" + (", spread evenly over all" if len(chosen) < len(pairs) else "")
    reading = (
        f"What a plain cut of the maps gives at each threshold, mean over {of}: best at {best / 255:.2f} with Dice "
        f"{dice[best]:.3f}; at 0.5 it is {dice[_HALF]:.3f}. A flat top means that the threshold hardly matters."
    )
    marked = [(0.5, "0.5"), (best / 255, "best"), *marks]
    chart = Chart("threshold", "mean over images", series, y_range=(0, 1), marks=marked, start=best / 255)
    return Figure("What a threshold costs", reading, chart=chart)


def curves_of(levels: Floats) -> tuple[Floats, Floats, Floats]:
    """Return mean Dice, precision and recall over images at each cut k >= level.

    Args:
        levels: of each image the pixels of each grey level, and those of them that are target (images, 256, 2); every
            image has a target.
    """
    reached = levels[:, ::-1].cumsum(axis=1)[:, ::-1]  # pixels of at least each level
    predicted, tp = reached[..., 0], reached[..., 1]
    real = tp[:, :1]
    dice = 2 * tp / (predicted + real)
    with np.errstate(invalid="ignore"):
        precision = np.where(predicted > 0, tp / predicted, np.nan)
    shown = ~np.isnan(precision)
    count = np.maximum(1, shown.sum(axis=0))
    return dice.mean(axis=0), np.where(shown, precision, 0).sum(axis=0) / count, (tp / real).mean(axis=0)


def _levels(pair: tuple[str, str]) -> npt.NDArray[np.int64] | None:
    try:
        prob_map = images.decode_map(storage.read_bytes(pair[0]), pair[0])
        truth = images.decode_mask(storage.read_bytes(pair[1]), pair[1])
    except (InputError, StorageError):  # its row says so
        return None
    return metrics.count_grey_levels(prob_map, truth) if prob_map.shape == truth.shape else None
