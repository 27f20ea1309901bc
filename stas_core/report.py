"""Figures as PNG bytes: what a cohort holds, how folds learnt, what predictions look like.

Each function is pure: plain values in, PNG bytes out, equal bytes for equal values.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stas_core.arrays import Mask, ResizedImage, RgbImage
from stas_core.errors import ConfigError

# Okabe and Ito's palette, told apart by colour-blind readers too.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
TRUTH_RGB, PREDICTION_RGB = (0, 158, 115), (213, 94, 0)

History = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Tile:
    """One picture of a contact sheet, with the line under it."""

    image: RgbImage
    caption: str


def stratum_name(stratum: int, edges: Sequence[float]) -> str:
    """Name a foreground-share stratum by its bounds in percent."""
    low = edges[stratum]
    if stratum == 0:
        return f"<{edges[1]:.0%}"
    return f"{low:.0%}-{edges[stratum + 1]:.0%}" if stratum + 1 < len(edges) else f"≥{low:.0%}"


def targets_histogram(num_targets: Sequence[int]) -> bytes:
    """Draw the histogram of targets per image."""
    _require(num_targets, "targets per image")
    figure, axes = _figure(6.4, 3.6)
    counts = np.bincount(num_targets)
    axes.bar(np.arange(len(counts)), counts, color=PALETTE[0], width=0.85)
    axes.set(xlabel="Targets per image", ylabel="Images")
    axes.set_title(f"{len(num_targets)} images, median {np.median(num_targets):g} targets", loc="left")
    return _png(figure)


def target_area_boxplot(areas_by_stratum: Mapping[str, Sequence[int]]) -> bytes:
    """Draw target areas in px as a box per foreground-share stratum."""
    kept = {name: areas for name, areas in areas_by_stratum.items() if len(areas)}
    _require(kept, "target areas")
    figure, axes = _figure(6.4, 3.6)
    _boxes(axes, list(kept.values()), [f"{name}\nn={len(areas)}" for name, areas in kept.items()])
    axes.set_yscale("log")
    axes.set(xlabel="Foreground share of the image", ylabel="Target area (px)")
    return _png(figure)


def strata_figure(stratum: Sequence[int], part: Sequence[str], *, edges: Sequence[float]) -> bytes:
    """Draw the strata's sizes as stacked bars over folds and hold-out, and as a pie of all images."""
    _require(stratum, "strata")
    names = [stratum_name(i, edges) for i in range(len(edges))]
    parts = sorted(set(part))
    figure = Figure(figsize=(9.6, 3.8), dpi=150, layout="constrained")
    bars, pie = figure.subplots(1, 2, width_ratios=[1.8, 1])
    _clean(bars)
    counts = np.array([[sum(1 for s, p in zip(stratum, part, strict=True) if (s, p) == (i, q)) for q in parts]
                       for i in range(len(edges))])  # fmt: skip
    colours = _shades(len(edges))
    bottom = np.zeros(len(parts))
    for row, name, colour in zip(counts, names, colours, strict=True):
        bars.bar(parts, row, bottom=bottom, label=name, color=colour, width=0.7)
        bottom += row
    for x, total in enumerate(bottom):
        bars.annotate(f"{total:.0f}", (x, total), ha="center", va="bottom", fontsize=8)
    bars.set(ylabel="Images")
    bars.legend(
        title="Foreground", fontsize=8, title_fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1)
    )
    totals = counts.sum(axis=1)
    shown = totals > 0
    labels = [f"{name}: {total}" for name, total in zip(names, totals, strict=True) if total]
    pie.pie(totals[shown], labels=labels, colors=[c for c, s in zip(colours, shown, strict=True) if s],
            startangle=90, counterclock=False, textprops={"fontsize": 8})  # fmt: skip
    return _png(figure)


def contact_sheet(tiles: Sequence[Tile], *, columns: int, title: str) -> bytes:
    """Lay pictures out in a grid with a caption under each."""
    _require(tiles, "contact sheet")
    rows = -(-len(tiles) // columns)
    height, width = np.max([tile.image.shape[:2] for tile in tiles], axis=0)
    cell = 3.2
    figure = Figure(
        figsize=(cell * columns, (cell * height / width + 0.32) * rows + 0.4), dpi=150, layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    for axes, tile in zip(figure.subplots(rows, columns, squeeze=False).flat, tiles, strict=False):
        axes.imshow(tile.image)
        axes.set_title(tile.caption, fontsize=8, y=-0.02, va="top")
    for axes in figure.axes:
        axes.axis("off")
    return _png(figure)


def overlay(image: RgbImage, *, truth: Mask | None, prediction: Mask | None) -> RgbImage:
    """Outline truth (green) and prediction (orange) on a copy of the image; lines grow with its width."""
    drawn = np.ascontiguousarray(image).copy()
    thickness = max(1, round(image.shape[1] / 500))
    for mask, colour in ((truth, TRUTH_RGB), (prediction, PREDICTION_RGB)):
        if mask is not None:
            contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(drawn, contours, -1, colour, thickness)
    return np.asarray(drawn)


def thumbnail(image: RgbImage, *, width_px: int) -> ResizedImage:
    """Shrink an image to a width by area averaging; a smaller one stays as it is."""
    height, width = image.shape[:2]
    if width <= width_px:
        return np.asarray(image)
    size = (width_px, max(1, round(height * width_px / width)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))


def learning_curves(history: History, *, title: str) -> bytes:
    """Draw a fold's training loss, validation scores and learning rate over epochs."""
    _require(history, "learning curves")
    figure = Figure(figsize=(6.4, 6.4), dpi=150, layout="constrained")
    loss, scores, rate = figure.subplots(3, 1, sharex=True, height_ratios=[2, 2, 1])
    for axes in (loss, scores, rate):
        _clean(axes)
    loss.plot(*_series(history, "train_loss"), color=PALETTE[0])
    loss.set(ylabel="Training loss")
    loss.set_title(title, loc="left")
    for name, colour in (("dice", PALETTE[0]), ("precision", PALETTE[1]), ("recall", PALETTE[2])):
        scores.plot(*_series(history, f"val_{name}"), color=colour, label=name.capitalize(), marker=".")
    scores.set(ylabel="Validation", ylim=(0, 1))
    scores.legend(frameon=False, fontsize=8, loc="lower right", ncols=3)
    rate.plot(*_series(history, "lr"), color=PALETTE[3])
    rate.set(ylabel="Learning rate", xlabel="Epoch")
    return _png(figure)


def fold_curves(histories: Mapping[str, History]) -> bytes:
    """Draw all folds' training loss and validation Dice over epochs."""
    _require(histories, "fold curves")
    figure = Figure(figsize=(9.6, 3.6), dpi=150, layout="constrained")
    loss, dice = figure.subplots(1, 2)
    for axes in (loss, dice):
        _clean(axes)
    for (name, history), colour in zip(histories.items(), PALETTE * len(histories), strict=False):
        loss.plot(*_series(history, "train_loss"), color=colour, label=name)
        dice.plot(*_series(history, "val_dice"), color=colour, label=name, marker=".")
    loss.set(xlabel="Epoch", ylabel="Training loss")
    dice.set(xlabel="Epoch", ylabel="Validation Dice", ylim=(0, 1))
    loss.legend(frameon=False, fontsize=8)
    return _png(figure)


def fold_scores(scores: Mapping[str, Sequence[float]]) -> bytes:
    """Draw each fold's per-image Dice as points over a box, with its mean."""
    _require(scores, "fold scores")
    figure, axes = _figure(6.4, 3.6)
    _boxes(axes, list(scores.values()), [f"{k}\nmean {np.mean(v):.3f}" for k, v in scores.items()])
    rng = np.random.default_rng(0)
    for x, values in enumerate(scores.values(), start=1):
        axes.plot(x + rng.uniform(-0.15, 0.15, len(values)), values, ".", color=PALETTE[0], markersize=3, alpha=0.6)
    axes.set(ylabel="Dice per image", ylim=(-0.02, 1.02))
    return _png(figure)


def pick_examples(ids: Sequence[str], dice: Sequence[float], *, num_each: int) -> dict[str, list[str]]:
    """Choose the images of best, median and worst Dice; none is chosen twice."""
    ranked = [image_id for _, image_id in sorted(zip(dice, ids, strict=True), key=lambda pair: (-pair[0], pair[1]))]
    num_each = min(num_each, len(ranked) // 3) or 1
    middle = ranked[num_each : len(ranked) - num_each]
    start = max(0, (len(middle) - num_each) // 2)
    chosen = {"best": ranked[:num_each], "median": middle[start : start + num_each], "worst": []}
    chosen["worst"] = ranked[max(len(ranked) - num_each, num_each) :]
    return chosen


def _require(values: object, what: str) -> None:
    if not values:
        raise ConfigError(f"nothing to draw: {what} is empty; give at least one value")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    _clean(axes)
    return figure, axes


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _boxes(axes: Axes, groups: Sequence[Sequence[float]], labels: Sequence[str]) -> None:
    axes.boxplot(groups, tick_labels=labels, widths=0.5, flierprops={"marker": ".", "markersize": 3, "alpha": 0.5},
                 medianprops={"color": PALETTE[1]})  # fmt: skip
    axes.tick_params(axis="x", labelsize=8)


def _shades(number: int) -> list[tuple[float, float, float]]:
    light, dark = np.array([0.87, 0.92, 0.97]), np.array([0.03, 0.19, 0.42])
    return [tuple(light + (dark - light) * i / max(1, number - 1)) for i in range(number)]


def _series(history: History, name: str) -> tuple[list[float], list[float]]:
    points = [(row["epoch"], row[name]) for row in history if row.get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _png(figure: Figure) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()
