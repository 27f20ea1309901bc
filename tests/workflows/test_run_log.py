"""A run's log as JSON lines: what a collector of logs is told."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stas_core import storage
from stas_core.errors import ConfigError, OccupiedOutputError
from tests.scoring.here import score_images_here
from tests.workflows.made import make_ensemble, make_images, settings
from workflows import run_log, score_images
from workflows.out_folder import Outputs, claim_for_stage
from workflows.progress import Progress
from workflows.score_images import ScoreConfig
from workflows.scoring import restarts
from workflows.scoring.restarts import Interrupted, NodesChanged

OUTPUTS = Outputs("train_folds", ())


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "run.jsonl"
    monkeypatch.setenv(run_log.VARIABLE, str(file))
    return file


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_log_of_a_run_has_the_numbers_of_its_manifest(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = make_images(tmp_path / "images", 5), tmp_path / "out"
    Path(images, "broken.jpg").write_bytes(b"no image")
    score_images_here(monkeypatch)
    config = settings(images, make_ensemble(tmp_path / "folds"), out, max_failed_fraction=0.5, accept_warnings=True)
    assert score_images.run(config, False) == 0
    manifest, lines = storage.read_json(f"{out}/manifest.json"), lines_of(log)
    same = {"run_id": manifest["run_id"], "stage": "score_images", "out": str(out)}
    for line in lines:
        assert same.items() <= line.items() and {"time", "level", "event"} <= line.keys()
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    events = [line["event"] for line in lines]
    assert events[0] == "begun" and events[-2:] == ["finished", "ended"] and set(events[1:-2]) == {"progress"}
    last, done, ended = lines[-3:]
    assert (last["done"], last["total"]) == (6, 6)
    assert done["num_images"] == manifest["num_images"] == last["done"] - last["failed"] == 5
    assert done["num_failures"] == manifest["num_failures"] == last["failed"] == ended["failed"] == 1
    assert done["verdict"] == manifest["verdict"]["level"]
    assert math.isclose(done["seconds"], manifest["seconds"])
    assert (ended["status"], ended["retried"], ended["level"]) == ("done", 0, "info")


def test_failed_is_what_the_manifest_counts_and_a_pipeline_adds_it_up(tmp_path: Path, log: Path) -> None:
    config = ScoreConfig()
    with claim_for_stage(str(tmp_path / "all"), OUTPUTS, force=False):
        for is_done in (False, True):
            with claim_for_stage(str(tmp_path / "out"), OUTPUTS, force=False) as folder:
                assert folder.is_finished(config, "") == is_done
                if not is_done:
                    folder.write_manifest(config, "", {"num_failures": 2})
    assert [line["failed"] for line in lines_of(log) if line["event"] == "ended"] == [2, 2, 4]


def test_a_log_that_takes_no_more_says_so_once_and_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(run_log.VARIABLE, "/dev/full")
    with claim_for_stage(str(tmp_path / "out"), OUTPUTS, force=False):
        Progress(1).step()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left" in said and "the run goes on" in said
    with pytest.raises(OccupiedOutputError), claim_for_stage(str(tmp_path / "out"), OUTPUTS, force=False):
        raise OccupiedOutputError("held")


def test_a_warning_is_told_once_by_the_innermost_run(
    tmp_path: Path, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = logging.getLogger("stas_core.patience")
    with claim_for_stage(str(tmp_path / "all"), OUTPUTS, force=False):
        with claim_for_stage(str(tmp_path / "one"), OUTPUTS, force=False):
            library.warning("inner")
        library.warning("outer")
    told = [(line["message"], line["out"]) for line in lines_of(log) if line["event"] == "warning"]
    assert told == [("inner", str(tmp_path / "one")), ("outer", str(tmp_path / "all"))]
    assert logging.lastResort not in logging.getLogger("stas_core").handlers


def test_items_in_work_when_a_node_is_lost_are_retried(tmp_path: Path, log: Path) -> None:
    with claim_for_stage(str(tmp_path / "out"), OUTPUTS, force=False):
        restarts._tell_interrupted(NodesChanged("lost b", in_work={"x", "y"}), "images", 7, 9)
        run_log.event("fold", loss=np.float32(0.5), dice=np.float32("nan"))
    _, restarted, fold, ended = lines_of(log)
    assert restarted["retried"] == ended["retried"] == 2 and (fold["loss"], fold["dice"]) == (0.5, None)


def test_a_place_that_takes_no_lines_is_refused_before_anything_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Callable[..., Any]
) -> None:
    monkeypatch.setenv(run_log.VARIABLE, "run.jsonl")
    for options in ([], ["--plan"]):
        ended = stage("prepare_data", *options, f"out={tmp_path / 'out'}", "phantom.num_images=3")
        assert ended.status == 2 and "STAS_LOG_JSON = 'run.jsonl'" in ended.err
    assert not (tmp_path / "out").exists()


def test_without_the_variable_nothing_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(run_log.VARIABLE, raising=False)
    with claim_for_stage(str(tmp_path / "out"), OUTPUTS, force=False):
        Progress(1).step()
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out == "1/1 images\n"


def test_a_terminal_gets_lines_beside_what_people_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(run_log.VARIABLE, "stderr")
    with claim_for_stage(str(tmp_path / "out"), OUTPUTS, force=False):
        Progress(2, label="maps: ").step(2)
    shown = capsys.readouterr()
    assert shown.out == "maps: 2/2 images\n"
    told = [json.loads(line) for line in shown.err.splitlines()]
    assert [(one["event"], one.get("items"), one.get("eta_s")) for one in told] == [
        ("begun", None, None),
        ("progress", "maps: images", None),  # all at once: there is no rate
        ("ended", None, None),
    ]


def test_how_a_run_ends_is_told_without_passwords(tmp_path: Path, log: Path) -> None:
    for error in (OccupiedOutputError("postgresql://stas:s3cret@db/mlflow is held"), KeyboardInterrupt()):
        with pytest.raises(type(error)), claim_for_stage(str(tmp_path / "out"), OUTPUTS, force=False):
            raise error
    begun, failed, again, stopped = lines_of(log)
    assert (begun["goes_on"], again["goes_on"]) == (False, True) and begun["run_id"] != again["run_id"]
    assert (failed["status"], stopped["status"], failed["level"]) == ("failed", "interrupted", "error")
    assert "OccupiedOutputError: postgresql://stas:***@db" in failed["error"] and "s3cret" not in log.read_text()


def test_restarts_and_the_warnings_of_the_library_are_told(
    tmp_path: Path, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with claim_for_stage(str(tmp_path / "out"), OUTPUTS, force=False):
        restarts._tell_interrupted(Interrupted("an actor died", {"a": "node", "b": "node"}), "images", 7, 9)
        logging.getLogger("stas_core.patience").warning("%s is away", "s3://bucket")
        run_log.event("fold", fold=0, train_loss=math.nan)
        Progress(9).step(9)
    logging.getLogger("stas_core.patience").warning("of no run")
    _, restarted, warning, fold, progress, ended = lines_of(log)
    assert (fold["fold"], fold["train_loss"]) == (0, None) and "NaN" not in log.read_text()
    assert (restarted["event"], restarted["why"], restarted["left"]) == ("restarted", "an actor died", 7)
    assert (warning["event"], warning["message"], warning["level"]) == ("warning", "s3://bucket is away", "warning")
    assert restarted["retried"] == progress["retried"] == ended["retried"] == 2
    assert "interrupted (an actor died); 7 of 9 images are left" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["run.jsonl", "/proc/none/run.jsonl", "yes"])
def test_a_place_that_takes_no_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv(run_log.VARIABLE, place)
    with (
        pytest.raises(ConfigError, match=rf"STAS_LOG_JSON = '{place}': .*; give stderr, stdout, or the absolute path"),
        claim_for_stage(str(tmp_path / "out"), OUTPUTS, force=False),
    ):
        pass
    assert not (tmp_path / "out" / "lease.json").exists()
