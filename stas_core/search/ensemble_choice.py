"""Greedy choice of an ensemble's members on out-of-fold maps, and what members and flips cost (Caruana et al. 2004).

A member is a kind of model, trained once for every fold: an image is predicted by those of its own fold only, which
never saw it. Members are added one by one, each time the one that raises mean Dice most. Done once without each fold
and scored on it (nested), this says what the choice itself is worth on new images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stas_core import markdown
from stas_core.arrays import Mask, ProbMapU8
from stas_core.predict.inference import Flip
from stas_core.scores import bootstrap, metrics
from stas_core.scores.bootstrap import BootstrapConfig, Difference
from stas_core.scores.metrics import Counts, ImageScores

Flips = tuple[Flip, ...]


class Subset(NamedTuple):
    """Members, sorted by name, and the flips they are applied in."""

    members: tuple[str, ...]
    flips: Flips


ScoreSubsets = Callable[[Sequence[Subset]], list[ImageScores]]
"""From subsets to, of each, Dice of every image."""


def score_subset(maps: Mapping[tuple[str, Flip], ProbMapU8], truth: Mask, subset: Subset) -> Counts:
    """Count the pixels of the mean of 8-bit maps (h, w), cut at 0.5 as `metrics.is_target` does, against the truth.

    Args:
        maps: of each member under each flip, upright.
    """
    chosen = [maps[member, flip] for member in subset.members for flip in subset.flips]
    total = np.zeros(truth.shape, np.uint32)
    for prob_u8 in chosen:
        total += prob_u8
    return metrics.count(2 * total >= 255 * len(chosen), truth)


def choose(
    members: Sequence[str],
    flips: Flips,
    shown: npt.NDArray[np.bool_],
    score: ScoreSubsets,
) -> list[str]:
    """Return the members in the order in which a greedy choice adds them, judged on the images shown; ties by name."""
    order: list[str] = []
    while left := sorted(set(members) - set(order)):
        subsets = [Subset(tuple(sorted([*order, member])), flips) for member in left]
        means = [float(scores[shown].mean()) for scores in score(subsets)]
        order.append(left[int(np.argmax(means))])
    return order


@dataclass(frozen=True)
class Size:
    """An ensemble of the first members under a set of flips: its Dice and its cost."""

    members: tuple[str, ...]
    flips: Flips
    tuned: float
    """Mean Dice by the members chosen on these same images."""
    nested: float
    """Mean Dice, each image by members chosen without its fold; `low` and `high` bound its bootstrap interval."""
    low: float
    high: float
    loss: Difference
    """Nested Dice against that of the best row, image by image."""
    cost: float
    """Seconds per image, relative to one pass of the cheapest member."""
    nested_dice: ImageScores = field(compare=False)
    """The nested Dice of each image."""


class _Candidate(NamedTuple):
    """A row before it is weighed against the others; `nested` is of each image."""

    members: tuple[str, ...]
    flips: Flips
    cost: float
    tuned: float
    nested: ImageScores


def tabulate(
    members: Mapping[str, float],
    flip_sets: Sequence[Flips],
    folds: npt.NDArray[np.int64],
    score: ScoreSubsets,
    config: BootstrapConfig,
    groups: Sequence[str],
) -> list[Size]:
    """Return a row for each number of members and set of flips, the cheapest first.

    Args:
        members: seconds that one pass of each member takes.
        folds: of each image.
        groups: of each image, for intervals by group.
    """
    rows: list[_Candidate] = []
    for flips in flip_sets:
        everywhere = np.ones(len(folds), bool)
        order = choose(list(members), flips, everywhere, score)
        without = {fold: choose(list(members), flips, folds != fold, score) for fold in np.unique(folds)}
        for size in range(1, len(members) + 1):
            nested = np.empty(len(folds))
            for fold, its_order in without.items():
                (scores,) = score([Subset(tuple(sorted(its_order[:size])), flips)])
                nested[folds == fold] = scores[folds == fold]
            (tuned,) = score([Subset(tuple(sorted(order[:size])), flips)])
            cost = sum(members[member] for member in order[:size]) * len(flips) / min(members.values())
            rows.append(_Candidate(tuple(order[:size]), flips, cost, float(tuned.mean()), nested))
    resampling: dict[str, Any] = {
        "groups": list(groups) if config.by == "group" else None,
        **config.model_dump(exclude={"by"}),
    }
    best = max(rows, key=lambda row: float(row.nested.mean())).nested
    sizes = []
    for row in sorted(rows, key=lambda row: row.cost):
        summary = bootstrap.summarise(row.nested, **resampling)
        loss = bootstrap.compare(row.nested, best, **resampling)
        interval = summary.mean, summary.low, summary.high
        sizes.append(Size(row.members, row.flips, row.tuned, *interval, loss, row.cost, row.nested))
    return sizes


def knee(sizes: Sequence[Size]) -> Size:
    """Return the cheapest row that is not proven worse than the best: the interval of its loss includes zero."""
    return next(size for size in sizes if size.loss.high >= 0)


def sizes_markdown(sizes: Sequence[Size], chosen: Size, config: BootstrapConfig) -> str:
    """Write the rows as a Markdown table."""
    interval = f"{config.confidence * 100:g} % interval"
    nested_on, against = f"Nested ({interval})", f"Against the best ({interval})"
    rows = []
    for size in sizes:
        loss = f"{size.loss.mean:+.4f} ({size.loss.low:+.4f} to {size.loss.high:+.4f})"
        nested = f"{size.nested:.4f} ({size.low:.4f} to {size.high:.4f})"
        members = f"{len(size.members)}: {', '.join(size.members)}"
        numbers = [f"{len(size.flips)}", f"{size.cost:.2f}", f"{size.tuned:.4f}"]
        rows.append([members, *numbers, nested, loss, "knee" if size is chosen else ""])
    return markdown.table(["Members", "Flips", "Cost", "Tuned on all", nested_on, against, "Chosen"], rows)
