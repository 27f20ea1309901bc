"""Pictures in a grid, pixel for pixel, with a caption under each."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from stas_core.arrays import RgbImage
from stas_core.errors import ConfigError
from stas_core.figures.style import house_style, png, require


@dataclass(frozen=True)
class Tile:
    """One picture of a contact sheet, with the line under it."""

    image: RgbImage
    caption: str


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
    """Wrap each line of a text by the average width of a letter."""
    num_letters = max(8, int(width_px / (0.6 * type_px)))
    return "\n".join(textwrap.fill(line, num_letters) for line in text.splitlines())
