"""Bootstrap intervals of scores over images, or over groups of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from stas_core.config import Config
from stas_core.scores.metrics import Counts

Column = npt.NDArray[np.float64]


Statistic = Callable[..., Column]
"""From columns, summed along `axis`, to a statistic of each resample."""


MIN_RESAMPLED = 8
"""Images (or groups) below which no interval is given: of 2 to 7, a percentile bootstrap that says 95 % covers 47 to
87 %."""
RESAMPLED_AT_ONCE = 4_000_000
"""Scores that a bootstrap draws at a time: about 100 MB, for any number of images."""


@dataclass(frozen=True)
class Summary:
    """A score over images: mean, sample standard deviation, and the bootstrap interval of the mean."""

    mean: float
    sd: float
    low: float
    high: float
    num_images: int


def summarise(
    values: npt.ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Summary:
    """Summarise per-image scores; the standard deviation of a single image is 0.

    Raises:
        ValueError: there is no value, or not one group for each.

    Example:
        >>> found = summarise([0.6, 0.7, 0.8, 0.9])
        >>> round(found.mean, 2), found.low < found.mean < found.high
        (0.75, True)
    """
    scores = _scores(values)
    low, high = bootstrap_interval(scores, groups=groups, num_resamples=num_resamples, confidence=confidence, seed=seed)
    sd = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
    return Summary(float(scores.mean()), sd, low, high, len(scores))


@dataclass(frozen=True)
class Difference:
    """Paired difference of two scores, first minus second: mean, interval, and how many images are better."""

    mean: float
    low: float
    high: float
    num_better: int
    num_equal: int
    num_worse: int


def compare(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Compare two lists of per-image scores image by image (paired bootstrap).

    Raises:
        ValueError: there is no value, or the lists differ in length.

    Example:
        >>> found = compare([0.6, 0.7, 0.8], [0.5, 0.7, 0.9])
        >>> found.num_better, found.num_equal, found.num_worse
        (1, 1, 1)
    """
    ours, theirs = _scores(first), _scores(second)
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} scores against {len(theirs)}; a paired comparison needs the same images in both")
    gains = ours - theirs
    low, high = bootstrap_interval(gains, groups=groups, num_resamples=num_resamples, confidence=confidence, seed=seed)
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    return Difference(float(gains.mean()), low, high, better, len(gains) - better - worse, worse)


def bootstrap_interval(
    values: npt.ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean (Efron 1979), resampling whole images.

    Args:
        groups: of each image, its group (patient, slide); whole groups are then resampled, because images of one
            group are alike and fewer independent witnesses than they are images.

    Raises:
        ValueError: there is no value, or not one group for each.
    """
    scores = _scores(values)

    def mean(total: Column, num_images: Column, axis: int) -> Column:
        return np.asarray(total.sum(axis=axis) / num_images.sum(axis=axis))

    columns = _by_group([scores, np.ones(len(scores))], groups)
    return _percentile_interval(mean, columns, num_resamples, confidence, seed)


def interval_if_enough(values: npt.ArrayLike, groups: Sequence[str]) -> tuple[float | None, float | None]:
    """Return the 95 % interval of the mean, over groups where any has several images; None, None: they are too few.

    Raises:
        ValueError: there is no value, or not one group for each.
    """
    num_groups = len(set(groups))
    if num_groups < MIN_RESAMPLED:
        return None, None
    return bootstrap_interval(values, groups=groups if num_groups < len(groups) else None)


def in_words(low: float | None, high: float | None, *, digits: int = 4, to: str = " to ") -> str:
    """Return an interval as a table shows it.

    >>> in_words(0.5, 0.75, digits=2), in_words(None, None)
    ('0.50 to 0.75', 'n/a')
    """
    return "n/a" if low is None or high is None else f"{low:.{digits}f}{to}{high:.{digits}f}"


def pooled_intervals(
    counts: Sequence[Counts],
    *,
    groups: Sequence[str] | None = None,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return the intervals of dice, precision and recall of the images' summed counts.

    The resamples are those of `bootstrap_interval` with the same images, groups and seed.

    Raises:
        ValueError: there are no counts, or not one group for each image.
    """
    columns = _by_group([_scores([getattr(image, name) for image in counts]) for name in ("tp", "fp", "fn")], groups)

    return {
        score: _percentile_interval(partial(_pooled_ratio, parts), columns, num_resamples, confidence, seed)
        for score, parts in _RATIOS.items()
    }


_RATIOS: dict[str, Callable[[Column, Column, Column], tuple[Column, Column]]] = {
    "dice": lambda tp, fp, fn: (2 * tp, 2 * tp + fp + fn),
    "precision": lambda tp, fp, fn: (tp, tp + fp),
    "recall": lambda tp, fp, fn: (tp, tp + fn),
}
"""Part and whole of each score, as in `Counts`."""


def _pooled_ratio(
    parts: Callable[[Column, Column, Column], tuple[Column, Column]], tp: Column, fp: Column, fn: Column, axis: int
) -> Column:
    tp, fp, fn = tp.sum(axis=axis), fp.sum(axis=axis), fn.sum(axis=axis)
    part, whole = parts(tp, fp, fn)
    undefined = np.where(fp + fn > 0, 0.0, 1.0)
    return np.where(whole > 0, part / np.maximum(whole, 1), undefined)


def _by_group(columns: Sequence[Column], groups: Sequence[str] | None) -> list[Column]:
    """Sum each column within groups, where they are given: what is resampled is then a group."""
    if groups is None:
        return list(columns)
    if len(groups) != len(columns[0]):
        raise ValueError(f"{len(groups)} groups for {len(columns[0])} scores; give one group for each")
    group_of = np.unique(groups, return_inverse=True)[1]
    return [np.bincount(group_of, weights=column).astype(np.float64) for column in columns]


def _percentile_interval(
    statistic: Statistic, columns: Sequence[Column], num_resamples: int, confidence: float, seed: int
) -> tuple[float, float]:
    """Resample the columns' entries together, and return the percentile interval of their statistic."""
    from scipy import stats  # slow to import, and not needed by processes that only count

    num_units = len(columns[0])
    if num_units == 1:  # it is drawn each time
        value = float(statistic(*columns, axis=-1))
        return value, value
    found = stats.bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=num_resamples,
        batch=max(1, RESAMPLED_AT_ONCE // num_units),
        rng=np.random.default_rng(seed),
    )
    # numpy's quantiles: scipy's differ from those of earlier versions in the last bit.
    low, high = np.quantile(found.bootstrap_distribution, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _scores(values: npt.ArrayLike) -> Column:
    scores = np.asarray(values, dtype=np.float64).ravel()
    if scores.size == 0:
        raise ValueError("no scores to summarise: give at least one image's score")
    return scores


class BootstrapConfig(Config):
    """How bootstrap intervals are computed."""

    by: Literal["image", "group"] = "image"
    """What is resampled: images, or whole groups (patients, slides), whose images are alike."""
    num_resamples: int = Field(2000, ge=100)
    """Number of resamples."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Share of resamples that the interval holds."""
    seed: int = 0
    """Seed of the resampling."""
