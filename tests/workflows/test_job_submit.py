"""`ray job submit` against a cluster of its own, started and stopped by cluster/local.sh."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stas_core import config, storage, tables
from tests.conftest import ROOT, TINY_MODEL
from workflows.pipeline import PipelineConfig

SCRIPT = str(ROOT / "cluster" / "local.sh")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start the cluster; give the environment its commands need."""
    short = Path("/tmp") / f"stas-{os.getpid()}"  # socket paths below it must stay under 107 characters
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {
        "PATH": f"{Path(sys.executable).parent}:{env['PATH']}",
        "STAS_RAY_DIR": str(short),
        "STAS_RAY_PORT": str(free_port()),
        "STAS_RAY_DASHBOARD_PORT": str(free_port()),
        "STAS_RAY_OPTIONS": "--num-cpus=2",
        "RAY_worker_niceness": "0",
    }
    started = run([SCRIPT, "start"], env)
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        yield env
    finally:
        run([SCRIPT, "stop"], env)
        subprocess.run(["rm", "-rf", str(short)], check=False)


def run(line: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=550, check=False)


def job(env: dict[str, str], *, command: list[str]) -> subprocess.CompletedProcess[str]:
    address = f"http://127.0.0.1:{env['STAS_RAY_DASHBOARD_PORT']}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{env['STAS_RAY_DIR']}/token"}
    return run(["ray", "job", "submit", "--address", address, "--", *command], env | token)


def test_the_token_is_private_and_needed(cluster: dict[str, str]) -> None:
    token = Path(cluster["STAS_RAY_DIR"]) / "token"
    assert token.stat().st_mode & 0o777 == 0o600
    address = f"http://127.0.0.1:{cluster['STAS_RAY_DASHBOARD_PORT']}/api/jobs/"
    code = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}"]
    assert run([*code, address], cluster).stdout == "401"
    assert run([*code, "-H", f"Authorization: Bearer {token.read_text()}", address], cluster).stdout == "200"
    assert token.read_text() not in run(["ps", "axww"], cluster).stdout
    logs = [cluster["STAS_RAY_DIR"] + name for name in ("/start.log", "/ray/session_latest/logs")]
    assert run(["grep", "-rl", "--", token.read_text(), *logs], cluster).stdout == ""


@pytest.mark.timeout(600)
def test_all_stages_as_a_job_and_again(cluster: dict[str, str], tmp_path: Path) -> None:
    """Prepare, train, tune, score and evaluate, twice in one job; what holds is skipped the second time."""
    out = tmp_path / "run"
    values: dict[str, Any] = {
        "out": str(out),
        "prepare": {
            "phantom": {"num_images": 9, "height": 96, "width": 128, "num_groups": 9},
            "split": {"num_folds": 2, "hold_out_fraction": 0.34},
        },
        "train": {
            "data": {"crop_px": 64},
            "model": TINY_MODEL,
            "optim": {"batch_size": 2, "micro_batch_size": 2},
            "training": {"epochs": 1},
        },
        "tune": {"space": {"min_target_px": {"low": 0, "high": 40}}, "search": {"num_settings": 4, "num_random": 2}},
        "score": {"resources": {"calibrate": False, "actors": 1, "cpus_per_task": 0.5}},
    }
    run_config = config.build(PipelineConfig, values)
    (tmp_path / "pipeline.yaml").write_text(config.dump(run_config))
    pipeline = f"python workflows/pipeline.py --config {tmp_path}/pipeline.yaml"
    # In between, some of what a stage made is lost.
    lose = f"cp {out}/scores/masks/*.png {tmp_path} && rm {out}/scores/masks/*.png {out}/scores/manifest.json"
    wait = ["python", "-m", "workflows.await_nodes", "1"]
    done = run([SCRIPT, "submit", *wait, "sh", "-c", f"{pipeline} && {lose} && echo AGAIN && {pipeline}"], cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cluster: 1 node(s) with 2 CPU" in done.stdout
    assert "_ray_pkg_" in done.stdout  # the code path: the uploaded copy is what ran
    first, again = done.stdout.split("AGAIN\n")
    stages = ("prepare_data", "train_folds", "tune_postprocess", "score_images", "evaluate")
    for printed in (first, again):
        assert [line.removeprefix("== ") for line in printed.splitlines() if line.startswith("== ")] == list(stages)
    assert "nothing to do" not in first and "GPU busy n/a" in first
    assert len(storage.read_json(str(out / "folds" / "ensemble.json"))["members"]) == 2
    assert tables.read_table(str(out / "scores" / "images.parquet")).num_rows == 3
    assert tables.read_table(str(out / "evaluation" / "scores.parquet")).num_rows == 3
    # The thresholds that were recommended are those that were applied.
    recommended = config.parse_yaml((out / "thresholds" / "postprocess.tuned.yaml").read_text(), "tuned")
    applied = storage.read_json(str(out / "scores" / "manifest.json"))["config"]["postprocess"]
    assert applied["min_target_px"] == recommended["min_target_px"]
    assert config.load_config(PipelineConfig, out / "config.resolved.yaml") == run_config

    # What was lost is made again, and what depends on it is done again; the rest is not.
    assert again.count("nothing to do") == 3 and "3 images: 0 to predict, 3 to finish from saved maps" in again
    masks = sorted((out / "scores" / "masks").iterdir())
    assert len(masks) == 3 and all(mask.read_bytes() == (tmp_path / mask.name).read_bytes() for mask in masks)


def test_the_literal_command_names_what_is_wrong(cluster: dict[str, str]) -> None:
    """Without --working-dir: with it runs the other test."""
    stage = "python workflows/train_folds.py"
    done = job(cluster, command=["sh", "-c", f"{stage} out=runs/x; {stage}"])
    assert done.returncode != 0 and "exit code 2" in done.stdout
    assert "out = runs/x is relative, but a Ray job works in a temporary copy" in done.stdout
    assert "out is not set" in done.stdout and f"{stage} out=" in done.stdout
