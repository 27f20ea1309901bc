"""What is not finite never passes for a result: in training, in checkpoints, in saved states, in maps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stas_core import config
from stas_core.data.cohort import CohortRow
from stas_core.errors import CheckpointError, DivergedError, StasError
from stas_core.networks import checkpoints
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.checkpoints import CheckpointRecord, RankedEpoch
from stas_core.networks.model import build_model
from stas_core.predict import ensemble
from stas_core.predict.inference import InferenceConfig
from stas_core.predict.predictor import Member, Predictor
from stas_core.train import loop
from stas_core.train.context import LocalContext
from stas_core.train.recipe import FoldRecipe, FoldTask
from tests.conftest import TINY_MODEL

CPU = torch.device("cpu")


def train(folder: Path, recipe: FoldRecipe, rows: list[CohortRow]) -> None:
    folder.mkdir(exist_ok=True)
    task = FoldTask(0, rows, str(folder / "fold"), {})
    loop.train_fold(LocalContext(folder, device=CPU), recipe, task)


def one_step(recipe: FoldRecipe, **optim: Any) -> FoldRecipe:
    """Return a recipe whose only step is also its last: no later loss can show that it diverged."""
    values = recipe.model_dump()
    values["optim"] |= {"batch_size": 8} | optim
    values["training"] |= {"epochs": 1}
    values["schedule"] |= {"warmup_epochs": 0}
    return FoldRecipe.model_validate(values)


def left_behind(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".safetensors", ".png")]


def test_a_last_step_that_diverges_is_no_finished_fold(
    tmp_path: Path, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]
) -> None:
    with pytest.raises(
        DivergedError, match=r"not finite in epoch 1 .*fold 0; lower optim\.lr, or set optim\.clip_norm"
    ):
        train(tmp_path, one_step(tiny_recipe, lr=1e30), cohort_rows)
    assert not left_behind(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_weights_that_are_not_finite_after_the_last_step(
    tmp_path: Path,
    tiny_recipe: FoldRecipe,
    cohort_rows: list[CohortRow],
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    ema_decay: float | None,
) -> None:
    step = torch.optim.AdamW.step

    def diverge(self: torch.optim.AdamW) -> None:
        step(self)
        with torch.no_grad():
            self.param_groups[0]["params"][-1].fill_(value)  # a head's bias: an infinite one gives maps of 0 and 1

    monkeypatch.setattr(torch.optim.AdamW, "step", diverge)
    with pytest.raises(DivergedError, match=r"heads.* is not finite after the last step in epoch 1 .*fold 0"):
        train(tmp_path, one_step(tiny_recipe, ema_decay=ema_decay), cohort_rows)
    assert not left_behind(tmp_path)


def made_checkpoint(uri: str, **weights: float) -> str:
    """Write a checkpoint; of the named tensors every value is replaced."""
    torch.manual_seed(0)
    model_config = config.build(ModelConfig, TINY_MODEL)
    record = CheckpointRecord(model_config.model_dump(mode="json"), 1.0, 0, 1, False, {"val_dice": 0.5}, {})
    state = build_model(model_config).state_dict()
    checkpoints.save_checkpoint(uri, {k: v.fill_(weights[k]) if k in weights else v for k, v in state.items()}, record)
    return uri


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_member_that_is_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    good, bad = (
        made_checkpoint(str(tmp_path / "a")),
        made_checkpoint(str(tmp_path / "b"), **{"network.heads.0.bias": value}),
    )
    with pytest.raises(CheckpointError, match=rf"the weights of {bad} are not finite \(network\.heads\.0\.bias\)"):
        ensemble.load_members([good, bad], CPU)


def test_a_map_that_is_not_finite_is_never_an_empty_one(tmp_path: Path) -> None:
    uri = made_checkpoint(str(tmp_path / "a"), **{"network.heads.0.weight": 3e38})
    members = ensemble.load_members([uri], CPU)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with pytest.raises(StasError, match=r"probabilities of this image are not finite.* set inference\.amp=none"):
        Predictor(members, device=CPU, config=InferenceConfig()).predict_u8(image)
    assert isinstance(members[0], Member)


def test_a_dice_of_nan_never_ranks() -> None:
    best = checkpoints.keep_best([RankedEpoch(1, float("nan"))], RankedEpoch(2, 0.1), 2)
    assert best == [RankedEpoch(2, 0.1)]
    assert checkpoints.keep_best(best, RankedEpoch(3, float("nan")), 2) == best
