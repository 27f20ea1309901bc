"""Check before training that BatchNorm has more than one value per channel to take statistics of."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from stas_core.data import images
from stas_core.data.cohort import CohortRow
from stas_core.data.images import padded_size
from stas_core.errors import ConfigError
from stas_core.networks.model import SegmentationModel
from stas_core.train.recipe import DataConfig


def require_statistics(model: SegmentationModel, rows: Sequence[CohortRow], data: DataConfig, num_images: int) -> None:
    """Refuse a model that normalises over a single value per channel in passes of `num_images` training images.

    Two images or more always give two values. One alone gives one where the features are 1 x 1: of an image no larger
    than the encoder's stride, or in a decoder that pools over the whole image (deeplabv3plus, pspnet).

    Raises:
        ConfigError: with the sizes, and what to change.
    """
    if num_images > 1 or any(isinstance(layer, nn.SyncBatchNorm) for layer in model.modules()):
        return
    sizes = {images.scaled_size((row.height, row.width), data.scale) for row in rows}
    if data.crop_px is not None:
        sizes = {(min(height, data.crop_px), min(width, data.crop_px)) for height, width in sizes}
    height, width = min(sizes, key=lambda size: (padded_size(size, multiple=model.stride), size))
    padded_height, padded_width = padded_size((height, width), multiple=model.stride)
    trial = copy.deepcopy(model).to("meta").train()  # shapes without numbers: nothing is computed
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial(torch.empty(1, 3, padded_height, padded_width, device="meta"))
    except NotImplementedError:
        return  # an operation without shape inference: the first step will show
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        crop = "" if data.crop_px is None else f", data.crop_px = {data.crop_px}"
        raise ConfigError(
            f"BatchNorm has only one value per channel to normalise over: some forward passes have one image (a "
            "worker's share of optim.batch_size, cut by optim.micro_batch_size), and the smallest training image is "
            f"{width}x{height} px (data.scale = {data.scale:g}{crop}; padded to {padded_width}x{padded_height}, a "
            f"multiple of the stride {model.stride}); use larger images or crops, give every pass two images (raise "
            "optim.batch_size and optim.micro_batch_size), or set model.batch_norm=frozen where only the encoder has it"
        ) from error
