import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stas_core import config
from stas_core.data import images
from stas_core.errors import ConfigError
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.model import build_model
from stas_core.predict import onnx_export
from stas_core.predict.inference import ALL_FLIPS, InferenceConfig
from stas_core.predict.onnx_export import ImageCheck, OnnxPredictor, WholeImages
from stas_core.predict.predictor import Member, Predictor
from tests.conftest import TINY_MODEL

CPU = torch.device("cpu")
EVERYTHING = InferenceConfig(flips=ALL_FLIPS, turns=True)


def network(seed: int, scale: float) -> Member:
    torch.manual_seed(seed)
    return Member(f"network {seed}", build_model(config.build(ModelConfig, TINY_MODEL)), scale)


@functools.cache
def both() -> tuple[Predictor, OnnxPredictor]:
    members = [network(0, 0.5), network(1, 1.0)]
    data = onnx_export.export(WholeImages(members, EVERYTHING), {"made by": "a test"})
    return Predictor(members, device=CPU, config=EVERYTHING), OnnxPredictor(data, num_threads=1)


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(size=st.tuples(st.integers(1, 110), st.integers(1, 110)))
@settings(max_examples=16, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_the_file_gives_the_maps_of_the_predictor_at_any_size(size: tuple[int, int]) -> None:
    predictor, exported = both()
    image = noise(size[0], *size)
    check = ImageCheck.of("it", predictor.predict_u8(image), exported.predict_u8(image))
    assert check.max_difference <= 1 and check.num_differing <= max(3, 0.02 * image.shape[0] * image.shape[1])


@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    scale=st.sampled_from([1.0, 0.75, 0.5, 1 / 3, 0.3, 0.25, 0.125]),
)
@settings(max_examples=60, deadline=None)
def test_images_are_shrunk_as_by_opencv(size: tuple[int, int], scale: float) -> None:
    image = noise(7, *size)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    found = onnx_export._shrink(planes, scale)[0].permute(1, 2, 0).numpy()
    expected = images.resize(image, scale)
    assert found.shape == expected.shape
    # A grey level apart at most, where a mean lies between two.
    assert np.abs(found - expected).max() <= 1 and np.mean(found != expected) <= 0.01 + 2 / found.size
    if scale in (1, 0.5) and not (size[0] % 2 or size[1] % 2):
        assert np.array_equal(found, expected)


@given(length=st.integers(1, 100), stride=st.sampled_from([4, 32, 64]))
@settings(max_examples=30, deadline=None)
def test_rims_are_those_of_numpy(length: int, stride: int) -> None:
    row = np.arange(length, dtype=np.float32)
    found = onnx_export._reflect(torch.from_numpy(row).view(1, 1, 1, -1), 3, stride)
    assert np.array_equal(found.numpy().ravel(), np.pad(row, (0, -length % stride), mode="reflect"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adaptive_px": 10}, "inference.adaptive_px = 10 cannot be expressed"),
        ({"compile": True}, "inference.compile = True cannot"),
        ({"batch_size": 2}, "inference.batch_size = 2 cannot"),
        ({"amp": "bf16"}, "inference.amp = bf16 cannot"),
    ],
)
def test_settings_that_a_graph_cannot_express_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WholeImages([network(0, 1.0)], InferenceConfig(flips=ALL_FLIPS, **values))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx" else name)
    with pytest.raises(ConfigError, match=r"onnx not installed; run: pip install 'stas-on-ray\[onnx\]'"):
        onnx_export.require_onnx()


def test_a_map_of_another_size_differs_everywhere() -> None:
    check = ImageCheck.of("it", np.full((2, 3), 200, np.uint8), np.zeros((3, 2), np.uint8))
    assert (check.num_differing, check.max_difference, check.num_predicted) == (6, 255, 6)
