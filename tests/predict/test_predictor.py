import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from stas_core import config, storage
from stas_core.errors import CheckpointError
from stas_core.networks import checkpoints
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.checkpoints import CheckpointRecord
from stas_core.networks.model import SegmentationModel, build_model
from stas_core.predict import ensemble
from stas_core.predict import predictor as predictors
from stas_core.predict.inference import ALL_FLIPS, Flip, InferenceConfig
from stas_core.predict.predictor import Member, Predictor, Transform
from tests.conftest import TINY_MODEL

CPU = torch.device("cpu")


class RedChannel(nn.Module):
    """A stand-in network: the target's logit is the red channel, 0..255."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        red = batch[:, 0] / 255
        return torch.stack([torch.log1p(-red.clamp(max=0.999)), torch.log(red.clamp(min=0.001))], dim=1)


def member(name: str = "red", scale: float = 1.0, stride: int = 32) -> Member:
    model = SegmentationModel(RedChannel(), stride=stride, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1.0, 1.0))
    return Member(name, model, scale)


def predictor(*members: Member, **settings_: Any) -> Predictor:
    return Predictor(members or [member()], device=CPU, config=InferenceConfig(**settings_))


def network(seed: int, **settings_: Any) -> Member:
    torch.manual_seed(seed)
    return Member(f"network {seed}", build_model(config.build(ModelConfig, {**TINY_MODEL, **settings_})))


def noise(seed: int, *size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 255, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize("flip", ALL_FLIPS)
@pytest.mark.parametrize("transpose", [False, True])
def test_undoing_a_transform_is_the_identity_on_any_shape(flip: Flip, transpose: bool) -> None:
    x = torch.arange(2 * 3 * 5).view(2, 3, 5)
    transform = Transform(flip, transpose)
    assert torch.equal(transform.undo(transform.apply(x)), x)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 9), st.booleans())
def test_any_size_comes_back_pixel_for_pixel(height: int, width: int, seed: int, turns: bool) -> None:
    image = noise(seed, height, width)
    assert np.abs(predictor(turns=turns).predict_u8(image).astype(int) - image[..., 0]).max() <= 1


def test_flips_are_averaged() -> None:
    image = noise(0, 64, 96)

    def predict(*flips: Flip) -> torch.Tensor:
        return predictor(network(0), flips=flips).predict([image])[0].prob

    singles = [predict(flip) for flip in ALL_FLIPS]
    assert torch.allclose(predict(*ALL_FLIPS), torch.stack(singles).mean(dim=0), atol=1e-5)
    mirrored = predictor(network(0), flips=("identity",)).predict([image[:, ::-1].copy()])[0].prob
    assert torch.allclose(singles[ALL_FLIPS.index("lr")], mirrored.flip(-1), atol=1e-5)


def test_members_are_averaged_in_one_order_and_their_disagreement_is_told() -> None:
    image = noise(1, 64, 64)
    first, second = network(1), network(2)
    alone = [predictor(one).predict([image])[0] for one in (first, second)]
    both = predictor(first, second).predict([image])[0]
    assert torch.allclose(both.prob, (alone[0].prob + alone[1].prob) / 2, atol=1e-6)
    assert torch.allclose(both.std, (alone[0].prob - alone[1].prob).abs() / 2, atol=1e-6)
    assert (alone[0].std == 0).all()
    turned_round = predictor(second, first).predict([image])[0]
    assert torch.equal(both.prob, turned_round.prob) and torch.equal(both.std, turned_round.std)
    assert both.num_passes == 4


def test_members_may_differ_in_scale_stride_normalisation_and_architecture() -> None:
    image = np.zeros((101, 203, 3), np.uint8)
    image[:, 100:] = 200
    prob = predictor(member("a"), member("b", 0.5), member("c", 0.25, stride=8)).predict_u8(image)
    assert prob.shape == (101, 203)
    assert (prob[:, :90] < 10).all() and (abs(prob[:, 112:].astype(int) - 200) < 10).all()
    other = network(3, arch="fpn")
    assert predictor(network(1), other).predict_u8(noise(0, 70, 90)).shape == (70, 90)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_batch_of_mixed_sizes_equals_batches_of_one(batch_size: int) -> None:
    batch = [noise(seed, *size) for seed, size in enumerate([(64, 64), (40, 90), (64, 64), (64, 64), (1, 7)])]
    one = predictor(network(0), network(1), batch_size=batch_size)
    together = one.predict(batch)
    for image, found in zip(batch, together, strict=True):
        (alone,) = one.predict([image])
        assert np.array_equal(found.prob_u8(), alone.prob_u8())
        assert found.prob.shape == image.shape[:2]


def test_larger_images_go_in_smaller_batches() -> None:
    shapes: list[tuple[int, ...]] = []
    one = member()
    one.model.network.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    limited = predictor(one, flips=("identity",), batch_size=4, batch_px=2 * 64 * 64)
    batch = [noise(seed, *size) for seed, size in enumerate([(64, 64), (64, 64), (64, 64), (128, 128), (32, 32)])]
    found = limited.predict(batch)
    assert sorted(shapes) == [(1, 3, 128, 128), (2, 3, 64, 64), (2, 3, 64, 64), (4, 3, 32, 32)]
    for image, one_found in zip(batch, found, strict=True):
        assert np.array_equal(one_found.prob_u8(), limited.predict([image])[0].prob_u8())


def test_adaptive_tta_stops_where_members_agree() -> None:
    flat, unsure = np.full((64, 64, 3), 250, np.uint8), noise(0, 64, 64)
    opposite = member("opposite")
    opposite.model.network.register_forward_hook(lambda *call: call[2].flip(1))
    agreeing = predictor(member("a"), member("b"), adaptive_px=0)
    assert [found.num_passes for found in agreeing.predict([flat, unsure])] == [1, 1]
    assert np.array_equal(agreeing.predict_u8(unsure), predictor(member("a"), member("b")).predict_u8(unsure))
    quarrelling = predictor(member("a"), opposite, adaptive_px=0)
    assert [found.num_passes for found in quarrelling.predict([flat, unsure])] == [4, 4]
    assert [found.num_passes for found in predictor(member("a"), adaptive_px=0).predict([flat])] == [2]


def test_bfloat16_gives_nearly_the_same_maps() -> None:
    members, batch = [network(0), network(1)], [noise(0, 40, 70), noise(1, 33, 50)]
    plain = predictor(*members).predict(batch)
    for one, other in zip(plain, predictor(*members, amp="bf16").predict(batch), strict=True):
        assert other.prob.dtype == torch.float32 and not torch.equal(one.prob, other.prob)
        assert torch.allclose(one.prob, other.prob, atol=0.02)


@pytest.mark.no_cover
def test_a_compiled_graph_gives_the_same_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of small networks, captured as always and run as they are: making machine code takes minutes. That the real
    # network can be captured is a test of its own, in test_model.
    graphs: list[torch.fx.GraphModule] = []

    def run_as_it_is(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=run_as_it_is))
    members, batch = [member("a"), member("b", scale=0.5)], [noise(0, 40, 70), noise(1, 33, 50)]
    compiled = predictor(*members, compile=True).predict(batch)
    assert graphs
    for one, other in zip(predictor(*members).predict(batch), compiled, strict=True):
        assert torch.equal(one.prob, other.prob)


def test_disagreement_has_the_range_of_a_byte() -> None:
    opposite = member("opposite")
    opposite.model.network.register_forward_hook(lambda *call: call[2].flip(1))
    white = np.full((32, 32, 3), 255, np.uint8)
    (found,) = predictor(member("a"), opposite).predict([white])
    assert found.std_u8().min() >= 254


def test_auto_amp_is_off_on_cpu() -> None:
    with predictors.autocast(CPU, "auto"):
        assert not torch.is_autocast_enabled("cpu")
    with predictors.autocast(CPU, "bf16"):
        assert torch.is_autocast_enabled("cpu")


def test_settings_have_one_order_of_flips() -> None:
    assert InferenceConfig(flips=("both", "identity")).flips == ("identity", "both")
    with pytest.raises(ValidationError, match="name each flip once"):
        InferenceConfig(flips=("lr", "lr"))


def save(uri: Path, seed: int, dice: float) -> str:
    record = CheckpointRecord(
        model=config.build(ModelConfig, TINY_MODEL).model_dump(mode="json"),
        scale=0.5,
        fold=0,
        epoch=1,
        averaged=False,
        scores={"val_dice": dice},
        provenance={},
    )
    checkpoints.save_checkpoint(str(uri), network(seed).model.state_dict(), record)
    return str(uri)


def test_ensembles_are_found_by_file_run_fold_and_checkpoint(tmp_path: Path) -> None:
    last = [save(tmp_path / f"fold_{fold}" / "checkpoints" / "last", fold, 0.5) for fold in (1, 2)]
    best = [save(tmp_path / f"fold_{fold}" / "checkpoints" / "epoch_0003", 10 + fold, 0.7) for fold in (1, 2)]
    for fold in (1, 2):
        save(tmp_path / f"fold_{fold}" / "checkpoints" / "epoch_0002", 20 + fold, 0.6)
    members = [{"fold": fold, "checkpoint": f"fold_{fold}/checkpoints/last"} for fold in (1, 2)]
    storage.write_json(str(tmp_path / "ensemble.json"), {"members": members})
    assert ensemble.find_checkpoints(str(tmp_path / "ensemble.json")) == last
    assert ensemble.find_checkpoints(str(tmp_path)) == last
    assert ensemble.find_checkpoints(str(tmp_path), top_k=1) == best
    assert ensemble.find_checkpoints(str(tmp_path / "fold_1")) == last[:1]
    assert ensemble.find_checkpoints(last[1]) == last[1:]
    first, second = ensemble.load_members(last, CPU), ensemble.load_members(last[::-1], CPU)
    assert [one.name for one in first] == [one.name for one in reversed(second)]
    assert first[0].scale == 0.5
    with pytest.raises(CheckpointError, match=r"top_k = 3, but 2 epoch\(s\) were kept"):
        ensemble.find_checkpoints(str(tmp_path), top_k=3)
    storage.remove(last[1])  # fold 2 is still in training
    for uri, top_k in ((tmp_path, None), (tmp_path, 1), (tmp_path / "fold_2", 1)):
        with pytest.raises(CheckpointError, match=r"fold_2 has no checkpoints/last: its training has not ended"):
            ensemble.find_checkpoints(str(uri), top_k=top_k)
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        ensemble.find_checkpoints(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="at least one member"):
        Predictor([], device=CPU, config=InferenceConfig())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "names no members; expected"),
        ({"members": []}, "names no members"),
        ({"members": [{"fold": 1}]}, r"member {'fold': 1} has no \"checkpoint\""),
        ({"members": [{"checkpoint": ""}]}, r"member {'checkpoint': ''} has no \"checkpoint\""),
    ],
)
def test_a_wrong_ensemble_file_is_named(tmp_path: Path, content: Any, message: str) -> None:
    storage.write_json(str(tmp_path / "ensemble.json"), content)
    with pytest.raises(CheckpointError, match=message):
        ensemble.find_checkpoints(str(tmp_path / "ensemble.json"))


def test_a_run_may_have_wildcards_in_its_name(tmp_path: Path) -> None:
    last = save(tmp_path / "run[2]" / "fold_0" / "checkpoints" / "last", 0, 0.5)
    assert ensemble.find_checkpoints(str(tmp_path / "run[2]")) == [last]


def test_predictions_come_one_by_one_without_gradients() -> None:
    batch = [noise(seed, *size) for seed, size in enumerate([(40, 60), (33, 70), (40, 60)])]
    model = predictor(network(0), network(1), batch_size=1)
    whole = model.predict(batch)
    order = []
    for index, found in model.each(batch):
        order.append(index)
        assert not found.prob.requires_grad and found.prob.is_inference()
        assert torch.equal(found.prob, whole[index].prob) and torch.equal(found.std, whole[index].std)
    assert order == [0, 2, 1]
