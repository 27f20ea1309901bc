"""Type checks at every annotated call, a small made cohort, and the private data beside the checkout where present.

What takes long to load is imported where it is used: the process that deals the tests out to others runs none.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import hypothesis
import pytest

import workflows  # noqa: F401 - sets what Ray reads when it is imported
from tests import typechecker

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from stas_core.data.cohort import CohortRow
    from stas_core.train.recipe import FoldRecipe

typechecker.install()  # before anything imports stas_core
os.environ.setdefault("STAS_STORAGE_PATIENCE_S", "0")  # what tests break stays broken

# What Ray notes of its processes and their logs, for pages that no test looks at, takes a twentieth of a core.
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "60")
os.environ.setdefault("METRICS_RECORD_INTERVAL_S", "60")
os.environ.setdefault("SCAN_EVENT_DIR_INTERVAL_SECONDS", "60")
os.environ.setdefault("AUTOSCALER_UPDATE_INTERVAL_S", "60")
os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
os.environ.update(RAY_idle_worker_killing_time_threshold_ms="600000")  # the next test has work for them
# Ray's workers would give way to whatever else runs, such as the other processes of `-n 3`, which never wait for them.
os.environ.setdefault("RAY_worker_niceness", "0")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # what a shell in the background hands to all it starts: the
    signal.signal(signal.SIGINT, signal.default_int_handler)  # stages that tests press Ctrl-C on would never hear it

# The same examples in every run, and no deadline: a busy machine must not fail a test. `--hypothesis-profile=search`
# looks for others.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("same")

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"workflows", "scoring", "folds"}
"""Folders with tests of workflows."""
UNCOUNTED = STAGES | {"cluster", "docs", "gpu"}
"""Folders with tests that need not count the lines of the library that they reach."""
NUM_IMAGES = 8
BUCKET = "s3://tests"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TINY_MODEL = {
    "encoder": "mobilenetv3_small_050",
    "encoder_weights": "none",
    "decoder_channels": [16, 16, 8, 8, 8],
    "activation": "relu",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write the files of tests/golden anew")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Say what stays in one process under `-n`: the tests that share a Ray, else those of a file."""
    shares_ray = "ray_nodes" in getattr(item, "fixturenames", ())
    # The first of a hundred examples reaches what the others do; the library's own tests, what those of workflows do.
    if getattr(getattr(item, "obj", None), "is_hypothesis_test", False) or item.path.parent.name in UNCOUNTED:
        item.add_marker(pytest.mark.no_cover)
    item.add_marker(pytest.mark.xdist_group("ray" if shares_ray else item.path.stem))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that share a Ray, which take longest, then with others of workflows: so `-n 3` ends soon."""

    def rank(item: pytest.Item) -> int:
        if "ray_nodes" in getattr(item, "fixturenames", ()):
            return 0
        return 1 if item.path.parent.name in STAGES else 2

    items.sort(key=rank)


def pytest_collection(session: pytest.Session) -> None:
    """Load all of the library where lines are counted.

    A module that is first loaded by a test without counting would have run none of its lines; which do depends on how
    tests are dealt out.
    """
    if session.config.getoption("numprocesses", None) or not session.config.getoption("cov_source", None):
        return
    import stas_core

    for module in pkgutil.walk_packages(stas_core.__path__, "stas_core."):
        importlib.import_module(module.name)


def pytest_configure(config: pytest.Config) -> None:
    """Leave other cores to other test processes: `make test` starts one for each."""
    if config.getoption("numprocesses", None):  # this one runs no tests
        return
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real images and oracle pairs, or skip."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"real data folder {folder} is absent")
    return folder


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images/ and annotations/ of eight 96x128 phantom fields."""
    from stas_core.data.phantom import PhantomConfig
    from tests import made_cohort

    phantom = PhantomConfig(num_images=NUM_IMAGES, height=96, width=128, seed=3)
    return made_cohort.write_fields(tmp_path_factory.mktemp("phantom"), phantom)


@pytest.fixture(scope="session")
def cohort_uri(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the cohort table of the phantom fields: two folds, no hold-out, made in plain Python."""
    from tests import made_cohort

    return made_cohort.prepare(phantom_folder, tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="session")
def cohort_rows(cohort_uri: str) -> list[CohortRow]:
    """Return the rows of the small cohort."""
    from stas_core.data import cohort

    return cohort.read_cohort(cohort_uri)


@pytest.fixture(scope="session")
def tiny_recipe() -> FoldRecipe:
    """Return a recipe that trains in a second: three epochs of two steps on 64 px crops."""
    from stas_core import config
    from stas_core.train.recipe import FoldRecipe

    return config.build(
        FoldRecipe,
        {
            "data": {"crop_px": 64},
            "model": TINY_MODEL,
            "optim": {"batch_size": 2, "micro_batch_size": 2},
            "schedule": {"warmup_epochs": 1},
            "training": {"epochs": 3, "top_k": 2},
            "inference": {"flips": ["identity", "lr"]},
        },
    )


@pytest.fixture(scope="session")
def s3_env() -> Iterator[dict[str, str]]:
    """Start an S3-compatible server on loopback; return the environment that points fsspec at it."""
    from moto.server import ThreadedMotoServer

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


@pytest.fixture
def s3(s3_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return an S3 file system with an empty bucket."""
    names = {"FSSPEC_S3_ENDPOINT_URL": "endpoint_url", "FSSPEC_S3_KEY": "key", "FSSPEC_S3_SECRET": "secret"}
    monkeypatch.setitem(fsspec.config.conf, "s3", {names[key]: s3_env[key] for key in names})
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    if files.exists(BUCKET):
        files.rm(BUCKET, recursive=True)
    files.mkdir(BUCKET)
    return files


@pytest.fixture
def endpoint(s3_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Point fsspec of this process, too, at the server; return the environment that does it elsewhere."""
    names = {"FSSPEC_S3_ENDPOINT_URL": "endpoint_url", "FSSPEC_S3_KEY": "key", "FSSPEC_S3_SECRET": "secret"}
    monkeypatch.setitem(fsspec.config.conf, "s3", {names[key]: s3_env[key] for key in names})
    return s3_env


@pytest.fixture(scope="session")
def ray_nodes(s3_env: dict[str, str]) -> Iterator[list[Any]]:
    """Start Ray with two CPUs once; stages called inside use it."""
    from workflows.cluster import ray_session  # not above: tests of the library never load Ray

    with ExitStack() as session:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in s3_env.items():
                patch.setenv(name, value)  # of the workers that are started now, not of the tests
            nodes = session.enter_context(ray_session(num_cpus=2))
        yield nodes


@pytest.fixture(scope="session")
def driver_env(ray_nodes: list[Any]) -> dict[str, str]:
    """Return the environment of a driver that joins that Ray, so that it can be killed without one of its own."""
    import ray

    return os.environ | {"RAY_ADDRESS": str(ray.get_runtime_context().gcs_address)}


@pytest.fixture(scope="session")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a run of two untrained folds of different scale."""
    from tests.workflows.made import make_ensemble

    return make_ensemble(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 24 images, twenty of them distinct."""
    from tests.workflows.made import make_images

    return make_images(tmp_path_factory.mktemp("many") / "images", 24)


@pytest.fixture(scope="session")
def scored(ray_nodes: list[Any], many_images: Path, ensemble: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the outputs of those images, scored undisturbed by as many actors as fit."""
    from stas_core import record_parts
    from tests.workflows.made import settings
    from workflows import score_images

    out = tmp_path_factory.mktemp("scores") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_parts, "PART_ROWS", 10)  # two parts, and four loose records
        resources = {"calibrate": False, "actors": None, "cpus_per_task": 0.5}
        assert score_images.run(settings(many_images, ensemble, out, resources=resources), False) == 0
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start the browser that pages are tested in, or skip; in CI it must be there.

    Of a module: while it is open, nothing else can run an event loop in this thread.
    """
    found = next((path for name in BROWSERS if (path := shutil.which(name)) is not None), None)
    if found is None:
        reason = f"no browser: none of {', '.join(BROWSERS)} is on the PATH (Debian: apt-get install chromium)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        made = playwright.chromium.launch(executable_path=found, args=options)
        yield made
        made.close()


def troubles_of(page: Page) -> list[str]:
    """Return a list that grows with every message, error, dialog and request to another machine of a page."""
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    page.on("request", lambda asked: troubles.append(asked.url) if asked.url.startswith("http") else None)
    return troubles
