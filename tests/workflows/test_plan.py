"""`--plan`: all that a run needs is checked, a little of it is tried, and nothing is written or started."""

import importlib
import mmap
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stas_core import config as configs
from stas_core import local_files, record_parts, storage
from stas_core.data import images as field_images
from stas_core.data.cohort import CohortRow
from stas_core.data.fields import load_mask
from stas_core.errors import UnreadableImage
from stas_core.runs import TrainingRun
from stas_core.scored_runs import ScoredRun
from stas_core.slides.phantom import PhantomSlideConfig, make_slide
from stas_core.train import loop
from stas_core.train.context import LocalContext
from stas_core.train.recipe import FoldRecipe, FoldTask
from tests import made_cohort
from tests.scoring import here
from tests.workflows.made import make_oof_run
from tests.workflows.test_evaluate import write_run
from workflows import console, out_folder, prepare_data, train_folds
from workflows import forecast as forecasts
from workflows import planned as planning
from workflows.cluster import Node, describe, plan_groups
from workflows.folds import estimate as folds
from workflows.folds import training
from workflows.folds.fitting import ResourcesConfig
from workflows.forecast import Forecast
from workflows.out_folder import Outputs, claim_for_stage
from workflows.phantom_fields import PhantomFields
from workflows.planned import Price
from workflows.progress import size
from workflows.scoring.estimate import Cluster
from workflows.scoring.plan import ScoreResources, plan_scoring

Stage = Callable[..., Any]
PLAN = Forecast("score_images", "s3://bucket/out", "10 images", "1 node", seconds=7200.0, basis="from 2 tried")


def planned(text: str) -> dict[str, str]:
    """Return the rows of a plan that was printed."""
    assert "nothing was started or written" in text
    return dict(re.findall(r"^  (to do|on|time|faster|GPU-hours|cost|memory|disk|note) +(.*)$", text, re.MULTILINE))


@pytest.mark.parametrize("name", console.STAGES)
def test_every_stage_can_be_planned(name: str) -> None:
    module = importlib.import_module(f"workflows.{name}")
    assert list(get_type_hints(module.plan).values())[:2] == [get_type_hints(module.run)["config"], bool]


def test_a_plan_says_time_gpu_hours_and_cost() -> None:
    said = planned("\n".join(PLAN.lines()))
    assert said == {"to do": "10 images", "on": "1 node", "time": "about 2:00:00, from 2 tried"}
    on_gpus = replace(PLAN, num_gpus=4.0, memory_bytes=2.5e9, disk_bytes=3.2e6, notes=("one",))
    said = planned("\n".join(on_gpus.lines(Price(1.5, of_gpus=True))))
    assert (said["GPU-hours"], said["cost"]) == ("8.0", "12.00, at 1.5 a GPU-hour")
    assert (said["memory"], said["disk"]) == ("about 2.5 GB a process", "about 3 MB in s3://bucket/out")
    assert said["note"] == "one"
    assert planned("\n".join(PLAN.lines(Price(3, of_gpus=False))))["cost"] == "6.00, at 3 an hour of this cluster"
    unknown = replace(PLAN, seconds=None, basis="no GPU here")
    assert planned("\n".join(unknown.lines(Price(3, of_gpus=True))))["time"] == "not known, no GPU here"


def test_a_disk_that_is_too_small_is_said(tmp_path: Path) -> None:
    free = forecasts.free_bytes(str(tmp_path / "not" / "there"))
    assert free is not None
    plenty = replace(PLAN, out=str(tmp_path), disk_bytes=1.0)
    assert "note" not in planned("\n".join(plenty.lines()))
    for short in (replace(plenty, disk_bytes=free * 2.0), replace(plenty, scratch_bytes=free * 2.0)):
        assert "has no room for this: free " in planned("\n".join(short.lines()))["note"]


@given(st.integers(2, 64), st.sampled_from([0, 1]), st.floats(1, 1e6), st.floats(0, 1e6))
def test_twice_the_nodes_take_half_the_time(num_nodes: int, gpus: int, predict_s: float, other_s: float) -> None:
    def seconds(count: int) -> float:
        nodes = [Node(8, gpus)] * count
        cluster = Cluster(nodes, plan_scoring(nodes, ScoreResources()))
        return cluster.seconds(predict_s, other_s, 1, 1e9) - forecasts.START_S

    assert seconds(2 * num_nodes) == pytest.approx(seconds(num_nodes) / 2)


def test_no_more_actors_work_than_there_are_or_than_images() -> None:
    nodes = [Node(64)]
    one = Cluster(nodes, plan_scoring(nodes, ScoreResources(actors=1)))
    every = Cluster(nodes, plan_scoring(nodes, ScoreResources()))
    assert one.seconds(6400, 0, 1, 1000) == every.seconds(6400, 0, 1, 1) == forecasts.START_S + 6400
    assert every.seconds(6400, 0, 1, 1000) < forecasts.START_S + 130


def test_folds_in_turns_take_longer_than_all_at_once(tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]) -> None:
    def plan_on(cpus: int) -> Forecast:
        laid = plan_groups([Node(cpus)], training.demand(ResourcesConfig(cpus_per_worker=1), 2))
        return folds.of_folds(Forecast("train_folds", "/none/out", "", ""), tiny_recipe, cohort_rows, [0, 1], laid)

    pace = folds.Pace(1.0, 2.0, 10, 10, 10.0, 1.0, 1e9, "a test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folds, "try_training", lambda *_: pace)
        one, two = plan_on(1), plan_on(2)
    # 3 epochs of 4 samples; 4 images validated in each, with one flip of the two that a map has; then 4 maps.
    assert two.seconds == forecasts.START_S + 3 * 4 * 1.0 + 3 * 4 * 1.0 + 4 * 2.0
    assert one.seconds == 2 * two.seconds
    assert one.faster.startswith("50% of the time with all folds at once: 2 CPU")
    assert "resources.workers_per_fold=2: 4 CPU" in two.faster
    assert one.faster_costs == two.faster_costs == 1


@pytest.mark.parametrize(
    ("num_folds", "slots", "now", "at_once"), [(5, 2, 6.0, 5.0), (4, 2, 4.0, 4.0), (5, 5, 5.0, 5.0)]
)
def test_folds_all_at_once_cost_no_more_than_they_train(num_folds: int, slots: int, now: float, at_once: float) -> None:
    """Of 5 folds in 2 slots, one slot is empty, and paid for, while the last one trains."""
    laid = plan_groups([Node(8, slots)], training.demand(ResourcesConfig(), num_folds))
    seconds = -(-num_folds // slots) * 3600.0
    costs = folds._faster_costs(laid, num_folds)
    plan = replace(PLAN, seconds=seconds, num_gpus=laid.num_gpus, faster="sooner", faster_costs=costs)
    said = planned("\n".join(plan.lines(Price(1, of_gpus=True))))
    assert said["cost"].startswith(f"{now:.2f},") and said["faster"].endswith(f": {at_once:.2f}")
    assert ("the price stays" in said["faster"]) is (now == at_once)


def test_twice_as_many_trials_at_once_cost_what_their_rounds_do() -> None:
    assert folds.faster_trials(8, 2) == ("half the time with parallel_trials=4 on twice as much", 1.0)
    text, costs = folds.faster_trials(5, 2)  # 3 rounds become 2
    assert text.startswith("67% of the time with parallel_trials=4") and costs == pytest.approx(4 / 3)
    assert folds.faster_trials(2, 2) == ("", 1.0)


def test_what_a_fold_that_goes_on_has_written_needs_no_new_room(
    tiny_recipe: FoldRecipe, cohort_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = configs.merge(tiny_recipe.model_dump(mode="json"), {"data": {"cohort": cohort_uri}})
    config = configs.build(training.TrainFoldsConfig, values | {"out": f"{tmp_path}/out"})
    opened = training.open_training(config)
    with claim_for_stage(opened.out, training.OUTPUTS, force=False, work=opened.work):
        storage.write_bytes(f"{TrainingRun(opened.out).fold(0).epoch(1)}/weights.safetensors", bytes(5000))
    pace = folds.Pace(1.0, 2.0, 10, 10, 10.0, 1.0, 1e9, "a test")
    monkeypatch.setattr(folds, "try_training", lambda *_: pace)
    for force in (False, True):
        assert train_folds.plan(config, force)[0].replaced_bytes == 5000


def test_folds_leave_about_what_was_planned(
    tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow], tmp_path: Path
) -> None:
    laid = plan_groups([Node(2)], training.demand(ResourcesConfig(cpus_per_worker=1), 2))
    found = folds.of_folds(Forecast("train_folds", f"{tmp_path}", "", ""), tiny_recipe, cohort_rows, [0, 1], laid)
    run = TrainingRun(f"{tmp_path}/run")
    for fold in (0, 1):
        (tmp_path / f"{fold}").mkdir()
        context = LocalContext(tmp_path / f"{fold}", device=torch.device("cpu"))
        run.fold(fold).finish(
            loop.train_fold(context, tiny_recipe, FoldTask(fold, cohort_rows, run.fold(fold).uri, {})), {}
        )
    training._summarise(run.uri, [0, 1], cohort_rows, None)
    written = local_files.bytes_below(run.uri)
    assert found.disk_bytes is not None and written / 1.2 < found.disk_bytes < written * 1.2


def test_the_cluster_that_halves_the_time_is_named_with_its_cost() -> None:
    """Its nodes by kind, the head left out; and what its autoscaler must allow, where nodes are still to come."""
    grows = [Node(0, 0, "head"), Node(8, 1, "one"), Node(8, 1), Node(4)]
    assert forecasts.doubled(grows) == (
        "half the time on twice as much: 4 node(s) of 8 CPU and 1 GPU and 2 node(s) of 4 CPU, for which its "
        "autoscaler's limit must be raised"
    )
    here = forecasts.doubled([Node(2)])
    assert here == "half the time on twice as much: 2 node(s) of 2 CPU"
    plan = Forecast("a", "/none/out", "", "a layout", seconds=7200, faster=here)
    assert (
        f"  faster    {here}; the price stays: 5.00" in plan.lines(planning.Price(2.5, of_gpus=False))
        and f"  faster    {here}; the price stays" in plan.lines()
    )
    assert describe(grows) == "4 node(s) with 20 CPU and 2 GPU (2 node(s) to come)"


def test_without_the_gpu_that_folds_need_the_time_is_not_known(
    tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]
) -> None:
    laid = plan_groups([Node(4, 1)], training.demand(ResourcesConfig(), 2))
    base = Forecast("train_folds", "/none/out", "", "")
    found = folds.of_folds(base, tiny_recipe, cohort_rows, [0, 1], laid)
    assert found.seconds is None and "this machine has none" in found.basis and found.num_gpus == 1


def test_the_peak_is_of_what_came_since_it_was_forgotten() -> None:
    forecasts.forget_peak()
    before = forecasts.peak_bytes()
    with mmap.mmap(-1, 600_000_000) as held:  # given back when it is closed, as the heap may not be
        np.frombuffer(held, np.uint8)[::4096] = 1
    high = forecasts.peak_bytes()
    assert high > before + 100e6  # the largest may be of a Ray that other tests share
    forecasts.forget_peak()
    assert forecasts.peak_bytes() < high - 100e6


PHANTOMS = {"num_images": 4, "height": 96, "width": 128, "num_groups": 4}


@pytest.mark.usefixtures("prepared_here")
def test_phantom_fields_that_are_made_are_not_planned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(fields: PhantomFields) -> None:
        fields.write_groups([fields.write(index) for index in range(fields.phantom.num_images)])

    monkeypatch.setattr(PhantomFields, "make", make)
    values = {"phantom": PHANTOMS, "split": {"num_folds": 2, "hold_out_fraction": 0}, "out": f"{tmp_path}/out"}
    config = configs.build(prepare_data.PrepareConfig, values)
    (first,) = prepare_data.plan(config, False)
    assert first.work == "4 phantom fields to make and measure" and first.basis == "from 4 images tried here"
    assert prepare_data.run(config, False) == 0
    fields = sum(path.stat().st_size for path in tmp_path.glob("out/phantom/*/*/*"))
    assert first.disk_bytes is not None and first.disk_bytes > fields and not first.replaced_bytes
    assert prepare_data.plan(config, False)[0].is_nothing
    (mask, *_) = sorted((tmp_path / "out" / "masks").iterdir())
    mask.unlink()
    (rest,) = prepare_data.plan(config, False)
    assert rest.work == "4 images with annotations, 1 to measure"
    assert rest.replaced_bytes == (tmp_path / "out" / "cohort.parquet").stat().st_size
    (anew,) = prepare_data.plan(config, True)
    assert anew.work == first.work and anew.replaced_bytes > fields


def test_what_a_contact_sheet_takes_is_not_timed_and_no_image_of_it_ends_a_plan(
    tmp_path: Path, phantom_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocked(uri: str, **_: Any) -> None:
        time.sleep(1)
        raise UnreadableImage(f"{uri} is damaged")

    monkeypatch.setattr(field_images, "read_image", blocked)
    fields = {name: f"{phantom_folder}/{name}/*[0-1].*" for name in ("images", "annotations")}
    config = configs.build(prepare_data.PrepareConfig, {"data": fields, "out": f"{tmp_path}/out"})
    (found,) = prepare_data.plan(config, False)
    assert found.seconds is not None and (found.seconds - forecasts.START_S) * (os.cpu_count() or 1) < 2


@pytest.fixture
def plan(stage: Stage, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Return a function that plans a stage and returns the rows of its plan, or of the last of several."""

    def plan(name: str, *arguments: str, **values: Any) -> dict[str, str]:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        done = stage(name, "--config", str(path), *arguments, f"out={tmp_path}/out", "--plan")
        assert done.status == 0, done.err
        assert not (tmp_path / "out").exists()
        said = planned(done.out)
        assert "not known" in said["time"] or re.match(r"about .* a process$", said["memory"])
        assert "not known" in said["time"] or re.match(r"about .* in ", said["disk"])
        return said

    return plan


Plan = Callable[..., dict[str, str]]


def test_a_cohort_and_its_training_are_planned(
    plan: Plan, phantom_folder: Path, cohort_uri: str, tiny_recipe: FoldRecipe
) -> None:
    fields = {"images": f"{phantom_folder}/images", "annotations": f"{phantom_folder}/annotations"}
    said = plan("prepare_data", data=fields)
    assert said["to do"] == "8 images with annotations, 8 to measure"
    assert said["time"].endswith("from 6 images tried here") and " kB in " in said["disk"]
    recipe = tiny_recipe.model_dump(mode="json")
    said = plan("train_folds", f"data.cohort={cohort_uri}", **recipe)
    assert said["to do"] == "2 fold(s) of 3 epochs on 8 images" and "short epochs tried here" in said["time"]
    space = {"optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
    said = plan("tune_training", f"train.data.cohort={cohort_uri}", train=recipe, space=space)
    assert " trials, " in said["to do"] and "stopped early" in said["note"]


def test_images_without_an_annotation_are_tried_as_such(
    ray_nodes: list[Any], stage: Stage, tmp_path: Path, phantom_folder: Path
) -> None:
    fields = [
        f"data.images={phantom_folder}/images/*_000[0-3].jpg",
        f"data.annotations={phantom_folder}/annotations/*1.json",
    ]
    given = [
        *fields,
        "data.unannotated=negative",
        "split.num_folds=2",
        "split.hold_out_fraction=0",
        f"out={tmp_path}/out",
    ]
    planned_ = planned(stage("prepare_data", *given, "--plan").out)
    assert planned_["to do"] == "4 images with annotations, 4 to measure" and "note" not in planned_
    done = stage("prepare_data", *given)
    assert done.status == 0 and re.search(r"^plan -> run: .*disk \d+ k?B -> \d+ k?B$", done.out, re.MULTILINE)
    held = storage.read_json(f"{tmp_path}/out/manifest.json")["forecast"]
    assert held["planned_work"] == planned_["to do"] and not held["goes_on"]
    assert held["seconds"]["forecast"] > 0 and held["seconds"]["actual"] > 0
    assert held["gpu_hours"] == {"forecast": 0.0, "actual": 0.0}
    assert held["missing"] == {}
    for name in ("memory_bytes", "disk_bytes"):
        assert held[name]["actual"] / 1.5 < held[name]["forecast"] < held[name]["actual"] * 1.5
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.name != "report.html")
    assert 0 < held["disk_bytes"]["actual"] <= written
    assert "plan -&gt; run" in (tmp_path / "out" / "report.html").read_text() and not list(
        planning.cache_folder().iterdir()
    )
    again = planned(stage("prepare_data", *given, "--plan").out)
    assert again == {"to do": "nothing: it is up to date (4 images)"}
    assert not list(planning.cache_folder().iterdir())  # else it would be held against what is run after a change


def test_what_follows_a_training_is_planned(
    plan: Plan,
    stage: Stage,
    tmp_path: Path,
    phantom_folder: Path,
    cohort_uri: str,
    cohort_rows: list[CohortRow],
    ensemble: str,
) -> None:
    oof = make_oof_run(tmp_path / "folds", cohort_rows, cohort_uri)
    search = {"space": {"min_target_px": {"low": 0, "high": 40}}, "search": {"num_settings": 9}}
    assert plan("tune_postprocess", f"run={oof}", **search)["to do"] == "3 studies of 9 settings on 8 maps of 2 folds"
    said = plan("score_images", f"data.images={phantom_folder}/images", f"ensemble.uri={ensemble}", "--price", "2")
    assert said["to do"] == "8 images to predict with 2 model(s), 0 are done"
    assert said["time"].endswith("from 4 images tried here") and "an hour of this cluster" in said["cost"]
    scored = write_run(tmp_path / "scored", {row.id: load_mask(row) for row in cohort_rows})
    said = plan("evaluate", f"run={scored}", f"truth.cohort={cohort_uri}")
    assert said["to do"] == "8 images of the truth, 8 of them in the run, 0 missing"
    assert plan("export", f"run={scored}")["to do"] == "8 masks as geojson, labelme"
    export = ("export", f"run={scored}", f"out={tmp_path}/exported")
    assert stage(*export).status == 0
    assert planned(stage(*export, "--plan").out) == {"to do": "nothing: it is up to date"}
    for change, todo in (("--force", "geojson, labelme"), ("formats=asap", "asap")):
        said = planned(stage(*export, change, "--plan").out)
        assert said["to do"] == f"8 masks as {todo}" and re.search(r", in place of .* that lie there; ", said["disk"])


@pytest.mark.usefixtures("ray_nodes")  # what looks for nodes would start a Ray for each run
def test_scoring_writes_about_what_was_planned(
    stage: Stage, tmp_path: Path, phantom_folder: Path, ensemble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.score_images_here(monkeypatch)
    here.score_slides_here(monkeypatch)
    make_slide(PhantomSlideConfig(width_px=1500, height_px=1100, num_slides=1), 0, tmp_path / "made")
    images = ("score_images", f"data.images={phantom_folder}/images/*[0-3].jpg", f"out={tmp_path}/images")
    slides = ("score_slides", f"slides={tmp_path}/made/slides", "model_mpp=1", f"out={tmp_path}/slides")
    tiles = ("tile.px=256", "tile.halo_px=32")
    models = (f"ensemble.uri={ensemble}", "inference.flips=[identity]", "accept_warnings=true")
    for name, *arguments in (images, (*images, "postprocess.min_target_px=7"), (*slides, *tiles)):
        said = planned(stage(name, *arguments, *models, "--plan").out)
        done = stage(name, *arguments, *models)
        assert done.status == 0, done.err
        out = next(one for one in arguments if one.startswith("out=")).removeprefix("out=")
        held = storage.read_json(f"{out}/manifest.json")["forecast"]
        assert held["missing"] == {} and held["seconds"]["forecast"] > 0
        for figure, within in (("memory_bytes", 1.5), ("disk_bytes", 1.25 if name == "score_slides" else 1.1)):
            assert held[figure]["actual"] / within < held[figure]["forecast"] < held[figure]["actual"] * within
        if "postprocess.min_target_px=7" in arguments:
            assert said["time"].endswith("from 4 saved maps tried here") and "in place of" in said["disk"]
    again = planned(stage(*slides, *tiles, *models, "postprocess.min_target_um2=9", "--plan").out)
    assert "1 slides, 1 to score" in again["to do"] and "in place of" in again["disk"]


@pytest.mark.usefixtures("ray_nodes")
def test_what_is_recorded_in_packed_parts_is_planned(
    stage: Stage, tmp_path: Path, phantom_folder: Path, ensemble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.score_images_here(monkeypatch)
    images = ("score_images", f"data.images={phantom_folder}/images/*[0-1].jpg", f"out={tmp_path}/out")
    given = (*images, f"ensemble.uri={ensemble}", "inference.flips=[identity]", "accept_warnings=true")
    assert stage(*given).status == 0
    record_parts.compact(ScoredRun(f"{tmp_path}/out"), verify=lambda: None)
    for change, tried in (("postprocess.min_target_px=7", "saved maps"), ("inference.flips=[lr]", "images")):
        done = stage(*given, change, "--plan")
        assert done.status == 0, done.err
        assert planned(done.out)["time"].endswith(f"from 2 {tried} tried here")


def test_files_that_are_overwritten_need_no_room_of_their_own(tmp_path: Path) -> None:
    free = forecasts.free_bytes(str(tmp_path))
    assert free is not None
    again = replace(PLAN, out=str(tmp_path), disk_bytes=free * 2.0, replaced_bytes=free * 2.0)
    said = planned("\n".join(again.lines()))
    assert "note" not in said and f", in place of {size(free * 2.0)} that lie there; " in said["disk"]


def test_files_that_are_not_all_counted_make_no_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{tmp_path}/out/report.md", bytes(1000))
    storage.write_json(f"{tmp_path}/out/claim.json", {"stage": "a", "ids": []})
    outputs = Outputs("a", ("report.md",))
    looked = list[str]()

    def listing(root: str) -> Iterator[str]:
        for number in range(1000):
            looked.append(f"{root}/{number}")
            yield looked[-1]

    def refused(root: str) -> Iterator[str]:
        yield f"{root}/report.md"
        raise PermissionError(13, "Permission denied", f"{root}/theirs")

    def said() -> dict[str, str]:
        base = forecasts.begin(f"{tmp_path}/out", outputs, force=True)
        short = replace(base, layout="1 node", work="10 images", disk_bytes=1e18)
        return planned("\n".join(short.lines()))

    assert "has no room" in said()["note"] and "in place of 1 kB that" in said()["disk"]
    with monkeypatch.context() as patch:
        patch.setattr(local_files, "find_all", refused)
        assert "at least 1 kB that lie there (not all files can be counted: [Errno 13]" in said()["disk"]
        assert "note" not in said()
        assert forecasts.bytes_in([f"{tmp_path}/out"]).num_bytes == 1000
    with monkeypatch.context() as patch:
        patch.setattr(local_files, "find_all", listing)
        patch.setattr(out_folder, "COUNTED_WITHIN_S", 0.0)
        patch.setattr(forecasts, "COUNTED_WITHIN_S", 0.0)
        assert "not all files could be counted within 0 s" in said()["disk"] and "note" not in said()
        assert forecasts.bytes_in([f"{tmp_path}"]).missing and forecasts.bytes_there([f"{tmp_path}/a"]).missing
        assert set(looked) == {f"{tmp_path}/out/0", f"{tmp_path}/0"}  # the clock stops the listing, too


def test_slides_are_planned_by_their_tissue(plan: Plan, tmp_path: Path, ensemble: str) -> None:
    phantom = PhantomSlideConfig(width_px=1500, height_px=1100, num_slides=1)
    make_slide(phantom, 0, tmp_path)
    slides = {"slides": f"{tmp_path}/slides", "model_mpp": 1.0, "tile": {"px": 256, "halo_px": 32}}
    said = plan("score_slides", f"ensemble.uri={ensemble}", **slides)
    assert re.match(r"1 slides, 1 to score with 2 model\(s\) of 1 um/px, about \d+ tiles with tissue", said["to do"])
    assert "from 1 slides and 2 tiles tried here" in said["time"]
    made = plan("score_slides", f"ensemble.uri={ensemble}", phantom=phantom.model_dump(mode="json"))
    assert "to make and score" in made["to do"] and made["time"] == "not known, the slides are not made yet"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"encoder_weights": "/none/weights.safetensors"}}, "/none/weights.safetensors"),
        ({"model": {"encoder": "efficientnet_b33"}}, "efficientnet_b33"),
        ({"model": {"init_from": "/none/ensemble.json"}}, "model.init_from = /none/ensemble.json: "),
        ({"resources": {"workers_per_fold": 1000}}, "no group can ever run"),
    ],
)
def test_what_a_run_would_meet_after_hours_is_refused_now(
    stage: Stage, tmp_path: Path, cohort_uri: str, tiny_recipe: FoldRecipe, change: dict[str, Any], message: str
) -> None:
    values = configs.merge(tiny_recipe.model_dump(mode="json"), change)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    given = ["--config", f"{tmp_path}/c.yaml", f"data.cohort={cohort_uri}", f"out={tmp_path}/out"]
    done = stage("train_folds", *given, "--plan")
    assert done.status == 2 and message in done.err and not (tmp_path / "out").exists()


def test_images_that_are_gone_and_an_out_of_others_are_refused_now(
    stage: Stage, tmp_path: Path, phantom_folder: Path, tiny_recipe: FoldRecipe
) -> None:
    images = tmp_path / "fields"
    shutil.copytree(phantom_folder, images)
    (tmp_path / "cohort").mkdir()
    cohort_uri = made_cohort.prepare(images, tmp_path / "cohort")
    next(iter((images / "images").iterdir())).unlink()
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_recipe.model_dump(mode="json")))
    given = ["--config", f"{tmp_path}/c.yaml", f"data.cohort={cohort_uri}", "--plan"]
    gone = stage("train_folds", *given, f"out={tmp_path}/out")
    assert gone.status == 2 and "1 of the 16 images and masks of the cohort cannot be read" in gone.err
    theirs = stage("train_folds", *given, f"out={images}")
    assert theirs.status == 2 and "is not empty" in theirs.err
    file = stage("train_folds", *given, f"out={tmp_path}/c.yaml/out")
    assert file.status == 2 and "is no folder that may be written" in file.err
