"""The array types that cross module borders: dtype, shape and range in one place.

Arrays are `[y, x]`. Under pytest a jaxtyping import hook checks every annotated call; elsewhere the
aliases cost nothing.
"""

import cv2
import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float32, Float64, Int32, UInt8

RgbImage = UInt8[np.ndarray, "h w 3"]
"""An 8-bit RGB image."""

AnyRgbImage = UInt8[np.ndarray, "_ _ 3"]
"""One 8-bit RGB image among several, each of its own size."""

Mask = Bool[np.ndarray, "h w"]
"""True on target (foreground) pixels."""

ResizedImage = UInt8[np.ndarray, "new_h new_w 3"]
"""An image that a function returns at another size than it was given."""

ResizedMapU8 = UInt8[np.ndarray, "new_h new_w"]
ResizedMask = Bool[np.ndarray, "new_h new_w"]
"""A mask that a function returns at another size than it was given."""

ProbMap = Float32[np.ndarray, "h w"]
"""Foreground probability in [0, 1]."""

ProbMapU8 = UInt8[np.ndarray, "h w"]
"""Foreground probability as k / 255, rounded: what is cached and post-processed."""

StainMatrix = Float64[np.ndarray, "3 2"]
"""Unit optical-density vectors, rows R, G, B; columns hematoxylin, eosin."""

MaxC = Float64[np.ndarray, "2"]
"""99th percentile of each stain's concentration: hematoxylin, eosin."""

Labels = Int32[np.ndarray, "h w"]
"""Which connected component a pixel belongs to, from 1; 0: none."""


def label_components(mask: npt.NDArray[np.bool_] | npt.NDArray[np.uint8]) -> tuple[int, Labels]:
    """Label the 8-connected components of a mask (0 or 1).

    Returns:
        the number of labels, background included, and the label of each pixel (0: background)."""
    num_labels, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    return num_labels, np.asarray(labels, np.int32)
