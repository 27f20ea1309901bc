from pathlib import Path

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from stas_core.errors import ResourceError, WriteError
from workflows import cluster, progress
from workflows.cluster import Demand, Node, Plan, plan_groups

LAPTOP = [Node(2)]
GPU_BOX = [Node(16, 1)]
DGX = [Node(64, 8)]
PAIR = [Node(16, 4), Node(16, 4)]


@pytest.mark.parametrize(
    ("nodes", "demand", "slots", "cpus", "gpus"),
    [
        (LAPTOP, Demand(4), 2, 1, 0),
        (LAPTOP, Demand(1), 1, 2, 0),
        (LAPTOP, Demand(4, workers_per_group=2), 1, 1, 0),
        (LAPTOP, Demand(4, parallel_groups=1), 1, 2, 0),
        (GPU_BOX, Demand(5), 1, 16, 1),
        (GPU_BOX, Demand(5, gpus_per_worker=0.25), 4, 4, 0.25),
        (GPU_BOX, Demand(5, gpus_per_worker=0), 5, 3, 0),
        (DGX, Demand(5), 5, 12, 1),
        (DGX, Demand(5, workers_per_group=2), 4, 8, 1),
        (DGX, Demand(5, workers_per_group=8), 1, 8, 1),
        (PAIR, Demand(2, gpus_per_worker=3), 2, 16, 3),
        (PAIR, Demand(5, gpus_per_worker=0.4), 5, 5, 0.4),
        ([Node(0), *PAIR], Demand(8), 8, 4, 1),  # a head node without CPUs
    ],
)
def test_plans(nodes: list[Node], demand: Demand, slots: int, cpus: int, gpus: float) -> None:
    plan = plan_groups(nodes, demand)
    assert (plan.slots, plan.cpus_per_worker, plan.gpus_per_worker) == (slots, cpus, gpus)
    assert plan.threads_per_worker == cpus and plan.workers_per_group == demand.workers_per_group


@given(
    st.lists(st.builds(Node, st.integers(0, 64), st.integers(0, 8)), max_size=4),
    st.builds(
        Demand, st.integers(1, 8), st.integers(1, 4), st.none() | st.integers(1, 8), st.sampled_from([None, 0, 1])
    ),
)
def test_a_plan_always_fits_or_is_refused(nodes: list[Node], demand: Demand) -> None:
    try:
        plan = plan_groups(nodes, demand)
    except ResourceError as error:
        assert "fit" in str(error) and "lower resources." in str(error)
        return
    assert 1 <= plan.slots <= demand.num_groups
    assert fits(nodes, plan)


def fits(nodes: list[Node], plan: Plan) -> bool:
    """Lay the workers of all slots on the nodes one by one."""
    left = plan.slots * plan.workers_per_group
    for node in nodes:
        cpus, gpus = node.num_cpus, node.num_gpus
        while left and cpus >= plan.cpus_per_worker and gpus >= plan.gpus_per_worker:
            cpus, gpus, left = cpus - plan.cpus_per_worker, gpus - plan.gpus_per_worker, left - 1
    return left == 0


def test_what_can_never_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(
        ResourceError, match=r"1 node\(s\) with 2 CPU and 0 GPU: 2 worker\(s\) of 1 CPU and 0 GPU fit, 3"
    ):
        plan_groups(LAPTOP, Demand(1, workers_per_group=3))
    with pytest.raises(ResourceError, match=r"0 worker\(s\) of 1 CPU and 1 GPU fit"):
        plan_groups(LAPTOP, Demand(1, gpus_per_worker=1))
    with pytest.raises(ResourceError, match=r"gpus_per_worker = 0\.5 with workers_per_fold = 2"):
        plan_groups(DGX, Demand(1, workers_per_group=2, gpus_per_worker=0.5))


@pytest.mark.parametrize("nodes", [[], [Node(0)]], ids=["empty", "a head without CPUs"])
def test_an_empty_cluster_that_grows_unseen_needs_its_slots_given(nodes: list[Node]) -> None:
    with pytest.raises(ResourceError):
        plan_groups(nodes, Demand(5))
    assert plan_groups(nodes, Demand(5, parallel_groups=3)).slots == 3


def test_what_an_autoscaler_may_add_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "live_nodes", lambda: [Node(0, 0, "head"), Node(8, 1, "one")])
    monkeypatch.setattr("workflows.autoscaling.node_groups", lambda: [({"CPU": 8, "GPU": 1}, 4), ({"CPU": 2}, 10**9)])
    nodes = cluster.cluster_nodes()
    assert nodes == [Node(0), *[Node(8, 1)] * 4, *[Node(2)] * cluster.MOST_NODES]
    assert plan_groups(nodes, Demand(5)).slots == 4
    assert [node.node_id for node in nodes[:3]] == ["head", "one", None]


def test_a_local_ray_without_room_for_its_logs_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").touch()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "full"))
    expected = rf"^Ray cannot write its logs and sockets to {tmp_path}/full/ray: Not a directory; .*set RAY_TMPDIR to"
    with pytest.raises(WriteError, match=expected), cluster.ray_session():
        pass


def test_durations() -> None:
    assert [progress.duration(s) for s in (5, 65, 3700)] == ["0:05", "1:05", "1:01:40"]
