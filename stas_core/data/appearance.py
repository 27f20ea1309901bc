"""How images look: figures of an image, their ranges over a training cohort, and how far an image lies outside.

Stains (Macenko), brightness and sharpness are what differs between laboratories and scanners. The ranges are small
enough to travel with an ensemble.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import cv2
import numpy as np

from stas_core.arrays import RgbImage
from stas_core.data import stain
from stas_core.data.stain import Stain

FINE_PX, COARSE_PX = 1.0, 4.0
"""Sigmas of the blurs that fine and all detail are what is above of."""
STAIN_PX = 1 << 16
"""Pixels, evenly spread, that a stain is estimated from where it is for the look alone."""
LOWEST, HIGHEST = 0.02, 0.98
"""Quantiles of the cohort that bound a range: single odd images do not widen it."""
NARROWEST = 0.05
"""Half a range is at least this share of its middle."""


@dataclass(frozen=True)
class Look:
    """Figures of an image; those of stains are null where it has no tissue."""

    brightness: float | None = None
    """Mean grey level, 0 to 255."""
    sharpness: float | None = None
    """Grey levels of fine detail over those of all detail, 0 to 1: falls with blur, and with magnification."""
    hematoxylin: float | None = None
    """99th percentile of the concentration."""
    eosin: float | None = None
    hematoxylin_red: float | None = None
    """Optical density of the stain's colour in red, of 1 in all; `_blue` likewise."""
    hematoxylin_blue: float | None = None
    eosin_red: float | None = None
    eosin_blue: float | None = None


NAMES = {
    "brightness": "brightness",
    "sharpness": "sharpness",
    "hematoxylin": "amount of hematoxylin",
    "eosin": "amount of eosin",
    "hematoxylin_red": "colour of hematoxylin (red)",
    "hematoxylin_blue": "colour of hematoxylin (blue)",
    "eosin_red": "colour of eosin (red)",
    "eosin_blue": "colour of eosin (blue)",
}
"""The figures in words."""


def measure(image: RgbImage) -> Look:
    """Measure an image (h, w, 3).

    Example:
        >>> glass = np.full((64, 64, 3), 240, np.uint8)
        >>> measure(glass).brightness, measure(glass).hematoxylin
        (240.0, None)
    """
    step = max(1, round((image.shape[0] * image.shape[1] / STAIN_PX) ** 0.5))
    return of_stain(stain.estimate(np.ascontiguousarray(image[::step, ::step])), *measure_light(image))


def measure_light(image: RgbImage) -> tuple[float, float]:
    """Return brightness and sharpness of an image, as `Look` has them."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    fine, coarse = (float(np.abs(grey - cv2.GaussianBlur(grey, (0, 0), px)).mean()) for px in (FINE_PX, COARSE_PX))
    return float(grey.mean()), fine / max(coarse, 1e-3)


def of_stain(found: Stain | None, brightness: float | None, sharpness: float | None) -> Look:
    """Return the look of an image whose stain was estimated before."""
    if found is None:
        return Look(brightness, sharpness)
    (h_red, e_red), _, (h_blue, e_blue) = found.matrix.tolist()
    hematoxylin, eosin = found.max_c.tolist()
    return Look(brightness, sharpness, hematoxylin, eosin, h_red, h_blue, e_red, e_blue)


Ranges = Mapping[str, tuple[float, float]]
"""Of each figure of `Look`, from where to where the images of a cohort have it."""


def ranges(looks: Sequence[Look]) -> dict[str, tuple[float, float]]:
    """Return the range of each figure that is known of some image.

    Example:
        >>> ranges([Look(brightness=100.0), Look(brightness=200.0)])
        {'brightness': (102.0, 198.0)}
    """
    found = {}
    for one in fields(Look):
        values = [value for look in looks if (value := getattr(look, one.name)) is not None]
        if values:
            low, high = np.quantile(values, (LOWEST, HIGHEST)).round(6).tolist()
            found[one.name] = (low, high)
    return found


class Drift(NamedTuple):
    """How far an image lies from a cohort: 1 at the edge of its range, and in which figure most."""

    score: float
    figure: str
    """A field of `Look`."""
    value: float


def drift(look: Look, cohort: Ranges) -> Drift | None:
    """Return how far an image is from the middle of a cohort's range, in half ranges, in its worst figure.

    None: image and cohort have no figure in common.

    Example:
        >>> drift(Look(brightness=250.0), {"brightness": (100.0, 200.0)})
        Drift(score=2.0, figure='brightness', value=250.0)
    """
    found = []
    known = vars(look)
    for name, (low, high) in cohort.items():
        if (value := known.get(name)) is not None:
            middle, half = (low + high) / 2, (high - low) / 2
            half = max(half, NARROWEST * abs(middle), 1e-6)
            found.append(Drift(abs(value - middle) / half, name, value))
    return max(found, default=None)
