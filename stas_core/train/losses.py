"""The paper's loss: Dice plus focal, per image, over valid pixels, summed over the heads of deep supervision.

With two classes, softmax gives the true class the probability p = sigmoid(s), where s is the margin between the two
logits, signed by the truth. Everything below is written in s: one map instead of two, exact at any logit.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from stas_core.errors import ConfigError
from stas_core.networks.tensors import Targets, Valid
from stas_core.train.recipe import LossConfig

_SMOOTHING_PX = 1.0


def segmentation_loss(
    outputs: Sequence[Float[Tensor, "n 2 _ _"]],
    target: Targets,
    valid: Valid,
    *,
    config: LossConfig,
    progress: float = 0.0,
) -> Float32[Tensor, "n"]:
    """Return the loss of each image, in float32 under any autocast; a pixel that is not valid takes no part.

    A deeper head is compared at its own resolution with every second (fourth) pixel of target and valid, which is
    nearest-neighbour downsampling. The heads' losses are summed, not averaged, as in the paper.

    Args:
        outputs: logits of each head, full resolution first.
        target: 1 on target pixels.
        valid: 1 on pixels that count.
        config: terms and weights.
        progress: share of the training that is done, in [0, 1].

    Raises:
        ConfigError: there are more heads than weights.

    Example:
        >>> import torch
        >>> target = torch.zeros(1, 8, 8)
        >>> heads = [torch.zeros(1, 2, 8 // 2**depth, 8 // 2**depth) for depth in range(2)]
        >>> segmentation_loss(heads, target, torch.ones_like(target), config=LossConfig()).shape
        torch.Size([1])
    """
    weights = head_weights(config, progress)
    if len(outputs) > len(weights):
        raise ConfigError(
            f"loss.deep_supervision_weights = {config.deep_supervision_weights} has {len(weights)} entries for "
            f"{len(outputs)} heads; give one for each or lower model.deep_supervision"
        )
    total = target.new_zeros(len(target))
    for logits, weight in zip(outputs, weights, strict=False):
        factor = target.shape[-1] // logits.shape[-1]
        shrunk = (slice(None), slice(None, None, factor), slice(None, None, factor))
        total = total + weight * _head_loss(logits.float(), target[shrunk], valid[shrunk], config)
    return total


def head_weights(config: LossConfig, progress: float) -> tuple[float, ...]:
    """Return the weight of each head at a share of the training in [0, 1]."""
    first, *deeper = config.deep_supervision_weights
    fade = math.cos(math.pi / 2 * progress) if config.deep_supervision_schedule == "cosine" else 1.0
    return (first, *(weight * fade for weight in deeper))


def _head_loss(logits: Tensor, target: Tensor, valid: Tensor, config: LossConfig) -> Tensor:
    margin = (logits[:, 1] - logits[:, 0]) * (2 * target - 1)
    dice = _dice_loss(margin.sigmoid(), target, valid, config)
    focal = _mean(_focal(margin, config), valid)
    return config.dice_weight * dice + config.focal_weight * focal


def _dice_loss(true_probability: Tensor, target: Tensor, valid: Tensor, config: LossConfig) -> Tensor:
    """Return 1 - 2 sum(Y P) / (sum Y + sum P) of each image, where Y is one-hot and P the probabilities."""
    if config.dice_over == "both":
        # sum(Y P) is the sum of the true class's probability; sum Y and sum P are the number of pixels each.
        return _mean(1 - true_probability, valid)
    probability = target * true_probability + (1 - target) * (1 - true_probability)
    overlap = (valid * target * probability).sum((1, 2))
    total = (valid * (target + probability)).sum((1, 2))
    return 1 - (2 * overlap + _SMOOTHING_PX) / (total + _SMOOTHING_PX)


def _focal(margin: Tensor, config: LossConfig) -> Tensor:
    """Return -alpha (1 - p)^gamma log p of each pixel (Lin et al. 2017), p the true class's probability."""
    # The clamp keeps the gradient of a power below one finite where p is exactly one.
    wrong = (-margin).sigmoid().clamp_min(1e-12)
    return -config.focal_alpha * wrong**config.focal_gamma * F.logsigmoid(margin)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Average over each image's valid pixels; zero where it has none."""
    return (values * valid).sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)
