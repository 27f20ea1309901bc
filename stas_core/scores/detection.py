"""Images, groups and slides as found or not: sensitivity, specificity and AUC, with intervals over groups.

An image without targets has no Dice worth a mean: it is right (nothing predicted) or it is not. Here each image, and
each group (patient, slide), is a positive or a negative, by its truth.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stas_core import markdown
from stas_core.scores.bootstrap import MIN_RESAMPLED, RESAMPLED_AT_ONCE, BootstrapConfig
from stas_core.tables import Int32

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

LARGEST, TOTAL, PEAK = "largest target", "total area", "peak probability"
"""What images and groups are ranked by; a group has the largest of its images, and the sum of their areas."""


@dataclass(frozen=True)
class Case:
    """An image or slide: what it is, what was predicted of it, and by what it is ranked."""

    group: str
    is_positive: bool
    """It has a target."""
    is_called: bool
    """A target was predicted."""
    ranks: Mapping[str, float]
    """Of `LARGEST`, `TOTAL` and `PEAK` those that are known."""
    false_share: float
    """Share of its pixels that are predicted falsely, 0 to 1."""


@dataclass(frozen=True)
class DetectionScore:
    """A row of `detection.parquet`: how well positives are told from negatives."""

    level: str
    """image (or slide), or group."""
    measure: str
    """sensitivity or specificity of a mask with any target, or AUC by one of the ranks."""
    value: float | None
    """0 to 1; null where there are no positives, or no negatives, to tell it by."""
    low: float | None
    """Bounds of its bootstrap interval over groups; null where there are too few."""
    high: float | None
    num_positive: Int32
    num_negative: Int32


@dataclass(frozen=True)
class Negatives:
    """Images without a target: what was predicted there all the same."""

    num_images: int
    num_called: int
    """With any predicted target."""
    mean_false_share: float
    """Share of an image that is predicted, mean over them."""


def negatives_of(cases: Sequence[Case]) -> Negatives | None:
    """Return what was predicted of images without a target; None: there is none."""
    found = [case for case in cases if not case.is_positive]
    if not found:
        return None
    return Negatives(
        len(found), sum(case.is_called for case in found), sum(case.false_share for case in found) / len(found)
    )


def score_detection(cases: Sequence[Case], config: BootstrapConfig, *, level: str = "image") -> list[DetectionScore]:
    """Score images (or slides), and where groups have several of them, groups too."""
    table = _score(cases, config, level)
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    if len(groups) < len(cases):
        table += _score([_together(name, own) for name, own in sorted(groups.items())], config, "group")
    return table


def _together(group: str, cases: Sequence[Case]) -> Case:
    known = set.intersection(*(set(case.ranks) for case in cases))
    ranks = {name: (sum if name == TOTAL else max)(case.ranks[name] for case in cases) for name in known}
    return Case(
        group,
        any(case.is_positive for case in cases),
        any(case.is_called for case in cases),
        {name: ranks[name] for name in (LARGEST, TOTAL, PEAK) if name in ranks},
        0.0,
    )


def _score(cases: Sequence[Case], config: BootstrapConfig, level: str) -> list[DetectionScore]:
    positive = np.array([case.is_positive for case in cases], bool)
    called = np.array([case.is_called for case in cases], bool)
    measures: dict[str, Floats | None] = {"sensitivity": None, "specificity": None}
    known = set.intersection(*(set(case.ranks) for case in cases)) if cases else set()
    for name in (LARGEST, TOTAL, PEAK):
        if name in known:
            measures[f"AUC by {name}"] = np.array([case.ranks[name] for case in cases], float)

    def value(measure: str, weights: Floats) -> Floats:
        ranks = measures[measure]
        if ranks is not None:
            return auc(ranks, positive, weights)
        of, right = (positive, called) if measure == "sensitivity" else (~positive, ~called)
        return _ratio(weights[:, of & right].sum(axis=1), weights[:, of].sum(axis=1))

    group_of = np.unique([case.group for case in cases], return_inverse=True)[1] if cases else np.zeros(0, int)
    num_groups = len(set(group_of.tolist()))
    counts = int(positive.sum()), int((~positive).sum())
    table = []
    for measure in measures:
        found = value(measure, np.ones((1, len(cases))))[0]
        low = high = None
        if num_groups >= MIN_RESAMPLED and np.isfinite(found):
            drawn = _resampled(lambda weights, name=measure: value(name, weights), group_of, num_groups, config)  # type: ignore[misc]
            tail = (1 - config.confidence) / 2
            low, high = (float(bound) for bound in np.nanquantile(drawn, [tail, 1 - tail]))
        table.append(DetectionScore(level, measure, float(found) if np.isfinite(found) else None, low, high, *counts))
    return table


def _resampled(
    value: Callable[[Floats], Floats], group_of: npt.NDArray[np.intp], num_groups: int, config: BootstrapConfig
) -> Floats:
    """Return a statistic of resampled groups, each with all its cases; NaN where there is nothing to tell it by."""
    rng = np.random.default_rng(config.seed)
    at_once = max(1, RESAMPLED_AT_ONCE // len(group_of))
    parts = []
    for start in range(0, config.num_resamples, at_once):
        num = min(at_once, config.num_resamples - start)
        drawn = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=num)
        parts.append(value(drawn[:, group_of].astype(np.float64)))
    return np.concatenate(parts)


def auc(ranks: Floats, positive: Flags, weights: Floats) -> Floats:
    """Return the area under the ROC curve: how often a positive ranks above a negative; ties count half.

    Args:
        ranks: of each case.
        positive: which cases are.
        weights: (resamples, cases), how often each case counts; NaN where there is no pair to compare.

    Example:
        >>> auc(np.array([1.0, 2, 3, 3]), np.array([False, False, True, False]), np.ones((1, 4)))
        array([0.83333333])
    """
    order = np.argsort(ranks, kind="stable")
    starts = np.flatnonzero(np.diff(ranks[order], prepend=-np.inf))
    above = np.add.reduceat(weights[:, order] * positive[order], starts, axis=1)
    below = np.add.reduceat(weights[:, order] * ~positive[order], starts, axis=1)
    won = (above * (np.cumsum(below, axis=1) - below / 2)).sum(axis=1)
    return _ratio(won, above.sum(axis=1) * below.sum(axis=1))


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan)


def detection_markdown(
    table: Sequence[DetectionScore],
    negatives: Negatives | None,
    config: BootstrapConfig,
    *,
    what: str = "images",
    without: str | None = "with targets",
) -> str:
    """Write sensitivity, specificity and AUC as Markdown, and what was predicted where there is nothing.

    `without` names the means that leave negatives out; None: there are none.
    """
    parts = ["## Found or not"]
    apart = f"; `{without}` leaves them out" if without else ""
    if negatives is None:
        parts.append(f"All {what} have targets: how often something is found where there is nothing cannot be told.")
    else:
        parts.append(
            f"{negatives.num_images} {what} without a target: {negatives.num_called} of them "
            f"({negatives.num_called / negatives.num_images:.1%}) with a predicted target, "
            f"{negatives.mean_false_share:.3%} of their area predicted on average. In means of Dice over all {what} "
            f"each of them counts 1 where nothing is predicted, else 0{apart}."
        )
    text = (
        "Sensitivity and specificity are of a mask with any target. AUC: how often a positive ranks above a negative. "
        f"Intervals ({config.confidence * 100:g} %) resample groups (patients, slides; without groups, images); n/a: "
        f"no positives or no negatives, or fewer than {MIN_RESAMPLED} groups."
    )
    rows = [[one.level, one.measure, _cell(one), f"{one.num_positive}", f"{one.num_negative}"] for one in table]
    return "\n\n".join([*parts, text, markdown.table(["Level", "Measure", "Value", "Positive", "Negative"], rows)])


def _cell(one: DetectionScore) -> str:
    if one.value is None:
        return "n/a"
    interval = "(n/a)" if one.low is None or one.high is None else f"({one.low:.4f} to {one.high:.4f})"
    return f"{one.value:.4f} {interval}"
