"""Figures of a training run: learning curves and scores of its folds."""

from collections.abc import Mapping, Sequence
from itertools import cycle, product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stas_core.errors import ConfigError
from stas_core.figures.style import (
    BLUE,
    CATEGORIES,
    GREEN,
    GREY,
    ORANGE,
    boxes,
    house_style,
    new_figure,
    panels,
    png,
    require,
    say,
)

History = Sequence[Mapping[str, float | None]]
"""One record per epoch: `epoch` from 1, `train_loss`, `lr`, and in validated epochs `val_dice`, `val_precision`,
`val_recall`, perhaps `val_loss`. A missing key and None both mean not measured."""


@house_style()
def learning_curves(history: History, *, title: str) -> bytes:
    """Draw one fold's loss, validation scores and learning rate over a shared epoch axis.

    Raises:
        ConfigError: there is no epoch.
    """
    require(history, "learning curves")
    figure = Figure(figsize=(6.4, 6.2), layout="constrained")
    loss, scores, rate = panels(figure, 3, 1, sharex=True, height_ratios=[2, 2, 1])
    _line(loss, history, "train_loss", label="Training", color=BLUE)
    if _line(loss, history, "val_loss", label="Validation", color=ORANGE):
        loss.legend(loc="upper right")
    validated = [
        _line(scores, history, f"val_{name.lower()}", label=name, color=colour, show_last=True)
        for name, colour in (("Dice", BLUE), ("Precision", ORANGE), ("Recall", GREEN))
    ]
    if any(validated):
        scores.legend(title="At the last validation", loc="lower right", ncols=3)
    else:
        say(scores, "not validated yet")
    _line(rate, history, "lr", label="Learning rate", color=GREY)
    loss.set(ylabel="Loss")
    loss.set_title(title)
    scores.set(ylabel="Validation score", ylim=(0, 1))
    rate.set(ylabel="Learning rate", xlabel="Epoch")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    rate.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    return png(figure)


@house_style()
def fold_curves(histories: Mapping[str, History]) -> bytes:
    """Draw all folds' loss and validation Dice over epochs; the validation loss, where there is one, is dotted.

    Raises:
        ConfigError: there is no fold.
    """
    require(histories, "fold curves")
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    loss, dice = panels(figure, 1, 2, sharex=True)
    styles = cycle(product(("-", "--", "-."), CATEGORIES))
    validated = []
    for (name, history), (dashes, colour) in zip(histories.items(), styles, strict=False):
        _line(loss, history, "train_loss", label=name, color=colour, linestyle=dashes)
        # matplotlib's legends leave out names that begin with an underscore.
        _line(loss, history, "val_loss", label="_", color=colour, linestyle=":")
        validated.append(_line(dice, history, "val_dice", label=name, color=colour, linestyle=dashes, show_last=True))
    if not any(validated):
        say(dice, "not validated yet")
    for axes, label in ((loss, "Loss"), (dice, "Validation Dice")):
        axes.set(xlabel="Epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    dice.set(ylim=(0, 1))
    if all(validated):
        dice.legend(title="At the last validation", loc="lower right", ncols=1 + len(histories) // 6)
    else:
        loss.legend(loc="upper right", ncols=1 + len(histories) // 6)
    return png(figure)


@house_style()
def fold_scores(scores: Mapping[str, Sequence[float]]) -> bytes:
    """Draw each fold's per-image Dice as points over a box, with its mean; several folds also pooled.

    Raises:
        ConfigError: there is no fold, or a fold has no score.
    """
    require(scores, "fold scores")
    for name, values in scores.items():
        require(values, f"scores of {name}")
    groups = dict(scores)
    if len(scores) > 1:
        groups["all"] = [value for values in scores.values() for value in values]
    figure, axes = new_figure(max(5.4, 0.8 + 1.1 * len(groups)), 3.8)
    boxes(axes, groups, whiskers=1.5, show_outside=False)
    for x, values in enumerate(groups.values(), start=1):
        # Steps of the golden ratio spread points of like score evenly, and alike in every run.
        spread = np.argsort(np.argsort(values, kind="stable")) * 0.618034 % 1 - 0.5
        axes.plot(x + 0.4 * spread, values, ".", color=BLUE, markersize=4.5, alpha=0.7, markeredgewidth=0)
        axes.plot(x, np.mean(values), "D", color=ORANGE, markersize=5, markeredgecolor="white", zorder=4)
    names = [f"{name}\nn = {len(values)}\nmean {np.mean(values):.3f}" for name, values in groups.items()]
    axes.set_xticks(range(1, len(groups) + 1), names)
    axes.set(ylabel="Dice per image", ylim=(-0.02, 1.02))
    axes.set_title("Box: quartiles; whiskers: within 1.5 interquartile ranges; diamond: mean")
    return png(figure)


def pick_examples(ids: Sequence[str], dice: Sequence[float], *, num_each: int) -> dict[str, list[str]]:
    """Choose images of best, median and worst Dice: best from the top, worst from the bottom, none twice.

    Of fewer than 3 * `num_each` images each kind gets a third, and at least the best one is chosen. Ties go by id.

    Raises:
        ConfigError: there is no image, or `num_each` is below 1.
    """
    require(ids, "images to choose examples from")
    if num_each < 1:
        raise ConfigError(f"num_each = {num_each}, expected at least 1")
    ranked = [image_id for _, image_id in sorted(zip(dice, ids, strict=True), key=lambda pair: (-pair[0], pair[1]))]
    num_each = min(num_each, max(1, len(ranked) // 3))
    best, rest = ranked[:num_each], ranked[num_each:]
    middle, worst = rest[:-num_each], rest[-num_each:]
    start = max(0, (len(middle) - num_each) // 2)
    return {"best": best, "median": middle[start : start + num_each], "worst": worst[::-1]}


def _line(axes: Axes, history: History, key: str, *, label: str, show_last: bool = False, **style: Any) -> bool:
    """Plot the epochs in which `key` was measured; return whether there were any."""
    points = [(row["epoch"], value) for row in history if (value := row.get(key)) is not None]
    if not points:
        return False
    if show_last:
        label = f"{label}  {points[-1][1]:.3f}"
    # Lone epochs need a mark to be seen; in a long unbroken curve marks only thicken the line.
    axes.plot(*zip(*points, strict=True), marker="o" if len(points) <= 25 else "", label=label, **style)
    return True
