"""What a tile's halo is worth to an ensemble: how much of a map still depends on where tiles are cut.

Convolutions see as far as their reach, so a halo of that width makes them exact. Networks that take statistics over a
whole tile (layer norm, squeeze-excitation) see all of it, and no halo does. Which is which is measured, not guessed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stas_core.arrays import ProbMapU8, RgbImage
from stas_core.slides.tiling import Box
from stas_core.slides.tissue import Tissue

if TYPE_CHECKING:  # which loads torch, and the table is read without it
    from stas_core.predict.predictor import Predictor

HALOS_PX = (0, 64, 128, 256)
_LEAST_REFERENCE_PX = 512
_CORE_PX = 512
MUCH_OFF = 0.05
"""Share of pixels off by more than one level beyond which a warning is due."""


@dataclass(frozen=True)
class Seam:
    """A row of the seam table: what a halo leaves of the dependence on the cut, on one square of tissue."""

    halo_px: int
    """Context about a tile, in pixels of the frame."""
    off_share: float
    """Share of pixels whose probability differs by more than 1/255 from that with a halo of `reference_px`."""
    flipped_share: float
    """Share of pixels that lie on the other side of the cascade's `low`."""
    largest_off: float
    """Largest difference in probability."""
    cost: float
    """Pixels predicted per pixel of the map, with tiles as configured."""


def reference_px(halo_px: int) -> int:
    """Return the halo of the prediction that the others are held against: 512 px, or twice the one configured."""
    return max(_LEAST_REFERENCE_PX, 2 * halo_px)


def measure_seams(
    predictor: "Predictor",
    read: Callable[[Box], RgbImage],
    place: Box,
    *,
    tile_px: int,
    halo_px: int,
    low: int,
) -> list[Seam]:
    """Predict one square with halos of several widths, and hold each against that with a halo of `reference_px`.

    Args:
        predictor: the ensemble.
        read: returns the pixels of a box of the slide's frame.
        place: the square, see `choose_place`.
        tile_px: side of the tiles that the slide is cut into.
        halo_px: the halo that is configured: its row is in the table, too.
        low: grey level that splits the map in two.
    """
    reference = _core(predictor, read, place, reference_px(halo_px))
    found = []
    for halo in sorted({*HALOS_PX, halo_px}):
        levels = _core(predictor, read, place, halo)
        off = np.abs(levels.astype(np.int16) - reference)
        found.append(
            Seam(
                halo_px=halo,
                off_share=float((off > 1).mean()),
                flipped_share=float(((levels >= low) != (reference >= low)).mean()),
                largest_off=float(off.max()) / 255,
                cost=((tile_px + 2 * halo) / tile_px) ** 2,
            )
        )
    return found


def _core(predictor: "Predictor", read: Callable[[Box], RgbImage], place: Box, halo_px: int) -> ProbMapU8:
    box = Box(place.y0 - halo_px, place.x0 - halo_px, place.y1 + halo_px, place.x1 + halo_px)
    return predictor.predict_u8(read(box))[place.within(box).slices]


def choose_place(tissue: Tissue, mpp: float, size: tuple[int, int], tile_px: int) -> Box:
    """Return a square of the frame (height, width), no larger than a tile, with as much tissue as any."""
    side = min(tile_px, _CORE_PX, *size)
    scale = mpp / tissue.mpp
    window = max(1, round(side * scale))
    sums = np.pad(tissue.mask, ((1, 0), (1, 0))).astype(np.int64).cumsum(0).cumsum(1)
    window_y, window_x = min(window, tissue.mask.shape[0]), min(window, tissue.mask.shape[1])
    held = (
        sums[window_y:, window_x:]
        - sums[:-window_y, window_x:]
        - sums[window_y:, :-window_x]
        + sums[:-window_y, :-window_x]
    )
    row, col = np.unravel_index(int(held.argmax()), held.shape)
    y0 = max(0, min(int(row / scale), size[0] - side)) // 32 * 32
    x0 = max(0, min(int(col / scale), size[1] - side)) // 32 * 32
    return Box(y0, x0, y0 + side, x0 + side)


def describe(seams: Sequence[Seam], halo_px: int, *, blended: bool = False) -> list[str]:
    """Return the table in lines for people, and a warning where the configured halo leaves much."""
    lines = [
        f"held against a halo of {reference_px(halo_px)} px, on one square of at most {_CORE_PX} px: where networks "
        "take statistics over the whole tile, larger tiles are off by other shares",
        *(
            f"halo {seam.halo_px} px: {seam.off_share:.2%} of pixels off by more than 1/255 (at most "
            f"{seam.largest_off:.3f}), {seam.flipped_share:.3%} flipped, cost {seam.cost:.2f}x"
            for seam in seams
        ),
    ]
    own = next((seam for seam in seams if seam.halo_px == halo_px), None)
    if own is not None and own.off_share > MUCH_OFF:
        hiding = "blending the tiles hides" if blended else "tile.blend=true hides"
        lines.append(
            f"warning: with tile.halo_px = {halo_px}, {own.off_share:.0%} of the map depends on where tiles are cut: "
            "a wider halo helps networks that see no further (norm=batch, no squeeze-excitation); of the others, "
            f"{hiding} the seams"
        )
    return lines
