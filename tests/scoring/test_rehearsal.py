"""What is measured before the pipelines: a node at fault is left out, and the run ends only where no other is left."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from stas_core.errors import InputError, ResourceError, StasError, UnreadableSlide, WriteError
from workflows import waiting
from workflows.cluster import Node
from workflows.node_faults import NodeFault
from workflows.scoring import pipeline, rehearsal, restarts, slide_pipeline
from workflows.scoring.plan import Ensemble, ScorePlan, ScoreResources, Work
from workflows.scoring.rehearsal import NotMeasured, rehearse

PLAN, WANTED = ScorePlan(1, 0, 0.75, 0.25, None, ""), ScoreResources(stall_timeout_s=60)
NO_GPU = "the cluster promises a GPU, but torch finds none on this node"


class Cluster:
    """Nodes, of which Ray takes the first that is not to be avoided; a task ends as its node's entry in `does` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.live, self.ran, self.cancelled = 0.0, list[str](), list[str](), list[str]()
        self.does: dict[str, Callable[[], Any]] = {}
        """What a task on a node does; without an entry it never ends."""

        def start(_step: Any, _plan: ScorePlan, avoid: set[str]) -> str:
            self.ran.append(next((node for node in self.live if node not in avoid), "nowhere"))
            return self.ran[-1]

        def wait(references: list[str], timeout: float) -> tuple[list[str], list[str]]:
            ready = [node for node in references if node in self.does]
            if not ready:
                self.now += timeout
                self.live = [node for node in self.live if node != "lost"]
            return ready, []

        def get(node: str) -> Any:
            try:
                return self.does[node]()
            except (StasError, ValueError) as error:
                text = f"{type(error).__name__}: {error}"
                raise ray.exceptions.RayTaskError("_here", text, error).as_instanceof_cause() from None

        clock = SimpleNamespace(monotonic=lambda: self.now)
        for owner, name, stand_in in (
            (ray, "wait", wait),
            (ray, "get", get),
            (ray, "cancel", lambda node, force: self.cancelled.append(node)),
            (rehearsal, "_start", start),
            (rehearsal, "time", clock),
            (restarts, "live_nodes", lambda: [Node(4, 0, node) for node in self.live]),
            (restarts, "cluster_nodes", lambda: [Node(4, 0, node) for node in self.live]),
            (restarts, "address_of", str),
            (waiting, "time", clock),
        ):
            monkeypatch.setattr(owner, name, stand_in)

    def be(self, **does: Callable[[], Any] | None) -> None:
        """Have these nodes."""
        self.live, self.ran = list(does), []
        self.does = {node: ends for node, ends in does.items() if ends is not None}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def broken(node: str) -> Callable[[], Any]:
    def fail() -> Any:
        raise NodeFault(NO_GPU, node)

    return fail


def failing(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def measure() -> Any:
    return rehearse(lambda: None, WANTED, PLAN)


def test_a_node_at_fault_is_left_out_and_another_measures(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.be(a=broken("a"), b=broken("b"), c=lambda: "measured")
    assert measure() == "measured" and cluster.ran == ["a", "b", "c"] and cluster.cancelled == []
    assert f"node b is left out: {NO_GPU}; look at its disk" in capsys.readouterr().out


def test_where_all_nodes_that_fit_are_at_fault_the_run_is_refused_and_the_last_named(cluster: Cluster) -> None:
    cluster.be(a=broken("a"), b=broken("b"))
    with pytest.raises(NodeFault, match=f"^node b: {NO_GPU} .no other holds an actor; left out before: 1") as met:
        measure()
    assert met.value.node_id == "b" and cluster.ran == ["a", "b"]
    cluster.be(a=broken("a"), lost=None)
    with pytest.raises(NodeFault, match=f"^node a: {NO_GPU} .no other holds an actor.$"):
        measure()
    assert cluster.ran == ["a", "lost"]


def test_what_is_no_nodes_fault_is_told_as_what_it_is(cluster: Cluster) -> None:
    cluster.be(a=failing(WriteError("the disk is full")), b=lambda: "measured")
    with pytest.raises(WriteError, match=r"^the disk is full$"):
        measure()
    cluster.be(a=failing(ValueError("a bad image")), b=lambda: "measured")
    with pytest.raises(NotMeasured, match=r"ValueError.*a bad image"):
        measure()
    assert cluster.ran == ["a"]  # the pipeline finds out what is to blame


def test_what_never_comes_is_given_up_and_what_cannot_come_refused(cluster: Cluster) -> None:
    cluster.be(a=None)
    with pytest.raises(NotMeasured, match="nothing was measured within 60 s"):
        measure()
    assert cluster.cancelled == ["a"]  # it holds an actor's resources
    cluster.be(lost=None)
    with pytest.raises(ResourceError, match=r"0 node\(s\) with 0 CPU .* not one"):
        measure()


def test_calibration_and_seams_go_on_without_a_node_at_fault_and_without_a_bad_input(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    models: Any = Ensemble((), "", None, use_gpu=True, threads=1)  # type: ignore[arg-type]
    item: Any = {"id": "slide"}

    def calibrate() -> Any:
        return pipeline.calibrate(Work(models, None), [], WANTED, PLAN)  # type: ignore[arg-type]

    def seams() -> Any:
        return slide_pipeline.measure_seams(slide_pipeline.BlockJob(models, None), item, WANTED, PLAN)  # type: ignore[arg-type]

    cluster.be(a=broken("a"), b=lambda: None)
    assert calibrate() is None and seams() is None and cluster.ran == ["a", "b"] * 2
    assert "no " not in capsys.readouterr().out.replace("node", "")
    cluster.be(a=failing(ValueError("odd")))
    assert calibrate() is None and seams() is None
    out = capsys.readouterr().out
    assert "no calibration: RayTaskError(ValueError): ValueError: odd" in out
    assert "no seam table: RayTaskError(ValueError): ValueError: odd, on slide; its blocks will tell" in out
    cluster.be(a=failing(UnreadableSlide("x")))
    assert seams() is None and "no seam table: unreadable_slide, on slide" in capsys.readouterr().out
    with pytest.raises(InputError):
        calibrate()
    cluster.be(a=broken("a"))
    for whichever in (calibrate, seams):
        with pytest.raises(NodeFault, match=r"^node a: "):
            whichever()


def test_a_fault_comes_back_from_ray_with_its_node_and_other_nodes_can_be_asked_for(ray_nodes: list[Node]) -> None:
    def lacking() -> None:
        raise ResourceError(NO_GPU)

    with pytest.raises(NodeFault, match=NO_GPU) as met:
        rehearse(lacking, WANTED, PLAN)
    assert met.value.node_id == ray.get_runtime_context().get_node_id()
    assert ray.get(rehearsal._start(lambda: "elsewhere", PLAN, {"a", "b"}), timeout=60) == "elsewhere"
    here = rehearsal._start(lambda: "here", PLAN, {met.value.node_id})
    assert ray.wait([here], timeout=1)[0] == []
    ray.cancel(here)
