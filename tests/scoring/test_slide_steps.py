"""What a slide meets on its way: drawn tissue and regions, files that change, disks that are full, object stores."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from stas_core import storage, tables
from stas_core.data.appearance import Ranges
from stas_core.errors import OccupiedOutputError, WriteError
from stas_core.slides.regions import RegionReader
from stas_core.slides.resolution import resolve_mpp
from stas_core.slides.source import open_slide
from stas_core.slides.tiling import Box
from stas_core.verdicts import VerdictConfig
from tests.conftest import BUCKET
from tests.ground.test_write_errors import files_of_at_most
from tests.scoring.slide_steps import damage, formula, found, predict, settings, survey, task_of
from tests.slides.made import stained, write_pyramid
from workflows import lease, score_slides
from workflows.scoring import slide_tasks
from workflows.scoring.slide_list import GivenConfig
from workflows.scoring.slide_plan import SlideItem, SlideTask
from workflows.scoring.slide_results import Judge, write_results
from workflows.scoring.slide_tasks import FinishedSlide
from workflows.scoring.slide_times import SlideTimes

SIZE = (700, 900)
NO_MEMBERS = {"save": {"members": False}}
JUDGE = Judge(VerdictConfig(), assumed_mpp=None, looks=None)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "slides" / "a.tif", stained(*SIZE), num_levels=2)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()


def rectangle(x0: int, y0: int, x1: int, y1: int) -> str:
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    return json.dumps({"type": "Polygon", "coordinates": [ring]})


def scored(task: SlideTask, item: SlideItem) -> FinishedSlide:
    """Score a slide to its end; return the row of its outcome."""
    assert survey(task, item)["reason"] is None
    assert {row["reason"] for row in predict(task, item)} == {None}
    return slide_tasks.finish(task, item)


@pytest.mark.parametrize("blend", [False, True])
def test_drawn_tissue_and_regions_restrict_what_is_scored(slide: Path, tmp_path: Path, blend: bool) -> None:
    tissue, roi = tmp_path / "tissue.geojson", tmp_path / "roi.geojson"
    tissue.write_text(rectangle(0, 0, 600, 700))
    roi.write_text(rectangle(100, 50, 720, 500))
    (item,) = found(slide, given=GivenConfig(tissue=str(tissue), roi=str(roi)))
    task = task_of(tmp_path / "out", tile={"blend": blend}, tissue={"margin_um": 0}, **NO_MEMBERS)
    assert scored(task, item)["reason"] is None
    with open_slide(slide) as opened:
        expected = formula(RegionReader(opened, resolve_mpp(opened.info), 0.5).read(Box(0, 0, *SIZE)))
    region = task.run.region("a", task.run.survey("a")[0])
    assert region is not None
    expected = np.where(region.covers(Box(0, 0, *SIZE)), expected, 0)
    expected[:, 768:] = 0  # tiles of 256 px that touch no tissue
    assert np.array_equal(tifffile.imread(task.run.file("maps", "a"), level=0), expected)
    record = task.run.record("a")
    assert record is not None and record.found is not None and record.found["tissue_source"] == "GeoJSON"
    assert record.found["tissue_mm2"] == pytest.approx(500 * 450 * 0.25e-6, rel=0.05)


@pytest.mark.parametrize("step", ["survey", "blocks", "finish", "outline"])
def test_a_slide_that_changes_on_its_way_is_not_scored(slide: Path, tmp_path: Path, step: str) -> None:
    tumour = tmp_path / "tumour.geojson"
    tumour.write_text(rectangle(0, 0, 300, 300))
    (item,) = found(slide, given=GivenConfig(tumour=str(tumour)))
    task = task_of(tmp_path / "out", **NO_MEMBERS)

    def change() -> None:
        if step == "outline":
            tumour.write_text(rectangle(0, 0, 310, 300))
        else:
            write_pyramid(slide, stained(*SIZE, 5), num_levels=2)

    if step == "survey":
        change()
        row = survey(task, item)
    else:
        assert survey(task, item)["reason"] is None
        if step == "blocks":
            change()
            row = predict(task, item)[0]
            assert not list(storage.local_path(task.blocks(item)).glob("*_*.tif"))
        else:
            predict(task, item)
            change()
            finished = slide_tasks.finish(task, item)
            record = task.run.record("a")
            assert record is not None and record.found is None
            row = {"reason": finished["reason"], "message": record.message}
            assert not list(Path(task.out, "maps").glob("*"))
    what = f"what is given with {slide}" if step == "outline" else str(slide)
    assert row["reason"] == "changed_input"
    assert row["message"] == f"{what} has changed since this run began; run again once nothing writes there"
    (again,) = found(slide, given=GivenConfig(tumour=str(tumour)))
    assert scored(task, again)["reason"] is None


def test_a_slide_whose_finishing_fails_is_told_and_the_others_are_scored(slide: Path, tmp_path: Path) -> None:
    write_pyramid(tmp_path / "slides" / "b.tif", stained(300, 300, 3), num_levels=2)
    items, task = found(tmp_path / "slides"), task_of(tmp_path / "out", **NO_MEMBERS)
    for item in items:
        assert survey(task, item)["reason"] is None
        predict(task, item)
    block = damage(task, items[0])
    assert [slide_tasks.finish(task, item)["reason"] for item in items] == ["unreadable_file", None]
    facts = write_results(task, items, [], own=frozenset({"a", "b"}), judge=JUDGE)
    assert (facts["num_slides"], facts["num_failures"]) == (1, 1)
    assert facts["verdict"]["level"] == "look at this"
    assert "**Verdict: look at this**" in (tmp_path / "out" / "report.md").read_text()
    (failed,) = tables.read_table(f"{task.out}/failures.parquet").to_pylist()
    assert failed["id"] == "a" and f"{block} is damaged" in failed["message"]
    assert "delete it, and its block is predicted again" in failed["message"]


def test_stains_unlike_those_of_the_training_are_told_with_their_figure(slide: Path, tmp_path: Path) -> None:
    (item,), task = found(slide), task_of(tmp_path / "out", **NO_MEMBERS)
    scored(task, item)

    def judged(looks: Ranges | None, **limits: float) -> tuple[dict[str, Any], Any]:
        judge = Judge(VerdictConfig(**limits), assumed_mpp=None, looks=looks)
        facts = write_results(task, [item], [], own=frozenset({"a"}), judge=judge)
        (row,) = tables.read_table(f"{task.out}/slides.parquet").to_pylist()
        return row, facts["verdict"]

    row, verdict = judged(None)
    assert row["eosin"] > 0 and row["drift"] is None and "stains against the training images" in str(verdict)
    usual = {name: (0.9 * row[name], 1.1 * row[name]) for name in ("hematoxylin", "eosin", "eosin_red")}
    row, verdict = judged(usual)
    assert row["drift"] < 0.01 and not [text for text in row["warnings"] if text.startswith("stain")]
    assert "slides_stain" not in str(verdict) and "stains against" not in str(verdict)
    row, verdict = judged(usual | {"eosin": (row["eosin"] * 0.4, row["eosin"] * 0.6)})
    assert row["drift"] == pytest.approx(5) and row["drift_of"] == "eosin" and "slides_stain" in str(verdict)
    (warning,) = [text for text in row["warnings"] if text.startswith("stain")]
    assert f"amount of eosin {row['eosin']:.3g}, in training" in warning and "(drift 5.0)" in warning
    row, _ = judged(usual | {"eosin": (row["eosin"] * 0.4, row["eosin"] * 0.6)}, max_drift=6)
    assert row["drift"] == pytest.approx(5) and not [text for text in row["warnings"] if text.startswith("stain")]


def test_the_blocks_that_are_missing_are_told_with_one_look(slide: Path, tmp_path: Path) -> None:
    tumour = tmp_path / "tumour.geojson"
    tumour.write_text(rectangle(0, 0, 300, 300))
    (item,) = found(slide, given=GivenConfig(tumour=str(tumour)))
    task = task_of(tmp_path / "out", **NO_MEMBERS)
    assert slide_tasks.open_slide(task, item) is None
    survey(task, item)
    opened = slide_tasks.open_slide(task, item)
    assert opened is not None and opened.reason is None
    assert list(opened.missing) == slide_tasks.blocks_of(task, item, slide_tasks.Layout.of(task, "a"))
    predict(task, item)
    opened = slide_tasks.open_slide(task, item)
    assert opened is not None and not opened.missing
    assert slide_tasks.open_slide(task, SlideItem(**{**item, "mpp": 0.4})) is None  # another survey's
    tumour.write_text("no outline")
    opened = slide_tasks.open_slide(task, item)
    assert opened is not None and opened.reason == "unreadable_annotation"
    record = task.run.record("a")
    assert record is not None and record.reason == opened.reason


def test_a_full_disk_ends_finishing_and_blames_no_slide(slide: Path, tmp_path: Path) -> None:
    (item,), task = found(slide), task_of(tmp_path / "out", **NO_MEMBERS)
    survey(task, item)
    predict(task, item)
    with files_of_at_most(20_000), pytest.raises(WriteError, match=r"cannot write .*: File too large \(EFBIG\)"):
        slide_tasks.finish(task, item)
    assert task.run.record("a") is None
    assert slide_tasks.finish(task, item)["reason"] is None


def test_a_slide_of_an_object_store_is_scored_like_a_file(slide: Path, tmp_path: Path, s3: Any) -> None:
    (item,), task = found(slide), task_of(tmp_path / "local", **NO_MEMBERS)
    assert scored(task, item)["reason"] is None
    s3.put(str(slide), f"{BUCKET}/slides/a.tif")
    s3.pipe(f"{BUCKET}/slides/cut.tif", slide.read_bytes()[:5000])
    there, cut = found(f"{BUCKET}/slides")
    other = task_of(tmp_path / "remote", cache={"folder": str(tmp_path / "cache")}, **NO_MEMBERS)
    assert scored(other, there)["reason"] is None
    for kind in ("maps", "masks", "geojson", "targets"):
        one, two = (storage.read_bytes(each.run.file(kind, "a")) for each in (task, other))
        assert one == two
    (copy,) = [path for path in (tmp_path / "cache").rglob("*.tif")]
    assert copy.read_bytes() == slide.read_bytes()
    failed = survey(other, cut)
    assert failed["reason"] == "unreadable_slide" and f"{BUCKET}/slides/cut.tif" in failed["message"]
    assert str(tmp_path) not in failed["message"]


def test_where_the_time_went_is_told_of_each_slide_and_of_the_run(slide: Path, tmp_path: Path) -> None:
    times = SlideTimes()
    assert times.lines() == [] and times.facts()["actors_busy"] is None
    times.add("a", survey_s=1.0)
    for _ in range(3):
        times.add("a", decode_s=0.5, idle_s=3.0, predict_s=4.0, keep_s=None)
        times.add_gpu(2.0, 1.5)
    times.add("b", idle_s=11.0, predict_s=8.0)
    times.add_window(first_s=3.0, inference_s=15.0, after_s=2.0)
    times.add_window(first_s=1.0, inference_s=5.0, after_s=0.0)
    assert times.of("a") == {"survey_s": 1.0, "decode_s": 1.5, "idle_s": 9.0, "predict_s": 12.0, "keep_s": 0.0}
    facts = times.facts()
    assert (facts["actors_busy"], facts["gpu_busy"], facts["inference_s"]) == (0.5, 0.75, 20.0)
    assert times.lines() == [
        "survey 1.0 s, decode 1.5 s, idle 20.0 s, predict 20.0 s, keep 0.0 s (summed over workers)",
        "inference 0:20, its first block after 0:04: actors busy 50%, GPU busy 75%; finishing went on for 0:02 after "
        "it",
    ]
    (item,), task = found(slide), task_of(tmp_path / "out", **NO_MEMBERS)
    survey(task, item)
    predict(task, item)
    slide_tasks.finish(task, item, times.of("a") | {"begun_unix_s": time.time() - 7})
    write_results(task, [item], [], own=frozenset({"a"}), judge=JUDGE)
    (row,) = tables.read_table(f"{task.out}/timings.parquet").to_pylist()
    assert row["predict_s"] == 12.0 and row["wait_s"] > 6 and row["postprocess_s"] > 0 and "begun_unix_s" not in row


def test_of_two_runs_in_one_folder_the_second_is_refused(slide: Path, tmp_path: Path, ensemble: str) -> None:
    out = str(tmp_path / "out")
    with (
        lease.hold(out, "score_slides"),
        pytest.raises(OccupiedOutputError, match=r"out is in use by another run \(score_slides, process"),
    ):
        score_slides.run(settings(slide, ensemble, out), False)
