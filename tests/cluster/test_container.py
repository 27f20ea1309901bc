"""The image of cluster nodes: what the Dockerfile says, and what a build of it could see. No engine is needed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths
from packaging.requirements import Requirement

import stas_core
from tests.cluster.tools import tool
from tests.conftest import ROOT
from tests.workflows.test_job_package import AT_HOME, BESIDE_CODE, tracked

DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()
COPIED = ["pyproject.toml", "constraints.txt", "README.md", "LICENSE"]


def lint(dockerfile: str) -> subprocess.CompletedProcess[str]:
    line = [
        tool("hadolint"),
        "--no-color",
        "--ignore",
        "DL3057",
        "-",
    ]  # DL3057: there is no server to ask for its health
    return subprocess.run(line, input=dockerfile, capture_output=True, text=True, timeout=60, check=False)


def test_hadolint_has_nothing_to_say() -> None:
    assert lint(DOCKERFILE).stdout == ""


@pytest.mark.parametrize(
    ("line", "broken"),
    [("USER 1000:1000", "USER root"), ("--no-install-recommends ", ""), ("WORKDIR /opt", "WORKDIR opt")],
)
def test_hadolint_finds_what_is_wrong(line: str, broken: str) -> None:
    assert line in DOCKERFILE
    assert lint(DOCKERFILE.replace(line, broken)).stdout != ""


def test_the_user_has_no_rights_and_code_comes_after_dependencies() -> None:
    steps = re.findall(r"^(?:RUN|COPY|USER|CMD|LABEL|ENV) .*", DOCKERFILE, re.M)
    assert steps[-2:] == ["USER 1000:1000", 'CMD ["python", "workflows/pipeline.py", "--help"]']
    final = DOCKERFILE.split("\nFROM ")[-1]
    assert final.index("--requirement requirements.txt") < final.index("COPY stas_core") < final.index("ARG COMMIT")
    assert re.findall(r"^ARG (\w+)", DOCKERFILE, re.M) == [
        *("PYTHON", "DEVICE", "TORCH_CPU_INDEX", "PACKAGES"),
        *("VERSION", "COMMIT"),
    ]  # arguments stay in an image's history: none carries a secret


def requirements(tmp_path: Path, **arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the step of the Dockerfile that lists what is to be installed; its lines are on stdout."""
    step = re.findall(r"^RUN (python -c .+?[^\\])\n", DOCKERFILE, re.M | re.S)[0]
    step = step.replace("/pyproject.toml", str(ROOT / "pyproject.toml")).replace(
        "/requirements.txt", f"{tmp_path}/r.txt"
    )
    env = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PACKAGES": "",
        "TORCH_CPU_INDEX": "https://cpu",
    }
    line = ["sh", "-c", f"{step} && cat {tmp_path}/r.txt"]
    return subprocess.run(line, env=env | arguments, capture_output=True, text=True, timeout=60, check=False)


def test_what_is_installed_is_what_the_project_needs(tmp_path: Path) -> None:
    listed = (ROOT / "pyproject.toml").read_text().split("\ndependencies = [\n")[1].split("\n]")[0]
    needed = {Requirement(line).name for line in re.findall('"(.+)"', listed)} | {"setuptools", "s3fs"}
    cuda = requirements(tmp_path, DEVICE="cuda").stdout.splitlines()
    assert {Requirement(line).name for line in cuda} == needed
    cpu = requirements(tmp_path, DEVICE="cpu", PACKAGES="boto3 gcsfs").stdout.splitlines()
    assert cpu == ["--extra-index-url https://cpu", *cuda, "boto3", "gcsfs"]
    assert requirements(tmp_path, DEVICE="gpu").returncode != 0


def test_code_configs_and_pins_can_be_seen_by_a_build_and_nothing_else(tmp_path: Path) -> None:
    among = [f"{folder}/{name}" for folder in ("workflows", "stas_core", "configs") for name in BESIDE_CODE]
    for name in [*AT_HOME, *among, *tracked(), *COPIED, ".dockerignore"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("secret")
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    seen = {name for name in exclude_paths(str(tmp_path), patterns) if (tmp_path / name).is_file()}
    assert seen - {"Dockerfile", ".dockerignore"} == {*tracked(), *COPIED}


def test_an_image_says_its_version_and_commit() -> None:
    recipe = subprocess.run(["make", "-n", "image"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert f'VERSION="{stas_core.__version__}"' in recipe.stdout
    assert re.search(r'COMMIT="([0-9a-f]{40}|unknown)"', recipe.stdout)
