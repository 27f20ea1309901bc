"""One style for every figure: colours, type, axes, and PNG bytes.

Each function of this package is pure: plain values in, PNG bytes out, equal bytes for equal values and one version of
matplotlib. Colours are told apart by colour-blind readers: categories have Okabe and Ito's, ordered strata run from
light to dark.
"""

import io
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stas_core.errors import ConfigError

BLUE, ORANGE, GREEN, PINK, AMBER, SKY, BLACK = CATEGORIES = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
INK, GREY, PALE_BLUE = "#262626", "#8C8C8C", "#CFE3F1"


_STYLE: dict[str, object] = {
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


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in one style regardless of the user's matplotlibrc, and restore the process's settings.

    matplotlib keeps one set of settings per process, so two threads must not draw at the same time.
    """
    with matplotlib.style.context(_STYLE, after_reset=True):
        yield


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


def panels(figure: Figure, num_rows: int, num_columns: int, **options: Any) -> list[Axes]:
    """Return the axes of a grid, row by row; `options` are those of `Figure.subplots`."""
    return list(figure.subplots(num_rows, num_columns, squeeze=False, **options).ravel())


def say(axes: Axes, text: str) -> None:
    """Explain empty axes by a text in their middle."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def png(figure: Figure) -> bytes:
    """Encode a figure without time or version marks."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def boxes(
    axes: Axes,
    groups: Mapping[str, Sequence[float]],
    *,
    whiskers: float | tuple[float, float],
    show_outside: bool,
) -> None:
    """Draw a box for each group."""
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
