"""Waiting for the nodes of a cluster that was just started. `test_job_submit.py` and the Slurm test run it for real."""

from collections.abc import Sequence

import pytest

from stas_core.errors import ResourceError
from workflows import await_nodes
from workflows.address import JOB_VARIABLE
from workflows.cluster import Node

HEAD, WORKER = Node(0), Node(4, 1)


class Cluster:
    """A node joins at each of these seconds."""

    def __init__(self, *joins_s: float) -> None:
        self.now_s, self.joins_s = 0.0, joins_s

    def nodes(self) -> Sequence[Node]:
        return [HEAD, *(WORKER for at in self.joins_s if at <= self.now_s)]

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def wait(self, wanted: int, within_s: float) -> list[Node]:
        return await_nodes.await_nodes(
            wanted, self.nodes, within_s=within_s, clock=lambda: self.now_s, sleep=self.sleep
        )


def test_it_waits_for_as_many_as_were_wanted_and_a_head_without_cpus_is_none() -> None:
    cluster = Cluster(3, 30, 300)
    assert cluster.wait(2, 100) == [WORKER, WORKER] and 30 <= cluster.now_s < 34
    assert cluster.wait(1, 100) == [WORKER, WORKER]


def test_after_a_while_fewer_do_but_none_do_not() -> None:
    assert Cluster(5).wait(2, 60) == [WORKER]
    with pytest.raises(ResourceError, match="no node that works joined the cluster within 60 s, expected 2"):
        Cluster(100).wait(2, 60)


def test_without_a_cluster_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SystemExit, match="RAY_ADDRESS is not set"):
        await_nodes.main(["2", "python", "x.py", "out=/data/run", "--dry-run"])
    for wrong in (["0", "python"], ["2"], ["two", "python"]):
        with pytest.raises(SystemExit, match="2"):
            await_nodes.main(wrong)


def test_a_cluster_that_never_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    monkeypatch.setattr(await_nodes, "_LOOK_S", 0.01)
    with pytest.raises(SystemExit, match=r"no Ray answers at RAY_ADDRESS = 127\.0\.0\.1:9"):
        await_nodes.main(["--within", "0.05", "1", "true"])
