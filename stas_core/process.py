"""The process that trains or predicts: its threads, kernels, memory and random state."""

import ctypes
import os
import platform
import random
import sys

import cv2
import numpy as np
import torch

from stas_core.errors import ResourceError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def set_up(device: torch.device, *, num_threads: int, deterministic: bool) -> None:
    """Set the threads of torch and OpenCV, choose deterministic or fastest kernels, and keep freed memory."""
    torch.set_num_threads(num_threads)
    cv2.setNumThreads(num_threads if num_threads > 1 else 0)
    keep_freed_memory()
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # slow debugging aid
    # An operation without a deterministic kernel warns by name instead of stopping a fold.
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic mode without it
    elif device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def device(*, on_gpu: bool, remedy: str) -> torch.device:
    """Return the device that this process is to work on.

    Args:
        on_gpu: whether it was given a GPU.
        remedy: what else to do where torch finds none; part of the message.

    Raises:
        ResourceError: it was given a GPU, and torch finds none. On a CPU its results would differ, after many hours.
    """
    if on_gpu and not torch.cuda.is_available():
        raise ResourceError(
            "the cluster promises a GPU, but torch finds none on this node; see its driver and torch's build, or "
            f"{remedy}"
        )
    return torch.device("cuda" if on_gpu else "cpu")


def seed(*parts: int) -> None:
    """Seed every generator from several numbers."""
    mixed = mix(*parts)
    random.seed(mixed)
    np.random.seed(mixed)  # libraries may draw from the global generator
    torch.manual_seed(mixed)


def mix(*parts: int) -> int:
    """Derive one seed from several numbers; a change in any of them gives an independent stream."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks for the next step or image: returning and zeroing pages is slow.

    By default it returns large ones to the kernel, which zeroes them again, page by page: a sixth of the time of a
    training step on a CPU, and two fifths of that of a field's prediction.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
