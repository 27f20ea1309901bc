"""Macenko stain estimation and rendering.

Macenko M. et al., A method for normalizing histology slides for quantitative analysis, ISBI 2009, with the constants
and the percentile rule (Hazen) of the published STAS system, whose output it equals on every pixel.

Optical density is OD = -ln((I + 1) / 240). An estimate is made once per image; the normalised, hematoxylin and eosin
renderings follow from it pixel by pixel, so crops can be rendered on the fly.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from stas_core.arrays import MaxC, RgbImage, StainMatrix

Variant = Literal["norm", "H", "E"]

WHITE = 240.0
MIN_OD = 0.15
"""A pixel with any channel below this is background."""
ANGLE_PERCENTILE = 1.0
MAX_C_PERCENTILE = 99.0
REFERENCE_MATRIX = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])
REFERENCE_MAX_C = np.array([1.9705, 1.0308])

_OD_OF = -np.log((np.arange(256) + 1) / WHITE)
_DARKEST_BACKGROUND = int(np.argmax(_OD_OF < MIN_OD))


@dataclass(frozen=True)
class Stain:
    """The stains of one image: unit optical-density vectors, and how much of each there is."""

    matrix: StainMatrix
    max_c: MaxC


def estimate(image: RgbImage) -> Stain | None:
    """Estimate an image's stains, or return None where there is no tissue to estimate them from.

    None too where the tissue has a single colour, or so little of a stain that its scale would be zero.
    """
    od = _optical_density(image)
    tissue = od[(image.reshape(-1, 3) < _DARKEST_BACKGROUND).all(axis=1)]
    if len(tissue) < 2:
        return None
    values, vectors = np.linalg.eigh(np.cov(tissue, rowvar=False))
    if values[1] <= 1e-12:  # one colour, or a line of colours: no plane of two stains
        return None
    plane = vectors[:, 1:]
    angles = np.arctan2(*(tissue @ plane).T[::-1])
    low, high = _hazen_percentiles(angles, [ANGLE_PERCENTILE, 100 - ANGLE_PERCENTILE])
    one, two = (plane @ [np.cos(angle), np.sin(angle)] for angle in (low, high))
    matrix = np.column_stack([one, two] if one[0] > two[0] else [two, one])
    if np.linalg.matrix_rank(matrix) < 2:
        return None
    concentrations = od @ np.linalg.pinv(matrix).T
    max_c = np.array([_hazen_percentiles(column, [MAX_C_PERCENTILE])[0] for column in concentrations.T])
    if not (np.isfinite(max_c).all() and (max_c > 0).all()):
        return None
    return Stain(matrix, max_c)


def render(image: RgbImage, stain: Stain, variant: Variant) -> RgbImage:
    """Render an image with the reference's stains (norm), or one stain of it alone (H, E)."""
    columns = {"norm": [0, 1], "H": [0], "E": [1]}[variant]
    unmix = np.linalg.pinv(stain.matrix) * (REFERENCE_MAX_C / stain.max_c)[:, None]
    mix = REFERENCE_MATRIX[:, columns] @ unmix[columns]
    intensity = WHITE * np.exp(_optical_density(image) @ -mix.T)
    # Half away from zero, then saturate, as the published code does; numpy would round half to even.
    return np.asarray(np.minimum(np.floor(intensity + 0.5), 255), np.uint8).reshape(image.shape)


def _optical_density(image: RgbImage) -> np.ndarray:
    """Return the optical density of every pixel, (h * w, 3) float64."""
    return np.asarray(cv2.LUT(image, _OD_OF)).reshape(-1, 3)


def _hazen_percentiles(values: np.ndarray, percentiles: list[float]) -> list[float]:
    """Return percentiles by Hazen's rule, selecting only the order statistics they lie between."""
    n = len(values)
    positions = [min(max(n * p / 100 - 0.5, 0.0), n - 1.0) for p in percentiles]
    wanted = sorted({i for position in positions for i in (int(position), min(int(position) + 1, n - 1))})
    ordered = np.partition(values, wanted)
    result = []
    for position in positions:
        below = int(position)
        above = min(below + 1, n - 1)
        result.append(float(ordered[below] + (position - below) * (ordered[above] - ordered[below])))
    return result
