"""What the cluster has no node for any more is refused with the arithmetic, or waited for where a node may come."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray.data

from stas_core.errors import ResourceError
from workflows import choose_ensemble, waiting
from workflows.cluster import Node, Plan, quieten_ray_data
from workflows.folds import disagreement
from workflows.member_maps import Predicting, predict_maps
from workflows.scoring import slide_pipeline
from workflows.scoring.plan import ScorePlan
from workflows.waiting import LOOK_S, NODE_TIMEOUT_S, Need, first_of, results, streamed

HEAD, WORKER = Node(0, 0, "head"), Node(4, 1, "worker")


class Cluster:
    """A head without CPUs and what else is live or may come; its tasks end when the clock says so, or never."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        self.live, self.to_come = [HEAD, WORKER], list[Node]()
        self.at: Callable[[], None] = lambda: None
        """Called whenever time passes."""

        def wait(references: list[float], timeout: float, **_: Any) -> tuple[list[float], list[float]]:
            if not (ready := [when for when in references if when <= self.now]):
                self.sleep(timeout)
            return ready[:1], []

        monkeypatch.setattr(ray, "wait", wait)
        monkeypatch.setattr(ray, "get", lambda when: [f"ended at {when:g}"])
        endless: SimpleNamespace = SimpleNamespace(remote=lambda *_, **__: float("inf"), options=lambda **_: endless)
        monkeypatch.setattr(ray, "remote", lambda *_, **__: lambda _: endless)
        monkeypatch.setattr(waiting, "live_nodes", lambda: self.live)
        monkeypatch.setattr(waiting, "cluster_nodes", lambda: self.live + self.to_come)
        monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.at()

    def lose_at(self, now: float) -> None:
        """Have the worker go at a time."""

        def look() -> None:
            if self.now >= now:
                self.live = [HEAD]

        self.at = look


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_tasks_that_have_room_are_waited_for_however_long_they_take(cluster: Cluster) -> None:
    need = Need("a task", 4, 1)
    assert first_of([9e5, 1e5], need.look) == 1e5
    assert results([3e5, 2e5], need.look) == [["ended at 300000"], ["ended at 200000"]]


@pytest.mark.parametrize(
    ("need", "fits"),
    [
        (Need("a task"), True),
        (Need("a task", 4), True),
        (Need("a task", 4.1), False),
        (Need("a task", 0.5, 0.5), True),
        (Need("a task", 1, 2), False),
    ],
)
def test_a_task_fits_a_whole_node_not_the_sum_of_them(cluster: Cluster, need: Need, fits: bool) -> None:
    cluster.live = [HEAD, WORKER, WORKER]
    if fits:
        need.look()
    else:
        with pytest.raises(ResourceError, match=rf"of {need.cpus:g} CPU and {need.gpus:g} GPU; bring lost"):
            need.look()


def test_a_lost_node_without_another_is_refused_with_the_arithmetic(cluster: Cluster) -> None:
    cluster.lose_at(100)
    with pytest.raises(ResourceError, match=r"1 node\(s\) with 0 CPU and 0 GPU: none has room for a task, of 1 CPU"):
        first_of([9e5], Need("a task").look)
    assert 100 <= cluster.now <= 100 + 2 * LOOK_S


def test_a_node_that_may_come_is_waited_for_and_said_so(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    def replace() -> None:
        if cluster.now >= 200:
            cluster.live = [HEAD, WORKER]

    cluster.live, cluster.to_come, cluster.at = [HEAD], [Node(4, 1)], replace
    assert first_of([300.0], Need("a task").look) == 300
    assert capsys.readouterr().out.count("waiting for a node that a task fits on") > 10
    cluster.live, cluster.at = [HEAD], lambda: None
    with pytest.raises(ResourceError, match="none has room for a task"):
        first_of([9e5], Need("a task").look)
    assert NODE_TIMEOUT_S < cluster.now < NODE_TIMEOUT_S + 400


def slides_being_finished(*_: Any) -> None:
    finishing = slide_pipeline.Finishing(None, ScorePlan(1, 0, 1, 0.5, None, ""), 4)  # type: ignore[arg-type]
    finishing.begin({"id": "a"}, {})  # type: ignore[typeddict-item]
    assert list(finishing.ended()) == []  # not waited for before all blocks are predicted
    list(finishing.ended(wait=True))


def members_on_hold_out(*_: Any) -> None:
    rows: list[Any] = [SimpleNamespace(fold=None)] * 3
    plan = Plan(1, 1, 2, 0.0, 2, "")
    disagreement.on_hold_out(["a", "b"], rows, None, plan, (), on_gpu=False)  # type: ignore[arg-type]


def maps_of_members(tmp_path: Any) -> None:
    fields: list[Any] = [SimpleNamespace(fold=0)] * 3
    predict_maps(fields, ["a", "b"], Predicting(str(tmp_path), ("identity",), "auto", 1))


def scores_of_ensembles(tmp_path: Any) -> None:
    subset: Any = SimpleNamespace
    choose_ensemble._Scorer([SimpleNamespace()], str(tmp_path))([subset])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("work", "asked"),
    [
        (slides_being_finished, "the finishing of a slide, of 0.5 CPU and 0 GPU"),
        (members_on_hold_out, "a prediction of hold-out images, of 1.8 CPU and 0 GPU"),
        (maps_of_members, "a prediction of maps, of 1 CPU and 1 GPU"),
        (scores_of_ensembles, "the scoring of maps, of 1 CPU and 0 GPU"),
    ],
)
def test_stages_stop_where_their_last_node_is_lost(
    cluster: Cluster, tmp_path: Any, work: Callable[[Any], None], asked: str
) -> None:
    cluster.lose_at(60)
    with pytest.raises(ResourceError, match=f"1 node.s. with 0 CPU and 0 GPU: none has room for {asked}"):
        work(tmp_path)


def test_a_pipeline_is_looked_at_and_what_that_raises_ends_it(
    ray_nodes: list[Node], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        looks.append(True)
        if len(looks) == 2:
            raise ResourceError("none has room")

    def slow(row: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.02)
        return row

    looks: list[bool] = []
    monkeypatch.setattr(waiting, "LOOK_S", 0.2)
    quieten_ray_data()
    with pytest.raises(ResourceError, match="none has room"):
        list(streamed(ray.data.range(100, override_num_blocks=2).map(slow), refuse))
    assert len(looks) == 2 and "Traceback" not in capfd.readouterr().err  # it is no fault of Ray Data's
