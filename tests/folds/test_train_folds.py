import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import torch

from stas_core import config, storage, tables
from stas_core.data.cohort import CohortRow
from stas_core.errors import ConfigError, ResourceError, StaleOutputError
from stas_core.runs import FoldScores
from stas_core.train import loop
from stas_core.train.context import LocalContext
from stas_core.train.recipe import FoldRecipe, FoldTask
from tests.conftest import ROOT
from tests.workflows.planted import plant_pickles
from tests.workflows.test_listening import watch_listening
from workflows import train_folds
from workflows.cluster import Node
from workflows.folds.training import TrainFoldsConfig
from workflows.out_folder import code_version

LONG = {"folds": [0], "resources": {"cpus_per_worker": 1}}
"""Settings of a run that is stopped on its way: one fold, with the threads of plain Python."""
LONG_EPOCHS = 12


def settings(recipe: FoldRecipe, cohort_uri: str, out: Path | str, **values: Any) -> TrainFoldsConfig:
    data = recipe.model_dump() | {"out": str(out), **values}
    data["data"] = data["data"] | {"cohort": cohort_uri}
    return config.build(TrainFoldsConfig, data)


def artefacts(fold: Path) -> dict[str, bytes]:
    """Return a fold's checkpoints, maps and index: what must not depend on where and how often it ran."""
    files = [*fold.glob("checkpoints/**/*"), *fold.glob("oof/*"), fold / "oof.parquet"]
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
def local_folds(
    tmp_path_factory: pytest.TempPathFactory, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]
) -> Path:
    return train_locally(tmp_path_factory.mktemp("local"), tiny_recipe, cohort_rows)


def test_folds_equal_the_local_loop_and_a_failing_one_does_not_stop_the_others(
    ray_nodes: list[Node],
    tmp_path: Path,
    tiny_recipe: FoldRecipe,
    cohort_uri: str,
    cohort_rows: list[CohortRow],
    local_folds: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ResourceError):  # it claims the folder
        train_folds.run(settings(tiny_recipe, cohort_uri, tmp_path, resources={"workers_per_fold": 64}), False)
    # Fold 0 cannot write its maps: a folder stands where the first one goes.
    first = next(row.id for row in cohort_rows if row.fold == 0)
    (tmp_path / "fold_0" / "oof" / f"{first}.png" / "in_the_way").mkdir(parents=True)
    run = settings(tiny_recipe, cohort_uri, tmp_path, resources={"max_restarts": 0})
    assert train_folds.run(run, False) == 1
    assert (tmp_path / "fold_1" / "fold.json").exists() and not (tmp_path / "fold_0" / "fold.json").exists()
    assert not (tmp_path / "manifest.json").exists()
    assert "fold 0 FAILED: WriteError: cannot write" in capsys.readouterr().out
    # With the cause gone, the same command finishes what is left.
    (tmp_path / "fold_0" / "oof" / f"{first}.png" / "in_the_way").rmdir()
    (tmp_path / "fold_0" / "oof" / f"{first}.png").rmdir()
    ran = tmp_path / "planted code ran"
    plant_pickles(tmp_path, ran)
    assert train_folds.run(run, False) == 0
    assert not ran.exists()
    # A fold that is left alone gets no more threads than beside the other: they would change its bytes.
    assert storage.read_json(str(tmp_path / "fold_0" / "fold.json"))["num_threads"] == 1
    for fold in ("fold_0", "fold_1"):
        assert artefacts(tmp_path / fold) == artefacts(local_folds / fold)
        ours = tables.read_table(str(tmp_path / fold / "metrics.parquet")).drop_columns(["images_per_s", "unix_time_s"])
        local = tables.read_table(str(local_folds / fold / "metrics.parquet"))
        assert ours.equals(local.drop_columns(["images_per_s", "unix_time_s"]))
    assert tables.read_table(str(tmp_path / "folds.parquet")).schema.equals(tables.schema_of(FoldScores))
    members = storage.read_json(str(tmp_path / "ensemble.json"))["members"]
    assert [member["fold"] for member in members] == [0, 1]
    assert all((tmp_path / member["checkpoint"] / "checkpoint.json").exists() for member in members)
    manifest = storage.read_json(str(tmp_path / "manifest.json"))
    assert all(manifest["folds"][fold]["cpu_hours"] > 0 for fold in ("0", "1"))
    assert not (tmp_path / "state" / "fold_0").exists()  # the other's was planted after it had ended

    # The same again does nothing; other settings are refused; the written config repeats the run.
    stamp = (tmp_path / "manifest.json").stat().st_mtime_ns
    assert train_folds.run(run, False) == 0
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(StaleOutputError, match=r"differs in: optim\.lr"):
        train_folds.run(run.model_copy(update={"optim": run.optim.model_copy(update={"lr": 0.5})}), False)
    again = config.load_config(TrainFoldsConfig, tmp_path / "config.resolved.yaml")
    assert train_folds.run(again, False) == 0


def test_unknown_folds_and_impossible_resources_are_refused(
    ray_nodes: list[Node], tmp_path: Path, tiny_recipe: FoldRecipe, cohort_uri: str
) -> None:
    with pytest.raises(ConfigError, match=r"folds = \[7\]: the cohort has folds \[0, 1\]"):
        train_folds.run(settings(tiny_recipe, cohort_uri, tmp_path / "a", folds=[7]), False)
    with pytest.raises(ResourceError, match="no group can ever run"):
        wanted = {"workers_per_fold": 64}
        train_folds.run(settings(tiny_recipe, cohort_uri, tmp_path / "b", resources=wanted), False)


def command(recipe: FoldRecipe, cohort_uri: str, out: Path) -> list[str]:
    """Return the command line of a slowed-down run that can be killed on its way."""
    path = out.parent / f"{out.name}.yaml"
    path.write_text(config.dump(settings(recipe, cohort_uri, out, **LONG)))
    return [sys.executable, str(ROOT / "workflows" / "train_folds.py"), "--config", str(path)]


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
    ray_nodes: list[Node], tiny_recipe: FoldRecipe, cohort_uri: str, local_folds: Path
) -> None:
    """DDP over gloo: the fold ends near the one-worker fold (BatchNorm statistics are each worker's own)."""
    fsspec.filesystem("s3").mkdir("s3://trained")
    out = "s3://trained/run"
    run = settings(tiny_recipe, cohort_uri, out, resources={"workers_per_fold": 2}, folds=[0])
    with watch_listening() as found:
        assert train_folds.run(run, False) == 0
    assert not found
    assert storage.list_files(f"{out}/fold_0/checkpoints") and not storage.entries(f"{out}/state")
    ours = tables.read_table(f"{out}/fold_0/metrics.parquet")["train_loss"].to_pylist()
    local = tables.read_table(str(local_folds / "fold_0" / "metrics.parquet"))["train_loss"].to_pylist()
    assert ours == pytest.approx(local, rel=0.1)
    ids = tables.read_table(f"{out}/fold_0/oof.parquet")["id"].to_pylist()
    assert ids == tables.read_table(str(local_folds / "fold_0" / "oof.parquet"))["id"].to_pylist()


@pytest.fixture(scope="module")
def long_recipe(tiny_recipe: FoldRecipe) -> FoldRecipe:
    """Return a recipe of so many epochs that a kill falls into the middle."""
    longer = tiny_recipe.training.model_copy(update={"epochs": LONG_EPOCHS})
    return tiny_recipe.model_copy(update={"training": longer})


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, long_recipe: FoldRecipe, cohort_rows: list[CohortRow]
) -> Path:
    return train_locally(tmp_path_factory.mktemp("undisturbed"), long_recipe, cohort_rows, folds=[0])


@pytest.mark.timeout(900)
def test_however_it_is_stopped_the_same_command_goes_on_to_the_same_bytes(
    driver_env: dict[str, str], tmp_path: Path, long_recipe: FoldRecipe, cohort_uri: str, undisturbed: Path
) -> None:
    """One run is stopped by SIGTERM, loses a worker, loses its driver, and is finished in this process."""
    out = tmp_path / "run"
    fold = out / "fold_0"
    line = command(long_recipe, cohort_uri, out)

    with subprocess.Popen(
        line, env=driver_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as driver:
        wait_for(lambda: epochs_done(fold) >= 2)
        driver.send_signal(signal.SIGTERM)
        printed, errors = driver.communicate(timeout=120)
    assert driver.returncode == 143, errors
    assert b"folds end at their next step" in printed and b"the same command again goes on" in errors
    assert epochs_done(fold) < LONG_EPOCHS
    assert any((out / "state" / fold.name).rglob("state.json"))

    driver = subprocess.Popen(line, env=driver_env, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(training_workers)[0].send_signal(signal.SIGKILL)
        at_kill = epochs_done(fold)
        wait_for(lambda: epochs_done(fold) > at_kill)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not (out / "manifest.json").exists()

    assert train_folds.run(settings(long_recipe, cohort_uri, out, **LONG), False) == 0
    assert artefacts(fold) == artefacts(undisturbed / fold.name)
