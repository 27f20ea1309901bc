"""Macenko estimate + norm at 1716x942 on one thread, against torchstain's numpy backend.

    python tests/bench/stain.py [image]

On a made field, or the image given. Norm only; both start from the same 8-bit array.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy loads its BLAS

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torchstain.base.normalizers import MacenkoNormalizer

from stas_core.data import stain
from stas_core.data.images import decode_image
from stas_core.data.phantom import PhantomConfig, make_phantom

ROUNDS = 7


def ours(image: np.ndarray) -> np.ndarray:
    estimate = stain.estimate(image)
    assert estimate is not None
    return stain.render(image, estimate, "norm")


def milliseconds(work: Callable[[np.ndarray], object], image: np.ndarray) -> float:
    start = time.perf_counter()
    work(image)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        image = decode_image(Path(sys.argv[1]).read_bytes(), sys.argv[1])
    else:
        image = make_phantom(PhantomConfig(), 0).image
    normaliser = MacenkoNormalizer(backend="numpy")

    def theirs(image: np.ndarray) -> object:
        return normaliser.normalize(image, stains=False)

    pairs = [(milliseconds(ours, image), milliseconds(theirs, image)) for _ in range(ROUNDS + 1)][1:]
    our_ms, their_ms = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(
        f"{image.shape[1]}x{image.shape[0]} px, median of {ROUNDS}: ours {our_ms:.0f} ms, torchstain {their_ms:.0f} ms"
    )
    print(f"ratio {their_ms / our_ms:.2f} (bar: 4)")


if __name__ == "__main__":
    main()
