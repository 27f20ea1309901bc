"""Figures of a search as PNG bytes, by the same rules as those of `report`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.importance import PedAnovaImportanceEvaluator

from stas_core.figures.style import BLUE, GREY, ORANGE, PALE_BLUE, house_style, new_figure, panels, png, require, say
from stas_core.scores.bootstrap import Difference
from stas_core.search.space import Dimension, Scalar, Setting, Space

COLUMNS = 4
NUM_BINS = 12


def importance(space: Space, settings: Sequence[Setting], scores: Sequence[float]) -> dict[str, float]:
    """Return how much each key decides whether a setting is among the best tenth (PED-ANOVA, Watanabe 2023).

    The shares add up to 1; nothing is returned where no two settings differ in score.
    """
    if len(set(scores)) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {key: dimension.distribution() for key, dimension in space.items()}
    study = optuna.create_study(direction="maximize")
    for setting, score in zip(settings, scores, strict=True):
        study.add_trial(optuna.create_trial(params=dict(setting), distributions=distributions, value=score))
    return dict(optuna.importance.get_param_importances(study, evaluator=PedAnovaImportanceEvaluator()))


@house_style()
def importance_bars(shares: Mapping[str, float]) -> bytes:
    """Draw how much each key matters.

    Raises:
        ConfigError: there is no key.
    """
    require(shares, "importance of keys")
    ranked = sorted(shares.items(), key=lambda pair: pair[1])
    figure, axes = new_figure(6.4, 0.9 + 0.24 * len(ranked))
    axes.barh([key for key, _ in ranked], [share for _, share in ranked], color=PALE_BLUE, edgecolor=BLUE, height=0.7)
    axes.set(xlabel="Importance (PED-ANOVA, shares of 1)")
    axes.set_title("What decides whether a setting is among the best tenth")
    return png(figure)


@house_style()
def partial_dependence(
    space: Space, settings: Sequence[Setting], scores: Sequence[float], marks: Mapping[str, Mapping[str, Any]]
) -> bytes:
    """Draw every tried setting's score against each key, with the best and the mean of neighbouring values.

    Args:
        marks: settings to mark by a line, by their name, such as default and best.

    Raises:
        ConfigError: no setting was tried.
    """
    require(settings, "settings tried")
    rows = math.ceil(len(space) / COLUMNS)
    figure = Figure(figsize=(2.7 * COLUMNS, 0.8 + 2.0 * rows), layout="constrained")
    grid = panels(figure, rows, COLUMNS, sharey=True)
    values = np.array(scores)
    for axes, key in zip(grid, space, strict=False):
        _dependence(axes, key, space[key], [setting[key] for setting in settings], values, marks)
        axes.set_ylim(*_worth_showing(values))
    for axes in grid[len(space) :]:
        axes.set_axis_off()
    for first in grid[::COLUMNS]:
        first.set_ylabel("Mean Dice")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), markerscale=5)
    return png(figure)


def _worth_showing(values: np.ndarray) -> tuple[float, float]:
    """Return the range of the better nine tenths: the worst settings would press all others into a line."""
    low, high = float(np.quantile(values, 0.1)), float(values.max())
    margin = 0.05 * (high - low) or 0.01
    return low - margin, high + margin


def _dependence(
    axes: Axes,
    key: str,
    dimension: Dimension,
    values: Sequence[Scalar],
    scores: np.ndarray,
    marks: Mapping[str, Mapping[str, Any]],
) -> None:
    names = None if dimension.choices is None else list(dimension.choices)
    x = np.array([names.index(value) for value in values] if names else values, float)
    axes.plot(x, scores, ".", color=BLUE, markersize=2, alpha=0.35, markeredgewidth=0, label="Setting")
    edges = np.unique(x) if len(np.unique(x)) <= NUM_BINS else np.quantile(x, np.linspace(0, 1, NUM_BINS + 1)[:-1])
    bins = np.searchsorted(np.unique(edges), x, side="right") - 1
    used = np.unique(bins)
    centre = [x[bins == one].mean() for one in used]
    axes.plot(centre, [scores[bins == one].max() for one in used], "-", color=ORANGE, label="Best nearby")
    axes.plot(centre, [scores[bins == one].mean() for one in used], "-", color=GREY, label="Mean nearby")
    for (name, mark), dashes in zip(marks.items(), ("--", ":", "-."), strict=False):
        place = mark.get(key)
        if names is None and isinstance(place, int | float):
            axes.axvline(place, color=GREY, linestyle=dashes, linewidth=1, label=name)
        elif names is not None and place in names:
            axes.axvline(names.index(place), color=GREY, linestyle=dashes, linewidth=1, label=name)
    if names is not None:
        axes.set_xticks(range(len(names)), ["null" if name is None else str(name) for name in names])
    axes.set_xlabel(key)


@house_style()
def optimism_by_fold(seen: Mapping[str, Difference], unseen: Mapping[str, Difference]) -> bytes:
    """Draw, for each fold, what its study gains on the default on the folds it saw and on the fold it did not.

    Raises:
        ConfigError: there is no fold.
    """
    require(seen, "gain per fold")
    figure, axes = new_figure(6.4, 3.4)
    for shift, gains, colour, label in (
        (-0.12, seen, GREY, "Images it was chosen on"),
        (0.12, unseen, BLUE, "The fold left out"),
    ):
        x = np.arange(len(gains)) + shift
        means = np.array([gain.mean for gain in gains.values()])
        bounds = np.array([[gain.mean - gain.low, gain.high - gain.mean] for gain in gains.values()]).T
        axes.errorbar(x, means, yerr=bounds.clip(0), fmt="o", color=colour, capsize=3, label=label)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(range(len(seen)), [f"without fold {fold}" for fold in seen])
    axes.set(ylabel="Gain in Dice on the default")
    axes.set_title("What each study's choice gains; bars: bootstrap interval of the mean")
    figure.legend(loc="outside lower center", ncols=2)
    return png(figure)


@house_style()
def dice_by_size(target_px: Sequence[int], before: Sequence[float], after: Sequence[float]) -> bytes:
    """Draw mean Dice before and after tuning over quarters of the images by target area, and each image's change.

    Raises:
        ConfigError: there is no image.
    """
    require(target_px, "images")
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    means, changes = panels(figure, 1, 2)
    order = np.argsort(target_px, kind="stable")
    areas, first, second = (np.array(values, float)[order] for values in (target_px, before, after))
    quarters = [quarter for quarter in np.array_split(np.arange(len(areas)), min(4, len(areas))) if len(quarter)]
    x = np.arange(len(quarters))
    for shift, values, colour, label in ((-0.2, first, GREY, "Default"), (0.2, second, BLUE, "Recommended, nested")):
        heights = [values[quarter].mean() for quarter in quarters]
        bars = means.bar(x + shift, heights, width=0.38, color=colour, alpha=0.75, label=label)
        means.bar_label(bars, fmt="%.3f", fontsize=7)
    names = [f"{areas[quarter].min():,.0f}-\n{areas[quarter].max():,.0f} px" for quarter in quarters]
    means.set_xticks(x, names)
    means.set(ylabel="Mean Dice", ylim=(0, 1.05), xlabel="Quarters of the images by target area")
    figure.legend(*means.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    shown = areas > 0
    if shown.any():
        changes.plot(
            areas[shown], (second - first)[shown], "o", color=BLUE, markersize=4, alpha=0.55, markeredgewidth=0
        )
        changes.set_xscale("log")
    else:
        say(changes, "no image has a target")
    changes.axhline(0, color=GREY, linewidth=0.8)
    changes.set(xlabel="Target area of the image (px)", ylabel="Change in Dice")
    return png(figure)


@house_style()
def score_over_time(history: Sequence[Mapping[str, Any]], states: Mapping[str, str]) -> bytes:
    """Draw every trial's mean Dice over its epochs: trained to the end, or stopped.

    Args:
        history: rows of trial, epoch and dice.
        states: of each trial, done, stopped or failed.

    Raises:
        ConfigError: there is no trial.
    """
    require(history, "scores over time")
    figure, axes = new_figure(6.4, 3.8)
    colours = {"done": BLUE, "stopped": GREY, "failed": ORANGE}
    labelled: set[str] = set()
    for trial, state in states.items():
        points = sorted((row["epoch"], row["dice"]) for row in history if row["trial"] == trial)
        if not points:
            continue
        label = "_" if state in labelled else f"{state}: {sum(one == state for one in states.values())}"
        labelled.add(state)
        axes.plot(*zip(*points, strict=True), "o-", color=colours[state], alpha=0.75, markersize=3, label=label)
    axes.set(xlabel="Epoch", ylabel="Validation Dice, mean over folds")
    axes.legend(loc="lower right")
    return png(figure)


@house_style()
def parallel_coordinates(space: Space, settings: Sequence[Setting], scores: Sequence[float]) -> bytes:
    """Draw each setting as a line over one axis per key and one for its score; the better, the stronger.

    Raises:
        ConfigError: there is no setting.
    """
    require(settings, "settings tried")
    figure, axes = new_figure(1.6 + 1.35 * (len(space) + 1), 4.2)
    columns = [_placed(space[key], [setting[key] for setting in settings]) for key in space]
    low, high = min(scores), max(scores)
    heights = [(score - low) / (high - low) if high > low else 0.5 for score in scores]
    columns.append((heights, [(0.0, f"{low:.3f}"), (1.0, f"{high:.3f}")]))
    for index in np.argsort(scores):
        strength = heights[index]
        axes.plot(
            range(len(columns)),
            [places[index] for places, _ in columns],
            color=BLUE if strength > 0.8 else GREY,
            alpha=0.2 + 0.7 * strength,
            linewidth=0.8 + 1.4 * strength,
        )
    for x, (_, ticks) in enumerate(columns):
        axes.axvline(x, color=GREY, linewidth=0.8)
        for y, text in ticks:
            axes.annotate(text, (x, y), xytext=(3, 0), textcoords="offset points", fontsize=7, va="center")
    axes.set_xticks(range(len(columns)), [*(key.replace(".", ".\n") for key in space), "Dice"])
    axes.set_yticks([])
    axes.set_title("Blue: within a fifth of the range below the best")
    return png(figure)


def _placed(dimension: Dimension, values: Sequence[Scalar]) -> tuple[list[float], list[tuple[float, str]]]:
    """Return where values lie on an axis of 0 to 1, and the marks of the axis."""
    if dimension.choices is not None:
        last = max(len(dimension.choices) - 1, 1)
        marks = [(index / last, "null" if one is None else str(one)) for index, one in enumerate(dimension.choices)]
        return [dimension.choices.index(value) / last for value in values], marks
    scale = math.log if dimension.log else float
    low, high = scale(dimension.low or 0), scale(dimension.high or 0)
    span = (high - low) or 1.0
    return [(scale(value) - low) / span for value in values], [  # type: ignore[arg-type]
        (0.0, f"{dimension.low:g}"),
        (1.0, f"{dimension.high:g}"),
    ]


@house_style()
def dice_by_level(level_dice: Mapping[int, float]) -> bytes:
    """Draw mean Dice of maps cut at each level k of their 256, with the best and 0.5 marked.

    Raises:
        ConfigError: no level was tried.
    """
    require(level_dice, "levels tried")
    levels, dice = list(level_dice), list(level_dice.values())
    best = int(np.argmax(dice))
    figure, axes = new_figure(6.0, 3.4)
    axes.plot(levels, dice, color=BLUE)
    axes.plot(levels[best], dice[best], "D", color=ORANGE, label=f"best: k >= {levels[best]}, {dice[best]:.4f}")
    axes.axvline(128, color=GREY, linewidth=0.8, label="0.5")
    axes.set(xlabel="Level at which maps are cut, without a cascade", ylabel="Mean Dice")
    axes.set_title("Global threshold: mean Dice of the images it is chosen on")
    axes.legend()
    return png(figure)


@house_style()
def dice_by_cost(points: Sequence[tuple[float, float, str]], chosen: int) -> bytes:
    """Draw Dice against relative seconds of ensembles named members x flips, with the chosen one marked.

    Raises:
        ConfigError: there is no ensemble.
    """
    require(points, "ensembles")
    figure, axes = new_figure(6.0, 3.8)
    for index, (cost, dice, name) in enumerate(points):
        axes.plot(cost, dice, "D" if index == chosen else "o", color=ORANGE if index == chosen else BLUE)
        axes.annotate(name, (cost, dice), xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="Seconds per image, relative to one pass", ylabel="Nested Dice")
    axes.set_title("Members x flips; diamond: the knee")
    return png(figure)
