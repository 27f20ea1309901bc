"""`ray job submit` against a cluster of its own, started and stopped by cluster/local.sh.

It believes that it has a GPU: folds and actors reserve fractions of it, and compute on CPUs.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stas_core import config, storage, tables
from stas_core.data import cohort as cohorts
from stas_core.data import images
from stas_core.predict import ensemble as ensembles
from stas_core.predict.predictor import Predictor
from tests.conftest import ROOT, TINY_MODEL
from tests.folds.test_train_folds import artefacts, train_locally
from workflows.folds.training import TrainFoldsConfig
from workflows.pipeline import PipelineConfig

pytestmark = pytest.mark.long
NUM_SCORED = 24
"""As many as a calibration pays for."""
STAGES = ["prepare_data", "train_folds", "tune_postprocess", "score_images", "evaluate"]
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
        "STAS_RAY_OPTIONS": "--num-cpus=2 --num-gpus=1",
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


@dataclass(frozen=True)
class Done:
    """A pipeline that ran twice in one job; in between, its masks and the manifest beside them were lost."""

    config: PipelineConfig
    out: Path
    lost: Path
    """Folder of the masks as they first were."""
    first: str
    again: str


@pytest.fixture(scope="module")
def done(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Prepare, train, tune, score and evaluate, twice in one job."""
    folder = tmp_path_factory.mktemp("job")
    out, lost, path = folder / "run", folder / "lost", folder / "pipeline.yaml"
    on_gpu = {"gpus_per_actor": 1, "cpus_per_actor": 0.5, "cpus_per_task": 0.5, "logical_gpus": True}
    values: dict[str, Any] = {
        "out": str(out),
        "accept_warnings": True,
        "prepare": {
            "phantom": {"num_images": 36, "height": 96, "width": 128, "num_groups": 36},
            "split": {"num_folds": 2, "hold_out_fraction": 2 / 3},
        },
        "train": {
            "data": {"crop_px": 64},
            "model": TINY_MODEL,
            "optim": {"batch_size": 2, "micro_batch_size": 2},
            "training": {"epochs": 1},
            "resources": {"gpus_per_worker": 0.5, "logical_gpus": True},
        },
        "tune": {"space": {"min_target_px": {"low": 0, "high": 40}}, "search": {"num_settings": 4, "num_random": 2}},
        "score": {"resources": on_gpu},
    }
    run_config = config.build(PipelineConfig, values)
    path.write_text(config.dump(run_config))
    pipeline = f"python workflows/pipeline.py --config {path}"
    lose = f"mkdir {lost} && mv {out}/scores/masks/* {lost} && rm {out}/scores/manifest.json"
    wait = ["python", "-m", "workflows.await_nodes", "1"]
    ended = run([SCRIPT, "submit", *wait, "sh", "-c", f"{pipeline} && {lose} && echo AGAIN && {pipeline}"], cluster)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "_ray_pkg_" in ended.stdout  # the code path: the uploaded copy is what ran
    first, again = ended.stdout.split("AGAIN\n")
    return Done(run_config, out, lost, first, again)


@pytest.mark.timeout(600)
def test_all_stages_as_a_job(done: Done) -> None:
    out = done.out
    assert "cluster: 1 node(s) with 2 CPU" in done.first and "nothing to do" not in done.first
    assert stages_of(done.first) == STAGES
    assert len(storage.read_json(str(out / "folds" / "ensemble.json"))["members"]) == 2
    assert tables.read_table(str(out / "scores" / "images.parquet")).num_rows == NUM_SCORED
    assert tables.read_table(str(out / "evaluation" / "scores.parquet")).num_rows == NUM_SCORED
    # The thresholds that were recommended are those that were applied.
    recommended = config.parse_yaml((out / "thresholds" / "postprocess.tuned.yaml").read_text(), "tuned")
    applied = storage.read_json(str(out / "scores" / "manifest.json"))["config"]["postprocess"]
    assert applied["min_target_px"] == recommended["min_target_px"]
    assert config.load_config(PipelineConfig, out / "config.resolved.yaml") == done.config


def test_what_was_lost_is_made_again_and_the_rest_is_not(done: Done) -> None:
    """What depends on it is done again, too."""
    assert stages_of(done.again) == STAGES
    assert done.again.count("nothing to do") == 3
    assert f"{NUM_SCORED} images: 0 to predict, {NUM_SCORED} to finish from saved maps" in done.again
    masks = sorted((done.out / "scores" / "masks").iterdir())
    assert [mask.name for mask in masks] == sorted(mask.name for mask in done.lost.iterdir())
    assert len(masks) == NUM_SCORED
    assert all(mask.read_bytes() == (done.lost / mask.name).read_bytes() for mask in masks)


def test_folds_share_a_gpu(done: Done, tmp_path: Path) -> None:
    """Two of half a GPU each, to the bytes of plain Python."""
    assert "2 worker(s) of 1 CPU and 0.5 GPU fit" in done.first
    run = done.out / "folds"
    recipe = config.load_config(TrainFoldsConfig, run / "config.resolved.yaml").recipe
    local = train_locally(tmp_path, recipe, cohorts.read_cohort(str(done.out / "cohort" / "cohort.parquet")))
    for fold in ("fold_0", "fold_1"):
        ours, expected = (
            {name: data for name, data in artefacts(folder / fold).items() if not name.endswith(".json")}
            for folder in (run, local)  # of JSON is the commit, which an uploaded copy does not know
        )
        assert len(ours) > 6 and ours == expected
    assert storage.read_json(str(run / "manifest.json"))["folds"]["0"]["gpu_hours"] > 0


def test_an_actor_takes_a_gpu_after_a_calibration(done: Done) -> None:
    """Its maps are those of plain Python."""
    out = done.out / "scores"
    assert "calibrated: per image: decode" in done.first
    assert "1 actor(s) of 0.5 CPU and 1 GPU fit beside tasks of 0.5 CPU" in done.first
    assert "GPU busy n/a" in done.first and "bottleneck: " in done.first
    settled = storage.read_json(str(out / "plan.json"))
    assert (settled["batch_size"], settled["batch_px"]) == (1, None)
    cpu = torch.device("cpu")
    members = ensembles.load_members(ensembles.find_checkpoints(str(done.out / "folds" / "ensemble.json")), cpu)
    predictor = Predictor(members, device=cpu, config=done.config.score.inference)
    rows = {row.id: row for row in cohorts.read_cohort(str(done.out / "cohort" / "cohort.parquet"))}
    maps = sorted((out / "maps").iterdir())
    assert len(maps) == NUM_SCORED
    for path in maps[::5]:
        image = images.decode_image(storage.read_bytes(rows[path.stem].image_uri), path.stem)
        assert np.array_equal(images.decode_map(path.read_bytes(), path.name), predictor.predict_u8(image))


def stages_of(printed: str) -> list[str]:
    return [line.removeprefix("== ") for line in printed.splitlines() if line.startswith("== ")]


def test_the_literal_command_names_what_is_wrong(cluster: dict[str, str]) -> None:
    """Without --working-dir: with it runs the other test."""
    stage = "python workflows/train_folds.py"
    done = job(cluster, command=["sh", "-c", f"{stage} out=runs/x; {stage}"])
    assert done.returncode != 0 and "exit code 2" in done.stdout
    assert "out = runs/x is relative, but a Ray job works in a temporary copy" in done.stdout
    assert "out is not set" in done.stdout and f"{stage} out=" in done.stdout
