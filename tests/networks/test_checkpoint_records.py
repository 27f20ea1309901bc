"""Records of checkpoints, ensembles and saved states that were damaged, edited, or made by another program."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from stas_core import config
from stas_core.data.cohort import CohortRow
from stas_core.errors import CheckpointError, StasError
from stas_core.networks import checkpoints
from stas_core.networks.architecture import ModelConfig
from stas_core.predict import ensemble
from stas_core.train import loop
from stas_core.train.context import LocalContext
from stas_core.train.recipe import FoldRecipe, FoldTask
from tests.conftest import TINY_MODEL

RECORD: dict[str, Any] = {
    "model": config.build(ModelConfig, TINY_MODEL).model_dump(mode="json"),
    "scale": 0.5,
    "fold": 1,
    "epoch": 3,
    "averaged": True,
    "scores": {"val_dice": 0.7},
    "provenance": {"commit": "x"},
}
CPU = torch.device("cpu")


def write(folder: Path, value: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / checkpoints.RECORD).write_text(json.dumps(value))
    return str(folder)


NAN = float("nan")
VALUES: dict[str, list[Any]] = {
    "scale": [0, -1, 1e-300, NAN, float("inf"), "x", "0.5", None, True, [1], 2],
    "fold": [-1, 1.5, "1", None, NAN, 1e400],
    "epoch": [-3, 2.5, "3", None],
    "averaged": [1, "yes", None],
    "scores": [None, [0.7], {"val_dice": "0.7"}, {"val_dice": NAN}, {"val_dice": None}],
    "provenance": ["x", {"commit": 1}],
    "model": [None, "unet", []],
}
WRONG = [(field, value) for field, values in VALUES.items() for value in values]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[f"{field}={value}" for field, value in WRONG])
def test_a_wrong_field_is_named(tmp_path: Path, field: str, value: Any) -> None:
    uri = write(tmp_path / "c", RECORD | {field: value})
    with pytest.raises(
        CheckpointError, match=rf"^{uri}/checkpoint\.json is not a checkpoint record: {field}"
    ) as caught:
        checkpoints.read_record(uri)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("field", RECORD)
def test_missing_and_unknown_fields_are_named(tmp_path: Path, field: str) -> None:
    uri = write(tmp_path / "c", {key: value for key, value in RECORD.items() if key != field})
    with pytest.raises(CheckpointError, match=rf"not a checkpoint record: {field}"):
        checkpoints.read_record(uri)
    with pytest.raises(CheckpointError, match=rf"not a checkpoint record: {field}_x"):
        checkpoints.read_record(write(tmp_path / "c", RECORD | {f"{field}_x": 1}))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(RECORD)) | st.text(), inner),
        max_leaves=8,
    )
)
def test_any_other_json_is_one_sentence(tmp_path: Path, value: Any) -> None:
    uri = write(tmp_path / "c", value)
    for read in (checkpoints.read_record, lambda uri: checkpoints.load_checkpoint(uri, CPU)):
        with pytest.raises(CheckpointError) as caught:
            read(uri)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"encoder": "no_such_net"}, r"model this version does not know: model\.encoder"),
        ({"encoder": 5}, r"model this version does not know: encoder = 5"),
        ({"decoder_channels": [16]}, "does not know"),
        ({"decoder_channels": [0, 1, 1, 1, 1]}, "does not know"),
        ({"surprise": 1}, "unknown key surprise"),
    ],
)
def test_a_wrong_model_is_named(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    uri = write(tmp_path / "c", RECORD | {"model": RECORD["model"] | model})
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_checkpoint(uri, CPU)


@pytest.mark.parametrize(
    "content",
    [[], {}, {"members": []}, {"members": {}}, {"members": [1]}, {"members": [{}]}, {"members": [{"checkpoint": 3}]}]
    + [{"members": [{"checkpoint": ""}]}, {"members": [{"checkpoint": "a"}, {"checkpoint": "a"}]}, None, "x", 1.5],
)
def test_ensembles_that_name_no_members(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "ensemble.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"^{path}"):
        ensemble.find_checkpoints(str(path))


def test_an_epoch_without_its_score_is_not_ranked(tmp_path: Path) -> None:
    kept = tmp_path / "fold_0" / "checkpoints"
    kept.mkdir(parents=True)
    for name, scores in (("last", {}), ("epoch_0001", {"dice": 1.0})):
        write(kept / name, RECORD | {"scores": scores})
    with pytest.raises(CheckpointError, match=r"epoch_0001/checkpoint\.json has no val_dice"):
        ensemble.find_checkpoints(str(tmp_path), top_k=1)


@pytest.fixture(scope="module")
def stopped(
    tmp_path_factory: pytest.TempPathFactory, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]
) -> tuple[Path, FoldRecipe]:
    """Return a fold of one epoch with its saved state, and the recipe that goes on from there."""
    folder = tmp_path_factory.mktemp("stopped")
    short = tiny_recipe.model_copy(update={"training": tiny_recipe.training.model_copy(update={"epochs": 1})})
    loop.train_fold(LocalContext(folder, device=CPU), short, FoldTask(0, cohort_rows, str(folder / "fold"), {}))
    return folder, tiny_recipe


def cut(state: Path) -> None:
    path = state / "state.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_tensors(state: Path) -> None:
    (state / "state.safetensors").write_bytes(save({"model.x": torch.zeros(3)}))


def no_record(state: Path) -> None:
    (state / "state.json").unlink()


def changed(**values: Any) -> Any:
    def change(state: Path) -> None:
        record = json.loads((state / "state.json").read_text())
        (state / "state.json").write_text(json.dumps(record | values))

    return change


@pytest.mark.parametrize(
    "damage",
    [cut, other_tensors, no_record, changed(epoch=-1), changed(epoch="1"), changed(epoch=7), changed(history=None)]
    + [changed(best=[{"epoch": 1}]), changed(best=[{"epoch": 1, "dice": float("nan")}]), changed(extra=1)]
    + [changed(train_seconds=float("nan")), changed(ran_on="cpu"), changed(history=[{"epoch": 1}])],
)
def test_a_damaged_state_is_named_and_not_gone_on_from(
    stopped: tuple[Path, FoldRecipe], tmp_path: Path, cohort_rows: list[CohortRow], damage: Any
) -> None:
    source, recipe = stopped
    shutil.copytree(source / "state", tmp_path / "state")
    damage(tmp_path / "state")
    with pytest.raises(
        StasError, match=r"a saved state cannot be gone on from: .*state.* start over with --force"
    ) as caught:
        loop.train_fold(LocalContext(tmp_path, device=CPU), recipe, FoldTask(0, cohort_rows, str(tmp_path), {}))
    assert "\n" not in str(caught.value)
