"""What monitoring sees of a run, as long as it is at work."""

import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workflows import prepare_data, run_metrics, score_slides
from workflows.folds import trial
from workflows.progress import Progress
from workflows.scoring import restarts, slide_pipeline, slide_tasks
from workflows.scoring.image_progress import ImageProgress
from workflows.scoring.plan import ScorePlan, ScoreResources
from workflows.scoring.slide_times import SlideTimes
from workflows.scoring.tasks import STEPS


def test_without_a_run_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_metrics, "_made", {})
    run_metrics.done(1, "images")
    run_metrics.show("stas_actors", 2)
    assert run_metrics._made == {}


@dataclass
class Told:
    """Stands in for what Ray has of all figures."""

    now_s: float = 100.0
    runs: list[Any] = field(default_factory=list)
    """Those at work."""
    gauges: dict[tuple[str, str], float] = field(default_factory=dict)
    """By figure and labels."""
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def metric(self, name: str) -> Any:
        """Return a figure."""

        def set_to(value: float, tags: dict[str, str]) -> None:
            self.gauges[name, " ".join(tags.values())] = value

        def inc(value: float, tags: dict[str, str]) -> None:
            self.counts[name, " ".join(tags.values())] += int(value)

        return SimpleNamespace(set=set_to, inc=inc)

    def after(self, seconds: float) -> dict[tuple[str, str], float]:
        """Return what gauges show that the runs at work tell again after a while."""
        self.gauges.clear()
        self.now_s += seconds
        for run in self.runs:
            run.tell()
        return self.gauges.copy()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    found = Told()
    monkeypatch.setattr(run_metrics, "_metric", found.metric)
    monkeypatch.setattr(run_metrics, "time", SimpleNamespace(monotonic=lambda: found.now_s))

    class Thread:
        """Tells nothing by itself."""

        def __init__(self, target: Any, args: tuple[Any, ...], **named: Any) -> None:
            self._run = args[0]

        def start(self) -> None:
            found.runs.append(self._run)

        def join(self) -> None:
            found.runs.remove(self._run)

    monkeypatch.setattr(run_metrics, "threading", SimpleNamespace(Thread=Thread, Event=threading.Event))
    return found


def test_a_run_is_quiet_from_what_it_finished_last_and_its_gauges_stay(told: Told) -> None:
    run = "train_folds /out f00d"
    with run_metrics.of_run("train_folds", "/out", "f00d"):
        assert told.after(50) == {("stas_running", run): 1, ("stas_quiet_seconds", run): 50}
        run_metrics.show("stas_fold_epoch", 3, fold="0")  # says what it is at, and finishes nothing
        assert told.after(3000)["stas_quiet_seconds", run] == 3050
        run_metrics.done(1, "epochs")
        told.now_s += 7
        run_metrics.done(0, "maps")
        assert told.after(0) == {
            ("stas_running", run): 1,
            ("stas_quiet_seconds", run): 7,
            ("stas_fold_epoch", f"{run} 0"): 3,
        }
    assert told.after(1) == {}
    assert told.counts == {("stas_items_done", f"{run} epochs"): 1}


def test_of_a_pipeline_the_stage_that_runs_is_the_one_that_is_quiet(told: Told) -> None:
    pipeline, folds = "pipeline /out f00d", "train_folds /out/folds cafe"
    with run_metrics.of_run("pipeline", "/out", "f00d"):
        with run_metrics.of_run("prepare_data", "/out/cohort", "beef"):
            run_metrics.done(5, "images")
        with run_metrics.of_run("train_folds", "/out/folds", "cafe"):
            assert told.after(4000) == {
                ("stas_running", pipeline): 1,
                ("stas_running", folds): 1,
                ("stas_quiet_seconds", folds): 4000,
            }
        assert told.after(2) == {("stas_running", pipeline): 1, ("stas_quiet_seconds", pipeline): 2}


GPU_BUSY, ACTORS = (("stas_gpu_busy", "score /out f00d"), ("stas_actors", "score /out f00d"))


def test_once_images_are_predicted_no_gpu_is_shown_as_busy(told: Told) -> None:
    nothing = dict.fromkeys(("reason", *STEPS, "gpu_watched_s", "gpu_busy_s"))
    predicted = nothing | {"gpu_watched_s": 2.0, "gpu_busy_s": 0.5}
    shown: list[float | None] = []

    def rows(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for _ in range(2):
            yield row
            shown.append(told.after(5).get(GPU_BUSY))

    with run_metrics.of_run("score", "/out", "f00d"):
        progress = ImageProgress(4, ScorePlan(1, 1, 1, 1, None, ""), 2)
        progress.follow(rows(predicted))
        assert shown == [0.25, 0.25] and GPU_BUSY not in told.after(5)
        progress.follow(rows(nothing))  # finished from their maps
        assert shown[2:] == [None, None] and ("stas_running", GPU_BUSY[1]) in told.after(5)


def test_once_blocks_are_predicted_no_gpu_is_shown_as_busy(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slide_pipeline, "MOST_BLOCKS", 2)
    monkeypatch.setattr(slide_pipeline, "run_restarting", lambda pipeline, job, items, *given: iter(items))
    job: Any = SimpleNamespace(task=SimpleNamespace(tile=SimpleNamespace(block=1, px=8, halo_px=0)))
    items: Any = [{"id": name} for name in "abc"]
    times = SlideTimes()
    with run_metrics.of_run("score", "/out", "f00d"):
        for _ in slide_pipeline.predict(job, items, ScoreResources(), ScorePlan(1, 1, 1, 1, None, "")):
            times.add_gpu(2.0, 0.5)
            assert told.after(5)[GPU_BUSY] == 0.25
        assert GPU_BUSY not in told.after(5)


@pytest.mark.parametrize("interrupted", [False, True])
def test_between_pipelines_and_after_the_last_no_actors_are_shown(
    told: Told, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    shown: list[float | None] = []

    def follow(pipeline: Any, work: Any, items: list[Any], *given: Any) -> Iterator[dict[str, Any]]:
        shown.append(told.after(5).get(ACTORS))
        for item in items:
            yield {"id": item["id"], "reason": None}
            shown.append(told.after(5).get(ACTORS))
            if interrupted and item["id"] == "a":
                raise restarts.NodesChanged("a node was lost")

    monkeypatch.setattr(restarts, "follow", follow)
    monkeypatch.setattr(restarts, "fit_to_cluster", lambda plan, *given, **named: plan)
    monkeypatch.setattr(restarts, "node_groups", list)
    work: Any = SimpleNamespace(what="images")
    plan, pipeline = ScorePlan(2, 1, 1, 1, None, ""), work
    with run_metrics.of_run("score", "/out", "f00d"):
        rows = restarts.run_restarting(pipeline, work, [{"id": "a"}, {"id": "b"}], ScoreResources(), plan)
        assert [row["id"] for row in rows] == ["a", "b"]
        assert ACTORS not in told.after(5)
    assert shown == ([None, 2, None, 1] if interrupted else [None, 2, 2])


def test_a_search_counts_epochs_and_trials(told: Told) -> None:
    table = trial.TrialTable(2, 3)

    def one(name: str, **result: Any) -> Any:
        return SimpleNamespace(config={"trial": name, "setting": {}}, last_result=result)

    with run_metrics.of_run("tune_training", "/out", "f00d"):
        for epoch in (1, 2):
            table.on_trial_result(0, [], one("0000"), {"epoch": epoch, "dice": 0.5})
        table.on_trial_complete(0, [], one("0000", epoch=2, dice=0.5))
        table.on_trial_error(0, [], one("0001"))
    label = "tune_training /out f00d"
    assert told.counts == {("stas_items_done", f"{label} epochs"): 2, ("stas_items_done", f"{label} trials"): 2}


def test_failures_of_slides_are_counted_whenever_they_come_beside_all_slides_that_were_looked_at(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    items: Any = [{"id": name} for name in ("known", "refused", "blank", "good")]
    opened = {"known": slide_tasks.OpenSlide(items[0], []), "refused": slide_tasks.OpenSlide(items[1], [], "no_tumour")}

    def survey(task: Any, items: Any, *plans: Any) -> Iterator[dict[str, Any]]:
        for item in items:
            opened[item["id"]] = slide_tasks.OpenSlide(item, [])
            yield {"id": item["id"], "survey_s": 1.0, "reason": "no_tissue" if item["id"] == "blank" else None}

    monkeypatch.setattr(slide_pipeline, "survey", survey)
    monkeypatch.setattr(score_slides, "open_slide", lambda task, item: opened.get(item["id"]))
    monkeypatch.setattr(score_slides, "record_failure", lambda *given: None)
    nothing: Any = None
    run = score_slides._Run(nothing, nothing, nothing, plan=nothing, num_cpus=1)
    with run_metrics.of_run("score_slides", "/out", "f00d"):
        assert [one.item["id"] for one in run._open(items)] == ["known", "good"]
        run._fail(items[3], "changed_input", "it has changed")
        assert run._take([{"id": "known", "seconds": {}, "reason": None}]) == 1
    label = "score_slides /out f00d"
    reasons = ("no_tumour", "no_tissue", "changed_input")
    failed = {("stas_items_failed", f"{label} {reason}"): 1 for reason in reasons}
    counted = {pair: number for pair, number in told.counts.items() if pair[0] != "stas_step_seconds"}
    done = {f"{score_slides.SURVEY}slides": 4, "slides": 2}
    assert counted == failed | {("stas_items_done", f"{label} {items}"): number for items, number in done.items()}


def test_images_that_cannot_be_prepared_are_counted(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"reason": None}, {"reason": "unreadable_image"}]
    monkeypatch.setattr(prepare_data, "stream", lambda *given: iter(rows))
    monkeypatch.setattr(prepare_data, "write_part", lambda *given: None)
    nothing: Any = None
    with run_metrics.of_run("prepare_data", "/out", "f00d"):
        assert list(prepare_data._measure([nothing] * 2, "/out", nothing, nothing)) == rows
    label = "prepare_data /out f00d"
    assert told.counts == {
        ("stas_items_done", f"{label} images"): 2,
        ("stas_items_failed", f"{label} unreadable_image"): 1,
    }


def test_no_password_reaches_an_exporter(told: Told) -> None:
    with run_metrics.of_run("evaluate", "sftp://me:s3cret@host/out", "f00d"):
        run_metrics.done(1, "images")
        run_metrics.show("stas_actors", 2)
        shown = {labels for _, labels in (*told.after(1), *told.counts)}
    assert shown == {f"evaluate sftp://me:***@host/out f00d{own}" for own in ("", " images")}


def exported(nodes: list[Any], run: str, shows: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Return what an exporter says of a run, as soon as it shows what is expected, or after a minute."""
    url = f"http://{nodes[0]['NodeManagerAddress']}:{nodes[0]['MetricsExportPort']}/metrics"
    found: dict[str, float] = {}
    deadline = time.monotonic() + 60
    while not shows(found) and time.monotonic() < deadline:
        time.sleep(0.5)
        with urllib.request.urlopen(url) as answer:
            lines = [line for line in answer.read().decode().splitlines() if f'run="{run}"' in line]
            found = {}
            assert all(re.search(r'run_id="[0-9a-f]+"', line) for line in lines)
        for name, labels, value in (re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups() for line in lines):  # type: ignore[union-attr]
            own = dict(re.findall(r'(items|reason|step|fold)="([^"]*)"', labels))
            found[" ".join([name, *own.values()])] = float(value)
    return found


def test_a_scoring_run_shows_its_steps(scored: Path) -> None:
    import ray

    items = "ray_stas_items_done_total images"
    found = exported(ray.nodes(), str(scored), lambda found: found.get(items) == 24)
    assert found[items] == 24
    steps = {name for name in found if name.startswith("ray_stas_step_seconds_total")}
    assert {name.rpartition(" ")[2] for name in steps} == {"decode", "predict", "postprocess", "write"}


def test_an_exporter_shows_what_a_run_has_done(
    ray_nodes: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    run = f"{tmp_path}/out"
    monkeypatch.setattr(run_metrics, "TELL_EVERY_S", 0.5)
    with run_metrics.of_run("score_images", run, "f00d"):
        progress = Progress(5)
        progress.step(2)
        progress.step()
        run_metrics.count("stas_items_failed", reason="slow")
        run_metrics.count("stas_step_seconds", 0.0, step="decode")
        run_metrics.show("stas_actors", 2)
        run_metrics.show("stas_fold_dice", None, fold="0")
        expected = {
            "ray_stas_running": 1.0,
            "ray_stas_items_done_total images": 3.0,
            "ray_stas_items_failed_total slow": 1.0,
            "ray_stas_actors": 2.0,
        }
        quiet = "ray_stas_quiet_seconds"
        found = exported(ray.nodes(), run, lambda found: expected.items() <= found.items() and quiet in found)
    Progress(9).step(9)  # of no run
    assert 0 < found.pop(quiet) < 60
    assert found == expected


def test_of_a_run_that_has_ended_an_exporter_keeps_counters_alone(scored: Path) -> None:
    import ray

    def has_ended(found: dict[str, float]) -> bool:
        return found != {} and all("_total" in name for name in found)

    assert has_ended(exported(ray.nodes(), str(scored), has_ended))
