import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stas_core import config, inference
from stas_core.inference import ALL_FLIPS, FLIP_AXES, Flip, InferenceConfig, Predictor
from stas_core.model import ModelConfig, SegmentationModel, build_model
from tests.conftest import TINY_MODEL

CPU = torch.device("cpu")


class RedChannel(nn.Module):
    """A stand-in network: the target's logit is the red channel, 0..255."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        red = batch[:, 0] / 255
        return torch.stack([torch.log1p(-red.clamp(max=0.999)), torch.log(red.clamp(min=0.001))], dim=1)


def predictor(flips: tuple[Flip, ...] = ALL_FLIPS, scale: float = 1.0) -> Predictor:
    model = SegmentationModel(RedChannel(), stride=32, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1.0, 1.0))
    return Predictor(model, scale=scale, device=CPU, config=InferenceConfig(flips=flips))


@pytest.mark.parametrize("flip", ALL_FLIPS)
def test_a_flip_undoes_itself_on_any_shape(flip: Flip) -> None:
    x = torch.arange(2 * 3 * 5).view(2, 3, 5)
    assert torch.equal(x.flip(FLIP_AXES[flip]).flip(FLIP_AXES[flip]), x)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 9))
def test_any_size_comes_back_pixel_for_pixel(height: int, width: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(1, 255, (height, width, 3), dtype=np.uint8)
    assert np.abs(predictor().predict_u8(image).astype(int) - image[..., 0]).max() <= 1


def test_flips_are_averaged() -> None:
    torch.manual_seed(0)
    model = build_model(config.build(ModelConfig, TINY_MODEL))
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)

    def predict(*flips: Flip) -> np.ndarray:
        return Predictor(model, scale=1, device=CPU, config=InferenceConfig(flips=flips)).predict(image)

    singles = [predict(flip) for flip in ALL_FLIPS]
    assert np.allclose(predict(*ALL_FLIPS), np.mean(singles, axis=0), atol=1e-5)
    mirrored = Predictor(model, scale=1, device=CPU, config=InferenceConfig(flips=("identity",))).predict(
        np.ascontiguousarray(image[:, ::-1])
    )
    assert np.allclose(singles[ALL_FLIPS.index("lr")], mirrored[:, ::-1], atol=1e-5)


def test_scaled_prediction_comes_back_at_native_size() -> None:
    image = np.zeros((101, 203, 3), np.uint8)
    image[:, 100:] = 200
    prob = predictor(scale=0.5).predict_u8(image)
    assert prob.shape == (101, 203)
    assert (prob[:, :95] < 10).all() and (abs(prob[:, 108:].astype(int) - 200) < 10).all()


def test_quantise_rounds_to_the_nearest() -> None:
    assert inference.quantise(np.array([[0, 0.5, 1, 127.6 / 255]], np.float32)).tolist() == [[0, 128, 255, 128]]


def test_auto_amp_is_off_on_cpu() -> None:
    with inference.autocast(CPU, "auto"):
        assert not torch.is_autocast_enabled("cpu")
    with inference.autocast(CPU, "bf16"):
        assert torch.is_autocast_enabled("cpu")
