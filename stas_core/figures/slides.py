"""A slide on a page: an overview of all that was found, and a gallery of single targets.

Geometry is in um from the left and the top of the slide, or of the crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, PathPatch
from matplotlib.path import Path
from numpy.typing import ArrayLike
from shapely.geometry import MultiPolygon, Polygon

from stas_core.arrays import ProbMapU8, ResizedMask, RgbImage
from stas_core.figures.style import BLACK, BLUE, GREEN, GREY, INK, house_style, png, require
from stas_core.slides.gallery import Crop
from stas_core.slides.scores import FIELD_UM, SlideScores

Area = Polygon | MultiPolygon
DISCLAIMER = "Research tool, not for diagnosis"
MOST_PX, LEAST_PX = 2048, 1200
"""Of the longer side of a slide on the page."""
LEAST_HEAT = 0.05
"""Networks give glass and lung some hundredths."""
_DPI = 128
"""A power of two: size in inches times dpi gives back the exact number of pixels."""
_PAD_PX, _HEADING_PX = 24, 1500
_BACKING = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 2}


@dataclass(frozen=True)
class Layers:
    """What is drawn over a slide; what is None or empty is left out."""

    heat: ProbMapU8 | None = None
    """Probability as k / 255, of any size: it covers the whole slide. Up to 0.05 it is not drawn."""
    section: ResizedMask | None = None
    """Where tissue is, of any size: it covers the whole slide."""
    targets_um: Float64[np.ndarray, "n 2"] | None = None
    """(x, y) of the targets' centroids."""
    tumour: Area | None = None


def key_figures(scores: SlideScores) -> str:
    """Return a slide's most telling figures in one line."""
    parts = [
        f"{scores.num_targets:,} target{'s' * (scores.num_targets != 1)}",
        f"{scores.stas_mm2:.3g} of {scores.tissue_mm2:.3g} mm² tissue",
    ]
    if scores.targets_per_mm2 is not None:
        parts.append(f"{scores.targets_per_mm2:.3g} per mm²")
    parts.append(f"{scores.densest_count:,} in the densest 20x field (class {scores.densest_class})")
    if scores.outside_max_um is not None:
        parts.append(f"up to {scores.outside_max_um / 1000:.2g} mm from the tumour (class {scores.outside_class})")
    return "  ·  ".join(parts)


@house_style()
def draw_overview(thumbnail: RgbImage, *, um_per_px: float, layers: Layers, scores: SlideScores) -> bytes:
    """Draw a slide with what was found on it, as PNG.

    Args:
        thumbnail: the whole slide, its longer side at most 2048 px.
        um_per_px: of the thumbnail.
        layers: what is drawn over it.
        scores: the slide's figures, for the title and the densest field.
    """
    rows, columns = thumbnail.shape[:2]
    scale = max(1.0, LEAST_PX / max(rows, columns))
    width, height = round(columns * scale), round(rows * scale)
    heading = [scores.id, key_figures(scores), *scores.warnings]
    line_px, foot_px = 30, 64
    head_px = _PAD_PX + line_px * len(heading)
    page_w, page_h = max(width, _HEADING_PX) + 2 * _PAD_PX, head_px + height + foot_px
    figure = Figure(figsize=(page_w / _DPI, page_h / _DPI), dpi=_DPI)
    for number, text in enumerate(heading):
        size = 13 if number == 0 else 9.5
        at = 1 - (_PAD_PX / 2 + number * line_px) / page_h
        figure.text(_PAD_PX / page_w, at, text, fontsize=size, va="top", parse_math=False)
    axes = figure.add_axes((_PAD_PX / page_w, foot_px / page_h, width / page_w, height / page_h))
    extent_um = columns * um_per_px, rows * um_per_px
    _show(axes, thumbnail, extent_um)
    keys = _draw_layers(axes, layers, extent_um)
    if scores.densest_x_um is not None and scores.densest_y_um is not None:
        place = scores.densest_x_um, scores.densest_y_um
        axes.add_patch(Circle(place, FIELD_UM, fill=False, edgecolor=BLACK, linewidth=2, linestyle=(0, (4, 2))))
        keys.append(Line2D([], [], color=BLACK, linewidth=2, linestyle=(0, (4, 2)), label="densest field of 0.95 mm²"))
    _scale_bar(axes, extent_um)
    figure.legend(handles=keys, loc="lower left", ncols=len(keys) or 1, borderaxespad=0.8)
    figure.text(1 - _PAD_PX / page_w, 20 / page_h, DISCLAIMER, fontsize=9.5, ha="right", color=INK, weight="bold")
    return png(figure)


def _show(axes: Axes, image: RgbImage, extent_um: tuple[float, float]) -> None:
    """Show an image in axes of um, without ticks."""
    axes.imshow(image, extent=(0, extent_um[0], extent_um[1], 0), interpolation="antialiased", aspect="auto")
    axes.set(xlim=(0, extent_um[0]), ylim=(extent_um[1], 0), xticks=[], yticks=[])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=GREY)


def _draw_layers(axes: Axes, layers: Layers, extent_um: tuple[float, float]) -> list[Patch | Line2D]:
    """Draw what was found, and return its key."""
    keys: list[Patch | Line2D] = []
    extent = (0, extent_um[0], extent_um[1], 0)
    if layers.heat is not None:
        colours = np.zeros((*layers.heat.shape, 4), np.float32)
        share = layers.heat / np.float32(255)
        # From yellow to red: told apart by lightness, and from the stain by colour.
        colours[..., 0], colours[..., 1] = 1 - 0.35 * share, 0.85 * (1 - share)
        colours[..., 3] = np.where(share > LEAST_HEAT, 0.15 + 0.65 * share, 0)
        axes.imshow(colours, extent=extent, interpolation="nearest", aspect="auto")
        keys += [Patch(color=(1, 0.85, 0), alpha=0.5, label="low"), Patch(color=(0.65, 0, 0), label="high probability")]
    if layers.section is not None and layers.section.any() and not layers.section.all():
        axes.contour(layers.section, [0.5], extent=extent, origin="upper", colors=[GREEN], linewidths=1)
        keys.append(Line2D([], [], color=GREEN, linewidth=1, label="tissue"))
    if layers.tumour is not None:
        axes.add_patch(PathPatch(_path(layers.tumour), fill=False, edgecolor=BLUE, linewidth=2))
        keys.append(Line2D([], [], color=BLUE, linewidth=2, label="tumour, as outlined"))
    if layers.targets_um is not None and len(layers.targets_um):
        x, y = layers.targets_um.T
        axes.add_line(_dots(x, y))
        keys.append(_dots([], []))
    return keys


def _dots(x: ArrayLike, y: ArrayLike) -> Line2D:
    return Line2D(
        x,
        y,
        linestyle="none",
        marker="o",
        markersize=6,
        markerfacecolor="none",
        markeredgecolor=INK,
        markeredgewidth=1.3,
        label="target",
    )


def _path(area: Area) -> Path:
    """Return the lines round an area and its holes."""
    rings = shapely.get_parts(shapely.boundary(area))
    return Path.make_compound_path(*(Path(shapely.get_coordinates(ring), closed=True) for ring in rings))


def _scale_bar(axes: Axes, extent_um: tuple[float, float], fontsize: float = 9) -> None:
    """Draw a bar of a round length, at most a quarter of the width, in the lower left corner."""
    width, height = extent_um
    length = round_length(width / 4)
    text = f"{length / 1000:g} mm" if length >= 100 else f"{length:g} µm"
    x, y = 0.03 * width, 0.96 * height
    axes.plot([x, x + length], [y, y], color=BLACK, linewidth=fontsize / 3, solid_capstyle="butt", zorder=4)
    axes.annotate(
        text, (x + length / 2, y), (0, 5), textcoords="offset points", ha="center", fontsize=fontsize, bbox=_BACKING
    )


def round_length(most: float) -> float:
    """Return the largest of 1, 2 and 5, times a power of ten, that is at most so long.

    Example:
        >>> [round_length(most) for most in (0.9, 199.0, 5000.0)]
        [0.5, 100.0, 5000.0]
    """
    unit = 10.0 ** np.floor(np.log10(most))
    return float(max(step * unit for step in (1, 2, 5) if step * unit <= most * (1 + 1e-9)))


@dataclass(frozen=True)
class GalleryItem:
    """A target in a gallery."""

    crop: Crop
    number: int
    """Of the target within the slide, from 1."""
    id: str
    """As in the GeoJSON; its beginning is shown."""
    lines: Sequence[str]
    """What is said of it, such as its area."""


@dataclass(frozen=True)
class GalleryRow:
    """A row of a gallery."""

    heading: str
    items: Sequence[GalleryItem]


@house_style()
def draw_gallery(rows: Sequence[GalleryRow], *, title: str) -> bytes:
    """Draw single targets at the models' resolution, a row for each reason to look at them, as PNG.

    Raises:
        ConfigError: there is no row.
    """
    require(rows, "gallery")
    longest = max(len(row.items) for row in rows)
    columns = 6 if longest > 8 else max(longest, 3)
    lines = [
        (row.heading if start == 0 else "", row.items[start : start + columns])
        for row in rows
        for start in range(0, len(row.items), columns)
    ]
    side = max(item.crop.image.shape[0] for row in rows for item in row.items)
    num_texts = 1 + max(len(item.lines) for row in rows for item in row.items)
    text_px, gap_px, top_px, heading_px = 22, 14, 64, 36
    step_px = heading_px + side + text_px * num_texts + gap_px
    page_w, page_h = 2 * _PAD_PX + columns * (side + gap_px) - gap_px, top_px + step_px * len(lines) + 40
    figure = Figure(figsize=(page_w / _DPI, page_h / _DPI), dpi=_DPI)

    def write(x: float, y: float, text: str, size: float, **options: Any) -> None:
        figure.text(x / page_w, 1 - y / page_h, text, fontsize=size, va="top", parse_math=False, **options)

    write(_PAD_PX, _PAD_PX / 2, title, 13)
    for number, (heading, items) in enumerate(lines):
        top = top_px + number * step_px
        write(_PAD_PX, top, heading, 10.5, weight="bold")
        for column, item in enumerate(items):
            x, y = _PAD_PX + column * (side + gap_px), top + heading_px
            place = (x / page_w, 1 - (y + side) / page_h, side / page_w, side / page_h)
            _draw_crop(figure.add_axes(place), item.crop)
            for line, text in enumerate((f"#{item.number}   {item.id[:8]}", *item.lines)):
                write(x, y + side + 5 + line * text_px, text, 8.5, weight="bold" if line == 0 else "normal")
    write(page_w - _PAD_PX, page_h - 28, DISCLAIMER, 9.5, ha="right", weight="bold")
    return png(figure)


def _draw_crop(axes: Axes, crop: Crop) -> None:
    extent_um = crop.image.shape[1] * crop.um_per_px, crop.image.shape[0] * crop.um_per_px
    _show(axes, crop.image, extent_um)
    path = _path(crop.outline)
    axes.add_patch(PathPatch(path, fill=False, edgecolor="white", linewidth=2.2))  # seen on dark nuclei, too
    axes.add_patch(PathPatch(path, fill=False, edgecolor=BLACK, linewidth=1))
    _scale_bar(axes, extent_um, fontsize=7)
