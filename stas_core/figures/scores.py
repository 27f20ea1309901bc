"""Figures of an evaluation as PNG bytes, by the same rules as those of `report`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stas_core.figures.style import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE_BLUE,
    PINK,
    SKY,
    house_style,
    new_figure,
    panels,
    png,
    require,
    say,
)
from stas_core.scores.metrics import GreyLevelCounts, ReliabilityBin, expected_calibration_error, reliability_bins
from stas_core.slides.evaluation import Froc

NUM_BINS = 20
"""Bins of the Dice histogram: 0.05 each."""
RELIABILITY_BINS = 16
LEAST_FALSE_PER_MM2 = 0.125
"""Where the axis of false targets begins; curves that begin before it are drawn from there."""
SLIDE_COLOURS = (ORANGE, GREEN, PINK, AMBER, SKY, BLACK)
"""Of the curves of single slides; more slides are all grey."""


@house_style()
def dice_histogram(postprocessed: Sequence[float], raw: Sequence[float]) -> bytes:
    """Draw the distribution of per-image Dice: post-processed masks and, where there are maps, the maps at 0.5.

    Raises:
        ConfigError: there is no post-processed score.
    """
    require(postprocessed, "Dice per image")
    figure, axes = new_figure(6.4, 3.4)
    edges = np.linspace(0, 1, NUM_BINS + 1).tolist()
    axes.hist(
        postprocessed, bins=edges, color=PALE_BLUE, edgecolor=BLUE, linewidth=0.8, label=_label("Masks", postprocessed)
    )
    axes.axvline(float(np.mean(postprocessed)), color=BLUE, linestyle="--", linewidth=1.2)
    if len(raw):
        axes.hist(raw, bins=edges, histtype="step", color=ORANGE, linewidth=1.6, label=_label("Maps at 0.5", raw))
        axes.axvline(float(np.mean(raw)), color=ORANGE, linestyle="--", linewidth=1.2)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set(xlabel="Dice per image", ylabel="Images", xlim=(-0.01, 1.01))
    axes.set_title("Dashed: mean over images")
    figure.legend(loc="outside lower center")
    return png(figure)


def _label(name: str, scores: Sequence[float]) -> str:
    return f"{name}: n = {len(scores):,}, mean {np.mean(scores):.3f}, median {np.median(scores):.3f}"


@house_style()
def dice_by_area(target_px: Sequence[int], dice: Sequence[float]) -> bytes:
    """Draw per-image Dice against the area of the image's targets on a log axis; images without target are counted.

    Raises:
        ConfigError: there is no image.
    """
    require(dice, "Dice per image")
    figure, axes = new_figure(6.4, 3.6)
    points = [(area, score) for area, score in zip(target_px, dice, strict=True) if area > 0]
    if points:
        areas, scores = np.array(points).T
        axes.plot(areas, scores, "o", color=BLUE, markersize=4, alpha=0.55, markeredgewidth=0)
        axes.set_xscale("log")
        means = ", ".join(f"{mean:.3f}" for mean in _draw_thirds(axes, areas, scores))
        note = f"Images: {len(points):,}; bars: mean of each third of them by area ({means})"
    else:
        say(axes, "no image has a target")
        note = "Images: 0"
    without = len(dice) - len(points)
    axes.set(xlabel="Target area of the image (px)", ylabel="Dice per image", ylim=(-0.02, 1.02))
    axes.set_title(note + (f"\nNot shown: {without:,} without target" if without else ""))
    return png(figure)


def _draw_thirds(axes: Axes, areas: np.ndarray, scores: np.ndarray) -> list[float]:
    """Draw the mean Dice of the third with the smallest targets, the middle and the largest; return the means."""
    means = []
    for third in np.array_split(np.argsort(areas, kind="stable"), 3):
        if len(third):
            means.append(float(scores[third].mean()))
            axes.hlines(means[-1], areas[third].min(), areas[third].max(), color=ORANGE, linewidth=2.2)
    return means


@house_style()
def reliability_diagram(levels: GreyLevelCounts) -> bytes:
    """Draw the observed target share against the predicted probability k / 255, and the number of pixels.

    Raises:
        ConfigError: there is no pixel.
    """
    bins = reliability_bins(levels, num_bins=RELIABILITY_BINS)
    require(bins, "calibration")
    probs, shares = [bin_.mean_prob for bin_ in bins], [bin_.target_share for bin_ in bins]
    figure = Figure(figsize=(5.2, 5.4), layout="constrained")
    curve, sizes = panels(figure, 2, 1, sharex=True, height_ratios=[3, 1])
    curve.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="Perfectly calibrated")
    curve.plot(probs, shares, "o-", color=BLUE, label="Maps")
    curve.set(ylabel="Share of pixels that are target", ylim=(-0.02, 1.02), xlim=(-0.02, 1.02))
    curve.legend(loc="upper left")
    curve.set_title(_errors_in_words(bins))
    sizes.bar(probs, [bin_.num_pixels for bin_ in bins], width=0.04, color=PALE_BLUE, edgecolor=BLUE, linewidth=0.8)
    sizes.set_yscale("log")
    sizes.set_ylim(bottom=0.8)
    sizes.set(xlabel="Probability of the map", ylabel="Pixels (log)")
    return png(figure)


def _errors_in_words(bins: Sequence[ReliabilityBin]) -> str:
    """State the error over all pixels and over those above the lowest bin: background swamps the former."""
    above = [bin_ for bin_ in bins if bin_.mean_prob >= 1 / RELIABILITY_BINS]
    where = [("Expected calibration error", bins), (f"Where the map says at least 1/{RELIABILITY_BINS}:", above)]
    return "\n".join(
        f"{name} {expected_calibration_error(part):.4f} over {sum(bin_.num_pixels for bin_ in part):,} pixels"
        if part
        else f"{name} no pixel"
        for name, part in where
    )


@house_style()
def froc(slides: Mapping[str, Froc], pooled: Froc, rates: Sequence[float]) -> bytes:
    """Draw sensitivity against false targets per mm2, of each slide and of all together, marked at the given rates.

    Raises:
        ConfigError: there is no slide.
    """
    require(slides, "curves of slides")
    figure, axes = new_figure(6.4, 4.2)
    drawn = {name: curve for name, curve in slides.items() if not np.isnan(curve.sensitivity).any()}
    end = 2 * max(*rates, *(float(one.false_per_mm2.max(initial=0)) for one in (pooled, *drawn.values())))
    if len(slides) > 1:
        for number, (name, curve) in enumerate(drawn.items()):
            few = len(drawn) <= len(SLIDE_COLOURS)
            colour = SLIDE_COLOURS[number] if few else GREY
            label = name if few else f"{len(drawn)} slides" if number == 0 else None
            _draw_curve(axes, curve, end, color=colour, linewidth=0.9, alpha=0.7, label=label)
    if np.isnan(pooled.sensitivity).any():
        say(axes, "no slide has a true target")
    else:
        what = "All slides together" if len(slides) > 1 else next(iter(slides))
        marked = [pooled.sensitivity_at(rate) for rate in rates]
        _draw_curve(axes, pooled, end, color=BLUE, linewidth=2, label=f"{what}: mean of the dots {np.mean(marked):.3f}")
        axes.plot(rates, marked, "o", color=BLUE, markersize=5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xlim=(LEAST_FALSE_PER_MM2, end), ylim=(-0.02, 1.02))
    axes.set(xlabel="False targets per mm² of tissue (log)", ylabel="Share of the true targets found")
    without = len(slides) - len(drawn)
    note = f"\nNot shown: {without} without a true target" if without else ""
    axes.set_title(f"Dots: the stated rates; a line ends where the mask has no more targets{note}")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2)
    return png(figure)


def _draw_curve(axes: Axes, curve: Froc, end: float, **style: Any) -> None:
    """Draw a curve as steps: what is found at a rate is found at all higher ones, as far as the mask has targets."""
    starts = np.array([curve.sensitivity_at(LEAST_FALSE_PER_MM2)])
    beyond = curve.false_per_mm2 > LEAST_FALSE_PER_MM2
    across = np.concatenate([[LEAST_FALSE_PER_MM2], curve.false_per_mm2[beyond]])
    up = np.concatenate([starts, curve.sensitivity[beyond]])
    (line,) = axes.step(across, up, where="post", **style)
    axes.plot(across[-1], up[-1], "|", color=line.get_color(), markersize=9)
    axes.hlines(up[-1], across[-1], end, color=line.get_color(), linewidth=0.8, linestyle=":")
