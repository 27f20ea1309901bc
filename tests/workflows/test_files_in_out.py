"""Files that a command names and that lie in `out`, where --force deletes: refused, and not touched.."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stas_core import config
from stas_core.config import Config
from tests.conftest import TINY_MODEL
from tests.workflows.test_cli import STAGES
from workflows.pipeline import PipelineConfig
from workflows.score_images import ScoreConfig

Stage = Callable[..., Any]
CASCADES = [
    ("score_images", "postprocess"),
    ("tune_postprocess", "default"),
    ("tune_postprocess", "reference"),
    ("pipeline", "score.postprocess"),
    ("pipeline", "tune.reference"),
]

WEIGHTS = [
    ("train_folds", "model.encoder_weights"),
    ("tune_training", "train.model.encoder_weights"),
    ("pipeline", "train.model.encoder_weights"),
]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize(("name", "key"), CASCADES)
def test_a_cascade_within_out_is_refused(name: str, key: str, force: list[str], stage: Stage, tmp_path: Path) -> None:
    cascade = write(tmp_path / "out" / "candidates" / "best.yaml", "min_target_px: 7\n")
    for spelled in (f"{cascade}", f"file://{cascade}", f"{tmp_path}/out/./candidates/best.yaml"):
        ended = stage(name, f"out={tmp_path}/out", f"{key}={spelled}", *force)
        assert ended.status == 2
        assert f"out = {tmp_path}/out holds {key} = {spelled}, which is read" in ended.err
    section, _, last = key.rpartition(".")
    text = f"{section}:\n  {last}: {cascade}\n" if section else f"{last}: {cascade}\n"
    ended = stage(name, "--config", str(write(tmp_path / "run.yaml", text)), f"out={tmp_path}/out", *force)
    assert f"holds {key} = {cascade}, which is read" in ended.err
    assert cascade.read_text() == "min_target_px: 7\n"


GIVEN = {
    "train_folds": "data.cohort={cohort}",
    "tune_training": "train.data.cohort={cohort}",
    "pipeline": "prepare.data={{images: /images, annotations: /annotations}}",
}


@pytest.mark.parametrize(("name", "key"), WEIGHTS)
def test_encoder_weights_within_out_are_refused(
    name: str, key: str, stage: Stage, cohort_uri: str, tmp_path: Path
) -> None:
    weights = write(tmp_path / "out" / "fold_0" / "checkpoints" / "last" / "weights.safetensors", "")
    data = GIVEN[name].format(cohort=cohort_uri)
    ended = stage(name, data, f"{key}={weights}", f"out={tmp_path}/out", "--force")
    assert ended.status == 2 and f"holds {key} = {weights}, which is read" in ended.err
    assert weights.exists()
    for word in ("imagenet", "package", "none", "null"):
        ended = stage(name, data, f"{key}={word}", f"out={tmp_path}/out", "--force")
        assert ended.status == 2 and "is not empty" in ended.err


@pytest.mark.parametrize(
    ("name", "key"), [(name, key.replace("encoder_weights", "init_from")) for name, key in WEIGHTS]
)
def test_models_to_go_on_from_are_neither_within_out_nor_around_it(
    name: str, key: str, stage: Stage, cohort_uri: str, ensemble: str, tmp_path: Path
) -> None:
    out = shutil.copytree(ensemble, tmp_path / "out")
    data = [GIVEN[name].format(cohort=cohort_uri)]
    if name == "tune_training":
        ended = stage(name, *data, f"{key}={ensemble}", f"out={tmp_path}/new")
        assert ended.status == 2 and "space.model.activation: train.model.init_from is set" in ended.err
        data += ["space={optim.lr: {low: 1e-4, high: 1e-2}}", "known=[]"]
    for given in (f"{out}/ensemble.json", out, f"{out}/fold_0/checkpoints/last"):
        ended = stage(name, *data, f"{key}={given}", f"out={out}", "--force")
        assert ended.status == 2 and f"holds {key} = {given}, which is read" in ended.err
    ended = stage(name, *data, f"{key}={out}", f"out={out}/again")
    assert ended.status == 2 and f"{key} = {out} lie within each other" in ended.err
    ended = stage(name, *data, f"{key}={ensemble}", f"out={tmp_path}/new")
    assert ended.status == 2 and ".encoder is mobilenetv3_small_050 in " in ended.err
    assert not (tmp_path / "new").exists()
    apart = write(tmp_path / "e.json", json.dumps({"members": [{"checkpoint": f"{out}/fold_0/checkpoints/last"}]}))
    if name == "train_folds":
        model = [f"model.{name}={value}".replace(" ", "") for name, value in TINY_MODEL.items()]
        ended = stage(name, *data, *model, f"{key}={apart}", "folds=0", f"out={out}", "--force")
        assert ended.status == 2 and f"holds model.init_from of fold 0 = {out}/fold_0/checkpoints/last" in ended.err


@pytest.mark.parametrize("name", STAGES)
def test_force_never_deletes_the_config_of_the_command(name: str, stage: Stage, tmp_path: Path) -> None:
    resolved = write(tmp_path / "out" / "config.resolved.yaml", "{}\n")
    write(tmp_path / "out" / "claim.json", f'{{"stage": "{name}", "ids": []}}')
    ended = stage(name, "--config", str(resolved), f"out={tmp_path}/out", "--force")
    assert ended.status == 2 and f"holds --config = {resolved}, which is read" in ended.err
    again = stage(name, "--config", str(resolved), f"out={tmp_path}/out")
    assert "--config" not in again.err.splitlines()[0].partition(";")[0]  # to repeat a run with its own config is fine
    assert resolved.read_text() == "{}\n"


@pytest.mark.parametrize(
    ("cls", "values", "files"),
    [
        (ScoreConfig, {}, {}),
        (ScoreConfig, {"postprocess": {"min_target_px": 3}, "data": {"images": "/i"}}, {}),
        (ScoreConfig, {"postprocess": "a.yaml"}, {"postprocess": "a.yaml"}),
        (
            PipelineConfig,
            {"score": {"postprocess": "s3://b/a.yaml"}, "tune": {"reference": "b.yaml", "default": {}}},
            {"score.postprocess": "s3://b/a.yaml", "tune.reference": "b.yaml"},
        ),
    ],
)
def test_the_files_of_sections_are_known_by_key(cls: type[Config], values: Any, files: dict[str, str]) -> None:
    assert config.section_files(cls, values) == files
