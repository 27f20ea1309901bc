"""Figures of a cohort: targets per image, their areas, strata by fold."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stas_core.data.cohort import stratum_name
from stas_core.errors import ConfigError
from stas_core.figures.style import BLUE, INK, boxes, house_style, new_figure, panels, png, require


@house_style()
def targets_histogram(num_targets: Sequence[int]) -> bytes:
    """Draw the histogram of targets per image.

    Raises:
        ConfigError: there is no image.
    """
    require(num_targets, "targets per image")
    figure, axes = new_figure(6.4, 3.4)
    counts = np.bincount(num_targets)
    bars = axes.bar(np.arange(len(counts)), counts, color=BLUE, width=0.85)
    if len(counts) <= 30:
        axes.bar_label(bars, [str(count) if count else "" for count in counts], padding=2, fontsize=7.5, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set(xlabel="Targets per image", ylabel="Images", xlim=(min(num_targets) - 0.8, len(counts) - 0.2))
    total, median = sum(num_targets), np.median(num_targets)
    axes.set_title(f"Images: {len(num_targets):,}; targets: {total:,}; median per image: {median:g}")
    return png(figure)


@house_style()
def target_area_boxplot(areas_by_stratum: Mapping[str, Sequence[int]]) -> bytes:
    """Draw target areas in px on a log axis, one box per foreground-share stratum in the order given.

    Raises:
        ConfigError: there is no target, or an area below 1 px, which a log axis cannot show.
    """
    areas = np.array([area for group in areas_by_stratum.values() for area in group])
    require(areas, "target areas")
    if areas.min() < 1:
        raise ConfigError(f"a target area is {areas.min()} px, expected at least 1: pass areas of components, in px")
    figure, axes = new_figure(6.4, 3.6)
    # Quartile-based whiskers assume a linear scale: on a log axis they would never end above a speck of 1 px.
    boxes(axes, areas_by_stratum, whiskers=(5, 95), show_outside=True)
    axes.set_xticks(range(1, len(areas_by_stratum) + 1), [f"{k}\nn = {len(v)}" for k, v in areas_by_stratum.items()])
    axes.set_yscale("log")
    axes.set(xlabel="Foreground share of the image", ylabel="Target area (px)")
    axes.set_title(f"Targets: {len(areas):,}; median: {np.median(areas):,.0f} px; whiskers: 5th to 95th percentile")
    return png(figure)


@house_style()
def strata_figure(stratum: Sequence[int], part: Sequence[str], *, edges: Sequence[float]) -> bytes:
    """Draw the foreground-share strata as stacked bars over folds and hold-out, and as a pie of all images.

    Args:
        stratum: of each image, an index into `edges`.
        part: of each image: "fold 0", "hold-out"...
        edges: lower edges of the strata, as shares.

    Raises:
        ConfigError: there is no image, or a stratum has no edge.
    """
    require(stratum, "strata")
    if not 0 <= min(stratum) <= max(stratum) < len(edges):
        raise ConfigError(f"strata span {min(stratum)} to {max(stratum)}, but edges name 0 to {len(edges) - 1}")
    parts = sorted(set(part), key=lambda name: (len(name), name))  # "fold 2" before "fold 10" before "hold-out"
    counts = np.zeros((len(edges), len(parts)), dtype=int)
    np.add.at(counts, (list(stratum), [parts.index(name) for name in part]), 1)
    colours = matplotlib.colormaps["YlGnBu"](np.linspace(0.12, 1, len(edges)))
    widths_in = (0.6 + 0.72 * len(parts), 1.8, 2.4)
    figure = Figure(figsize=(sum(widths_in), 3.4), layout="constrained")
    bars, key, pie = panels(figure, 1, 3, width_ratios=widths_in)
    _strata_bars(bars, parts, counts, colours)
    totals = counts.sum(axis=1)
    wedges, *_ = pie.pie(
        totals,
        colors=[(red, green, blue, alpha) for red, green, blue, alpha in colours],
        startangle=90,
        counterclock=False,
        wedgeprops={"edgecolor": "white", "linewidth": 0.6},
    )
    pie.set_title(f"All images: {len(stratum):,}", loc="center")
    names = [
        f"{stratum_name(i, edges)}:  {total:,}  ({100 * total / len(stratum):.1f} %)" for i, total in enumerate(totals)
    ]
    key.legend(wedges[::-1], names[::-1], title="Foreground share", loc="center", handlelength=1.2, alignment="left")
    key.axis("off")
    return png(figure)


def _strata_bars(
    axes: Axes, parts: Sequence[str], counts: npt.NDArray[np.int_], colours: npt.NDArray[np.float64]
) -> None:
    tallest = counts.sum(axis=0).max()
    bottom = np.zeros(len(parts), dtype=int)
    for row, colour in zip(counts, colours, strict=True):
        bars = axes.bar(parts, row, bottom=bottom, color=colour, width=0.72, edgecolor="white", linewidth=0.6)
        # A number fits where its segment is at least as high as the type.
        texts = [str(count) if count > 0.04 * tallest else "" for count in row]
        is_dark = colour[:3] @ (0.299, 0.587, 0.114) < 0.55
        axes.bar_label(bars, texts, label_type="center", fontsize=7.5, color="white" if is_dark else INK)
        bottom += row
    for x, total in enumerate(bottom):
        axes.annotate(f"{total:,}", (x, total), (0, 2), textcoords="offset points", ha="center", va="bottom")
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.set(ylabel="Images", ylim=(0, 1.08 * tallest))
