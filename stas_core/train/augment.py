"""Paired augmentation of an 8-bit image and its mask; crops and padding.

Operations come from libraries (albumentations, Pillow, OpenCV); what is drawn comes from the caller's generator alone,
so a sample is a pure function of that generator's seed. No function writes into its inputs; where nothing changes,
the inputs themselves may come back.

AutoAugment: Cubuk et al., CVPR 2019, the 25 sub-policies learned on CIFAR-10; torchvision has the table.
"""

import os
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float64, Int32
from PIL import Image, ImageOps
from torchvision.transforms.autoaugment import AutoAugment, AutoAugmentPolicy

from stas_core.arrays import Mask, ResizedImage, ResizedMask, RgbImage, label_components

# albumentations asks the network for a newer version at import unless this is set before.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
from albumentations.augmentations.pixel import functional as pixel

from stas_core.train.recipe import AugmentConfig

StainVariant = Literal["image", "H", "norm"]

TargetPoints = Int32[np.ndarray, "num_targets num_points 2"]
"""(y, x) of pixels of each target: the same number for each, so that drawing one is two integers."""

NUM_LAST_EPOCHS_WITHOUT_POLICY = 5
FILL = 128
"""Grey level of image pixels that a geometric operation brings in from outside; the mask gets False."""


def policy_probability(config: AugmentConfig, *, epoch: int, num_epochs: int) -> float:
    """Return the chance that a sample of `epoch` (counted from 0) gets a sub-policy.

    `decay` is p0 * (1 - 0.7 * epoch / (num_epochs - 5)), and 0 in the last five epochs: a run of at most five
    epochs has no policy at all.
    """
    if config.policy == "none" or config.policy_schedule == "off":
        return 0.0
    if config.policy_schedule == "constant":
        return config.policy_p0
    num_with_policy = num_epochs - NUM_LAST_EPOCHS_WITHOUT_POLICY
    return config.policy_p0 * (1 - 0.7 * epoch / num_with_policy) if epoch < num_with_policy else 0.0


def draw_stain_variant(config: AugmentConfig, rng: np.random.Generator) -> StainVariant:
    """Draw which rendering of the image a sample shows."""
    u = rng.random()
    if u < config.norm_p:
        return "norm"
    return "H" if u < config.norm_p + config.hematoxylin_p else "image"


OpName = Literal[
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "solarize",
    "posterize",
    "invert",
    "autocontrast",
    "equalize",
]


class Op(NamedTuple):
    """One step of a sub-policy: an operation, its chance, and its strength from 0 to 9 (0 where it has none)."""

    name: OpName
    probability: float
    level: int


SubPolicy = tuple[Op, ...]


def _op(name: str, probability: float, level: int | None) -> Op:
    """Translate an operation from torchvision's names ("ShearX"), where None says that it has no strength."""
    own_name: OpName = re.sub(r"(?<=[a-z])(?=[XY]$)", "_", name).lower()  # type: ignore[assignment]
    return Op(own_name, probability, level or 0)


_CIFAR10: tuple[SubPolicy, ...] = tuple(
    tuple(_op(*op) for op in sub_policy) for sub_policy in AutoAugment(AutoAugmentPolicy.CIFAR10).policies
)


def _as_in_the_paper(sub_policy: SubPolicy) -> SubPolicy:
    kept = (op for op in sub_policy if op.name != "sharpness")
    return tuple(op._replace(name="shear_x") if op.name == "shear_y" else op for op in kept)


POLICIES: dict[str, tuple[SubPolicy, ...]] = {
    "autoaugment_code": _CIFAR10,
    "autoaugment_paper": tuple(map(_as_in_the_paper, _CIFAR10)),
    "none": (),
}

MAX_LEVEL = 9
_LARGEST: dict[OpName, float] = {
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 150 / 331,
    "translate_y": 150 / 331,
    "rotate": 30.0,
    "brightness": 0.9,
    "color": 0.9,
    "contrast": 0.9,
    "sharpness": 0.9,
}
"""Magnitude at MAX_LEVEL of the operations that go either way; the sign is drawn."""


def op_magnitude(op: Op, *, height: int, width: int, translate_y_by: Literal["height", "width"] = "height") -> float:
    """Return the unsigned magnitude of an operation on an image of that size.

    Shear: px per px. Translation: whole px. Rotation: degrees. Brightness, colour, contrast, sharpness: change of a
    factor of 1. Solarise: grey level from which pixels are inverted. Posterise: bits kept. Others have none: 0.
    """
    share = op.level / MAX_LEVEL
    if op.name == "solarize":
        return 256 * (1 - share)
    if op.name == "posterize":
        return 8.0 - round(4 * share)
    largest = _LARGEST.get(op.name, 0.0)
    if op.name == "translate_x":
        return float(int(width * largest * share))
    if op.name == "translate_y":
        return float(int((height if translate_y_by == "height" else width) * largest * share))
    return largest * share


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def _sharpness(image: RgbImage, change: float) -> RgbImage:
    return np.asarray(cv2.addWeighted(image, 1 + change, cv2.filter2D(image, -1, _SMOOTH), -change, 0))


def _by_pillow(operation: Callable[[Image.Image], Image.Image]) -> Callable[[RgbImage, float], RgbImage]:
    # albumentations has a "pil" mode of both, but it misses Pillow by up to 18 and 29 grey levels.
    return lambda image, _: np.array(operation(Image.fromarray(image)))


_PHOTOMETRIC: dict[OpName, Callable[[RgbImage, float], RgbImage]] = {
    "brightness": lambda image, change: pixel.adjust_brightness_torchvision(image, 1 + change),
    "color": lambda image, change: pixel.adjust_saturation_torchvision(image, 1 + change),
    "contrast": lambda image, change: pixel.adjust_contrast_torchvision(image, 1 + change),
    "sharpness": _sharpness,
    "solarize": lambda image, threshold: pixel.solarize(image, threshold / 255),
    "posterize": lambda image, num_bits: pixel.posterize(image, int(num_bits)),
    "invert": lambda image, _: pixel.invert(image),
    "autocontrast": _by_pillow(ImageOps.autocontrast),
    "equalize": _by_pillow(ImageOps.equalize),
}


def apply_op(image: RgbImage, mask: Mask, *, name: OpName, magnitude: float) -> tuple[RgbImage, Mask]:
    """Apply one AutoAugment operation; geometric ones move image (bilinear) and mask (nearest) by the same matrix.

    Args:
        image: image.
        mask: its mask.
        name: the operation.
        magnitude: see `op_magnitude`; of those that go either way, with its sign.
    """
    if name in _PHOTOMETRIC:
        return _PHOTOMETRIC[name](image, magnitude), mask
    height, width = mask.shape
    matrix = _affine(name, magnitude, height, width)
    moved = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=(FILL, FILL, FILL))
    moved_mask = cv2.warpAffine(mask.view(np.uint8), matrix, (width, height), flags=cv2.INTER_NEAREST)
    return np.asarray(moved), np.asarray(moved_mask).view(np.bool_)


def _affine(name: OpName, magnitude: float, height: int, width: int) -> Float64[np.ndarray, "2 3"]:
    """Build the matrix from source to destination pixel centres: rotation about the centre, shear about the corner."""
    linear, fixed, shift = np.eye(2), np.array([-0.5, -0.5]), np.zeros(2)
    if name == "rotate":
        angle = np.deg2rad(magnitude)
        linear = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        fixed = np.array([(width - 1) / 2, (height - 1) / 2])
    elif name == "shear_x":
        linear[0, 1] = magnitude
    elif name == "shear_y":
        linear[1, 0] = magnitude
    else:
        shift[("translate_x", "translate_y").index(name)] = magnitude
    return np.column_stack([linear, fixed - linear @ fixed + shift])


def augment(
    image: RgbImage, mask: Mask, *, rng: np.random.Generator, config: AugmentConfig, policy_p: float
) -> tuple[RgbImage, Mask]:
    """Augment one sample: with chance `policy_p` a sub-policy; then flips, quarter turns, brightness, noise.

    The order is fixed: noise comes last, so that nothing smooths it.
    """
    if rng.random() < policy_p and (sub_policies := POLICIES[config.policy]):
        sub_policy = sub_policies[rng.integers(len(sub_policies))]
        image, mask = apply_sub_policy(image, mask, sub_policy, rng=rng, translate_y_by=config.translate_y_by)
    image, mask = _turn(image, mask, rng, config)
    if rng.random() < config.brightness_p:
        factor = 1 + rng.uniform(-config.brightness_limit, config.brightness_limit)
        image = pixel.adjust_brightness_torchvision(image, factor)
    if rng.random() < config.noise_p:
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        noise *= 255 * config.noise_sigma
        image = np.asarray(cv2.add(image, noise, dtype=cv2.CV_8U))
    return image, mask


def apply_sub_policy(
    image: RgbImage,
    mask: Mask,
    sub_policy: SubPolicy,
    *,
    rng: np.random.Generator,
    translate_y_by: Literal["height", "width"] = "height",
) -> tuple[RgbImage, Mask]:
    """Apply each step of a sub-policy with its chance, in order, with a drawn sign where it has one."""
    height, width = mask.shape
    for op in sub_policy:
        chosen, sign = rng.random() < op.probability, 1 if rng.random() < 0.5 else -1
        if not chosen:
            continue
        size = op_magnitude(op, height=height, width=width, translate_y_by=translate_y_by)
        image, mask = apply_op(image, mask, name=op.name, magnitude=size * sign if op.name in _LARGEST else size)
    return image, mask


def _turn(image: RgbImage, mask: Mask, rng: np.random.Generator, config: AugmentConfig) -> tuple[RgbImage, Mask]:
    flip_lr, flip_ud, rot90 = rng.random(3) < (config.flip_lr_p, config.flip_ud_p, config.rot90_p)
    if flip_lr or flip_ud:
        axis = -1 if flip_lr and flip_ud else int(flip_lr)
        image, mask = np.asarray(cv2.flip(image, axis)), _as_mask(cv2.flip(mask.view(np.uint8), axis))
    if rot90:
        square = mask.shape[0] == mask.shape[1]
        code = int(rng.integers(3)) if square else cv2.ROTATE_180
        image, mask = np.asarray(cv2.rotate(image, code)), _as_mask(cv2.rotate(mask.view(np.uint8), code))
    return image, mask


def _as_mask(pixels: np.ndarray) -> Mask:
    return np.asarray(pixels).view(np.bool_)


def target_points(mask: Mask, *, num_points: int = 64) -> TargetPoints:
    """Pick pixels of every target (8-connected component), spread over it: what `crop` centres on.

    Labelling takes about 10 ms on a 1716x942 mask; keep the result with the image. Equal masks give equal points.
    """
    _, labels = label_components(mask)
    yx = np.argwhere(mask)
    label_of = np.asarray(labels)[mask]
    yx = yx[np.argsort(label_of, kind="stable")]
    areas = np.bincount(label_of)[1:]
    # One point in each num_points-th of a target's pixels; even steps could fall into one column of it.
    share = (np.arange(num_points) + np.random.default_rng(0).random(num_points)) / num_points
    index = (np.cumsum(areas) - areas)[:, None] + np.floor(share * areas[:, None]).astype(np.int64)
    return np.asarray(yx[index], np.int32)


def crop(
    image: RgbImage,
    mask: Mask,
    *,
    size_px: int,
    positive_fraction: float,
    target_points: TargetPoints,
    rng: np.random.Generator,
) -> tuple[ResizedImage, ResizedMask]:
    """Draw a square crop; a side of the image shorter than `size_px` stays whole.

    With chance `positive_fraction` it holds a drawn pixel of a drawn target (targets first, so that small ones count
    as much as large ones) somewhere in its middle half; else, or without targets, it lies anywhere.

    Example:
        >>> image, mask = np.zeros((90, 120, 3), np.uint8), np.zeros((90, 120), bool)
        >>> points, rng = target_points(mask), np.random.default_rng(0)
        >>> found, _ = crop(image, mask, size_px=64, positive_fraction=0.5, target_points=points, rng=rng)
        >>> found.shape
        (64, 64, 3)
    """
    size = np.array(mask.shape)
    last = np.maximum(size - size_px, 0)
    if rng.random() < positive_fraction and len(target_points):
        point = target_points[rng.integers(target_points.shape[0]), rng.integers(target_points.shape[1])]
        corner = np.clip(point - rng.integers(size_px // 4, size_px - size_px // 4, 2), 0, last)
    else:
        corner = rng.integers(0, last, endpoint=True)
    y, x = corner
    window = np.s_[y : y + size_px, x : x + size_px]
    return np.ascontiguousarray(image[window]), np.ascontiguousarray(mask[window])
