import os
import subprocess
import sys
from pathlib import Path

import pytest

from stas_core import config
from stas_core.config import Config
from tests.conftest import ROOT
from workflows.choose_ensemble import ChooseEnsembleConfig
from workflows.evaluate import EvaluateConfig
from workflows.pipeline import PipelineConfig
from workflows.prepare_data import PrepareConfig
from workflows.score_images import ScoreConfig
from workflows.train_folds import TrainFoldsConfig
from workflows.tune_postprocess import TunePostprocessConfig
from workflows.tune_training import TuneTrainingConfig

STAGES: dict[str, type[Config]] = {
    "prepare_data": PrepareConfig,
    "train_folds": TrainFoldsConfig,
    "tune_postprocess": TunePostprocessConfig,
    "tune_training": TuneTrainingConfig,
    "choose_ensemble": ChooseEnsembleConfig,
    "score_images": ScoreConfig,
    "evaluate": EvaluateConfig,
    "pipeline": PipelineConfig,
}


def stage(name: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "workflows" / f"{name}.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd="/", env=os.environ | env, check=False)


@pytest.mark.parametrize("name", STAGES)
def test_dry_run_prints_the_resolved_config_from_any_folder(name: str, tmp_path: Path) -> None:
    done = stage(name, "--dry-run", "out=here")
    assert done.returncode == 0, done.stderr
    (tmp_path / "c.yaml").write_text(done.stdout)
    default = config.load_config(STAGES[name], ROOT / "configs" / f"{name}.yaml", ["out=here"])
    assert config.load_config(STAGES[name], tmp_path / "c.yaml") == default
    assert "# " in done.stdout


def test_help_lists_every_key() -> None:
    done = stage("train_folds", "--help")
    assert done.returncode == 0
    assert all(f"  {key} = " in done.stdout for key in config.keys(TrainFoldsConfig))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lrr=1"], "unknown key optim.lrr = 1: did you mean optim.lr?"),
        ([], "out is not set; give it in the config file, or run: python"),
        (["out=x"], "data.cohort is not set"),
        (["out=x", "data.cohort=/none/cohort.parquet"], "cannot read /none/cohort.parquet"),
    ],
)
def test_wrong_settings_exit_with_2(arguments: list[str], message: str) -> None:
    done = stage("train_folds", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_relative_paths_in_a_job_exit_with_2_and_the_full_command() -> None:
    done = stage("train_folds", "out=runs/a", RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert done.returncode == 2
    assert "out = runs/a is relative" in done.stderr and "workflows/train_folds.py out=runs/a out=/data" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# COMMAND: python workflows/")
    name = text.split("workflows/", 1)[1].split(".py", 1)[0]
    config.load_config(STAGES[name], path)
    assert "# HARDWARE" in text and "# TIME" in text and "# SCORE" in text
