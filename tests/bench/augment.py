"""Images per second of the augmentation on one thread, beside torchvision's AutoAugment.

    OMP_NUM_THREADS=1 python -m tests.bench.augment

Ours moves image and mask, torchvision the image alone. The rounds of all candidates alternate, so that a busy machine
slows them alike; given are medians over rounds and, for the sub-policies, the ratio to torchvision's.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from stas_core.arrays import Mask, RgbImage
from stas_core.data.images import pad, padded_size
from stas_core.train.augment import augment, crop, target_points
from stas_core.train.recipe import AugmentConfig

NUM_ROUNDS = 7
POLICY_ONLY = AugmentConfig(flip_lr_p=0, flip_ud_p=0, brightness_p=0, noise_p=0)


def make_field(height: int, width: int) -> tuple[RgbImage, Mask]:
    """Make a smooth random image with grain, and a mask of blobs."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 235, (height // 8, width // 8, 3), dtype=np.uint8)
    image = np.asarray(cv2.resize(coarse, (width, height)), np.uint8)
    blobs = cv2.resize(rng.random((height // 32, width // 32)), (width, height)) > 0.9
    return np.asarray(cv2.add(image, rng.integers(0, 20, image.shape, dtype=np.uint8))), np.asarray(blobs)


def images_per_s(candidates: dict[str, Callable[[], object]], num_images: int) -> dict[str, float]:
    """Time the candidates in alternating rounds of `num_images`; return medians."""
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(NUM_ROUNDS + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            for _ in range(num_images):
                run()
            if number:  # the first round warms up
                rates[name].append(num_images / (time.perf_counter() - start))
    return {name: median(values) for name, values in rates.items()}


def main() -> None:
    """Print the table."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs = AutoAugment(AutoAugmentPolicy.CIFAR10, fill=[128.0, 128.0, 128.0])
    for height, width, num_images in ((256, 256, 500), (942, 1716, 50)):
        image, mask = make_field(height, width)
        picture, tensor = Image.fromarray(image), torch.from_numpy(image).permute(2, 0, 1).contiguous()
        points, rng = target_points(mask), np.random.default_rng(0)
        ours = partial(augment, image, mask, rng=rng)
        padded_height, padded_width = padded_size((height, width), multiple=32)
        rates = images_per_s(
            {
                "sub-policy, this project": partial(ours, config=POLICY_ONLY, policy_p=1.0),
                "sub-policy, torchvision on PIL": partial(theirs, picture),
                "sub-policy, torchvision on tensors": partial(theirs, tensor),
                "all of augment, first epoch": partial(ours, config=AugmentConfig(), policy_p=0.4),
                "all of augment, last epoch": partial(ours, config=AugmentConfig(), policy_p=0.0),
                "crop to 128 px": partial(
                    crop, image, mask, size_px=128, positive_fraction=0.7, target_points=points, rng=rng
                ),
                "pad": partial(pad, image, mask, height=padded_height, width=padded_width),
                "target points": partial(target_points, mask),
            },
            num_images,
        )
        print(f"{height}x{width}, {num_images} images a round, {NUM_ROUNDS} rounds, 1 thread")
        for name, rate in rates.items():
            ratio = f"  ours / theirs {rates['sub-policy, this project'] / rate:.2f}" if "torchvision" in name else ""
            print(f"  {name:36s} {rate:10.1f} images/s{ratio}")


if __name__ == "__main__":
    main()
