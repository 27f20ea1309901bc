"""How scoring is laid on a cluster: actors, shares, calibration, how far reading runs ahead."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.data
import torch

from stas_core import storage
from stas_core.errors import (
    ResourceError,
)
from stas_core.predict import inference as inferences
from stas_core.predict.inference import InferenceConfig
from stas_core.predict.postprocess import PostprocessConfig
from tests.workflows.made import settings
from workflows import score_images, waiting
from workflows.cluster import Node
from workflows.score_images import ScoreConfig
from workflows.scoring import pipeline as pipelines
from workflows.scoring import restarts
from workflows.scoring.pipeline import Calibration
from workflows.scoring.plan import Ensemble, ScorePlan, ScoreResources, Work, plan_scoring
from workflows.scoring.restarts import Identified
from workflows.scoring.tasks import PREDICTED, Item, LimitsConfig, SaveConfig, ScoreTask


def test_a_calibration_that_never_comes_is_given_up(
    ray_nodes: list[Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipelines, "time_steps", lambda *_: time.sleep(60))
    plan, wanted = ScorePlan(1, 0, 0.75, 0.25, None, ""), ScoreResources(stall_timeout_s=1.0)
    work = Work(Ensemble((), "", inferences.InferenceConfig(), False, 1), None)  # type: ignore[arg-type]
    assert pipelines.calibrate(work, [], wanted, plan) is None
    assert "no calibration: nothing was measured within 1 s" in capsys.readouterr().out


def test_reading_rests_while_enough_images_wait(ray_nodes: list[Node], tmp_path: Path) -> None:
    note = tmp_path / "read"

    def read(table: pa.Table) -> pa.Table:
        with note.open("a") as file:
            file.write(".")
        return pa.table({"image": [bytes(2**19)]})

    class Slow:
        def __init__(self) -> None:
            time.sleep(2)

        def __call__(self, table: pa.Table) -> pa.Table:
            time.sleep(0.05)
            return pa.table({"num_read": [note.stat().st_size]})

    def pipeline(found: ray.data.Dataset, work: Any, plan: ScorePlan, ledger: Any) -> ray.data.Dataset:
        rows: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": 1}
        pool = ray.data.ActorPoolStrategy(size=1)
        step: Any = read
        return found.map_batches(step, num_cpus=0.25, **rows).map_batches(Slow, num_cpus=0.5, compute=pool, **rows)

    plan = ScorePlan(1, 0, 0.5, 0.25, 8, "", images_per_block=1)
    assert plan.run_ahead_bytes == 8 * 2**19
    items = [Identified(id=str(number)) for number in range(60)]
    done = [row for rows in restarts.conduct(pipeline, None, items, plan, None) for row in rows]
    assert len(done) == 60
    ahead = [row["num_read"] - number for number, row in enumerate(done)]
    assert max(ahead) < 30  # 8 images wait, a few are on their way; without a limit nearly all 60 would be read at once


@pytest.mark.parametrize(
    ("nodes", "wanted", "expected"),
    [
        ([Node(1)], {}, (1, 0, 0.75, 0.25)),
        ([Node(2)], {}, (2, 0, 0.75, 0.25)),
        ([Node(2), Node(2), Node(0)], {}, (4, 0, 0.75, 0.25)),
        ([Node(16)], {"threads_per_actor": 4}, (4, 0, 3.0, 0.25)),
        ([Node(16, 8)], {}, (8, 1.0, 1.0, 1.0)),
        ([Node(8, 8)], {}, (8, 1.0, 0.5, 0.25)),
        ([Node(16, 1), Node(16)], {"gpus_per_actor": 0.25}, (4, 0.25, 1.0, 1.0)),
        ([Node(16, 2)], {"actors": 1}, (1, 1.0, 1.0, 1.0)),
    ],
)
def test_the_plan_leaves_room_for_the_tasks(
    nodes: list[Node], wanted: dict[str, Any], expected: tuple[float, ...]
) -> None:
    plan = plan_scoring(nodes, ScoreResources(**wanted))
    assert (plan.actors, plan.gpus_per_actor, plan.cpus_per_actor, plan.cpus_per_task) == expected
    assert plan.actors * plan.cpus_per_actor + plan.cpus_per_task <= sum(node.num_cpus for node in nodes)


@pytest.mark.parametrize(
    ("nodes", "wanted", "message"),
    [
        ([Node(2)], {"actors": 3}, r"2 actor\(s\) of 0.75 CPU.* asked for: resources.actors = 3"),
        ([Node(2)], {"gpus_per_actor": 1}, r"1 node\(s\) with 2 CPU and 0 GPU: 0 actor\(s\)"),
        ([Node(0)], {}, r"0 actor\(s\).*add nodes"),
        ([Node(1)], {"cpus_per_actor": 1}, r"0 actor\(s\) of 1 CPU.*beside tasks of 0.25 CPU"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_arithmetic(
    nodes: list[Node], wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(ResourceError, match=message):
        plan_scoring(nodes, ScoreResources(**wanted))


def test_calibration_leaves_cores_to_the_slowest_step() -> None:
    plan = plan_scoring([Node(4)], ScoreResources())
    assert Calibration(0.02, 1.0, 0.02, 1).fit(plan).actors == 4
    assert Calibration(0.02, 0.02, 0.02, 1).fit(plan).actors == 2
    assert Calibration(1.0, 0.01, 0.02, 1).fit(plan).actors == 1


def test_calibration_stops_at_the_batch_that_does_not_fit(
    phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Actor:
        def __init__(self, ensemble: Ensemble, save: SaveConfig):
            self._batch_size = ensemble.inference.batch_size or 1

        def __call__(self, table: pa.Table) -> pa.Table:
            time.sleep(0.05)
            fits = {"prob": bytes(96 * 128), "mean_disagreement": 0.0, "num_passes": 4, "predict_s": 0.05}
            done = fits if self._batch_size < 4 else {"reason": "out_of_memory", "message": "too large"}
            empty = dict.fromkeys(PREDICTED.names)
            return pa.Table.from_pylist([empty | row | done for row in table.to_pylist()], schema=PREDICTED)

    monkeypatch.setattr(pipelines, "start_actor", Actor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    task = ScoreTask(str(tmp_path), "", PostprocessConfig(), SaveConfig(), LimitsConfig())
    work = Work(Ensemble((), "", inferences.InferenceConfig(), True, 1), task)
    items = [Item(id=path.stem, image_uri=str(path), stamp="") for path in (phantom_folder / "images").iterdir()]
    found = pipelines.time_steps(work, items[:1])
    assert found is not None and (found.batch_size, found.batch_px) == (2, 2 * 96 * 128)
    too_large = replace(work, ensemble=work.ensemble.with_batches(8, None))
    assert pipelines.time_steps(too_large, items[:1]) is None
    assert pipelines.time_steps(too_large, items[:1], work) is not None


def test_what_is_left_of_a_cluster_is_used_or_refused_with_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = ScoreResources()
    on_gpus = plan_scoring([Node(8, 2), Node(8)], wanted)
    monkeypatch.setattr(restarts, "cluster_nodes", list)
    monkeypatch.setattr(restarts, "live_nodes", lambda: [Node(8, 2), Node(8)])
    assert restarts.fit_to_cluster(on_gpus, wanted) is on_gpus
    monkeypatch.setattr(restarts, "live_nodes", lambda: [Node(8, 1, "a"), Node(8, 2, "b"), Node(8, 0, "c")])
    assert restarts.fit_to_cluster(on_gpus, wanted).actors == 3  # one has joined
    fitting = restarts.fit_to_cluster(on_gpus, wanted, ["b"])
    assert fitting.actors == 1 and fitting.reason.startswith("2 node(s) with 16 CPU and 1 GPU: 1 actor(s)")
    assert restarts.fit_to_cluster(on_gpus, wanted.model_copy(update={"actors": 2})).actors == 2
    monkeypatch.setattr(restarts, "live_nodes", lambda: [Node(8)])
    with pytest.raises(ResourceError, match=r"0 node\(s\) .* 0 actor\(s\) of 1 CPU and 1 GPU fit"):
        restarts.fit_to_cluster(on_gpus, wanted)


def test_where_nodes_may_be_added_the_first_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head without CPUs and an autoscaler: the plan counts on what may come, and the work begins with the first."""
    wanted, looks = ScoreResources(node_timeout_s=60), iter([[Node(0)], [Node(0)], [Node(0), Node(8, 1)]])
    plan = plan_scoring([Node(0), *[Node(8, 1)] * 4], wanted)
    assert plan.actors == 4
    monkeypatch.setattr(restarts, "live_nodes", lambda: next(looks))
    monkeypatch.setattr(restarts, "cluster_nodes", lambda: [Node(0), *[Node(8, 1)] * 4])
    monkeypatch.setattr(waiting, "NODE_LOOK_S", 0)
    monkeypatch.setattr(restarts, "node_groups", lambda: [({"CPU": 8.0, "GPU": 1.0}, 4)])
    asked: list[Any] = []
    monkeypatch.setattr(restarts, "ask_for", asked.append)
    assert restarts.fit_to_cluster(plan, wanted).actors == 1
    assert capsys.readouterr().out.count("waiting for a node that an actor fits on") == 2
    assert asked == [[{"CPU": 8, "GPU": 1}]] * 2  # for one item, of those that may come
    monkeypatch.setattr(restarts, "live_nodes", lambda: [Node(0)])
    with pytest.raises(ResourceError, match=r"1 node\(s\) with 0 CPU"):
        restarts.fit_to_cluster(plan, wanted.model_copy(update={"node_timeout_s": 0.0}))


def test_a_plan_belongs_to_what_it_was_calibrated_for(tmp_path: Path) -> None:
    run = settings(tmp_path / "images", "/unused", tmp_path)

    def settled(weights: str, *, use_gpu: bool = True, run: ScoreConfig = run) -> InferenceConfig:
        return score_images.choose_models(run, str(tmp_path), [], weights, use_gpu=use_gpu).inference

    key = Ensemble((), "these", run.inference, use_gpu=True, threads=1).key
    storage.write_json(str(tmp_path / "plan.json"), {"batch_size": 4, "batch_px": 900, "calibrated_for": key})
    assert (settled("these").batch_size, settled("these").batch_px) == (4, 900)
    assert settled("others").batch_size is None and settled("these", use_gpu=False).batch_size is None
    more_work = run.model_copy(update={"inference": run.inference.model_copy(update={"turns": True})})
    assert settled("these", run=more_work).batch_size is None


def test_a_plan_whose_batch_no_longer_fits_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = settings(tmp_path / "images", "/unused", tmp_path, resources={"calibrate": True})
    models = Ensemble((), "", run.inference, use_gpu=True, threads=1)
    tried: list[int | None] = []

    def calibrate(work: Work, *_: Any, otherwise: Work) -> Calibration | None:
        tried.extend(one.ensemble.inference.batch_size for one in (work, otherwise))
        return Calibration(0.01, 1.0, 0.01, 2, 900)

    monkeypatch.setattr(pipelines, "calibrate", calibrate)
    items = [Item(id=str(index), image_uri="", stamp="") for index in range(100)]
    plan = plan_scoring([Node(8, 1)], run.resources)
    settled_models, _ = score_images.settle(run, str(tmp_path), models.with_batches(8, 7200), items, plan)
    assert tried == [8, None] and settled_models.inference.batch_size == 2
    settled = {"batch_size": 2, "batch_px": 900, "calibrated_for": models.key}
    assert storage.read_json(str(tmp_path / "plan.json")) == settled
