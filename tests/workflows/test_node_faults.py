"""A node whose GPU does not work: others predict hold-out images and maps, and where there is none, it is named."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from stas_core import storage
from stas_core.errors import CheckpointError, LocalDiskError, ResourceError, StasError
from stas_core.predict.inference import InferenceConfig
from workflows import waiting
from workflows.cluster import Node, Plan
from workflows.folds import disagreement
from workflows.member_maps import Predicting, predict_maps
from workflows.node_faults import NodeFault, naming_this_node
from workflows.ray_internals import NODE_LABEL  # with all of Ray that is used, before parts of it are replaced
from workflows.scoring import slide_pipeline
from workflows.scoring.plan import ScorePlan
from workflows.waiting import Need

NO_GPU = NodeFault("torch finds no GPU on this node; see its driver", "a")


class Cluster:
    """Nodes, of which Ray takes the first not avoided; a task returns `answer`, or ends with the node's error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.live, self.errors, self.ran = ["a", "b"], dict[str, StasError](), list[str]()
        self.answer: Any = [1.0]
        self.told = list[Any]()
        """What each task was given last."""

        def placed(label_selector: dict[str, str]) -> SimpleNamespace:
            avoid = re.findall(r"\w+", label_selector.get(NODE_LABEL, "").removeprefix("!in"))

            def start(*_: Any, **given: Any) -> tuple[int, str | None]:
                self.ran.append(next((node for node in self.live if node not in avoid), "nowhere"))
                self.told.append(given)
                return len(self.ran), self.ran[-1]

            return SimpleNamespace(remote=start, options=placed)

        def remote(label_selector: dict[str, str] | None = None, **_: Any) -> Callable[[Any], Any]:
            return lambda _: placed(label_selector or {})

        def get(reference: tuple[int, str]) -> Any:
            if (error := self.errors.get(reference[1])) is None:
                return self.answer
            raise ray.exceptions.RayTaskError("task", str(error), error).as_instanceof_cause()

        def nodes() -> list[Node]:
            return [Node(4, 1, node) for node in self.live]

        for owner, name, stand_in in (
            (ray, "remote", remote),
            (ray, "wait", lambda references, timeout: ([one for one in references if one[1] != "nowhere"][:1], [])),
            (ray, "get", get),
            (waiting, "live_nodes", nodes),
            (waiting, "cluster_nodes", nodes),
            (waiting, "address_of", lambda node: f"10.0.0.{node}"),
        ):
            monkeypatch.setattr(owner, name, stand_in)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def on_hold_out(*avoid: str) -> float | None:
    rows: list[Any] = [SimpleNamespace(fold=None)] * 3
    plan = Plan(1, 1, 2, 1.0, 2, "")
    return disagreement.on_hold_out(["x", "y"], rows, InferenceConfig(), plan, avoid, on_gpu=True)


def maps(out: Path, gpus: float = 1) -> dict[str, float]:
    fields: list[Any] = [SimpleNamespace(fold=fold) for fold in (0, 1)]
    return predict_maps(fields, ["x", "y"], Predicting(str(out), ("identity",), "auto", gpus))


def test_hold_out_images_are_not_predicted_where_folds_could_not_train(cluster: Cluster) -> None:
    cluster.answer = [0.1, 0.3]
    assert on_hold_out("a") == 0.3 and cluster.ran == ["b"]


def test_hold_out_images_are_predicted_on_another_node(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.errors["a"] = NO_GPU
    assert on_hold_out() == 1.0 and cluster.ran == ["a", "b"]
    assert capsys.readouterr().out == f"node 10.0.0.a is left out: {NO_GPU}\n"


def test_a_finished_training_is_not_lost_where_no_node_can_predict_its_hold_out(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.errors["a"], cluster.live = NO_GPU, ["a"]
    assert on_hold_out() is None
    known = "how far the models disagree on hold-out images is not known: node 10.0.0.a: torch finds no GPU"
    assert known in capsys.readouterr().out
    cluster.errors |= {"b": NodeFault("torch finds no GPU on this node", "b")}
    cluster.live = ["a", "b"]
    assert on_hold_out() is None and cluster.ran[1:] == ["a", "b"]
    assert "node 10.0.0.b: torch finds no GPU" in capsys.readouterr().out


def test_what_no_other_node_mends_ends_the_hold_out_measurement(cluster: Cluster) -> None:
    cluster.errors["a"] = CheckpointError("damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        on_hold_out()
    assert cluster.ran == ["a"]


def test_where_the_other_nodes_are_lost_the_one_at_fault_is_named(cluster: Cluster) -> None:
    cluster.errors["a"] = NO_GPU
    error = ray.exceptions.RayTaskError("task", "", NO_GPU).as_instanceof_cause()
    rest = Need("a task", 1, 1).on_other_nodes(error)
    rest.look()
    cluster.live = ["a"]
    with pytest.raises(
        NodeFault, match=r"^node 10\.0\.0\.a: torch finds no GPU .*\(no other node has room for a task\)"
    ):
        rest.look()


def test_maps_are_made_on_other_nodes_or_the_node_is_named(cluster: Cluster, tmp_path: Path) -> None:
    cluster.errors["a"] = NO_GPU
    assert maps(tmp_path) == {"x": 1.0, "y": 1.0}
    assert cluster.ran.count("b") == 4 and cluster.ran.count("a") <= 4
    cluster.live = ["a"]
    with pytest.raises(NodeFault, match=r"^node 10\.0\.0\.a: torch finds no GPU .*\(no other node has room for a pred"):
        maps(tmp_path)


def test_members_are_timed_on_one_kind_of_device(cluster: Cluster, tmp_path: Path) -> None:
    def times_again(gpus: float) -> int:
        cluster.told = []
        maps(tmp_path, gpus)
        return sum(given["again"] for given in cluster.told)

    assert [times_again(gpus) for gpus in (1, 0.5, 0, 0)] == [2, 0, 2, 0]
    cluster.answer = []
    assert maps(tmp_path, 0) == {"x": 1.0, "y": 1.0}
    assert storage.read_json(str(tmp_path / "seconds.json"))["on_gpu"] is False


def test_slides_are_finished_on_another_node_where_one_has_no_room(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    full, cluster.answer = NodeFault("cannot make a temporary folder", "a"), {"id": "s", "reason": None, "seconds": {}}
    cluster.errors["a"] = full
    finishing = slide_pipeline.Finishing(None, ScorePlan(1, 0, 1, 0.5, None, ""), 4)  # type: ignore[arg-type]
    slide: Any = {"id": "s", "slide_uri": "s.svs"}
    finishing.begin(slide, {})
    assert [*finishing.ended(wait=True)] == [cluster.answer] and cluster.ran == ["a", "b"]
    assert "node 10.0.0.a is left out: cannot make a temporary folder" in capsys.readouterr().out
    cluster.errors["b"] = NodeFault("no room", "b")
    finishing.begin(slide, {})
    with pytest.raises(NodeFault, match="no other node has room for the finishing of a slide"):
        list(finishing.ended(wait=True))


def test_only_what_a_node_lacks_is_its_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a"))
    for lack in (ResourceError("no GPU"), LocalDiskError("no room")):
        with pytest.raises(NodeFault, match=str(lack)) as met, naming_this_node():
            raise lack
        assert met.value.node_id == "a"
    with pytest.raises(CheckpointError), naming_this_node():
        raise CheckpointError("damaged")
