from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stas_core import config, storage
from stas_core.errors import CheckpointError
from stas_core.networks import checkpoints
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.checkpoints import CheckpointRecord, RankedEpoch
from stas_core.networks.model import build_model
from tests.conftest import TINY_MODEL

CPU = torch.device("cpu")


def record() -> CheckpointRecord:
    model = config.build(ModelConfig, TINY_MODEL).model_dump(mode="json")
    return CheckpointRecord(
        model, 0.5, fold=1, epoch=3, averaged=True, scores={"dice": 0.7}, provenance={"commit": "x"}
    )


def test_a_checkpoint_gives_back_the_same_outputs_and_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(config.build(ModelConfig, TINY_MODEL)).eval()
    for name in ("a", "b"):
        checkpoints.save_checkpoint(str(tmp_path / name), model.state_dict(), record())
    for file in (checkpoints.WEIGHTS, checkpoints.RECORD):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    loaded, found = checkpoints.load_checkpoint(str(tmp_path / "a"), CPU)
    assert found == record() and not loaded.training
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(image)[0], model(image)[0])


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    uri = str(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint\.json"):
        checkpoints.load_checkpoint(uri, CPU)
    model = build_model(config.build(ModelConfig, TINY_MODEL))
    checkpoints.save_checkpoint(uri, dict(list(model.state_dict().items())[1:]), record())
    with pytest.raises(CheckpointError, match=r"(?s)do not fit the model.*Missing key"):
        checkpoints.load_checkpoint(uri, CPU)
    storage.write_bytes(f"{uri}/weights.safetensors", b"12345678garbage")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        checkpoints.load_checkpoint(uri, CPU)
    storage.write_json(f"{uri}/checkpoint.json", {"fold": 1})
    with pytest.raises(CheckpointError, match="not a checkpoint record"):
        checkpoints.load_checkpoint(uri, CPU)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 4))
def test_the_best_epochs_are_kept_whatever_the_order(dice: list[float], top_k: int) -> None:
    best: list[RankedEpoch] = []
    for epoch, value in enumerate(dice, start=1):
        best = checkpoints.keep_best(best, RankedEpoch(epoch, value), top_k)
    everything = sorted(enumerate(dice, start=1), key=lambda pair: (-pair[1], pair[0]))
    assert [(entry.epoch, entry.dice) for entry in best] == everything[:top_k]


def test_an_epoch_done_again_replaces_itself() -> None:
    best = checkpoints.keep_best([RankedEpoch(1, 0.5), RankedEpoch(2, 0.4)], RankedEpoch(2, 0.4), 3)
    assert best == [RankedEpoch(1, 0.5), RankedEpoch(2, 0.4)]
