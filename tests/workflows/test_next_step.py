"""The commands that stages name at their ends: each is one that the stage named would take."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stas_core import config as configs
from stas_core import storage
from tests.conftest import ROOT
from tests.workflows.test_cli import STAGES
from workflows import next_step
from workflows.next_step import NextStep

STEPS: dict[str, Callable[[str], NextStep | None]] = {
    "prepare_data": next_step.after_prepare,
    "train_folds": lambda out: next_step.after_training(out)[0],
    "train_folds, to review": lambda out: next_step.after_training(out)[1],
    "tune_training": lambda out: next_step.after_training_search(out, "/data/cohort.parquet"),
    "tune_postprocess": lambda out: next_step.after_threshold_search(out, "s3://bucket/folds"),
    "choose_ensemble": lambda out: next_step.after_ensemble_choice(out, ["identity", "lr"]),
    "score_images": lambda out: next_step.after_scoring(out, "/data/images", None)[0],
    "score_images, to correct": lambda out: next_step.after_scoring(out, "/data/images", None)[1],
    "score_images of a cohort": lambda out: next_step.after_scoring(out, "/data/cohort.parquet", "hold-out")[0],
    "score_slides": lambda out: next_step.after_slides(out, None),
    "export": lambda out: next_step.after_export(out, "labelme", "/data/images"),
    "export of a class": lambda out: next_step.after_export(out, "labelme", "/data/images", "Tumour nest"),
    "export of a queue": lambda out: next_step.after_export(out, "geojson*/*.geojson", "/data/images", partly=True),
}


def built_of(command: str) -> tuple[str, Any, list[str]]:
    """Return the stage of a command, its settings as that stage reads them, and which of them are given."""
    program, script, *arguments = shlex.split(command)
    stage = Path(script).stem
    assert program == "python" and (ROOT / script).is_file()
    file = ROOT / "configs" / f"{stage}.yaml"
    if arguments[0] == "--config":
        file, arguments = Path(arguments[1]), arguments[2:]
    built = configs.load_config(STAGES[stage], file, arguments)
    return stage, built, [one.partition("=")[0] for one in arguments]


def values_of(command: str) -> tuple[str, dict[str, object]]:
    """Return the stage of a command and the values it gives, as that stage reads them."""
    stage, built, keys = built_of(command)
    values: dict[str, object] = {}
    for key in keys:
        found: object = built
        for name in key.split("."):
            found = found[name] if isinstance(found, dict) else getattr(found, name)
        values[key] = found
    return stage, values


@pytest.mark.parametrize("ended", STEPS)
def test_a_command_is_taken_as_it_is_written(ended: str, tmp_path: Path) -> None:
    out = tmp_path / "it's #2"
    out.mkdir()
    for name in ("postprocess.tuned.yaml", "train_folds.best.yaml"):  # which commands name
        (out / name).write_text("{}\n")
    step = STEPS[ended](str(out))
    assert step is not None
    stage, values = values_of(step.command)
    assert stage in STAGES and values["out"] not in ("", str(out))
    assert str(values["out"]).startswith(str(out))


@pytest.mark.parametrize("label", ["nest", "it's #2 {a: b", "a.b", "a=b", "v1.", "Größe: ß"])
def test_the_class_of_an_export_is_listed_whatever_it_is_called(label: str) -> None:
    step = next_step.after_export("/data/out", "labelme", "/data/images", label)
    assert built_of(step.command)[1].annotation.meaning_of(label) == "target"
    assert "annotation.labels" not in next_step.after_export("/data/out", "labelme", "/data/images").command


def test_settings_of_a_run_are_given_again(tmp_path: Path) -> None:
    run = str(tmp_path)
    assert next_step.after_evaluation(run, of_slides=False) is None
    assert next_step.after_evaluation("s3://bucket/run", of_slides=True) is None  # --config takes files of this machine
    assert next_step.after_training_search("s3://bucket/search", "s3://bucket/cohort.parquet") is None
    (tmp_path / "config.resolved.yaml").write_text("save: {maps: false}\n")
    for of_slides, key in ((False, "data.images"), (True, "slides")):
        step = next_step.after_evaluation(run, of_slides=of_slides)
        assert step is not None and values_of(step.command)[1][key] in ("IMAGES", "SLIDES")


@pytest.mark.parametrize(
    ("called", "begins"),
    [
        ("/venv/bin/stas", "stas train_folds "),
        ("/opt/tool/workflows/prepare_data.py", "python /opt/tool/workflows/train_folds.py "),
        ("/venv/bin/pytest", "python workflows/train_folds.py "),
    ],
)
def test_a_command_is_called_as_this_one_was(called: str, begins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert next_step.after_prepare("/out").command.startswith(begins)


def test_what_is_no_step_is_not_shown(tmp_path: Path) -> None:
    assert next_step.lines(str(tmp_path)) == []
    step = next_step.after_prepare("/out")
    storage.write_json(f"{tmp_path}/manifest.json", {"next": [1, {"why": "so"}, next_step.recorded(step)["next"][0]]})
    assert next_step.lines(str(tmp_path)) == [f"next, {step.why}:", f"  {step.command}"]
