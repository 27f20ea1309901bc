"""Pixel counts of a mask against the truth, and scores over images with bootstrap intervals.

Where a ratio is 0 / 0, precision and recall are 1 if both masks are empty and 0 if only one is; Dice is then still
their harmonic mean. (The published code scores an empty prediction on an empty truth 0.)
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stas_core.arrays import Mask, ProbMapU8


@dataclass(frozen=True)
class Counts:
    """Pixels of a prediction against the truth; counts of several images or tiles add up."""

    tp: int
    fp: int
    fn: int

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN)."""
        return self._ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """TP / (TP + FP): share of the predicted pixels that are true."""
        return self._ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """TP / (TP + FN): share of the true pixels that are predicted."""
        return self._ratio(self.tp, self.tp + self.fn)

    def _ratio(self, part: int, whole: int) -> float:
        if whole == 0:
            return 0.0 if self.fp or self.fn else 1.0
        return part / whole


def count(pred: Mask, truth: Mask) -> Counts:
    """Count true positive, false positive and false negative pixels.

    Raises:
        ValueError: the masks differ in shape.
    """
    if pred.shape != truth.shape:
        raise ValueError(f"prediction is {pred.shape} (height, width), truth is {truth.shape}; bring both to one size")
    tp = int(np.count_nonzero(pred & truth))
    return Counts(tp, fp=int(np.count_nonzero(pred)) - tp, fn=int(np.count_nonzero(truth)) - tp)


def is_target(prob_map: ProbMapU8, threshold: float = 0.5) -> Mask:
    """Return where the probability k / 255 reaches the threshold: k >= 128 at 0.5."""
    lowest = int(np.searchsorted(np.arange(256) / 255, threshold))
    return prob_map >= lowest


@dataclass(frozen=True)
class Summary:
    """A score over images: mean, sample standard deviation, and the bootstrap interval of the mean."""

    mean: float
    sd: float
    low: float
    high: float
    num_images: int


def summarise(values: npt.ArrayLike, *, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> Summary:
    """Summarise per-image scores; the deviation of a single image is 0.

    Raises:
        ValueError: there is no value.
    """
    scores = _scores(values)
    low, high = bootstrap_interval(scores, num_resamples=num_resamples, confidence=confidence, seed=seed)
    sd = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
    return Summary(float(scores.mean()), sd, low, high, len(scores))


def bootstrap_interval(
    values: npt.ArrayLike, *, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean (Efron 1979), resampling whole images.

    Raises:
        ValueError: there is no value.
    """
    scores = _scores(values)
    chosen = np.random.default_rng(seed).integers(len(scores), size=(num_resamples, len(scores)))
    low, high = np.quantile(scores[chosen].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _scores(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64).ravel()
    if scores.size == 0:
        raise ValueError("no scores to summarise: give at least one image's score")
    return scores
