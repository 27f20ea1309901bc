"""The loss against its definition in the paper, written out in plain numpy."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stas_core.errors import ConfigError
from stas_core.train.losses import _head_loss, head_weights, segmentation_loss
from stas_core.train.recipe import LossConfig

PAPER = LossConfig()


def batch(seed: int = 0, num: int = 3, height: int = 16, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num, 2, height, width, generator=generator)
    target = (torch.rand(num, height, width, generator=generator) < 0.3).float()
    valid = (torch.rand(num, height, width, generator=generator) < 0.8).float()
    return logits, target, valid


def paper_loss(
    logits: npt.NDArray[np.float64], target: npt.NDArray[np.float64], valid: npt.NDArray[np.float64], gamma: float
) -> tuple[float, float]:
    """Return Dice and focal term of one image, summed pixel by pixel over both classes."""
    shifted = np.exp(logits - logits.max(axis=0))
    probability = shifted / shifted.sum(axis=0)
    one_hot = np.stack([1 - target, target])
    overlap = total = focal = 0.0
    for y, x in zip(*np.nonzero(valid), strict=True):
        for k in range(2):
            overlap += one_hot[k, y, x] * probability[k, y, x]
            total += one_hot[k, y, x] + probability[k, y, x]
        true = probability[int(target[y, x]), y, x]
        focal -= (1 - true) ** gamma * math.log(true)
    return 1 - 2 * overlap / total, focal / valid.sum()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.sampled_from([0.0, 1.0, 2.0, 3.5]))
def test_equals_the_papers_definition(seed: int, gamma: float) -> None:
    logits, target, valid = batch(seed)
    config = LossConfig(dice_weight=0.7, focal_weight=1.3, focal_alpha=0.5, focal_gamma=gamma)
    loss = segmentation_loss([logits], target, valid, config=config)
    for i in range(len(loss)):
        dice, focal = paper_loss(
            logits[i].double().numpy(), target[i].double().numpy(), valid[i].double().numpy(), gamma
        )
        assert loss[i].item() == pytest.approx(0.7 * dice + 1.3 * 0.5 * focal, rel=2e-5)


def test_target_dice_equals_its_definition() -> None:
    logits, target, valid = batch()
    config = LossConfig(dice_over="target", focal_weight=0)
    probability = logits.softmax(1)[:, 1]
    for i, loss in enumerate(segmentation_loss([logits], target, valid, config=config)):
        counts = valid[i] == 1
        p, y = probability[i][counts], target[i][counts]
        assert loss.item() == pytest.approx(1 - (2 * (p * y).sum().item() + 1) / ((p + y).sum().item() + 1), rel=1e-5)


def test_focal_without_gamma_is_cross_entropy() -> None:
    logits, target, _ = batch()
    config = LossConfig(dice_weight=0, focal_gamma=0)
    loss = segmentation_loss([logits], target, torch.ones_like(target), config=config)
    expected = F.cross_entropy(logits, target.long(), reduction="none").mean((1, 2))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dice_over", ["both", "target"])
def test_perfect_prediction_costs_nothing_and_the_opposite_costs_most(dice_over: str) -> None:
    _, target, valid = batch()
    config = LossConfig.model_validate({"dice_over": dice_over})
    right = 1000 * torch.stack([1 - 2 * target, 2 * target - 1], dim=1)
    assert segmentation_loss([right], target, valid, config=config).abs().max() < 1e-6
    assert (segmentation_loss([-right], target, valid, config=config) > 1000).all()


@pytest.mark.parametrize("dice_over", ["both", "target"])
def test_padding_has_no_say(dice_over: str) -> None:
    logits, target, valid = batch()
    config = LossConfig.model_validate({"dice_over": dice_over})
    logits.requires_grad_()
    loss = segmentation_loss([logits], target, valid, config=config)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    padded = (valid == 0)[:, None].expand_as(logits)
    assert (gradient[padded] == 0).all()
    assert (gradient[~padded] != 0).all()
    other = torch.where(padded, torch.full_like(logits, 50.0), logits)
    flipped = torch.where(valid == 1, target, 1 - target)
    torch.testing.assert_close(segmentation_loss([other], flipped, valid, config=config), loss, rtol=0, atol=0)


def test_each_image_has_its_own_loss() -> None:
    logits, target, valid = batch()
    together = segmentation_loss([logits], target, valid, config=PAPER)
    alone = [segmentation_loss([logits[i, None]], target[i, None], valid[i, None], config=PAPER) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_image_without_a_valid_pixel_costs_nothing() -> None:
    logits, target, _ = batch()
    logits.requires_grad_()
    loss = segmentation_loss([logits], target, torch.zeros_like(target), config=PAPER)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (loss == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dice_over", ["both", "target"])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e20])
def test_extreme_logits_stay_finite(gamma: float, dice_over: str, size: float) -> None:
    _, target, valid = batch()
    sign = torch.tensor([1.0, -1.0]).repeat(12)
    logits = (size * torch.stack([sign.expand_as(target), -sign.expand_as(target)], dim=1)).requires_grad_()
    config = LossConfig.model_validate({"focal_gamma": gamma, "dice_over": dice_over})
    loss = segmentation_loss([logits], target, valid, config=config)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dice_over", ["both", "target"])
def test_gradient_is_the_derivative(dice_over: str) -> None:
    logits, target, valid = (t.double() for t in batch(num=2, height=3, width=4))
    config = LossConfig.model_validate({"dice_over": dice_over})
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: _head_loss(x, target, valid, config), [logits])


def test_heads_are_summed_with_their_weights() -> None:
    logits, target, valid = batch()
    half, quarter = logits[:, :, ::2, ::2] + 1, logits[:, :, ::4, ::4] - 1
    full = segmentation_loss([logits], target, valid, config=PAPER)
    at_half = segmentation_loss([half], target[:, ::2, ::2], valid[:, ::2, ::2], config=PAPER)
    at_quarter = segmentation_loss([quarter], target[:, ::4, ::4], valid[:, ::4, ::4], config=PAPER)
    together = segmentation_loss([logits, half, quarter], target, valid, config=PAPER)
    torch.testing.assert_close(together, full + at_half / 4 + at_quarter / 16)


def test_target_of_a_deeper_head_is_the_nearest_pixel() -> None:
    target = torch.zeros(1, 8, 8)
    target[:, 2:6, 4:] = 1
    expected = F.interpolate(target[None], scale_factor=0.5, mode="nearest")[0]
    right = 1000 * torch.stack([1 - 2 * expected, 2 * expected - 1], dim=1)
    first = 1000 * torch.stack([1 - 2 * target, 2 * target - 1], dim=1)
    loss = segmentation_loss([first, right], target, torch.ones_like(target), config=PAPER)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_cosine_fades_the_deeper_heads_only() -> None:
    config = LossConfig(deep_supervision_schedule="cosine")
    assert head_weights(config, 0.0) == pytest.approx((1, 0.25, 0.0625))
    assert head_weights(config, 0.5) == pytest.approx((1, 0.25 * math.sqrt(0.5), 0.0625 * math.sqrt(0.5)))
    assert head_weights(config, 1.0) == pytest.approx((1, 0, 0))
    assert head_weights(PAPER, 1.0) == (1, 0.25, 0.0625)


def test_progress_reaches_the_loss() -> None:
    logits, target, valid = batch()
    config = LossConfig(deep_supervision_schedule="cosine")
    outputs = [logits, logits[:, :, ::2, ::2]]
    at_end = segmentation_loss(outputs, target, valid, config=config, progress=1.0)
    torch.testing.assert_close(at_end, segmentation_loss([logits], target, valid, config=config))


def test_more_heads_than_weights_is_an_error() -> None:
    logits, target, valid = batch()
    with pytest.raises(ConfigError, match=r"deep_supervision_weights = \(1\.0,\) has 1 entries for 2 heads"):
        config = LossConfig(deep_supervision_weights=(1,))
        segmentation_loss([logits, logits[:, :, ::2, ::2]], target, valid, config=config)


def test_is_computed_in_float32_under_autocast() -> None:
    logits, target, valid = batch()
    rounded = logits.bfloat16()
    expected = segmentation_loss([rounded.float()], target, valid, config=PAPER)
    with torch.autocast("cpu", torch.bfloat16):
        loss = segmentation_loss([rounded], target, valid, config=PAPER)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
