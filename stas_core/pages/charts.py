"""Charts as SVG: readable on paper and without scripts; the page's script adds a reading at the pointer."""

import math
from typing import Any

from markupsafe import Markup, escape

from stas_core.pages.contents import Chart, Series

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 12, 40
NUM_COLOURS = 7
"""Of `page.css`: those of Okabe and Ito, which colour-blind readers tell apart."""


def nice_ticks(low: float, high: float, num: int = 5) -> list[float]:
    """Return round values from low to high, about `num` of them.

    >>> nice_ticks(0, 1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high <= low:
        return [low]
    raw = (high - low) / num
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def number_text(value: float) -> str:
    """Return a number as an axis or a reading shows it.

    >>> [number_text(value) for value in (0.5, 1200, 0.00012, 3)]
    ['0.5', '1,200', '1.2e-04', '3']
    """
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


class _Frame:
    """The ranges of a chart, and where its values are drawn."""

    def __init__(self, chart: Chart):
        xs = [x for line in chart.series for x, _ in line.points]
        ys = [y for line in chart.series for _, y in line.points if math.isfinite(y)]
        self.x = (min(xs), max(xs)) if xs else (0.0, 1.0)
        if self.x[0] == self.x[1]:
            self.x = (self.x[0] - 0.5, self.x[1] + 0.5)
        if chart.y_range is not None:
            self.y = chart.y_range
        else:
            low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
            room = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
            self.y = (0.0 if 0 <= low < (high - low) / 2 else low - room, high + room)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return where a value is drawn."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (min(max(y, self.y[0]), self.y[1]) - self.y[0]) / (self.y[1] - self.y[0])
        return (
            round(_LEFT + across * (WIDTH - _LEFT - _RIGHT), 1),
            round(HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM), 1),
        )


def draw(chart: Chart, title: str) -> Markup:
    """Draw a chart as SVG."""
    frame = _Frame(chart)
    parts = [*_grid(chart, frame), *_marks(chart, frame)]
    parts += [_line(line, index, frame) for index, line in enumerate(chart.series)]
    label = f"{title}. Lines: {', '.join(line.name for line in chart.series)}"
    opening = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
    return Markup("".join([opening, *parts, "</svg>"]))


def to_json(chart: Chart) -> dict[str, Any]:
    """Return what the page's script reads values from."""
    frame = _Frame(chart)
    return {
        "x": frame.x,
        "left": _LEFT,
        "right": WIDTH - _RIGHT,
        "top": _TOP,
        "bottom": HEIGHT - _BOTTOM,
        "label": chart.x_label,
        "whole": chart.whole_x,
        "start": chart.start,
        "series": [
            {"name": line.name, "points": [[_short(x), _short(y)] for x, y in line.points]} for line in chart.series
        ],
    }


def colour_of(line: Series, index: int) -> int:
    """Return the number of a line's colour."""
    return (index if line.colour is None else line.colour) % NUM_COLOURS


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _grid(chart: Chart, frame: _Frame) -> list[str]:
    left, right, bottom = _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for y in nice_ticks(*frame.y):
        _, at = frame.place(frame.x[0], y)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{at + 4}" text-anchor="end">{number_text(y)}</text>')
    ticks = nice_ticks(*frame.x, num=8)
    for x in [tick for tick in ticks if not chart.whole_x or tick == int(tick)]:
        at, _ = frame.place(x, frame.y[0])
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{at}" y="{bottom + 17}" text-anchor="middle">{number_text(x)}</text>')
    middle, half = (left + right) / 2, (_TOP + bottom) / 2
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    x_label, y_label = escape(chart.x_label), escape(chart.y_label)
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{x_label}</text>')
    turned = f'transform="translate(13 {half}) rotate(-90)"'
    parts.append(f'<text class="label" {turned} text-anchor="middle">{y_label}</text>')
    return parts


def _marks(chart: Chart, frame: _Frame) -> list[str]:
    texts: dict[float, list[str]] = {}
    for x, text in chart.marks:
        texts.setdefault(x, []).append(text)
    parts = []
    for index, (x, some) in enumerate(sorted(texts.items())):
        at, _ = frame.place(x, frame.y[0])
        side, shift = ("end", -4) if at > WIDTH * 0.75 else ("start", 4)
        y, words = _TOP + 11 + 13 * index, escape(", ".join(some))
        parts.append(f'<line class="mark" x1="{at}" x2="{at}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{at + shift:g}" y="{y}" text-anchor="{side}">{words}</text>')
    return parts


def _line(line: Series, index: int, frame: _Frame) -> str:
    colour = colour_of(line, index)
    dash = ' stroke-dasharray="6 4"' if line.is_dashed else ""
    points = [frame.place(x, y) for x, y in line.points if math.isfinite(y)]
    if len(points) == 1:
        return f'<circle class="dot c{colour}" cx="{points[0][0]}" cy="{points[0][1]}" r="3.5"/>'
    text = " ".join(f"{x:g},{y:g}" for x, y in points)
    dots = ""
    if len(points) <= 40 and not line.is_dashed:
        dots = "".join(f'<circle class="dot c{colour}" cx="{x:g}" cy="{y:g}" r="2.2"/>' for x, y in points)
    return f'<polyline class="line c{colour}" points="{text}"{dash}/>{dots}'
