"""`--plan` of a pipeline: what its stages are planned on, and what they cost and need together."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from stas_core import config as configs
from stas_core import storage
from stas_core.data.cohort import CohortRow
from stas_core.train.recipe import FoldRecipe
from tests import made_cohort
from tests.workflows.test_plan import PLAN, Stage, planned
from workflows import forecast as forecasts
from workflows import pipeline, prepare_data, score_slides
from workflows.cluster import Node, plan_groups
from workflows.folds import estimate as folds
from workflows.folds import training
from workflows.folds.fitting import ResourcesConfig
from workflows.forecast import Forecast
from workflows.planned import Price


def test_a_pipeline_is_planned_before_there_is_a_cohort(
    stage: Stage, tmp_path: Path, phantom_folder: Path, tiny_recipe: FoldRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = list[str]()  # its CSVs may be large

    def open_once(config: prepare_data.PrepareConfig) -> prepare_data.Opened:
        opened.append(str(config.out))
        return open_cohort(config)

    open_cohort = prepare_data.open_cohort
    monkeypatch.setattr(prepare_data, "open_cohort", open_once)
    values = {
        "prepare": {
            "data": {"images": f"{phantom_folder}/images", "annotations": f"{phantom_folder}/annotations"},
            "split": {"num_folds": 3, "hold_out_fraction": 0.25},
        },
        "train": tiny_recipe.model_dump(mode="json"),
    }
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(values))
    done = stage("pipeline", "--config", f"{tmp_path}/all.yaml", f"out={tmp_path}/out", "--plan")
    assert done.status == 0 and not (tmp_path / "out").exists(), done.err
    assert "plan of train_folds" in done.out and "3 fold(s) of 3 epochs on 6 images, 2 held out" in done.out
    for stage_, maker in (("score_images", "train_folds"), ("evaluate", "score_images")):
        known = f"  to do     known when {maker} has run: plan again then"
        assert f"plan of {stage_}; nothing was started or written to out\n{known}\n" in done.out
    assert opened == [f"{tmp_path}/out/cohort"]
    said = planned(done.out.partition("plan of pipeline; ")[2])
    assert said["time"].endswith(", without score_images, evaluate") and said["disk"].startswith("about ")


def test_a_pipeline_adds_up_its_stages_and_names_those_without_a_time() -> None:
    on_gpus = replace(PLAN, stage="train_folds", num_gpus=4.0, memory_bytes=2e9, disk_bytes=5e6)
    on_cpus = replace(PLAN, seconds=3600.0, memory_bytes=1e9, disk_bytes=1e6)
    unknown = replace(PLAN, stage="score_slides", seconds=None, basis="the slides are not made yet")
    later = replace(PLAN, stage="evaluate", layout="", seconds=None)
    stages = [on_gpus, on_cpus, unknown, later]
    total = pipeline.together("s3://bucket/out", stages).foreseen()
    assert (total.stage, total.seconds, total.gpu_hours) == ("pipeline", 10800, 8)
    assert (total.memory_bytes, total.disk_bytes) == (2e9, 6e6) and total.basis == "without score_slides, evaluate"
    nothing = pipeline.together("s3://bucket/out", [unknown, later])
    assert nothing.seconds is None and nothing.disk_bytes is None and nothing.basis == total.basis


@pytest.mark.parametrize("num_gpus", [0.0, 4.0])
def test_a_pipeline_costs_what_its_stages_cost(num_gpus: float) -> None:
    """Of the price of a GPU-hour, stages on CPUs cost nothing; without any GPU it is that of the cluster."""
    stages = [replace(PLAN, num_gpus=num_gpus), replace(PLAN, seconds=3600.0), replace(PLAN, seconds=None)]
    total = pipeline.together("s3://bucket/out", stages)
    price = forecasts.price_of(2.5, [*stages, total])
    costs = [planned("\n".join(one.lines(price))).get("cost", "0") for one in (*stages, total)]
    *each, together = (float(re.match(r"[\d.]+", cost)[0]) for cost in costs)  # type: ignore[index]
    assert sum(each) == together == (2.5 * 2 * 4 if num_gpus else 2.5 * 3)
    assert not num_gpus or costs[1] == "0: it takes no GPU, and 2.5 is the price of a GPU-hour"


def plan_anew(
    tmp_path: Path, phantom_folder: Path, recipe: FoldRecipe, patch: pytest.MonkeyPatch, *, force: bool = False
) -> dict[str, Forecast]:
    """Return the plan, by stage, of a pipeline whose out has a cohort without hold-out, and what came of it."""
    shutil.copytree(phantom_folder, tmp_path / "fields")
    out = tmp_path / "out"
    (out / "cohort").mkdir(parents=True)
    made_cohort.prepare(tmp_path / "fields", out / "cohort")
    for name, stage in (("", "pipeline"), ("cohort/", "prepare_data"), ("folds/", "train_folds")):
        storage.write_json(f"{out}/{name}claim.json", {"stage": stage, "ids": []})
    storage.write_json(f"{out}/folds/ensemble.json", {})
    patch.setattr(folds, "try_training", lambda *_: None)
    for module in (pipeline, prepare_data):
        patch.setattr(module, "nodes_at_hand", lambda: [Node(8, 1)])
    values = {
        "prepare": {
            "data": {name: f"{tmp_path}/fields/{name}" for name in ("images", "annotations")},
            "split": {"num_folds": 3, "hold_out_fraction": 0.25},
        },
        "train": recipe.model_dump(mode="json"),
        "slides": {"slides": f"{tmp_path}/fields"},
        "out": str(out),
    }
    return {one.stage: one for one in pipeline.plan(configs.build(pipeline.PipelineConfig, values), force)}


@pytest.mark.parametrize("force", [False, True])
def test_a_cohort_that_the_run_replaces_is_not_planned_on(
    tmp_path: Path, phantom_folder: Path, tiny_recipe: FoldRecipe, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    found = plan_anew(tmp_path, phantom_folder, tiny_recipe, monkeypatch, force=force)
    assert found["train_folds"].work == "3 fold(s) of 3 epochs on 6 images, 2 held out"
    for stage, maker in (
        ("score_images", "train_folds"),
        ("evaluate", "score_images"),
        ("score_slides", "train_folds"),
    ):
        assert found[stage].work == f"known when {maker} has run: plan again then"  # not from the old ensemble
    assert any("begins with --force only" in note for note in found["train_folds"].notes) is not force


def test_what_could_be_planned_does_not_decide_what_the_price_is_of(
    tmp_path: Path, phantom_folder: Path, tiny_recipe: FoldRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_data, "expected_rows", lambda *_: [])  # none of the images tried can be used
    found = plan_anew(tmp_path, phantom_folder, tiny_recipe, monkeypatch)
    assert found["train_folds"].work.startswith("known when prepare_data has run")
    for stages, of_gpus in (
        (["prepare_data", "evaluate"], False),
        (["prepare_data", "train_folds"], True),
        (["score_images"], True),
        (["score_slides"], True),
    ):
        assert forecasts.price_of(2.5, [found[one] for one in stages]) == Price(2.5, of_gpus=of_gpus)


def test_a_price_is_of_gpus_where_their_work_is_done(tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]) -> None:
    laid = plan_groups([Node(4, 1)], training.demand(ResourcesConfig(), 2))
    done = folds.of_folds(replace(PLAN, num_gpus=0.0), tiny_recipe, cohort_rows, [], laid)
    assert done.is_nothing and not done.gpu_hours
    assert forecasts.price_of(1, [done, PLAN]) == Price(1, of_gpus=True)


def test_phantom_slides_have_the_price_of_those_that_are_there(
    tmp_path: Path, ensemble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_slides, "nodes_at_hand", lambda: [Node(8, 2)])
    values = {"phantom": {"num_slides": 1}, "ensemble": {"uri": ensemble}, "model_mpp": 1, "out": f"{tmp_path}/out"}
    (found,) = score_slides.plan(configs.build(score_slides.ScoreSlidesConfig, values), False)
    assert found.basis == "the slides are not made yet" and found.num_gpus == 2


def test_a_pipeline_lacks_the_room_that_it_lacks_at_its_worst_moment(tmp_path: Path) -> None:
    free = float(shutil.disk_usage(tmp_path).free)
    small = replace(PLAN, out=str(tmp_path), disk_bytes=1.0)
    large = replace(small, disk_bytes=1.5 * free)
    replaces = replace(small, replaced_bytes=free)

    def lacks(*stages: Forecast) -> float:
        return pipeline.together(str(tmp_path), stages).short_bytes / free

    assert lacks(replaces, large) == 0.0
    assert lacks(large, replaces) == pytest.approx(0.5, abs=0.1)  # its old files still lie there
    assert lacks(large, replace(replaces, disk_bytes=None)) == pytest.approx(0.5, abs=0.1)
    assert lacks(large, replace(large, replaced_bytes=free)) == pytest.approx(1.0, abs=0.1)
