"""MLflow is told of runs where a user asks for it, and never gets between a run and its end."""

import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stas_core import config, storage
from stas_core.errors import WriteError
from stas_core.runs import EpochMetrics, FoldResult, TrainingRun
from workflows import prepare_data, tracking
from workflows.folds.training import TrainFoldsConfig
from workflows.tracking import TrackingConfig

pytest.importorskip("mlflow")
Stage = Callable[..., Any]
RESOLVED = """
optim: {lr: 0.001}
folds: [0]
data:
  cohort: sftp://me:s3cret@host/cohort.parquet
"""
RECORD = {
    "stage": "train_folds",
    "commit": "c0",
    "command": "python workflows/train_folds.py",
    "folds": {"0": {"seconds": 12.5}},
    "verdict": {"level": "look at this", "reasons": []},
    "inputs": "a",
}


def settings(**values: Any) -> TrainFoldsConfig:
    return TrainFoldsConfig(tracking=TrackingConfig(**values))


def epoch(number: int, loss: float) -> EpochMetrics:
    return EpochMetrics(
        fold=0,
        epoch=number,
        train_loss=loss,
        lr=1e-3,
        grad_norm=1.0,
        images_per_s=2.0,
        val_dice=0.5 + number / 10,
        val_precision=None,
        val_recall=None,
        unix_time_s=1000.0 + number,
    )


@pytest.fixture
def out(tmp_path: Path) -> str:
    """Return the folder of a training run: its config, a figure, and one epoch of a fold."""
    folder = str(tmp_path / "out")
    storage.write_bytes(f"{folder}/config.resolved.yaml", RESOLVED.encode())
    storage.write_bytes(f"{folder}/figures/folds.png", b"a picture")
    TrainingRun(folder).fold(0).write_metrics([epoch(1, 0.9)])
    return folder


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri, uri)


def runs_of(uri: str) -> dict[str, Any]:
    client = client_of(uri)
    found = client.search_runs([client.get_experiment_by_name("stas").experiment_id])
    return {run.info.run_name: run for run in found}


def losses(uri: str, run_id: str) -> list[tuple[int, float, int]]:
    return [(m.step, m.value, m.timestamp) for m in client_of(uri).get_metric_history(run_id, "train_loss")]


def test_a_run_is_told_and_the_same_command_goes_on_with_it(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "STOP_S", 60.0)
    uri, fold = f"sqlite:///{out}/tracking/mlflow.db", TrainingRun(out).fold(0)
    with (
        tracking.following(settings(enabled=True), out),
        pytest.raises(KeyboardInterrupt),
        tracking.of_stage("pipeline", out),
        tracking.of_stage("train_folds", out),
    ):
        tracking.begin()
        tracking.log_fold(0)
        tracking.log_fold(0)
        tracking.log_trial("0003", {"optim.lr": 0.1}, 2, {"dice": 0.25, "fold_0": 0.25}, "stopped")
        raise KeyboardInterrupt
    first = runs_of(uri)
    assert {name: run.info.status for name, run in first.items()} == {
        "pipeline": "KILLED",
        "train_folds": "KILLED",
        "fold 0": "KILLED",
        "trial 0003": "KILLED",
    }
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in first.items()}
    ids = {name: run.info.run_id for name, run in first.items()}
    assert (
        parents["train_folds"] == ids["pipeline"] and parents["fold 0"] == parents["trial 0003"] == ids["train_folds"]
    )
    assert first["train_folds"].data.params == {
        "optim.lr": "0.001",
        "folds": "[0]",
        "data.cohort": "sftp://me:***@host/cohort.parquet",
    }
    assert first["trial 0003"].data.params == {"optim.lr": "0.1"}
    assert first["trial 0003"].data.metrics == {"dice": 0.25, "fold_0": 0.25}
    assert losses(uri, ids["fold 0"]) == [(1, 0.9, 1001000)]

    fold.write_metrics([epoch(1, 0.9), epoch(2, 0.8)])
    fold.finish(FoldResult(0, 2, 0.71, 0.6, 0.8, 0.7, 0.7, 2, 9.0, 2.0, ["cpu"]), {})
    with tracking.following(settings(enabled=True), out), tracking.of_stage("train_folds", out):
        tracking.begin()
        tracking.log_fold(0)
        said = tracking.finished(RECORD)
    assert said == {"tracking": {"uri": uri, "experiment": "stas", "run": ids["train_folds"]}}
    second = runs_of(uri)
    assert {name: run.info.run_id for name, run in second.items()} == ids
    assert losses(uri, ids["fold 0"]) == [(1, 0.9, 1001000), (2, 0.8, 2000 + 1000000)]
    assert second["fold 0"].data.metrics["oof_dice"] == 0.71 and second["fold 0"].info.status == "FINISHED"
    told = second["train_folds"]
    assert told.info.status == "FINISHED" and told.data.tags["stas.verdict"] == "look at this"
    assert told.data.metrics == {"folds.0.seconds": 12.5}
    kept = client_of(uri).list_artifacts(told.info.run_id, "figures")
    assert [file.path for file in kept] == ["figures/folds.png"]
    resolved = client_of(uri).download_artifacts(told.info.run_id, "config.resolved.yaml")
    assert Path(resolved).read_text() == RESOLVED.replace("s3cret", "***")

    with tracking.following(settings(enabled=True), out), tracking.of_stage("train_folds", out):
        tracking.finished(RECORD)  # as a pipeline does, where all is up to date
    again = runs_of(uri)["train_folds"]
    assert again.info.end_time == told.info.end_time and len(runs_of(uri)) == len(ids)


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the address of a server that takes connections and never answers."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def tell(out: str, uri: str) -> dict[str, Any]:
    with tracking.following(settings(uri=uri), out), tracking.of_stage("train_folds", out):
        tracking.begin()
        tracking.log_fold(0)
        return dict(tracking.finished(RECORD)["tracking"])


def test_a_server_that_does_not_answer_costs_seconds_and_a_line(
    out: str, silent_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.5)
    said = tell(out, silent_server)
    line = f"tracking: MLflow at {silent_server} is told nothing more: no answer for 0.5 s. The run goes on\n"
    assert capsys.readouterr().out == line and said["failed"] == "no answer for 0.5 s" and said["run"] is None


class SlowClient:
    """An MLflow that takes a while for everything."""

    def __init__(self, tracking_uri: str, registry_uri: str):
        self.num_artifacts = 0

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="1")

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        time.sleep(0.3)
        self.num_artifacts += 1


@pytest.mark.parametrize(("num_artifacts", "failure"), [(4, None), (100, "not all was told within 2.4 s")])
def test_slow_is_not_silent_and_has_an_end(
    num_artifacts: int, failure: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow.MlflowClient", SlowClient)
    teller, told = tracking._Teller("http://slow", "stas"), []

    def deed(client: Any, experiment: str) -> None:
        for _ in range(num_artifacts):
            told.append(client.log_artifact("run", "a.png", None))

    teller.tell(deed)
    teller.settle(0.8)
    assert teller.failure == (None if failure is None else f"it is slow: {failure}")
    assert failure is not None or len(told) == num_artifacts


@pytest.mark.parametrize(
    ("uri", "cause"),
    [
        ("sqlite:///file:{db}?mode=ro&uri=true", "readonly"),
        ("sqlite:///{folder}", "unable to open database file"),
        ("http://127.0.0.1:9", "refused"),
    ],
)
def test_what_mlflow_cannot_take_is_said_once(
    uri: str,
    cause: str,
    out: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)  # where MLflow makes a folder `file:` of a URI that SQLite alone understands
    (tmp_path / "mlflow.db").write_bytes(b"")
    said = tell(out, uri.format(db=tmp_path / "mlflow.db", folder=tmp_path))
    printed = capsys.readouterr().out
    assert printed.startswith("tracking: MLflow at ") and printed.count("\n") == 1 and cause in printed
    assert cause in said["failed"]


def test_off_by_default(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)  # to import it fails
    with tracking.following(TrainFoldsConfig(), out), tracking.of_stage("train_folds", out):
        tracking.begin()
        tracking.log_fold(0)
        assert tracking.finished(RECORD) == {}
    assert not Path(out, "tracking").exists()


def test_a_stage_tells_of_its_run_and_who_is_told_makes_no_other_run(
    ray_nodes: list[Any], stage: Stage, tmp_path: Path, phantom_folder: Path
) -> None:
    fields = [f"data.images={phantom_folder}/images", f"data.annotations={phantom_folder}/annotations"]
    given = [*fields, "split.num_folds=2", f"out={tmp_path}/out", "accept_warnings=true"]
    ended = stage("prepare_data", *given, "tracking.enabled=true", "tracking.experiment=mine")
    assert ended.status == 0, ended.err
    assert "MLflow" not in ended.out + ended.err and "alembic" not in ended.err
    manifest = storage.read_json(f"{tmp_path}/out/manifest.json")
    assert manifest["tracking"]["experiment"] == "mine" and "failed" not in manifest["tracking"]
    run = client_of(manifest["tracking"]["uri"]).get_run(manifest["tracking"]["run"])
    assert run.data.params["split.num_folds"] == "2" and run.info.status == "FINISHED"
    assert run.data.tags["stas.verdict"] == manifest["verdict"]["level"]
    assert (tmp_path / "out" / "tracking" / "artifacts").exists()
    again = stage("prepare_data", *given)
    assert again.status == 0 and "up to date" in again.out
    assert prepare_data.OUTPUTS.owns("tracking/artifacts/1/a/b.png", frozenset())


def test_a_stage_that_fails_is_told_of(tmp_path: Path, phantom_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise WriteError("the disk is full")

    monkeypatch.setattr(prepare_data, "_measure", fail)
    monkeypatch.setattr(tracking, "STOP_S", 60.0)
    out, data = f"{tmp_path}/out", {name: f"{phantom_folder}/{name}" for name in ("images", "annotations")}
    made = config.build(prepare_data.PrepareConfig, {"data": data, "out": out, "tracking": {"enabled": True}})
    with tracking.following(made, out), pytest.raises(WriteError, match="the disk is full"):
        prepare_data.run(made, False)
    found = runs_of(f"sqlite:///{out}/tracking/mlflow.db")
    assert {name: run.info.status for name, run in found.items()} == {"prepare_data": "FAILED"}


def test_secrets_are_refused_and_not_shown(stage: Stage, tmp_path: Path) -> None:
    for secret in (
        "http://me:s3cret@host",
        "postgresql://me:s3c/ret@host/db",
        "postgresql://me:pa s3c@ret@host/db",
        "http://h/?token=s3cret",
        "postgresql://host/db?user=me&pwd=s3cret",
        "postgresql://host/db?sslpassword=s3cret",
        "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Ds3cret",
        "http://h/?api_key=s3cret",
    ):
        ended = stage("train_folds", f"tracking.uri={secret}", f"out={tmp_path}/out", "data.cohort=/none")
        assert ended.status == 2 and "MLFLOW_TRACKING_USERNAME" in ended.err
        assert "s3c" not in ended.err + ended.out and "***" in ended.err
    for allowed in ("postgresql://me@host:5432/db?sslkey=/my.key&passfile=/my.pass", "http://host:5000"):
        ended = stage("train_folds", f"tracking.uri={allowed}", f"out={tmp_path}/out", "data.cohort=/none")
        assert "/none" in ended.err and allowed in ended.out and not (tmp_path / "out").exists()


def test_what_is_missing_is_said_before_the_start(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = ["data.cohort=/none", "tracking.enabled=true"]
    assert (
        "out = s3://bucket/run cannot hold a database; set tracking.uri"
        in stage("train_folds", *on, "out=s3://bucket/run").err
    )
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    ended = stage("train_folds", *on, f"out={tmp_path}/out", "--plan")
    assert ended.status == 2 and "pip install 'stas-on-ray[tracking]'" in ended.err
    nested = stage("pipeline", "train.tracking.enabled=true", f"out={tmp_path}/out")
    assert nested.status == 2 and "train.tracking.enabled = True: in a pipeline" in nested.err
