"""Actors, nodes and drivers that die while images are scored, and images that end their process."""

import itertools
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray.data
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from stas_core import storage
from stas_core.errors import (
    StasError,
)
from stas_core.predict import ensemble as ensembles
from stas_core.predict import inference as inferences
from stas_core.predict.postprocess import PostprocessConfig
from tests.workflows.chaos import ALL_FIT, Chaos, result
from tests.workflows.made import settings, write_config
from workflows import score_images
from workflows.cluster import Node
from workflows.node_faults import NodeFault
from workflows.scoring import pipeline as pipelines
from workflows.scoring import restarts
from workflows.scoring.plan import Ensemble, ScorePlan, ScoreResources, Work
from workflows.scoring.restarts import Interrupted, NodesChanged
from workflows.scoring.suspects import Blame, NodeBlame
from workflows.scoring.tasks import Item, LimitsConfig, SaveConfig, ScoreTask


@pytest.mark.long
@pytest.mark.timeout(600)
def test_lost_actors_nodes_and_drivers_leave_no_trace(
    scored: Path, many_images: Path, ensemble: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    chaos = Chaos(
        write_config(tmp_path / "score.yaml", many_images, ensemble, out, resources=ALL_FIT), random.Random(0)
    )
    try:
        chaos.run(out, max_kills=3, num_images=len(list(many_images.iterdir())), timeout_s=550)
    finally:
        chaos.close()
    assert chaos.killed["node"] and chaos.killed["driver"], chaos.killed
    assert result(out) == result(scored) and not list(out.rglob("*.tmp"))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_image_that_kills_its_actor_is_found_and_the_others_go_on(
    scored: Path, many_images: Path, ensemble: str, tmp_path: Path
) -> None:
    items, _, _ = score_images.find_images(str(many_images))
    poison, other = items[:2]

    class Poisoned:
        """Loads its models when it needs them: most of these die of their first image."""

        def __init__(self, *arguments: Any):
            self._arguments = arguments
            self._actor: Any = None

        def __call__(self, table: pa.Table) -> pa.Table:
            if poison["id"] in table["id"].to_pylist():
                os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
            if self._actor is None:
                self._actor = load_actor(*self._arguments)
            predicted: pa.Table = self._actor(table)
            return predicted

    load_actor = pipelines.start_actor

    def pipeline(found: ray.data.Dataset, work: Work, plan: ScorePlan, ledger: Any) -> ray.data.Dataset:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipelines, "start_actor", Poisoned)
            patch.setattr(pipelines, "MAX_TASK_RETRIES", 0)
            return pipelines.predict_and_finish(found, work, plan, ledger)

    out, chosen = str(tmp_path / "out"), settings(many_images, ensemble, tmp_path / "out")
    members = Ensemble(tuple(ensembles.find_checkpoints(ensemble)), "", chosen.inference, use_gpu=False, threads=1)
    work = score_images.make_work(chosen, out, members)
    plan, wanted = ScorePlan(1, 0, 0.75, 0.25, None, ""), ScoreResources()
    rows = list(restarts.run_restarting(pipeline, work, [poison, other], wanted, plan))
    assert {row["id"]: row["reason"] for row in rows} == {poison["id"]: "crashed_prediction", other["id"]: None}
    record = storage.read_json(work.task.file("records", poison["id"]))
    assert re.search(r"failed over it alone, twice \(.*Actor.*Error.*if memory ran out", record["message"])
    name = f"maps/{other['id']}.png"
    assert (tmp_path / "out" / name).read_bytes() == (scored / name).read_bytes()


POOL = 40


def record_crashes_of_nodes(task: Any, blame: Blame[Any], hosts: NodeBlame) -> Iterator[dict[str, Any]]:
    for item, _ in blame.settle():
        hosts.at_fault(item["id"])
        yield {"id": item["id"], "reason": "blamed"}


def record_crashes(task: Any, blame: Blame[Any], _: Any) -> Iterator[dict[str, Any]]:
    return ({"id": item["id"], "reason": "blamed"} for item, _ in blame.settle())


@settings_of_hypothesis(max_examples=60, deadline=None)
@given(
    poison=st.sets(st.integers(0, POOL - 1), max_size=14),
    ahead=st.integers(0, 6),
    lost=st.sets(st.integers(0, 8), max_size=3),
)
def test_whatever_images_end_their_process_the_others_are_finished_once(
    poison: set[int], ahead: int, lost: set[int]
) -> None:
    """Who is to blame, on a pretended pipeline: `ahead` further images come before it fails, and others are suspect."""
    runs: list[int] = []
    rng = random.Random(ahead)

    def follow(_pipeline: Any, _work: Any, items: list[Any], *_: Any) -> Iterator[dict[str, Any]]:
        runs.append(len(items))
        for index, item in enumerate(items):
            if len(runs) in lost and index == 3:
                raise NodesChanged("a node was lost")
            if int(item["id"]) in poison:
                rest = (one for one in items[index:] if int(one["id"]) not in poison)
                yield from ({"id": one["id"], "reason": None} for one in itertools.islice(rest, ahead))
                begun = rng.sample(items, min(len(items), 3))  # by other actors, or before the last was finished
                raise Interrupted("RayActorError", dict.fromkeys([item["id"], *(one["id"] for one in begun)], ""))
            yield {"id": item["id"], "reason": None}

    items = [{"id": str(index)} for index in range(POOL)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restarts, "follow", follow)
        patch.setattr(restarts, "fit_to_cluster", lambda plan, *_, **__: plan)
        patch.setattr(restarts, "node_groups", list)
        patch.setattr(restarts, "record_crashes", record_crashes)
        plan = ScorePlan(1, 0, 0.75, 0.25, None, "", images_per_block=1)
        work: Any = SimpleNamespace(task=None, what="images")
        rows = list(restarts.run_restarting(None, work, items, ScoreResources(), plan))  # type: ignore[arg-type]
    assert sorted(int(row["id"]) for row in rows) == list(range(POOL))
    assert {int(row["id"]) for row in rows if row["reason"] == "blamed"} == poison
    assert len(runs) <= 12 + 8 * len(poison)


@settings_of_hypothesis(max_examples=80, deadline=None)
@given(
    poison=st.sets(st.integers(0, POOL - 1), max_size=4),
    nodes=st.sampled_from([("a", "b"), ("a", "b", "c")]),
    broken=st.sampled_from([None, "b"]),
    seed=st.integers(0, 9),
)
def test_a_node_that_fails_whatever_it_is_given_is_left_out_and_blames_no_image(
    poison: set[int], nodes: tuple[str, ...], broken: str | None, seed: int
) -> None:
    """On a pretended pipeline whose images run on nodes at random; a broken node's process dies at once."""
    runs: list[set[str]] = []
    rng = random.Random(seed)

    def follow(_pipeline: Any, _work: Any, items: list[Any], *rest: Any) -> Iterator[dict[str, Any]]:
        able = [node for node in nodes if node not in rest[-1]] or list(nodes)
        runs.append(set(able))
        for item in items:
            if (node := rng.choice(able)) == broken or int(item["id"]) in poison:
                raise Interrupted("RayActorError", {item["id"]: node})
            yield {"id": item["id"], "reason": None}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restarts, "follow", follow)
        patch.setattr(restarts, "live_nodes", lambda: [Node(4, 0, node) for node in nodes])
        patch.setattr(restarts, "address_of", str)
        patch.setattr(restarts, "node_groups", list)
        patch.setattr(restarts, "record_crashes", record_crashes_of_nodes)
        plan, items = ScorePlan(1, 0, 0.75, 0.25, None, ""), [{"id": str(index)} for index in range(POOL)]
        work: Any = SimpleNamespace(task=None, what="images")
        rows = list(restarts.run_restarting(None, work, items, ScoreResources(), plan))  # type: ignore[arg-type]
    assert sorted(int(row["id"]) for row in rows) == list(range(POOL))
    assert {int(row["id"]) for row in rows if row["reason"] == "blamed"} == poison
    assert broken is None or broken not in runs[-1]
    assert broken is not None or len(runs) <= 1 + 4 * len(poison)  # no node is left out for long for images' sake


def test_a_node_without_what_the_cluster_promises_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def follow(_pipeline: Any, _work: Any, items: list[Any], *rest: Any) -> Iterator[dict[str, Any]]:
        if "b" not in rest[-1]:
            raise NodesChanged("no GPU") from NodeFault("torch finds no GPU on this node", "b")
        yield from ({"id": item["id"], "reason": None} for item in items)

    monkeypatch.setattr(restarts, "follow", follow)
    monkeypatch.setattr(restarts, "address_of", str)
    monkeypatch.setattr(restarts, "node_groups", list)
    plan, work = ScorePlan(1, 0, 0.75, 0.25, None, ""), SimpleNamespace(task=None, what="images")
    for nodes in (["a", "b"], ["b"]):
        monkeypatch.setattr(restarts, "live_nodes", lambda nodes=nodes: [Node(4, 0, node) for node in nodes])
        found = restarts.run_restarting(None, work, [{"id": "x"}], ScoreResources(), plan)  # type: ignore[arg-type]
        if nodes == ["b"]:
            with pytest.raises(NodeFault, match="torch finds no GPU"):
                list(found)
        else:
            assert [row["id"] for row in found] == ["x"]
            assert "node b is left out: torch finds no GPU on this node; look at" in capsys.readouterr().out


@pytest.mark.parametrize(("num_poison", "finished"), [(1, None), (7, None), (30, {"id": "done"})])
def test_images_that_all_end_their_process_are_all_recorded(
    num_poison: int, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a run is repeated that ended with just these: an image that was finished then tells that all is well."""

    def follow(_pipeline: Any, _work: Any, items: list[Any], *_: Any) -> Iterator[dict[str, Any]]:
        if items != [finished]:
            raise Interrupted("RayActorError", {items[0]["id"]: ""})
        yield {"id": "done", "reason": None}

    monkeypatch.setattr(restarts, "follow", follow)
    monkeypatch.setattr(restarts, "fit_to_cluster", lambda plan, *_, **__: plan)
    monkeypatch.setattr(restarts, "node_groups", list)
    monkeypatch.setattr(restarts, "record_crashes", record_crashes)
    items, plan = [{"id": str(index)} for index in range(num_poison)], ScorePlan(1, 0, 0.75, 0.25, None, "")
    work: Any = SimpleNamespace(task=None, what="images")
    found = restarts.run_restarting(None, work, items, ScoreResources(), plan, finished)  # type: ignore[arg-type]
    assert sorted(int(row["id"]) for row in found) == list(range(num_poison))


@pytest.mark.parametrize("suspected", [0, 1, 3])
@pytest.mark.parametrize("known_good", [False, True])
def test_a_fault_that_no_image_causes_ends_the_run_and_blames_none(
    suspected: int, known_good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []

    def follow(_pipeline: Any, _work: Any, items: list[Any], *_: Any) -> Iterator[dict[str, Any]]:
        runs.append(len(items))
        if len(runs) == 1 and known_good:
            yield from ({"id": item["id"], "reason": None} for item in items[:5])
        raise Interrupted("RayActorError", {item["id"]: "" for item in items[-suspected:]} if suspected else None)

    monkeypatch.setattr(restarts, "follow", follow)
    monkeypatch.setattr(restarts, "fit_to_cluster", lambda plan, *_, **__: plan)
    monkeypatch.setattr(restarts, "node_groups", list)
    items = [{"id": str(index)} for index in range(1000)]
    plan = ScorePlan(1, 0, 0.75, 0.25, None, "")
    work: Any = SimpleNamespace(task=None, what="images")
    found = restarts.run_restarting(None, work, items, ScoreResources(), plan)  # type: ignore[arg-type]
    if known_good:
        assert [row["id"] for row in itertools.islice(found, 5)] == ["0", "1", "2", "3", "4"]
    with pytest.raises(
        StasError, match=r"failed one after the other without any of the images to blame, .*RayActorError.*again"
    ):
        next(found)
    # The last asked whether an image that was finished still can be, where one was and any was suspect.
    assert len(runs) == 8 + (known_good and suspected > 0)


def test_an_unexplained_failure_ends_the_run_though_a_known_image_can_be_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def follow(_pipeline: Any, _work: Any, items: list[Any], *_: Any) -> Iterator[dict[str, Any]]:
        if len(items) > 1:
            raise Interrupted("RayError")
        yield {"id": items[0]["id"], "reason": None}

    monkeypatch.setattr(restarts, "follow", follow)
    monkeypatch.setattr(restarts, "fit_to_cluster", lambda plan, *_, **__: plan)
    monkeypatch.setattr(restarts, "node_groups", list)
    work: Any = SimpleNamespace(task=None, what="images")
    items, plan = [{"id": "0"}, {"id": "1"}], ScorePlan(1, 0, 0.75, 0.25, None, "")
    with pytest.raises(StasError, match="without any of the images to blame"):
        list(restarts.run_restarting(None, work, items, ScoreResources(), plan, {"id": "done"}))  # type: ignore[arg-type]


def test_blocked_readers_are_no_stall(ray_nodes: list[Node], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A block of images whose readers all block takes longer than the stall's own time, and is waited for."""

    def pipeline(found: ray.data.Dataset, work: Work, plan: ScorePlan, ledger: Any) -> ray.data.Dataset:
        def wait(row: dict[str, Any]) -> dict[str, Any]:
            time.sleep(3)
            return row

        return found.map(wait)

    task = ScoreTask(str(tmp_path), "", PostprocessConfig(), SaveConfig(), LimitsConfig(timeout_s=30))
    work = Work(Ensemble((), "", inferences.InferenceConfig(), False, 1), task)
    plan = ScorePlan(1, 0, 0.75, 0.25, None, "", images_per_block=1)
    wanted = ScoreResources(stall_timeout_s=1)
    items = [Item(id="a", image_uri="a.png", stamp="1")]
    rows = restarts.follow(pipeline, work, items, plan, wanted)
    assert [row["id"] for row in rows] == ["a"]
    impatient = replace(task, limits=LimitsConfig(timeout_s=0.1, retries=0))
    with pytest.raises(Interrupted, match="none of the images was finished for"):
        list(restarts.follow(pipeline, replace(work, task=impatient), items, plan, wanted))
