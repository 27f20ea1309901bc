"""One image of 1 x 1 features in BatchNorm is refused before training, and nothing else is."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from stas_core import config
from stas_core.data.cohort import CohortRow
from stas_core.errors import ConfigError
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.model import apply_batch_norm_policy, build_model
from stas_core.train import batch_norm, loop
from stas_core.train.context import LocalContext
from stas_core.train.recipe import DataConfig, FoldRecipe, FoldTask
from tests.conftest import TINY_MODEL

CASES: list[tuple[dict[str, Any], dict[str, Any], tuple[int, int], int]] = [
    ({}, {"crop_px": 32}, (96, 128), 1),
    ({}, {"crop_px": 33}, (96, 128), 1),
    ({}, {"crop_px": 32}, (96, 128), 2),
    ({}, {"scale": 0.25}, (96, 128), 1),
    ({}, {"scale": 0.5}, (96, 128), 1),
    ({}, {}, (1, 1), 1),
    ({}, {}, (32, 33), 1),
    ({"batch_norm": "frozen"}, {"crop_px": 32}, (96, 128), 1),
    ({"batch_norm": "frozen", "norm": "batch"}, {"crop_px": 32}, (96, 128), 1),
    ({"arch": "deeplabv3plus", "encoder": "resnet18"}, {}, (96, 128), 1),
    ({"arch": "deeplabv3plus", "encoder": "resnet18"}, {}, (96, 128), 2),
    ({"arch": "pan", "encoder": "resnet18"}, {}, (96, 128), 1),
    ({"arch": "fpn", "encoder": "resnet18"}, {"crop_px": 32}, (96, 128), 1),
    ({"arch": "fpn", "encoder": "resnet18"}, {}, (96, 128), 1),
]


@pytest.mark.parametrize(("model", "data", "size", "num_images"), CASES)
def test_what_is_refused_is_what_torch_cannot_train(
    cohort_rows: list[CohortRow], model: dict[str, Any], data: dict[str, Any], size: tuple[int, int], num_images: int
) -> None:
    model_config = config.build(ModelConfig, TINY_MODEL | model)
    network = apply_batch_norm_policy(
        build_model(model_config), model_config.batch_norm, device_type="cpu", world_size=1
    ).train()
    data_config = config.build(DataConfig, {"crop_px": None} | data)
    row = dataclasses.replace(cohort_rows[0], height=size[0], width=size[1])
    height, width = (min(round(side * data_config.scale), data_config.crop_px or side) for side in size)
    padded = [-(-side // network.stride) * network.stride for side in (height, width)]
    try:
        network(torch.zeros(num_images, 3, *padded))
        trains = True
    except ValueError:
        trains = False
    before = torch.get_rng_state()
    if trains:
        batch_norm.require_statistics(network, [row], data_config, num_images)
    else:
        with pytest.raises(ConfigError, match=rf"only one value per channel.*{width}x{height} px.*batch_size"):
            batch_norm.require_statistics(network, [row], data_config, num_images)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fold_that_cannot_be_trained_says_so_before_its_first_step(
    tmp_path: Path, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]
) -> None:
    values = tiny_recipe.model_dump()
    values["data"] |= {"crop_px": 32}
    values["optim"] |= {"micro_batch_size": 1}
    task = FoldTask(0, cohort_rows, str(tmp_path / "fold"), {})
    with pytest.raises(ConfigError, match="only one value per channel"):
        loop.train_fold(LocalContext(tmp_path), FoldRecipe.model_validate(values), task)
