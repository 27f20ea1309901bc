"""What cluster/local.sh stop ends, and what it leaves alone."""

import os
import subprocess
from pathlib import Path

from tests.conftest import ROOT


def test_stop_ends_the_clusters_processes_and_no_bystander(tmp_path: Path) -> None:
    env = os.environ | {"STAS_RAY_DIR": str(tmp_path)}
    named = ["python3", "-c", "import time; time.sleep(60)", f"{tmp_path}/ray/session_latest/logs"]
    with (
        subprocess.Popen(named) as bystander,
        subprocess.Popen(["sleep", "60"], env=env | {"STAS_RAY_CLUSTER": str(tmp_path)}) as member,
        subprocess.Popen(["sleep", "60"], env=env | {"STAS_RAY_CLUSTER": f"{tmp_path}_other"}) as other,
    ):
        stopped = subprocess.run([str(ROOT / "cluster" / "local.sh"), "stop"], env=env, timeout=60, check=False)
        try:
            assert stopped.returncode == 0 and member.wait(timeout=10) != 0
            assert bystander.poll() is None and other.poll() is None
        finally:
            for process in (bystander, member, other):
                process.kill()
