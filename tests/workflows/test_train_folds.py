import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from stas_core import config, storage, training
from stas_core.cohort import CohortRow
from stas_core.context import LocalContext
from stas_core.errors import ConfigError, ResourceError, StaleOutputError
from stas_core.training import FoldRecipe, FoldTask
from tests.conftest import ROOT
from workflows import train_folds
from workflows.out_folder import code_version
from workflows.runtime import Node
from workflows.train_folds import TrainFoldsConfig


def settings(recipe: FoldRecipe, cohort_uri: str, out: Path, **values: Any) -> TrainFoldsConfig:
    data = recipe.model_dump() | {"out": str(out), **values}
    data["data"] = data["data"] | {"cohort": cohort_uri}
    return config.build(TrainFoldsConfig, data)


def artefacts(fold: Path) -> dict[str, bytes]:
    """Return a fold's checkpoints, maps and index: what must not depend on where and how often it ran."""
    files = [*fold.glob("checkpoints/**/*"), *fold.glob("oof/*"), fold / "oof.parquet"]
    return {str(path.relative_to(fold)): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def local_folds(
    tmp_path_factory: pytest.TempPathFactory, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]
) -> Path:
    """Train both folds in plain Python."""
    folder = tmp_path_factory.mktemp("local")
    provenance = {"commit": code_version()["commit"]}
    for fold in (0, 1):
        context = LocalContext(folder / f"state_{fold}", device=torch.device("cpu"))
        context.folder.mkdir()
        task = FoldTask(fold, cohort_rows, str(folder / f"fold_{fold}"), provenance)
        training.train_fold(context, tiny_recipe, task)
    return folder


def test_folds_through_ray_equal_the_local_loop(
    ray_nodes: list[Node], tmp_path: Path, tiny_recipe: FoldRecipe, cohort_uri: str, local_folds: Path
) -> None:
    run = settings(tiny_recipe, cohort_uri, tmp_path)
    assert train_folds.run(run, False) == 0
    for fold in ("fold_0", "fold_1"):
        assert artefacts(tmp_path / fold) == artefacts(local_folds / fold)
        ours = storage.read_table(str(tmp_path / fold / "metrics.parquet")).drop_columns(
            ["images_per_s", "unix_time_s"]
        )
        local = storage.read_table(str(local_folds / fold / "metrics.parquet"))
        assert ours.equals(local.drop_columns(["images_per_s", "unix_time_s"]))
    assert storage.read_table(str(tmp_path / "folds.parquet")).schema.equals(train_folds.FOLDS_SCHEMA)
    members = storage.read_json(str(tmp_path / "ensemble.json"))["members"]
    assert [member["fold"] for member in members] == [0, 1]
    assert all((tmp_path / member["checkpoint"] / "checkpoint.json").exists() for member in members)
    manifest = storage.read_json(str(tmp_path / "manifest.json"))
    assert all(manifest["folds"][fold]["cpu_hours"] > 0 for fold in ("0", "1"))
    assert not any((tmp_path / "state").glob("fold_*"))

    # The same again does nothing; other settings are refused; the written config repeats the run.
    stamp = (tmp_path / "manifest.json").stat().st_mtime_ns
    assert train_folds.run(run, False) == 0
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(StaleOutputError, match=r"differs in: optim\.lr"):
        train_folds.run(run.model_copy(update={"optim": run.optim.model_copy(update={"lr": 0.5})}), False)
    again = config.load_config(TrainFoldsConfig, tmp_path / "config.resolved.yaml")
    assert train_folds.run(again, False) == 0

    # A fold that is left alone gets no more threads than beside the other: they would change its bytes.
    storage.remove(str(tmp_path / "fold_1"))
    assert train_folds.run(again, False) == 0
    assert storage.read_json(str(tmp_path / "fold_1" / "fold.json"))["num_threads"] == 1
    assert artefacts(tmp_path / "fold_1") == artefacts(local_folds / "fold_1")


def test_a_failing_fold_does_not_stop_the_others(
    ray_nodes: list[Node],
    tmp_path: Path,
    tiny_recipe: FoldRecipe,
    cohort_uri: str,
    cohort_rows: list[CohortRow],
    capsys: pytest.CaptureFixture[str],
) -> None:
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
    assert train_folds.run(run, False) == 0
    assert (tmp_path / "manifest.json").exists()


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
    path.write_text(config.dump(settings(recipe, cohort_uri, out)))
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
    return storage.read_table(str(path)).num_rows if path.exists() else 0


def training_workers(parent: int) -> list[psutil.Process]:
    """Return the processes of a driver's Ray that run a training function."""
    children = psutil.Process(parent).children(recursive=True)
    return [child for child in children if "TrainWorker" in " ".join(child.cmdline())]


LOGICAL_GPUS = """
import sys
from pathlib import Path
from stas_core import config
from workflows import train_folds
from workflows.runtime import ray_session
with ray_session(num_cpus=2, num_gpus=1):
    sys.exit(train_folds.run(config.load_config(train_folds.TrainFoldsConfig, Path(sys.argv[1])), False))
"""


def test_folds_share_a_logical_gpu(tmp_path: Path, tiny_recipe: FoldRecipe, cohort_uri: str, local_folds: Path) -> None:
    """Two folds with half a GPU each run at once, on a Ray that believes it has one."""
    path = tmp_path / "run.yaml"
    run = settings(tiny_recipe, cohort_uri, tmp_path / "run", resources={"gpus_per_worker": 0.5})
    path.write_text(config.dump(run))
    done = subprocess.run(
        [sys.executable, "-c", LOGICAL_GPUS, str(path)], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 worker(s) of 1 CPU and 0.5 GPU fit" in done.stdout and "2 group(s) in 2 slot(s)" in done.stdout
    for fold in ("fold_0", "fold_1"):
        assert artefacts(tmp_path / "run" / fold) == artefacts(local_folds / fold)
    assert storage.read_json(str(tmp_path / "run" / "manifest.json"))["folds"]["0"]["gpu_hours"] > 0


def test_two_workers_per_fold(
    ray_nodes: list[Node], tmp_path: Path, tiny_recipe: FoldRecipe, cohort_uri: str, local_folds: Path
) -> None:
    """DDP over gloo: the fold ends near the one-worker fold (BatchNorm statistics are each worker's own)."""
    run = settings(tiny_recipe, cohort_uri, tmp_path, resources={"workers_per_fold": 2}, folds=[0])
    assert train_folds.run(run, False) == 0
    ours = storage.read_table(str(tmp_path / "fold_0" / "metrics.parquet"))["train_loss"].to_pylist()
    local = storage.read_table(str(local_folds / "fold_0" / "metrics.parquet"))["train_loss"].to_pylist()
    assert ours == pytest.approx(local, rel=0.1)
    ids = storage.read_table(str(tmp_path / "fold_0" / "oof.parquet"))["id"].to_pylist()
    assert ids == storage.read_table(str(local_folds / "fold_0" / "oof.parquet"))["id"].to_pylist()


@pytest.fixture
def long_recipe(tiny_recipe: FoldRecipe) -> FoldRecipe:
    """Return a recipe of so many epochs that a kill falls into the middle."""
    longer = tiny_recipe.training.model_copy(update={"epochs": 30})
    return tiny_recipe.model_copy(update={"training": longer})


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]
) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    longer = tiny_recipe.training.model_copy(update={"epochs": 30})
    provenance = {"commit": code_version()["commit"]}
    for fold in (0, 1):
        context = LocalContext(folder / f"state_{fold}", device=torch.device("cpu"))
        context.folder.mkdir()
        task = FoldTask(fold, cohort_rows, str(folder / f"fold_{fold}"), provenance)
        training.train_fold(context, tiny_recipe.model_copy(update={"training": longer}), task)
    return folder


def test_ctrl_c_ends_the_folds_at_once_and_keeps_their_states(
    tmp_path: Path, long_recipe: FoldRecipe, cohort_uri: str
) -> None:
    out = tmp_path / "run"
    with subprocess.Popen(
        command(long_recipe, cohort_uri, out),
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as driver:
        wait_for(lambda: min(epochs_done(out / "fold_0"), epochs_done(out / "fold_1")) >= 2)
        driver.send_signal(signal.SIGINT)
        printed, errors = driver.communicate(timeout=60)
    assert driver.returncode == 130, errors
    assert b"folds end at their next step" in printed and b"the same command again goes on" in errors
    assert max(epochs_done(out / "fold_0"), epochs_done(out / "fold_1")) < 30
    assert all(any((out / "state" / f"fold_{fold}").rglob("state.json")) for fold in (0, 1))


@pytest.mark.timeout(900)
def test_a_killed_worker_and_a_killed_driver_change_nothing(
    tmp_path: Path, long_recipe: FoldRecipe, cohort_uri: str, undisturbed: Path
) -> None:
    out = tmp_path / "run"
    line = command(long_recipe, cohort_uri, out)
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    driver = subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(lambda: epochs_done(out / "fold_0") >= 2)
        training_workers(driver.pid)[0].send_signal(signal.SIGKILL)
        at_kill = max(epochs_done(out / "fold_0"), epochs_done(out / "fold_1"))
        wait_for(lambda: min(epochs_done(out / "fold_0"), epochs_done(out / "fold_1")) > at_kill)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not (out / "manifest.json").exists()

    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    for fold in ("fold_0", "fold_1"):
        assert storage.read_json(str(out / fold / "fold.json"))["num_threads"] == 1
        assert artefacts(out / fold) == artefacts(undisturbed / fold)
