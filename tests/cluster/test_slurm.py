"""cluster/slurm.sbatch on a real Slurm: two nodes in namespaces of this machine, as root (`make test-cluster`)."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from stas_core import storage
from tests.cluster.tools import tool
from tests.conftest import ROOT, TINY_MODEL
from tests.folds.test_train_folds import artefacts, epochs_done

SCRIPT = ROOT / "cluster" / "slurm.sbatch"
HOSTS = ROOT / "tests" / "cluster" / "slurm_hosts.sh"
NEEDED = ("slurmctld", "slurmd", "munged", "ip")
EPOCHS = 20


def why_not() -> str | None:
    """Return what this machine lacks for a Slurm of its own."""
    if os.environ.get("STAS_TEST_CLUSTER", "short") == "short":
        return "minutes long: run by `make test-cluster`"
    if os.geteuid() != 0:
        return "namespaces need root"
    if missing := [name for name in NEEDED if not shutil.which(name, path="/usr/sbin:/usr/bin:/sbin")]:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge iproute2"
    return None if Path("/sys/fs/cgroup/freezer").is_dir() else "slurmd in namespaces needs cgroups of version 1"


class Slurm:
    """Two nodes of one CPU each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_"))}
        self.env |= {"STAS_SLURM_DIR": str(folder / "state"), "STAS_VENV": str(Path(sys.executable).parents[1])}

    def run(self, *line: str) -> str:
        """Run a command on the first node; return what it prints."""
        done = subprocess.run(
            [str(HOSTS), "in", str(self.folder), *line],
            cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, *words: str, nodes: int = 2, more: Sequence[str] = ()) -> str:
        """Submit a stage with more options of sbatch; return the job's number."""
        options = ["--parsable", f"--nodes={nodes}", f"--output={self.folder}/job-%j.log", *more]
        return self.run("sbatch", *options, str(SCRIPT), *words).strip()

    def log(self, job: str) -> str:
        """Return what a job has printed."""
        path = self.folder / f"job-{job}.log"
        return path.read_text() if path.exists() else ""

    def state(self, job: str) -> str:
        """Return where a job is: PENDING, RUNNING, COMPLETED..."""
        return str(re.findall(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))[0])

    def wait(self, job: str, condition: Callable[[], Any], seconds: float = 700) -> None:
        """Wait for a condition, at most so many seconds."""
        end = time.monotonic() + seconds
        while not condition():
            logs = [path.read_text()[-3000:] for path in self.folder.glob(f"state/{job}/ray-*.log")]
            assert time.monotonic() < end, "\n".join([self.run("squeue"), self.log(job), *logs])
            time.sleep(0.5)

    def ended(self, job: str) -> bool:
        """Tell whether a job is over."""
        return self.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "PREEMPTED")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="stas-slurm-", dir="/var/tmp"))  # the nodes' /tmp are their own
    cluster = Slurm(folder)
    try:
        subprocess.run([str(HOSTS), "up", str(folder)], check=True, timeout=120)
        yield cluster
        for path in sorted(folder.glob("job-*.log")):
            print(f"==== {path.name}\n{path.read_text()}")
    finally:
        subprocess.run([str(HOSTS), "down", str(folder)], check=True, timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def train(slurm: Slurm) -> list[str]:
    """Make a cohort on one node; return the stage that trains a fold with a worker on each of two."""
    settings: dict[str, Any] = {
        "out": str(slurm.folder / "cohort"),
        "phantom": {"num_images": 8, "height": 96, "width": 128, "num_groups": 8},
        "split": {"num_folds": 2},
    }
    (slurm.folder / "prepare.yaml").write_text(yaml.safe_dump(settings))
    stage = ["workflows/prepare_data.py", "--config", f"{slurm.folder}/prepare.yaml"]
    job = slurm.submit(*stage, nodes=1, more=["--gpus-per-node=1"])
    slurm.wait(job, lambda: slurm.ended(job))
    assert slurm.state(job) == "COMPLETED", slurm.log(job)
    assert "on the Ray at 127.0.0.1:" in slurm.log(job)  # alone, a node listens on loopback
    assert "1 node(s) with 1 CPU and 1 GPU" in slurm.log(job)  # one that Slurm counts, and nothing computes on
    settings = {
        "data": {"cohort": f"{slurm.folder}/cohort/cohort.parquet", "crop_px": 64, "num_loader_workers": 0},
        "model": TINY_MODEL,
        "optim": {"batch_size": 2, "micro_batch_size": 1},
        "training": {"epochs": EPOCHS},
        "folds": [0],
        "resources": {"workers_per_fold": 2, "cpus_per_worker": 1},
        "accept_warnings": True,
    }
    (slurm.folder / "train.yaml").write_text(yaml.safe_dump(settings))
    return ["workflows/train_folds.py", "--config", f"{slurm.folder}/train.yaml"]


@pytest.mark.timeout(3000)
def test_a_job_that_is_stopped_and_preempted_goes_on_to_the_same_bytes(slurm: Slurm, train: list[str]) -> None:
    quiet, cut = slurm.folder / "quiet", slurm.folder / "cut"
    job = slurm.submit(*train, f"out={quiet}")
    slurm.wait(job, lambda: slurm.ended(job))
    assert slurm.state(job) == "COMPLETED", slurm.log(job)
    assert "2 node(s) with 2 CPU" in slurm.log(job)

    job = slurm.submit(*train, f"out={cut}", more=["--export=ALL,STAS_TLS=yes"])
    slurm.wait(job, lambda: epochs_done(cut / "fold_0") >= 2)
    token = slurm.folder / "state" / job / "token"
    assert token.stat().st_mode & 0o777 == 0o600 and token.parent.stat().st_mode & 0o777 == 0o700
    told = [slurm.run("ps", "axww"), slurm.run("scontrol", "show", "job", job), slurm.log(job)]
    gcs = f"10.78.0.1:{10000 + int(job) % 40 * 500}"
    shown = slurm.run("sh", "-c", f"openssl s_client -connect {gcs} </dev/null 2>&1 || true")
    assert re.search(r"subject=CN ?= ?stas", shown), shown
    assert "ray" in told[0] and not any(token.read_text() in text for text in told)
    slurm.run("scancel", "--signal=TERM", "--batch", job)  # as Slurm does two minutes before the time is up
    slurm.wait(job, lambda: "is queued again" in slurm.log(job), 120)
    slurm.wait(job, lambda: "Restarts=1" in slurm.run("scontrol", "show", "job", job), 60)
    stopped_at = epochs_done(cut / "fold_0")
    assert 2 <= stopped_at < EPOCHS and not token.exists()

    slurm.wait(job, lambda: epochs_done(cut / "fold_0") > stopped_at)
    options = ["--parsable", "--partition=high", "--nodes=2", "--output=/dev/null"]
    urgent = slurm.run("sbatch", *options, "--wrap=true").strip()
    slurm.wait(job, lambda: slurm.state(urgent) == "COMPLETED", 200)
    slurm.wait(job, lambda: slurm.ended(job))
    shown = slurm.run("scontrol", "show", "job", job)
    assert "JobState=COMPLETED" in shown and "Restarts=2" in shown, slurm.log(job)
    assert artefacts(cut / "fold_0") == artefacts(quiet / "fold_0") and storage.exists(str(cut / "manifest.json"))

    assert not (slurm.folder / "state" / job).exists()
    for node in ("n1", "n2"):
        left = slurm.run("srun", "-w", node, "sh", "-c", "ls -d /tmp/stas-ray-* 2>/dev/null; pgrep -l raylet || true")
        assert left == "", node


def test_what_fails_says_so_and_is_not_queued_again(slurm: Slurm, train: list[str]) -> None:
    job = slurm.submit(train[0], f"out={slurm.folder}/wrong", "optim.lr=fast", nodes=1)
    slurm.wait(job, lambda: slurm.ended(job))
    assert "ExitCode=2:0" in slurm.run("scontrol", "show", "job", job) and "optim.lr" in slurm.log(job)
    job = slurm.submit("workflows/nothing.py", nodes=1)
    slurm.wait(job, lambda: slurm.ended(job))
    assert "expected a stage below" in slurm.log(job) and "got: workflows/nothing.py" in slurm.log(job)


def test_shellcheck_has_nothing_to_say() -> None:
    scripts = [SCRIPT, HOSTS, *sorted((ROOT / "cluster").glob("*.sh"))]
    done = subprocess.run([tool("shellcheck"), *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_shellcheck_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "x.sh").write_text(SCRIPT.read_text().replace('rm -rf "$work"', "rm -rf $work"))
    done = subprocess.run([tool("shellcheck"), str(tmp_path / "x.sh")], capture_output=True, text=True, check=False)
    assert "SC2086" in done.stdout
