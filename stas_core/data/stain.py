"""Macenko stain estimation and rendering.

Macenko M. et al., A method for normalizing histology slides for quantitative analysis, ISBI 2009, with the constants
and the percentile rule (Hazen) of the published STAS system, whose output it equals on every pixel.

Optical density is OD = -ln((I + 1) / 240). An estimate is made once per image; the normalised, hematoxylin and eosin
renderings follow from it pixel by pixel, so crops can be rendered on the fly.

Speed, all in float64: optical densities are looked up, pixels are worked on in blocks that stay in the processor's
cache, and unmixing, scaling and mixing again is one 3x3 matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from stas_core.arrays import MaxC, RgbImage, StainMatrix

Variant = Literal["norm", "H", "E"]
Pixels = UInt8[np.ndarray, "n 3"]
OpticalDensity = Float64[np.ndarray, "n 3"]

WHITE = 240.0
MIN_OD = 0.15
"""A pixel with any channel below this is background."""
ANGLE_PERCENTILE = 1.0
"""The stains' directions are this percentile of the tissue's, and 100 minus it."""
MAX_C_PERCENTILE = 99.0
REFERENCE_MATRIX = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])
REFERENCE_MAX_C = np.array([1.9705, 1.0308])

_OD_OF = -np.log((np.arange(256) + 1) / WHITE)
_LIGHTEST_TISSUE = int(np.flatnonzero(_OD_OF >= MIN_OD).max())
_BLOCK_PX = 1 << 14  # 400 kB of float64 RGB


@dataclass(frozen=True)
class Stain:
    """The stains of one image: unit optical-density vectors, and the 99th percentile of each concentration."""

    matrix: StainMatrix
    max_c: MaxC


def estimate(image: RgbImage) -> Stain | None:
    """Estimate an image's stains, or return None where there is no tissue to estimate them from.

    None too where the tissue has a single colour, or so little of a stain that its scale would be zero.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> image = rng.integers((120, 40, 100), (220, 140, 180), (64, 64, 3)).astype(np.uint8)
        >>> found = estimate(image)
        >>> render(image, found, "H").shape
        (64, 64, 3)
        >>> estimate(np.full((64, 64, 3), 255, np.uint8)) is None  # glass
        True
    """
    pixels = image.reshape(-1, 3)
    is_tissue = cv2.inRange(pixels[None], (0, 0, 0), (_LIGHTEST_TISSUE,) * 3)[0] > 0
    tissue = pixels.take(np.flatnonzero(is_tissue), axis=0)  # several times faster than indexing
    if len(tissue) < 2:
        return None
    values, vectors = np.linalg.eigh(_covariance(tissue))
    if values[1] <= 1e-12:  # one colour, or a line of colours: no plane of two stains
        return None
    matrix = _stain_matrix(tissue, vectors[:, 1:])
    if np.linalg.matrix_rank(matrix) < 2:
        return None
    concentrations = _project(pixels, np.linalg.pinv(matrix))
    max_c = np.percentile(concentrations, MAX_C_PERCENTILE, axis=1, method="hazen")
    return Stain(matrix, max_c) if (max_c > 0).all() else None


def render(image: RgbImage, stain: Stain, variant: Variant) -> RgbImage:
    """Render an image with the reference's stains (norm), or one stain of it alone (H, E)."""
    columns = {"norm": [0, 1], "H": [0], "E": [1]}[variant]
    unmix = np.linalg.pinv(stain.matrix) * (REFERENCE_MAX_C / stain.max_c)[:, None]
    mix = -REFERENCE_MATRIX[:, columns] @ unmix[columns]
    pixels = image.reshape(-1, 3)
    rendered = np.empty_like(pixels)
    for block in _blocks(pixels):
        light = cv2.transform(_optical_density(pixels[block])[None], mix)[0]
        np.exp(light, out=light)
        light *= WHITE
        light += 0.5  # cut off below, this rounds half away from zero as the published code does
        rendered[block] = np.minimum(light, 255, out=light).astype(np.uint8)
    return rendered.reshape(image.shape)


def _covariance(pixels: Pixels) -> Float64[np.ndarray, "3 3"]:
    """Return the covariance of the pixels' optical densities."""
    total, products = np.zeros(3), np.zeros((3, 3))
    for block in _blocks(pixels):
        od = _optical_density(pixels[block])
        total += np.ones(len(od)) @ od  # several times faster than a sum over the short axis
        products += od.T @ od
    return np.asarray((products - np.outer(total, total) / len(pixels)) / (len(pixels) - 1))


def _stain_matrix(tissue: Pixels, plane: Float64[np.ndarray, "3 2"]) -> StainMatrix:
    """Return the robust extreme directions of tissue in the stain plane, hematoxylin (larger red OD) first."""
    along, across = _project(tissue, plane.T)
    angles = np.arctan2(across, along)
    extremes = np.percentile(angles, (ANGLE_PERCENTILE, 100 - ANGLE_PERCENTILE), method="hazen")
    one, two = (plane @ [np.cos(angle), np.sin(angle)] for angle in extremes)
    return np.column_stack([one, two] if one[0] > two[0] else [two, one])


def _project(pixels: Pixels, axes: Float64[np.ndarray, "2 3"]) -> Float64[np.ndarray, "2 n"]:
    """Return the pixels' optical densities along two axes."""
    projected = np.empty((2, len(pixels)))
    for block in _blocks(pixels):
        projected[:, block] = axes @ _optical_density(pixels[block]).T
    return projected


def _optical_density(pixels: Pixels) -> OpticalDensity:
    return np.asarray(cv2.LUT(pixels[None], _OD_OF)[0])


def _blocks(pixels: Pixels) -> Iterator[slice]:
    return (slice(start, start + _BLOCK_PX) for start in range(0, len(pixels), _BLOCK_PX))
