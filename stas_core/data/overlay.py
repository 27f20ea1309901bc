"""Masks outlined on images, and images made small; without matplotlib, for the processes that finish images."""

import cv2
import numpy as np
from jaxtyping import Float32

from stas_core.arrays import Mask, ResizedImage, RgbImage
from stas_core.errors import ConfigError

# Cyan and yellow occur in no H&E stain and stay apart for colour-blind readers; the dark rim shows them on glass.
TRUTH_RGB, PREDICTION_RGB, RIM_RGB = (0, 220, 255), (255, 220, 0), (20, 20, 20)
ERROR_OPACITY = 0.4


def draw(image: RgbImage, *, truth: Mask | None, prediction: Mask | None, tint_errors: bool = False) -> RgbImage:
    """Outline truth (cyan) and prediction (yellow) on a copy of the image; lines grow with its width.

    Truth is drawn just outside its targets and the prediction just inside, so that neither hides the other where
    they agree. No line runs along the image's border.

    Args:
        image: what to draw on.
        truth: the annotated targets.
        prediction: the predicted targets.
        tint_errors: also tint missed areas cyan and false ones yellow; needs both masks.

    Raises:
        ConfigError: errors are to be tinted, but one mask is missing.

    Example:
        >>> image, mask = np.zeros((20, 20, 3), np.uint8), np.zeros((20, 20), bool)
        >>> mask[5:15, 5:15] = True
        >>> draw(image, truth=mask, prediction=None).any(axis=2).sum() > 0
        np.True_
    """
    drawn = image.copy()
    if tint_errors:
        if truth is None or prediction is None:
            raise ConfigError("tint_errors needs both truth and prediction: pass both, or leave it off")
        _tint(drawn, truth & ~prediction, TRUTH_RGB)
        _tint(drawn, prediction & ~truth, PREDICTION_RGB)
    line_px = max(1, round(image.shape[1] / 360))
    rim_px = round(line_px / 2)
    lines = []
    if truth is not None:
        lines.append((_distance_px(truth), TRUTH_RGB))
    if prediction is not None:
        lines.append((_distance_px(~prediction), PREDICTION_RGB))
    for distance, _ in lines:  # all rims before all lines: no rim may cover the other mask's line
        drawn[(distance > 0) & (distance <= line_px + rim_px)] = RIM_RGB
    for distance, rgb in lines:
        drawn[(distance > 0) & (distance <= line_px)] = rgb
    return np.asarray(drawn)


def _tint(image: RgbImage, mask: Mask, rgb: tuple[int, int, int]) -> None:
    image[mask] = np.rint((1 - ERROR_OPACITY) * image[mask] + ERROR_OPACITY * np.array(rgb))


def _distance_px(mask: Mask) -> Float32[np.ndarray, "h w"]:
    """Measure how far each pixel is from the mask; the mask itself is at 0."""
    return np.asarray(cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE))


def thumbnail(image: RgbImage, *, width_px: int) -> ResizedImage:
    """Shrink an image to a width by area averaging; a smaller one stays as it is."""
    height, width = image.shape[:2]
    if width <= width_px:
        return image
    size = (width_px, max(1, round(height * width_px / width)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
