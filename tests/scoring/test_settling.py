"""The order of a run: old results go, the batch is settled, and only then the work is split, once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray

from stas_core import storage
from stas_core.errors import StasError
from stas_core.predict import ensemble as ensembles
from tests.scoring.test_score_again import predicted
from tests.workflows.made import make_images, settings
from workflows import autoscaling, score_images, score_slides
from workflows.cluster import Node
from workflows.scoring import pipeline, restarts, settling, tasks
from workflows.scoring.pipeline import Calibration
from workflows.scoring.plan import plan_scoring

SETTLED = Calibration(0.01, 1.0, 0.01, batch_size=2, batch_px=900)


def without_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensembles, "find_checkpoints", lambda *_, **__: ["a"])
    monkeypatch.setattr(ensembles, "checkpoint_fingerprint", lambda _: "a")
    monkeypatch.setattr(ensembles, "check_mpp", lambda *_: ())
    monkeypatch.setattr(ensembles, "load_members", lambda *_: None)


def test_the_batch_is_settled_first_and_the_work_split_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    config = settings(
        make_images(tmp_path / "images", 30), "/unused", out, resources={"actors": 1}, save={"disagreement": False}
    )
    items, _, _ = score_images.find_images(str(tmp_path / "images"))
    models = score_images.choose_models(config, str(out), ["a"], storage.fingerprint("a"), use_gpu=False)
    task = score_images.make_work(config, str(out), models).task
    tasks.finish(task, pa.Table.from_pylist([predicted(item) for item in items[:5]], tasks.PREDICTED))
    seen: list[Any] = []

    @contextmanager
    def session() -> Iterator[list[Node]]:
        (out / "manifest.json").write_text("{}")
        yield [Node(8)]

    def calibrate(work: Any, unpredicted: list[Any], *_: Any, **__: Any) -> Calibration:
        seen.append(("calibrate", len(unpredicted), (out / "manifest.json").exists()))
        return SETTLED

    def split(*given: Any) -> Any:
        seen.append(("split", given[-1].predict_key != task.predict_key))
        return split_todo(*given)

    def score(work: Any, fresh: list[Any], *_: Any, **__: Any) -> None:
        seen.append(("score", len(fresh), work.ensemble.inference.batch_size))
        raise KeyboardInterrupt

    split_todo = settling.split_todo
    without_models(monkeypatch)
    for owner, name, stand_in in (
        (score_images, "ray_session", session),
        (score_images, "split_todo", split),
        (pipeline, "calibrate", calibrate),
        (pipeline, "score", score),
    ):
        monkeypatch.setattr(owner, name, stand_in)
    (out / "claim.json").write_text('{"stage": "score_images", "ids": []}')
    with pytest.raises(KeyboardInterrupt):
        score_images.run(config, False)
    assert seen == [("calibrate", 25, False), ("split", True), ("score", 30, 2)]


def test_why_images_failed_is_told_before_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def session() -> Iterator[list[Node]]:
        yield [Node(8)]

    def score(_: Any, fresh: list[Any], *__: Any, **___: Any) -> Iterator[dict[str, Any]]:
        seconds = dict.fromkeys(tasks.FINISHED.names)
        yield from (seconds | {"id": item["id"], "reason": "crashed_reader"} for item in fresh)
        raise StasError("the cluster is gone")

    without_models(monkeypatch)
    monkeypatch.setattr(score_images, "ray_session", session)
    monkeypatch.setattr(pipeline, "score", score)
    with pytest.raises(StasError, match="the cluster is gone"):
        score_images.run(settings(make_images(tmp_path / "images", 3), "/unused", tmp_path / "out"), False)
    assert "failed: 3 crashed_reader" in capsys.readouterr().out


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what an autoscaler is asked for, and when Ray ended."""
    told: list[Any] = []

    @contextmanager
    def session() -> Iterator[list[Node]]:
        try:
            yield [Node(8)]
        finally:
            told.append("Ray ended")

    for owner in (autoscaling, restarts):
        monkeypatch.setattr(owner, "node_groups", lambda: [({"CPU": 8.0}, 1)])
        monkeypatch.setattr(owner, "ask_for", told.append)
    for stage in (score_images, score_slides):
        monkeypatch.setattr(stage, "ray_session", session)
    monkeypatch.setattr(restarts, "cluster_nodes", lambda: [Node(8)])
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    return told


@pytest.mark.parametrize("error", [KeyboardInterrupt, StasError])
def test_an_end_while_the_batch_is_settled_takes_back_what_was_asked_for(
    error: type[BaseException], told: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrate(_: Any, items: list[Any], wanted: Any, plan: Any, **__: Any) -> Calibration:
        restarts.ask_for_nodes(plan, wanted, len(items))
        raise error

    without_models(monkeypatch)
    monkeypatch.setattr(pipeline, "calibrate", calibrate)
    config = settings(make_images(tmp_path / "images", 30), "/unused", tmp_path / "out", resources={"actors": 1})
    with pytest.raises(error):
        score_images.run(config, False)
    assert told == [[{"CPU": 8.0}], [], "Ray ended"]


def test_slides_that_are_stopped_take_back_what_was_asked_for(
    told: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline asks in a generator, which the error's frames keep open until after Ray has ended."""

    class Stopped:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def score(self, _: Any) -> None:
            restarts.ask_for_nodes(plan_scoring([Node(8)], config.resources), config.resources, 1)
            raise KeyboardInterrupt

    without_models(monkeypatch)
    resolution = SimpleNamespace(value=0.5, is_assumed=False)
    monkeypatch.setattr(ensembles, "resolution_of", lambda *_: resolution)
    monkeypatch.setattr(score_slides, "usual_looks", lambda *_: None)
    monkeypatch.setattr(score_slides, "_Run", Stopped)
    config = score_slides.ScoreSlidesConfig()
    folder: Any = SimpleNamespace(uri=str(tmp_path), is_finished=lambda *_: False, account=SimpleNamespace())
    with pytest.raises(KeyboardInterrupt):
        score_slides._score(config, folder, ["a"], [], [], {})
    assert told == [[{"CPU": 8.0}], [], "Ray ended"]
