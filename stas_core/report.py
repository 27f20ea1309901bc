"""Figures as PNG bytes: what a cohort holds, how folds learnt, what predictions look like.

Each function is pure: plain values in, PNG bytes out, equal bytes for equal values and one version of matplotlib.
Colours are told apart by colour-blind readers: categories have Okabe and Ito's, ordered strata run from light to dark.
"""

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stas_core.arrays import RgbImage
from stas_core.errors import ConfigError

BLUE, ORANGE, GREEN, PINK, AMBER, SKY, BLACK = CATEGORIES = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
INK, GREY, PALE_BLUE = "#262626", "#8C8C8C", "#CFE3F1"


_STYLE = {
    "figure.dpi": 200,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}

History = Sequence[Mapping[str, float | None]]
"""One record per epoch: `epoch` from 1, `train_loss`, `lr`, and in validated epochs `val_dice`, `val_precision`,
`val_recall`, perhaps `val_loss`. A missing key and None both mean not measured."""


@dataclass(frozen=True)
class Tile:
    """One picture of a contact sheet, with the line under it."""

    image: RgbImage
    caption: str


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in one style whatever the user's matplotlibrc says, and leave the process's settings as they were.

    matplotlib keeps one set of settings per process, so two threads must not draw at the same time.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def stratum_name(stratum: int, edges: Sequence[float]) -> str:
    """Name a foreground-share stratum by its bounds in percent; `edges` are the lower edges of all strata."""
    low, *above = (f"{edge * 100:g}" for edge in edges[stratum : stratum + 2])
    if not above:
        return f"≥{low} %"
    return f"{low}\u2013{above[0]} %" if edges[stratum] > 0 else f"<{above[0]} %"


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
    _boxes(axes, areas_by_stratum, whiskers=(5, 95), show_outside=True)
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
    bars, key, pie = figure.subplots(1, 3, width_ratios=widths_in)
    _strata_bars(bars, parts, counts, colours)
    totals = counts.sum(axis=1)
    wedges, *_ = pie.pie(
        totals, colors=colours, startangle=90, counterclock=False, wedgeprops={"edgecolor": "white", "linewidth": 0.6}
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


@house_style()
def contact_sheet(tiles: Sequence[Tile], *, columns: int, title: str) -> bytes:
    """Lay pictures out in a grid, pixel for pixel, with a caption under each that may wrap.

    Raises:
        ConfigError: there is no tile, or no column.
    """
    require(tiles, "contact sheet")
    if columns < 1:
        raise ConfigError(f"columns = {columns}, expected at least 1")
    columns = min(columns, len(tiles))
    cell_h, cell_w = (int(size) for size in np.max([tile.image.shape[:2] for tile in tiles], axis=0))
    type_px = max(11, cell_w // 26)
    captions = [_wrap(tile.caption, cell_w, type_px) for tile in tiles]
    heading = _wrap(title, columns * cell_w, 1.25 * type_px)
    top = round(type_px * (1.6 + 1.6 * len(heading.splitlines())))
    caption_h = round(type_px * (1 + 1.4 * max(len(caption.splitlines()) for caption in captions)))
    step_x, step_y = cell_w + type_px, cell_h + caption_h
    width, height = type_px + step_x * columns, top + step_y * -(-len(tiles) // columns)
    dpi = 128  # a power of two: size in inches times dpi gives back the exact number of pixels
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    points = type_px * 72 / dpi
    figure.text(type_px / width, 1 - type_px / height, heading, fontsize=1.25 * points, va="top", parse_math=False)
    for index, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        row, column = divmod(index, columns)
        tile_h, tile_w = tile.image.shape[:2]
        x, bottom = type_px + column * step_x, height - top - row * step_y - tile_h
        figure.figimage(tile.image, x + (cell_w - tile_w) // 2, bottom, origin="upper")
        at = (x + cell_w / 2) / width, (bottom - 0.3 * type_px) / height
        figure.text(*at, caption, fontsize=points, ha="center", va="top", parse_math=False)
    return png(figure)


def _wrap(text: str, width_px: int, type_px: float) -> str:
    """Break each line of a text where the average letter's width says that it is full."""
    num_letters = max(8, int(width_px / (0.6 * type_px)))
    return "\n".join(textwrap.fill(line, num_letters) for line in text.splitlines())


@house_style()
def learning_curves(history: History, *, title: str) -> bytes:
    """Draw one fold's loss, validation scores and learning rate over a shared epoch axis.

    Raises:
        ConfigError: there is no epoch.
    """
    require(history, "learning curves")
    figure = Figure(figsize=(6.4, 6.2), layout="constrained")
    loss, scores, rate = figure.subplots(3, 1, sharex=True, height_ratios=[2, 2, 1])
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
    loss, dice = figure.subplots(1, 2, sharex=True)
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
    _boxes(axes, groups, whiskers=1.5, show_outside=False)
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


def require(values: Sized, what: str) -> None:
    """Refuse to draw nothing.

    Raises:
        ConfigError: there is no value.
    """
    if len(values) == 0:
        raise ConfigError(f"nothing to draw: {what} is empty; give at least one value")


def new_figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    return figure, figure.subplots()


def _boxes(
    axes: Axes,
    groups: Mapping[str, Sequence[float]],
    *,
    whiskers: float | tuple[float, float],
    show_outside: bool,
) -> None:
    axes.boxplot(
        list(groups.values()),
        widths=0.55,
        whis=whiskers,
        showfliers=show_outside,
        patch_artist=True,
        boxprops={"facecolor": PALE_BLUE, "edgecolor": INK, "linewidth": 0.9},
        medianprops={"color": INK, "linewidth": 1.8},
        whiskerprops={"color": INK, "linewidth": 0.9},
        capprops={"color": INK, "linewidth": 0.9},
        flierprops={"marker": ".", "markersize": 4, "markerfacecolor": BLUE, "markeredgewidth": 0, "alpha": 0.6},
    )
    axes.tick_params(axis="x", length=0)


def _line(axes: Axes, history: History, key: str, *, label: str, show_last: bool = False, **style: Any) -> bool:
    """Plot what was measured of `key`; tell whether anything was."""
    points = [(row["epoch"], value) for row in history if (value := row.get(key)) is not None]
    if not points:
        return False
    if show_last:
        label = f"{label}  {points[-1][1]:.3f}"
    # Lone epochs need a mark to be seen; in a long unbroken curve marks only thicken the line.
    axes.plot(*zip(*points, strict=True), marker="o" if len(points) <= 25 else "", label=label, **style)
    return True


def say(axes: Axes, text: str) -> None:
    """Write why axes are empty into their middle."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def png(figure: Figure) -> bytes:
    """Encode a figure without time or version marks."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()
