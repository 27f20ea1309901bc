"""What tests of stages share: one local Ray, an S3 server that its workers know, commands run in this process."""

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from moto.server import ThreadedMotoServer

from tests.conftest import ROOT
from tests.workflows.made import make_ensemble, make_images, settings
from workflows import score_images
from workflows.cluster import Node, ray_session  # before Ray: sets the environment that Ray reads when it is imported

import ray  # isort: skip


@pytest.fixture(scope="session")
def s3_env() -> Iterator[dict[str, str]]:
    """Start an S3-compatible server on loopback; return the environment that points fsspec at it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}",
        "FSSPEC_S3_KEY": "testing",
        "FSSPEC_S3_SECRET": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@pytest.fixture(scope="session")
def ray_nodes(s3_env: dict[str, str]) -> Iterator[list[Node]]:
    """Start Ray with two CPUs once; stages called inside use it."""
    with ExitStack() as session:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in s3_env.items():
                patch.setenv(name, value)  # of the workers that are started now, not of the tests
            nodes = session.enter_context(ray_session(num_cpus=2))
        yield nodes


@pytest.fixture(scope="session")
def driver_env(ray_nodes: list[Node]) -> dict[str, str]:
    """Return the environment of a driver that joins that Ray, so that it can be killed without one of its own."""
    return os.environ | {"RAY_ADDRESS": str(ray.get_runtime_context().gcs_address)}


class Ended(NamedTuple):
    """What a command left."""

    status: int
    out: str
    err: str


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Return a function that runs `python workflows/<name>.py <arguments>` in this process."""

    def run(name: str, *arguments: str) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"workflows/{name}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "workflows" / f"{name}.py"), run_name="__main__")
        status = ended.value.code
        return Ended(status if isinstance(status, int) else 1, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a run of two untrained folds of different scale."""
    return make_ensemble(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of forty images, twenty of them distinct."""
    return make_images(tmp_path_factory.mktemp("many") / "images", 40)


@pytest.fixture(scope="session")
def scored(ray_nodes: list[Node], many_images: Path, ensemble: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the outputs of those images, scored undisturbed by as many actors as fit."""
    out = tmp_path_factory.mktemp("scores") / "a"
    resources = {"calibrate": False, "actors": None}
    assert score_images.run(settings(many_images, ensemble, out, resources=resources), False) == 0
    return out
