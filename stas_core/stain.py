"""Macenko stain estimation and rendering.

Macenko M. et al., A method for normalizing histology slides for quantitative analysis, ISBI 2009, with the constants
and the percentile rule (Hazen) of the published STAS system, whose output it equals on every pixel.

Optical density is OD = -ln((I + 1) / 240). An estimate is made once per image; the normalised, hematoxylin and eosin
renderings follow from it pixel by pixel, so crops can be rendered on the fly.

Speed: pixels are worked on in float32 with a known bound on the error. Where that bound leaves a result open (a
rounding close to a half, a rank close to a percentile), and only there, it is computed again in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float32, Float64, UInt8

from stas_core.arrays import MaxC, RgbImage, StainMatrix

Variant = Literal["norm", "H", "E"]
Pixels = UInt8[np.ndarray, "n 3"]
Axis = Float64[np.ndarray, "3"]

WHITE = 240.0
MIN_OD = 0.15
"""A pixel with any channel below this is background."""
ANGLE_PERCENTILES = (1.0, 99.0)
MAX_C_PERCENTILE = 99.0
REFERENCE_MATRIX = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])
REFERENCE_MAX_C = np.array([1.9705, 1.0308])

_OD_OF = -np.log((np.arange(256) + 1) / WHITE)
_OD_OF_32 = _OD_OF.astype(np.float32)
_LARGEST_OD = float(np.abs(_OD_OF).max())
_LIGHTEST_TISSUE = int(np.flatnonzero(_OD_OF >= MIN_OD).max())
_BLOCK_PX = 1 << 15  # what is worked on at a time stays in the cache
_FLOAT32_STEP = 2.0**-23


@dataclass(frozen=True)
class Stain:
    """The stains of one image: unit optical-density vectors, and how much of each there is."""

    matrix: StainMatrix
    max_c: MaxC


def estimate(image: RgbImage) -> Stain | None:
    """Estimate an image's stains, or return None where there is no tissue to estimate them from.

    None too where the tissue has a single colour, or so little of a stain that its scale would be zero.
    """
    pixels = np.ascontiguousarray(image).reshape(-1, 3)
    is_tissue = cv2.inRange(pixels[None], (0, 0, 0), (_LIGHTEST_TISSUE,) * 3)[0]
    tissue = pixels[np.flatnonzero(is_tissue)]
    if len(tissue) < 2:
        return None
    values, vectors = np.linalg.eigh(_covariance(tissue))
    if values[1] <= 1e-12:  # one colour, or a line of colours: no plane of two stains
        return None
    matrix = _stain_matrix(tissue, vectors[:, 1:])
    if np.linalg.matrix_rank(matrix) < 2:
        return None
    max_c = _max_concentrations(pixels, np.linalg.pinv(matrix))
    if not (np.isfinite(max_c).all() and (max_c > 0).all()):
        return None
    return Stain(matrix, max_c)


def _covariance(pixels: Pixels) -> Float64[np.ndarray, "3 3"]:
    """Return the covariance of the pixels' optical densities."""
    total, products = np.zeros(3), np.zeros((3, 3))
    for start in range(0, len(pixels), _BLOCK_PX):
        od = _optical_density(pixels[start : start + _BLOCK_PX])
        total += np.ones(len(od)) @ od  # several times faster than a sum over the short axis
        products += od.T @ od
    return np.asarray((products - np.outer(total, total) / len(pixels)) / (len(pixels) - 1))


def _stain_matrix(tissue: Pixels, plane: Float64[np.ndarray, "3 2"]) -> StainMatrix:
    """Return the robust extremes of the tissue's directions within the plane, hematoxylin (redder in OD) first."""
    other, main = plane.T
    low, high = _extreme_angles(tissue, other, main) if _one_signed(main) else _any_extreme_angles(tissue, other, main)
    one, two = (np.cos(angle) * other + np.sin(angle) * main for angle in (low, high))
    return np.column_stack([one, two] if one[0] > two[0] else [two, one])


def _one_signed(axis: Axis) -> bool:
    return bool((axis > 0).all() or (axis < 0).all())


def _extreme_angles(tissue: Pixels, other: Axis, main: Axis) -> list[float]:
    """Return the percentiles of atan2(main, other) where the main axis has one sign, as stained tissue's has.

    Tissue is dense in every channel, so its part along such an axis has that sign too, and the angle falls as
    other / main grows: ranks of the angle are ranks of the ratio, and only two angles are computed.
    """
    sign = np.sign(main[0])

    def ratio(index: np.ndarray) -> np.ndarray:
        od = _optical_density(tissue[index])
        return np.asarray((od @ other) / (od @ main * sign))

    approximate = np.empty(len(tissue), np.float32)
    transform = np.stack([other, main * sign]).astype(np.float32)
    for start in range(0, len(tissue), _BLOCK_PX):
        parts = cv2.transform(_optical_density_32(tissue[start : start + _BLOCK_PX]), transform)[0]
        approximate[start : start + _BLOCK_PX] = parts[:, 0] / parts[:, 1]
    smallest_main = MIN_OD * float(np.abs(main).sum())
    error = 32 * _FLOAT32_STEP * _LARGEST_OD / smallest_main * (1 + float(np.abs(approximate).max()))
    angles = []
    for percentile in ANGLE_PERCENTILES:
        ranks, share = _hazen_ranks(len(tissue), percentile if sign < 0 else 100 - percentile)
        at_ranks = np.arctan2(sign, _order_statistics(approximate, ratio, ranks, error))
        angles.append(float(at_ranks[0] + share * (at_ranks[1] - at_ranks[0])))
    return angles


def _any_extreme_angles(tissue: Pixels, other: Axis, main: Axis) -> list[float]:
    """Return the percentiles of atan2(main, other), whatever the axes."""
    od = _optical_density(tissue)
    return [float(a) for a in np.percentile(np.arctan2(od @ main, od @ other), ANGLE_PERCENTILES, method="hazen")]


def _max_concentrations(pixels: Pixels, unmix: Float64[np.ndarray, "2 3"]) -> MaxC:
    """Return the high percentile of each stain's concentration over all pixels."""
    approximate = np.empty((2, len(pixels)), np.float32)
    for start in range(0, len(pixels), _BLOCK_PX):
        parts = cv2.transform(_optical_density_32(pixels[start : start + _BLOCK_PX]), unmix.astype(np.float32))[0]
        approximate[:, start : start + _BLOCK_PX] = parts.T
    ranks, share = _hazen_ranks(len(pixels), MAX_C_PERCENTILE)
    result = []
    for row, values in zip(unmix, approximate, strict=True):
        error = 8 * _FLOAT32_STEP * _LARGEST_OD * float(np.abs(row).sum())

        def exact(index: np.ndarray, row: np.ndarray = row) -> np.ndarray:
            return np.asarray(_optical_density(pixels[index]) @ row)

        low, high = _order_statistics(values, exact, ranks, error)
        result.append(low + share * (high - low))
    return np.array(result)


def render(image: RgbImage, stain: Stain, variant: Variant) -> RgbImage:
    """Render an image with the reference's stains (norm), or one stain of it alone (H, E)."""
    columns = {"norm": [0, 1], "H": [0], "E": [1]}[variant]
    unmix = np.linalg.pinv(stain.matrix) * (REFERENCE_MAX_C / stain.max_c)[:, None]
    mix = -REFERENCE_MATRIX[:, columns] @ unmix[columns]
    transform = np.column_stack([mix, np.full(3, np.log(WHITE))]).astype(np.float32)
    error = 256 * 16 * _FLOAT32_STEP * (np.log(WHITE) + _LARGEST_OD * float(np.abs(mix).sum(axis=1).max()))
    pixels = np.ascontiguousarray(image).reshape(-1, 3)
    result = np.empty_like(pixels)
    for start in range(0, len(pixels), _BLOCK_PX):
        block = pixels[start : start + _BLOCK_PX]
        light = cv2.exp(cv2.transform(_optical_density_32(block), transform))[0]
        # Half away from zero, then saturate, as the published code does.
        np.minimum(light, 255, out=light)
        light += np.float32(0.5 - error)
        low = light.astype(np.uint8)
        light += np.float32(2 * error)
        high = np.minimum(light, 255, out=light).astype(np.uint8)
        unsure = np.unique(np.flatnonzero(low.ravel() != high.ravel()) // 3)
        if len(unsure):
            exact = WHITE * np.exp(_optical_density(block[unsure]) @ mix.T)
            low[unsure] = np.minimum(np.floor(exact + 0.5), 255)
        result[start : start + _BLOCK_PX] = low
    return result.reshape(image.shape)


def _optical_density(pixels: Pixels) -> Float64[np.ndarray, "n 3"]:
    return np.asarray(cv2.LUT(pixels[None], _OD_OF)[0])


def _optical_density_32(pixels: Pixels) -> Float32[np.ndarray, "1 n 3"]:
    return np.asarray(cv2.LUT(pixels[None], _OD_OF_32))


def _hazen_ranks(count: int, percentile: float) -> tuple[tuple[int, int], float]:
    """Return the two ranks (from 0) that a percentile lies between by Hazen's rule, and how far along."""
    position = min(max(count * percentile / 100 - 0.5, 0.0), count - 1.0)
    below = int(position)
    return (below, min(below + 1, count - 1)), position - below


def _order_statistics(
    approximate: Float32[np.ndarray, " n"],
    exact: Callable[[np.ndarray], np.ndarray],
    ranks: Sequence[int],
    error: float,
) -> list[float]:
    """Return the exact values of two neighbouring ranks of numbers known to within `error`.

    `exact(index)` computes the numbers at an index in float64. A sorted sample brackets the ranks; only numbers that
    may lie in the bracket are computed exactly. A bracket that proves too narrow is widened to everything.
    """
    count = len(approximate)
    sample = np.sort(approximate[:: max(1, count // 8192)])
    share = ranks[0] / max(1, count - 1)
    middle, width = share * (len(sample) - 1), 4 * np.sqrt(len(sample) * share * (1 - share)) + 4
    first, last = int(middle - width), int(middle + width) + 1
    bracket = (
        float(sample[first]) if first >= 0 else -np.inf,
        float(sample[last]) if last < len(sample) else np.inf,
    )
    for low, high in (bracket, (-np.inf, np.inf)):
        num_below = int(np.count_nonzero(approximate < low - error))
        maybe = np.flatnonzero((approximate >= low - error) & (approximate <= high + error))
        inside = [rank - num_below for rank in ranks]
        if min(inside) >= 0 and max(inside) < len(maybe):
            values = np.sort(exact(maybe))
            found = [float(values[rank]) for rank in inside]
            if low <= min(found) and max(found) <= high:
                break
    return found
