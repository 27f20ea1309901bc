"""Slides that tests make themselves."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

from stas_core.arrays import RgbImage


def noise(height: int, width: int, seed: int = 0) -> RgbImage:
    """Return smooth random colours: neighbouring pixels differ, and JPEG keeps them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def write_pyramid(
    path: Path, pixels: RgbImage, *, mpp: float | tuple[float, float] | None = 0.5, num_levels: int = 3, **options: Any
) -> Path:
    """Write a pyramidal tiled TIFF of 256 px tiles, each level half of the one before."""
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib", "metadata": None} | options
    if mpp is not None:
        x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
        options |= {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"}
    else:
        options |= {"resolution": (1, 1), "resolutionunit": "NONE"}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in range(num_levels):
            if level:
                size = pixels.shape[1] // 2, pixels.shape[0] // 2
                pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
            file.write(pixels, subfiletype=int(level > 0), **options)
    return path


def write_ome(path: Path, pixels: RgbImage, size: float = 0.5, unit: str = "µm") -> Path:
    """Write a tiled OME-TIFF with a physical pixel size."""
    metadata = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeXUnit": unit}
    metadata |= {"PhysicalSizeY": size, "PhysicalSizeYUnit": unit}
    tifffile.imwrite(path, pixels, ome=True, tile=(256, 256), photometric="rgb", metadata=metadata)
    return path
