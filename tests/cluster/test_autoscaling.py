"""A run on a cluster that begins as a head without CPUs: it asks for nodes, takes them as they come, lets them go."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from stas_core import config
from stas_core.config import Config
from stas_core.data.cohort import CohortRow
from stas_core.train.recipe import FoldRecipe
from tests.cluster.autoscaling import AutoscalingRay
from tests.conftest import ROOT
from tests.folds import test_train_folds
from tests.workflows.chaos import ALL_FIT, num_records, result
from tests.workflows.made import settings
from workflows import autoscaling, ray_internals
from workflows.cluster import Node
from workflows.scoring import restarts
from workflows.scoring.plan import ScorePlan, ScoreResources

GROWS = "1 node(s) with 0 CPU and 0 GPU, which may grow to 4 node(s) with 3 CPU and 0 GPU"


@pytest.fixture(scope="module")
def cluster() -> Iterator[AutoscalingRay]:
    """Start the cluster, whose nodes are ended once they have been idle for six seconds."""
    with AutoscalingRay() as started:
        yield started


class Stage:
    """A stage that runs on the cluster's head; a context."""

    def __init__(self, cluster: AutoscalingRay, name: str, settings: Config, folder: Path) -> None:
        path, self._log = folder / f"{name}.yaml", folder / f"{name}.log"
        path.write_text(config.dump(settings))
        line = [sys.executable, str(ROOT / "workflows" / f"{name}.py"), "--config", str(path)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(line, env=cluster.environment, stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def printed(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    @property
    def status(self) -> int | None:
        """Its exit status; None: it runs."""
        return self._process.poll()


def wait_for(condition: Callable[[], Any], seconds: float, stage: Stage | None = None) -> None:
    """Wait until something holds, while a stage runs."""
    end = time.monotonic() + seconds
    while not condition():
        told = "" if stage is None else stage.printed
        assert time.monotonic() < end, f"nothing happened within {seconds:g} s\n{told}"
        assert stage is None or stage.status is None, f"ended with {stage.status}\n{told}"
        time.sleep(0.1)


def note(seen: set[str], cluster: AutoscalingRay) -> set[str]:
    """Add the nodes that are there now to those that were seen."""
    seen |= {*cluster.nodes()}
    return seen


@pytest.mark.long
@pytest.mark.timeout(300)
def test_scoring_takes_nodes_as_they_come_and_lost_ones_are_replaced(
    cluster: AutoscalingRay, scored: Path, many_images: Path, ensemble: str, tmp_path: Path
) -> None:
    """All of them are lost at once, as spot machines are: none that is left can end the work before others come."""
    out = tmp_path / "out"
    with Stage(cluster, "score_images", settings(many_images, ensemble, out, resources=ALL_FIT), tmp_path) as stage:
        wait_for(lambda: num_records(out), 150, stage)
        lost = set(cluster.nodes())
        for node in lost:
            cluster.kill(node)
        wait_for(lambda: {*cluster.nodes()} - lost, 60, stage)
        wait_for(lambda: stage.status is not None, 150)
    assert stage.status == 0 and GROWS in stage.printed, stage.printed
    assert re.search(r"interrupted \((lost|a node was lost)", stage.printed), stage.printed
    assert "infeasible" not in stage.printed
    assert result(out) == result(scored)
    wait_for(lambda: not cluster.nodes(), 30)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_folds_ask_for_a_node_each(
    cluster: AutoscalingRay, tiny_recipe: FoldRecipe, cohort_uri: str, cohort_rows: list[CohortRow], tmp_path: Path
) -> None:
    """They end before those of plain Python begin: two cores are busy enough."""
    wait_for(lambda: not cluster.nodes(), 30)
    run, seen = test_train_folds.settings(tiny_recipe, cohort_uri, tmp_path / "out"), set[str]()
    with Stage(cluster, "train_folds", run, tmp_path) as stage:
        wait_for(lambda: stage.status is not None or len(note(seen, cluster)) > 2, 150)
        wait_for(lambda: stage.status is not None, 150)
    assert stage.status == 0 and len(note(seen, cluster)) == 2, stage.printed
    local = test_train_folds.train_locally(tmp_path, tiny_recipe, cohort_rows)
    for fold in ("fold_0", "fold_1"):
        assert test_train_folds.artefacts(tmp_path / "out" / fold) == test_train_folds.artefacts(local / fold)


def test_limits_are_those_of_the_autoscalers_configuration() -> None:
    aws = yaml.safe_load((ROOT / "cluster" / "ray_up" / "aws.yaml").read_text())
    assert autoscaling.groups_of(aws) == [({"CPU": 8, "GPU": 1}, 8)]
    kinds: dict[str, dict[str, Any]] = {
        "head": {"resources": {"CPU": 0}},
        "cpu": {"resources": {"CPU": 4, "memory": 2**30}, "max_workers": 9},
        "gpu": {"resources": {"CPU": 8, "GPU": 1}},
        "never": {"resources": {"CPU": 64}, "max_workers": 0},
        "unknown": {"resources": {}},
    }
    found = {"available_node_types": kinds, "head_node_type": "head", "max_workers": 10}
    assert autoscaling.groups_of(found) == [({"CPU": 8, "GPU": 1}, 10)], "all are within the limit for all"
    kinds["gpu"]["max_workers"] = 3
    assert autoscaling.groups_of(found) == [({"CPU": 8, "GPU": 1}, 3), ({"CPU": 4}, 7)]
    assert autoscaling.groups_of({}) == []


def test_a_configuration_is_that_of_the_autoscaler_at_the_address(tmp_path: Path) -> None:
    """Found by the command line of the autoscaler, which runs beside the driver, on the head."""
    path = tmp_path / "autoscaler.yaml"
    path.write_text("max_workers: 2\navailable_node_types: {worker: {resources: {CPU: 4}}}\n")
    line = [sys.executable, "-c", "input()", "--gcs-address=10.0.0.1:6379", f"--autoscaling-config={path}"]
    with subprocess.Popen(line, stdin=subprocess.PIPE) as monitor:
        try:
            wait_for(lambda: autoscaling.config_file("10.0.0.1:6379") == path, 10)
            assert autoscaling.config_file("10.0.0.1:6380") is None
            assert autoscaling.groups_of(autoscaling.config_of("10.0.0.1:6379")) == [({"CPU": 4}, 2)]
        finally:
            monitor.kill()
    assert autoscaling.config_of("10.0.0.2:6379") == {}


@pytest.mark.parametrize(("status", "autoscales"), [(200, True), (200, False), (403, True), (500, True)])
def test_limits_of_kuberay_are_those_of_the_pods_cluster(
    status: int,
    autoscales: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A server of Kubernetes stands in: a pod that may not read its cluster has no autoscaler beside it."""
    from ray.autoscaler._private.kuberay import node_provider

    (cluster, *_) = yaml.safe_load_all((ROOT / "cluster/kuberay/base/raycluster.yaml").read_text())
    cluster["metadata"]["namespace"] = "runs"
    cluster["spec"]["enableInTreeAutoscaling"] = autoscales
    asked: list[str] = []

    def get(url: str, **_: Any) -> requests.Response:
        asked.append(url)
        response = requests.Response()
        response.status_code, response._content = status, json.dumps(cluster).encode()
        return response

    (tmp_path / "namespace").write_text("runs")
    monkeypatch.setattr(ray_internals, "KUBERNETES_NAMESPACE", tmp_path / "namespace")
    monkeypatch.setattr(node_provider, "load_k8s_secrets", lambda: ({}, "", None))
    monkeypatch.setattr(requests, "get", get)
    assert ray_internals.kuberay_config() == {}, "no pod of KubeRay"
    monkeypatch.setenv("RAY_CLUSTER_NAME", "stas")
    groups = autoscaling.groups_of(ray_internals.kuberay_config())
    assert groups == ([({"CPU": 4}, 8)] if status == 200 and autoscales else [])
    assert asked[0].endswith("/namespaces/runs/rayclusters/stas")
    assert ("what the autoscaler may add is not known" in capsys.readouterr().out) == (status == 500)


@pytest.mark.parametrize(
    ("num_items", "actors", "avoid", "expected"),
    [
        (1, None, (), 1),  # one block
        (24, None, (), 2),  # six blocks, five actors on a node
        (10**6, None, (), 4),  # all that there may be
        (10**6, 7, (), 2),
        (1, None, ("one",), 2),  # the one that is avoided counts as there
    ],
)
def test_no_more_nodes_are_asked_for_than_the_work_that_is_left_keeps_busy(
    num_items: int, actors: int | None, avoid: tuple[str, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(restarts, "node_groups", lambda: [({"CPU": 4.0}, 4)])
    monkeypatch.setattr(restarts, "cluster_nodes", lambda: [Node(0, 0, "head"), Node(4, 0, "one"), *[Node(4)] * 3])
    monkeypatch.setattr(restarts, "ask_for", asked.append)
    wanted = ScoreResources(actors=actors)
    restarts.ask_for_nodes(ScorePlan(20, 0, 0.75, 0.25, None, ""), wanted, num_items, avoid)
    assert asked == [[{"CPU": 4}] * expected]
    monkeypatch.setattr(restarts, "node_groups", list)
    restarts.ask_for_nodes(ScorePlan(20, 0, 0.75, 0.25, None, ""), wanted, num_items, avoid)
    assert len(asked) == 1, "there is no autoscaler to ask"
