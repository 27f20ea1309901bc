"""Prediction and a training step on pretended CUDA tensors, which find what is left on the wrong device.

torch's FakeTensorMode runs shapes, types and devices of every operation, and none of its arithmetic, so no GPU is
needed. What a real one computes, `tests/gpu/check.py` says.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stas_core import config
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.model import SegmentationModel, build_model
from stas_core.predict.inference import InferenceConfig
from stas_core.predict.predictor import Member, Predictor, autocast, normalise
from stas_core.train.losses import segmentation_loss
from stas_core.train.recipe import LossConfig
from tests.conftest import TINY_MODEL

pytestmark = pytest.mark.no_cover
CUDA = torch.device("cuda", 0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that there is a GPU; models are made on it, as moving a fake one is not implemented."""
    monkeypatch.setattr(SegmentationModel, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    with FakeTensorMode():
        yield


def make_model(device: torch.device = CUDA, **settings: Any) -> SegmentationModel:
    with torch.device(device):
        return build_model(config.build(ModelConfig, TINY_MODEL | settings))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    "settings", [{"flips": ["identity"], "amp": "none"}, {"flips": ["identity", "ud"], "turns": True}], ids=str
)
def test_predictions_stay_on_the_gpu(settings: dict[str, Any]) -> None:
    members = [Member("half", make_model(), scale=0.5), Member("plain", make_model())]
    predictor = Predictor(members, device=CUDA, config=config.build(InferenceConfig, {"batch_size": 2} | settings))
    sizes = [(50, 70), (64, 64), (50, 70)]
    found = predictor.predict([np.zeros((*size, 3), np.uint8) for size in sizes])
    for prediction, size in zip(found, sizes, strict=True):
        for tensor, shape in ((prediction.prob, size), (prediction.std, size), (prediction.members, (2, *size))):
            assert tensor.device == CUDA and tensor.dtype == torch.float32 and tuple(tensor.shape) == shape


@pytest.mark.usefixtures("fake")
def test_what_is_left_on_the_cpu_is_found() -> None:
    predictor = Predictor([Member("left", make_model(torch.device("cpu")))], device=CUDA, config=InferenceConfig())
    with pytest.raises(RuntimeError, match=r"device|bfloat16.*weight type \(torch.float32\)"):
        predictor.predict([np.zeros((64, 64, 3), np.uint8)])


@pytest.mark.usefixtures("fake")
def test_a_training_step_stays_on_the_gpu() -> None:
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.device(CUDA):
        images = torch.zeros((2, 3, 64, 64), dtype=torch.uint8)
        targets, valid = torch.zeros((2, 64, 64)), torch.ones((2, 64, 64))
    mean, std = (torch.tensor(values, device=CUDA).view(1, 3, 1, 1) for values in (model.mean, model.std))
    with autocast(CUDA, "auto"):
        logits = model(normalise(images, mean, std))
    losses = segmentation_loss(logits, targets, valid, config=LossConfig(), progress=0.5)
    assert losses.device == CUDA and losses.dtype == torch.float32 and tuple(losses.shape) == (2,)
    for parameter in model.parameters():  # the backward pass itself asks for a real device
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.device == CUDA and parameter.dtype == torch.float32, name
