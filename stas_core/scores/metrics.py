"""Counts of a mask against the truth, by pixels and by targets, and scores over images with bootstrap intervals.

Where a ratio is 0 / 0, precision and recall are 1 if both masks are empty and 0 if only one is; Dice is then still
their harmonic mean. (The published code scores an empty prediction on an empty truth 0.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Int64

from stas_core.arrays import Mask, ProbMapU8, label_components

GreyLevelCounts = Int64[np.ndarray, "256 2"]
"""Row k: pixels whose grey level is k, and how many of them are target. Arrays of several maps can be summed."""

ImageScores = npt.NDArray[np.float64]
"""Dice of each image."""


@dataclass(frozen=True)
class Counts:
    """Pixels (or targets) of a prediction against the truth; counts of several images or tiles add up."""

    tp: int
    fp: int
    fn: int

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN); of targets this is called F1."""
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

    Example:
        >>> pred, truth = np.array([[True, True, False]]), np.array([[True, False, True]])
        >>> count(pred, truth), count(pred, truth).dice
        (Counts(tp=1, fp=1, fn=1), 0.5)
    """
    _require_one_size(pred, truth)
    tp = int(np.count_nonzero(pred & truth))
    return Counts(tp, fp=int(np.count_nonzero(pred)) - tp, fn=int(np.count_nonzero(truth)) - tp)


def count_targets(pred: Mask, truth: Mask) -> Counts:
    """Count targets (8-connected components) that match one to one with an IoU of at least 0.5.

    Pairs are taken greedily by IoU, though their order changes no count: a target has two partners only if these
    are its halves, each at exactly 0.5, and a half lies wholly inside it and so has no other partner.

    Raises:
        ValueError: the masks differ in shape.
    """
    _require_one_size(pred, truth)
    num_pred, pred_label = label_components(pred)
    num_truth, truth_label = label_components(truth)
    pred_area, truth_area = np.bincount(pred_label.ravel()), np.bincount(truth_label.ravel())
    both = pred & truth
    pairs = pred_label[both].astype(np.int64) * num_truth + truth_label[both]
    keys, overlap = np.unique(pairs, return_counts=True)
    of_pred, of_truth = np.divmod(keys, num_truth)
    union = pred_area[of_pred] + truth_area[of_truth] - overlap
    free_pred, free_truth = set(range(1, num_pred)), set(range(1, num_truth))
    for pair in np.argsort(-overlap / union, kind="stable"):
        one, other = int(of_pred[pair]), int(of_truth[pair])
        if 2 * overlap[pair] >= union[pair] and one in free_pred and other in free_truth:
            free_pred.remove(one)
            free_truth.remove(other)
    return Counts(num_pred - 1 - len(free_pred), fp=len(free_pred), fn=len(free_truth))


def _require_one_size(pred: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> None:
    if pred.shape != truth.shape:
        raise ValueError(f"prediction is {pred.shape} (height, width), truth is {truth.shape}; bring both to one size")


def is_target(prob_map: ProbMapU8, threshold: float = 0.5) -> Mask:
    """Return where the probability k / 255 reaches the threshold: k >= 128 at 0.5."""
    lowest = int(np.searchsorted(np.arange(256) / 255, threshold))
    return prob_map >= lowest


def count_grey_levels(prob_map: ProbMapU8, truth: Mask) -> GreyLevelCounts:
    """Count the pixels of each grey level, and how many of them are target: all that their reliability needs."""
    return np.stack([np.bincount(prob_map.ravel(), minlength=256), np.bincount(prob_map[truth], minlength=256)], axis=1)


@dataclass(frozen=True)
class ReliabilityBin:
    """Pixels of neighbouring grey levels: their mean probability, and the share of them that is target."""

    mean_prob: float
    target_share: float
    num_pixels: int


def reliability_bins(levels: GreyLevelCounts, *, num_bins: int = 16) -> list[ReliabilityBin]:
    """Gather grey levels into bins of even width; bins without a pixel are left out."""
    bin_of = np.arange(256) * num_bins // 256
    bins = []
    for index in range(num_bins):
        pixels, targets = levels[bin_of == index].T
        if (total := int(pixels.sum())) > 0:
            mean_prob = float(pixels @ np.flatnonzero(bin_of == index)) / 255 / total
            bins.append(ReliabilityBin(mean_prob, float(targets.sum()) / total, total))
    return bins


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return the expected calibration error: |mean probability - target share|, averaged over pixels.

    Raises:
        ValueError: there is no pixel.
    """
    total = sum(bin_.num_pixels for bin_ in bins)
    if total == 0:
        raise ValueError("no pixels to judge probabilities by: give the level counts of at least one map")
    return sum(abs(bin_.mean_prob - bin_.target_share) * bin_.num_pixels for bin_ in bins) / total
