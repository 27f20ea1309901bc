import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import torch

from stas_core import config, storage, tables
from stas_core.data.cohort import CohortRow
from stas_core.errors import ConfigError, ResourceError, StaleOutputError
from stas_core.networks import checkpoints
from stas_core.networks.checkpoints import CheckpointRecord
from stas_core.networks.model import build_model
from stas_core.runs import FoldScores, TrainingRun
from stas_core.train import loop
from stas_core.train.context import LocalContext
from stas_core.train.recipe import FoldRecipe, FoldTask
from tests.conftest import ROOT
from tests.docs.documented import assert_documented
from tests.workflows.planted import plant_pickles
from tests.workflows.test_listening import watch_listening
from tests.workflows.test_tracking import runs_of
from workflows import tracking, train_folds
from workflows.cluster import Node
from workflows.folds.fitting import ResourcesConfig
from workflows.folds.training import TrainFoldsConfig
from workflows.out_folder import code_version

EPOCHS = 10
"""So many that what stops a fold falls into its middle."""


def settings(recipe: FoldRecipe, cohort_uri: str, out: Path | str, **values: Any) -> TrainFoldsConfig:
    data = recipe.model_dump() | {"out": str(out), "accept_warnings": True, **values}  # it learns next to nothing
    data["data"] = data["data"] | {"cohort": cohort_uri}
    return config.build(TrainFoldsConfig, data)


def artefacts(fold: Path) -> dict[str, bytes]:
    """Return a fold's checkpoints, maps and index: what must not depend on where and how often it ran."""
    files = [*fold.glob("checkpoints/**/*"), *fold.glob("oof/*"), *fold.glob("examples/*/*"), fold / "oof.parquet"]
    return {str(path.relative_to(fold)): path.read_bytes() for path in files if path.is_file()}


def train_locally(folder: Path, recipe: FoldRecipe, rows: list[CohortRow], folds: Sequence[int] = (0, 1)) -> Path:
    """Train folds in plain Python."""
    provenance = {"commit": code_version()["commit"]}
    for fold in folds:
        context = LocalContext(folder / f"state_{fold}", device=torch.device("cpu"))
        context.folder.mkdir()
        loop.train_fold(context, recipe, FoldTask(fold, rows, str(folder / f"fold_{fold}"), provenance))
    return folder


@pytest.fixture(scope="module")
def recipe(tiny_recipe: FoldRecipe) -> FoldRecipe:
    return tiny_recipe.model_copy(update={"training": tiny_recipe.training.model_copy(update={"epochs": EPOCHS})})


@pytest.fixture(scope="module")
def local_folds(tmp_path_factory: pytest.TempPathFactory, recipe: FoldRecipe, cohort_rows: list[CohortRow]) -> Path:
    return train_locally(tmp_path_factory.mktemp("local"), recipe, cohort_rows)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe: FoldRecipe, cohort_uri: str) -> TrainFoldsConfig:
    return settings(recipe, cohort_uri, tmp_path_factory.mktemp("run"), resources={"max_restarts": 1})


def kill_worker(fold: Path, killed: list[int]) -> None:
    """End the workers of all folds that still train, once this one has trained for two epochs; note how far it was."""
    wait_for(lambda: epochs_done(fold) >= 2)
    for worker in training_workers():
        worker.kill()
    killed.append(epochs_done(fold))


@pytest.fixture(scope="module")
def half_done(ray_nodes: list[Node], run: TrainFoldsConfig, local_folds: Path) -> str:
    """Train both folds, of which one cannot write its metrics, and the other loses its worker; return what is printed.

    The folds in plain Python are asked for only so that nothing else runs beside those of Ray.
    """
    out, killed = Path(run.out or ""), list[int]()
    with pytest.raises(ResourceError):  # it claims the folder
        train_folds.run(run.model_copy(update={"resources": ResourcesConfig(workers_per_fold=64)}), False)
    (out / "fold_0" / "metrics.parquet" / "in_the_way").mkdir(parents=True)
    killer = threading.Thread(target=kill_worker, args=(out / "fold_1", killed))
    killer.start()
    with redirect_stdout(io.StringIO()) as printed:
        assert train_folds.run(run, False) == 1
    killer.join()
    assert killed and killed[0] < EPOCHS
    return printed.getvalue()


@pytest.mark.long
def test_a_failing_fold_or_a_killed_worker_does_not_stop_the_others(
    half_done: str, run: TrainFoldsConfig, local_folds: Path
) -> None:
    out = Path(run.out or "")
    assert "fold 0 FAILED: WriteError: cannot write" in half_done
    assert (out / "fold_1" / "fold.json").exists() and not (out / "fold_0" / "fold.json").exists()
    assert not (out / "manifest.json").exists()
    assert artefacts(out / "fold_1") == artefacts(local_folds / "fold_1")


@pytest.mark.long
def test_however_it_is_stopped_the_same_command_goes_on_to_the_same_bytes(
    half_done: str, run: TrainFoldsConfig, local_folds: Path, driver_env: dict[str, str], tmp_path: Path
) -> None:
    """With the cause gone, the fold that failed is stopped by SIGTERM, loses its driver, and is finished here."""
    out = Path(run.out or "")
    fold = out / "fold_0"
    (fold / "metrics.parquet" / "in_the_way").rmdir()
    (fold / "metrics.parquet").rmdir()
    path = tmp_path / "run.yaml"
    path.write_text(config.dump(run))
    line = [sys.executable, str(ROOT / "workflows" / "train_folds.py"), "--config", str(path)]
    with subprocess.Popen(
        line, env=driver_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as driver:
        wait_for(lambda: epochs_done(fold) >= 2)
        driver.send_signal(signal.SIGTERM)
        printed, errors = driver.communicate(timeout=120)
    assert driver.returncode == 143, errors
    assert b"folds end at their next step" in printed and b"the same command again goes on" in errors
    assert epochs_done(fold) < EPOCHS
    assert any((out / "state" / fold.name).rglob("state.json"))

    at_stop = epochs_done(fold)
    driver = subprocess.Popen(line, env=driver_env, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(lambda: epochs_done(fold) > at_stop)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert epochs_done(fold) < EPOCHS and not (out / "manifest.json").exists()

    ran = tmp_path / "planted code ran"
    plant_pickles(out, ran)
    assert train_folds.run(run, False) == 0
    assert not ran.exists()
    assert_documented("train_folds", out)
    # A fold that is left alone gets no more threads than beside the other: they would change its bytes.
    assert storage.read_json(str(fold / "fold.json"))["num_threads"] == 1
    for name in ("fold_0", "fold_1"):
        assert artefacts(out / name) == artefacts(local_folds / name)
        ours = tables.read_table(str(out / name / "metrics.parquet")).drop_columns(["images_per_s", "unix_time_s"])
        local = tables.read_table(str(local_folds / name / "metrics.parquet"))
        assert ours.equals(local.drop_columns(["images_per_s", "unix_time_s"]))
    assert tables.read_table(str(out / "folds.parquet")).schema.equals(tables.schema_of(FoldScores))
    members = storage.read_json(str(out / "ensemble.json"))["members"]
    assert [member["fold"] for member in members] == [0, 1]
    assert all((out / member["checkpoint"] / "checkpoint.json").exists() for member in members)
    manifest = storage.read_json(str(out / "manifest.json"))
    assert manifest["report"] == ["report.html"]
    assert all(manifest["folds"][number]["cpu_hours"] > 0 for number in ("0", "1"))
    assert not list((out / "state").glob("fold_*"))  # not even that of the fold that had ended before; others' stay

    # The same again does nothing; other settings are refused; the written config repeats the run.
    stamp = (out / "manifest.json").stat().st_mtime_ns
    assert train_folds.run(run, False) == 0
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(StaleOutputError, match=r"differs in: optim\.lr"):
        train_folds.run(run.model_copy(update={"optim": run.optim.model_copy(update={"lr": 0.5})}), False)
    again = config.load_config(TrainFoldsConfig, out / "config.resolved.yaml")
    assert train_folds.run(again, False) == 0


def test_unknown_folds_and_impossible_resources_are_refused(
    ray_nodes: list[Node], tmp_path: Path, tiny_recipe: FoldRecipe, cohort_uri: str
) -> None:
    with pytest.raises(ConfigError, match=r"folds = \[7\]: the cohort has folds \[0, 1\]"):
        train_folds.run(settings(tiny_recipe, cohort_uri, tmp_path / "a", folds=[7]), False)
    with pytest.raises(ResourceError, match="no group can ever run"):
        wanted = {"workers_per_fold": 64}
        train_folds.run(settings(tiny_recipe, cohort_uri, tmp_path / "b", resources=wanted), False)


def wait_for(condition: Callable[[], Any], seconds: float = 280) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("nothing happened in time")


def epochs_done(fold: Path) -> int:
    path = fold / "metrics.parquet"
    return tables.read_table(str(path)).num_rows if path.exists() else 0


def training_workers() -> list[psutil.Process]:
    """Return the processes of this process's Ray that run a training function."""
    return [child for child in psutil.Process().children(recursive=True) if "TrainWorker" in name_of(child)]


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has ended since
        return ""


@pytest.mark.usefixtures("endpoint")
def test_two_workers_per_fold_and_a_run_in_a_bucket(
    ray_nodes: list[Node], tiny_recipe: FoldRecipe, cohort_uri: str, cohort_rows: list[CohortRow], tmp_path: Path
) -> None:
    """DDP over gloo: the fold ends near the one-worker fold (BatchNorm statistics are each worker's own).

    It goes on from a model in the bucket; a copy of that elsewhere makes the same run, another model another one.
    """
    fsspec.filesystem("s3").mkdir("s3://trained")
    out, model = "s3://trained/run", tiny_recipe.model.model_copy(update={"init_from": "s3://trained/before"})
    for seed, uri in enumerate(("s3://trained/before", str(tmp_path / "other"))):
        torch.manual_seed(seed)
        record = CheckpointRecord(tiny_recipe.model.model_dump(mode="json"), 1.0, 0, 1, False, {}, {})
        checkpoints.save_checkpoint(uri, build_model(tiny_recipe.model).state_dict(), record)
    tiny_recipe = tiny_recipe.model_copy(update={"model": model})
    told = {"uri": f"sqlite:///{tmp_path}/mlflow.db"}
    run = settings(tiny_recipe, cohort_uri, out, resources={"workers_per_fold": 2}, folds=[0], tracking=told)
    with watch_listening() as found, redirect_stdout(io.StringIO()) as printed, tracking.following(run, out):
        assert train_folds.run(run, False) == 0
    assert not found
    assert "all folds go on from s3://trained/before: out-of-fold scores are only honest if" in printed.getvalue()
    manifest, last = storage.read_json(f"{out}/manifest.json"), f"{out}/fold_0/checkpoints/last"
    assert "whether s3://trained/before, from which" in manifest["verdict"]["unchecked"][0]
    assert "tracking: MLflow" not in printed.getvalue() and "failed" not in manifest["tracking"]
    known = runs_of(told["uri"])
    assert manifest["tracking"]["run"] == known["train_folds"].info.run_id and "tracking" not in manifest["config"]
    dice = [row.val_dice for row in TrainingRun(out).fold(0).metrics()]
    assert known["fold 0"].data.metrics["val_dice"] == dice[-1]
    assert {run.info.status for run in known.values()} == {"FINISHED"} and len(known) == 2
    mark = manifest["config"]["model"]["init_from"]
    assert checkpoints.read_record(last).provenance["init_from"] == mark and "trained" not in mark
    fsspec.filesystem("s3").get("s3://trained/before", str(tmp_path / "moved"), recursive=True)
    moved, other = (model.model_copy(update={"init_from": f"{tmp_path}/{name}"}) for name in ("moved", "other"))
    assert train_folds.run(run.model_copy(update={"model": moved}), False) == 0
    with pytest.raises(StaleOutputError, match=rf"differs in: model\.init_from \(was '{mark}', now"):
        train_folds.run(run.model_copy(update={"model": other}), False)
    assert storage.list_files(f"{out}/fold_0/checkpoints") and not storage.entries(f"{out}/state")
    ours = tables.read_table(f"{out}/fold_0/metrics.parquet")["train_loss"].to_pylist()
    one = train_locally(tmp_path, tiny_recipe, cohort_rows, folds=[0]) / "fold_0"
    local = tables.read_table(str(one / "metrics.parquet"))["train_loss"].to_pylist()
    assert ours == pytest.approx(local, rel=0.1)
    ids = tables.read_table(f"{out}/fold_0/oof.parquet")["id"].to_pylist()
    assert ids == tables.read_table(str(one / "oof.parquet"))["id"].to_pylist()
