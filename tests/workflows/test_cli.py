import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stas_core import config
from stas_core.config import Config
from stas_core.errors import ConfigError
from tests.conftest import ROOT
from workflows.choose_ensemble import ChooseEnsembleConfig
from workflows.cli import main
from workflows.evaluate import EvaluateConfig
from workflows.export import ExportConfig
from workflows.export_model import ExportModelConfig
from workflows.folds.training import TrainFoldsConfig
from workflows.pipeline import PipelineConfig
from workflows.prepare_data import PrepareConfig
from workflows.report import ReportConfig
from workflows.score_images import ScoreConfig
from workflows.score_slides import ScoreSlidesConfig
from workflows.tune_postprocess import TunePostprocessConfig
from workflows.tune_training import TuneTrainingConfig

STAGES: dict[str, type[Config]] = {
    "prepare_data": PrepareConfig,
    "train_folds": TrainFoldsConfig,
    "tune_postprocess": TunePostprocessConfig,
    "tune_training": TuneTrainingConfig,
    "choose_ensemble": ChooseEnsembleConfig,
    "score_images": ScoreConfig,
    "score_slides": ScoreSlidesConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "export_model": ExportModelConfig,
    "report": ReportConfig,
    "pipeline": PipelineConfig,
}


Stage = Callable[..., Any]


def test_a_stage_is_a_script_that_runs_from_any_folder() -> None:
    line = [sys.executable, str(ROOT / "workflows" / "train_folds.py"), "--dry-run", "optim.lr=5e-4"]
    env = os.environ | {"PYTHONSAFEPATH": "1"}  # Python does not look beside the script
    done = subprocess.run(line, env=env, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert "lr: 0.0005  # " in done.stdout


def test_a_python_that_is_not_the_environment_is_told_in_a_sentence() -> None:
    stages = [ROOT / "workflows" / f"{name}.py" for name in STAGES]
    line = [sys.executable, "-S", "-E", str(stages[0]), "out=my runs/a"]
    done = subprocess.run(line, capture_output=True, text=True, cwd="/", check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "it lacks stas_core, workflows, pydantic," in done.stderr and "'out=my runs/a'" in done.stderr
    module = [sys.executable, "-S", "-E", "-m", "workflows.prepare_data", "out=my runs/a"]
    done = subprocess.run(module, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "it lacks pydantic," in done.stderr and "the same command with " in done.stderr
    for stage in stages:  # before any import that would fail
        assert re.match(
            r'""".*?"""\n\nimport sys\n\nif __name__ == "__main__" and .*\n    import environment ',
            stage.read_text(),
            re.S,
        )


@pytest.mark.parametrize("name", STAGES)
def test_dry_run_prints_the_resolved_config_from_any_folder(
    name: str, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    done = stage(name, "--dry-run", "out=here")
    assert done.status == 0, done.err
    (tmp_path / "c.yaml").write_text(done.out)
    default = config.load_config(STAGES[name], ROOT / "configs" / f"{name}.yaml", ["out=here"])
    assert config.load_config(STAGES[name], tmp_path / "c.yaml") == default
    # Not in the output: pydantic finds no docstrings of classes that runpy defines.
    assert "out: here  # " in config.describe(default)


@pytest.mark.parametrize("name", STAGES)
def test_help_lists_every_key(name: str, stage: Stage) -> None:
    done = stage(name, "--help")
    assert done.status == 0
    assert all(f"  {key} = " in done.out for key in config.keys(STAGES[name]))
    keys = done.out.partition("--help [KEY]")[2]
    described = [line for line in keys.splitlines() if line.startswith(" " * 6) and " " in line.strip()]
    assert described and max(map(len, described)) <= 80


def test_help_of_a_key_or_a_section_is_that_alone(stage: Stage) -> None:
    assert stage("train_folds", "--help", "optim.lr").out.split() == [
        *("optim:", "optim.lr", "=", "0.001"),
        *["(number", ">", "0)", "Peak", "learning", "rate."],
    ]
    section = stage("train_folds", "-h", "optim").out
    assert "  optim.weight_decay = " in section and "data." not in section
    wrong = stage("train_folds", "--help", "optim.rate")
    assert wrong.status == 2 and "no key or section optim.rate: did you mean optim." in wrong.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lrr=1"], "unknown key optim.lrr = 1: did you mean optim.lr?"),
        ([], "out is not set; give it, or run: python"),
        (["out=x"], "data.cohort is not set"),
        (
            ["out=x", "data.cohort=/none/cohort.parquet"],
            "there is no cohort table /none/cohort.parquet; make it first: python workflows/prepare_data.py",
        ),
        (["out=x", "data.cohort=/tmp"], "/tmp is a folder; give its table: /tmp/cohort.parquet"),
    ],
)
def test_wrong_settings_exit_with_2(stage: Stage, arguments: list[str], message: str) -> None:
    done = stage("train_folds", *arguments)
    assert done.status == 2
    assert message in done.err and "Traceback" not in done.err


def test_a_config_of_ours_is_named_without_its_path(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = stage("train_folds", "--config", "stas_cpu", "--dry-run", "out=x")
    assert named.out == stage("train_folds", "--config", f"{ROOT}/configs/stas_cpu.yaml", "--dry-run", "out=x").out
    assert named.status == 0
    (tmp_path / "stas_cpu").write_text("optim: {lr: 0.5}")  # a file of that name comes first
    assert "lr: 0.5  #" in stage("train_folds", "--config", "stas_cpu", "--dry-run", "out=x").out
    wrong = stage("train_folds", "--config", "stas_gpu", "--dry-run")
    assert wrong.status == 2 and "cannot read config file stas_gpu" in wrong.err


def test_relative_paths_in_a_job_exit_with_2_and_the_full_command(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    done = stage("train_folds", "out=runs/a")
    assert done.status == 2
    assert "out = runs/a is relative" in done.err and "workflows/train_folds.py out=runs/a out=/data" in done.err


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# COMMAND: python workflows/")
    name = text.split("workflows/", 1)[1].split(".py", 1)[0]
    config.load_config(STAGES[name], path)
    assert "# HARDWARE" in text and "# TIME" in text and "# SCORE" in text


def test_a_password_in_a_uri_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: EvaluateConfig, force: bool) -> int:
        print(f"scores: {config.out}/images.parquet")
        print(f"{config.out} is away", file=sys.stderr)
        raise ConfigError(f"out = {config.out} is not liked")

    with pytest.raises(SystemExit) as ended:
        main("evaluate", EvaluateConfig, run, "", ["out=memory://me:s3cret@host/out"], plan=lambda config, force: [])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and "s3cret" not in shown.out + shown.err
    assert shown.out.endswith("scores: memory://me:***@host/out/images.parquet\n")
    assert shown.err == ("memory://me:***@host/out is away\nConfigError: out = memory://me:***@host/out is not liked\n")
