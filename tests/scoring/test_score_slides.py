"""Whole slides from end to end: through Ray and in plain Python, bad ones beside good ones, killed and gone on."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
import torch
from PIL import Image

from stas_core import config, storage, tables
from stas_core.errors import ConfigError
from stas_core.predict import ensemble as ensembles
from stas_core.predict.inference import InferenceConfig
from stas_core.predict.postprocess import run_cascade
from stas_core.predict.predictor import Predictor
from stas_core.slides.blocks import TileConfig
from stas_core.slides.layers import small_size
from stas_core.slides.regions import RegionReader
from stas_core.slides.run import SMALL_MAPS, SMALL_MASKS, SMALL_STDS, THUMBNAILS, SlideRecord, SlideRun
from stas_core.slides.source import open_slide
from stas_core.slides.survey import survey_slide, tiles_to_predict
from stas_core.slides.tissue import TissueConfig
from tests.conftest import ROOT
from tests.docs.documented import assert_documented
from tests.scoring.here import score_slides_here
from tests.scoring.slide_steps import ITEM, TILE, found, settings, task_of
from tests.slides.made import stained, write_pyramid
from workflows import score_slides
from workflows.scoring import slide_plan, slide_tasks
from workflows.scoring.slide_list import GivenConfig, ListedSlide
from workflows.scoring.slide_plan import BlockItem, SlideItem

GOOD = {"a": (700, 520), "b": (300, 300), "c": (530, 1100)}
"""Height and width of the slides that can be scored."""
BAD = {
    "blank": "no_tissue",
    "cut": "unreadable_slide",
    "huge": "absurd_mpp",
    "lone": "incomplete_slide",
    "mute": "missing_mpp",
}


QUICK = {"resources": {"actors": 1}, "tile": {"measure": False}}
"""One process that loads torch, where the run that others go by has as many as fit, and one that measures seams."""


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three slides that can be scored, and one of each kind that cannot."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, (name, size) in enumerate(GOOD.items()):
        write_pyramid(folder / f"{name}.tif", stained(*size, seed), mpp=0.5, num_levels=2)
    write_pyramid(folder / "blank.tif", np.full((400, 400, 3), 243, np.uint8))
    write_pyramid(folder / "huge.tif", stained(300, 300), mpp=352.8)
    write_pyramid(folder / "mute.tif", stained(300, 300), mpp=None)
    whole = write_pyramid(folder / "cut.tif", stained(600, 600)).read_bytes()
    (folder / "cut.tif").write_bytes(whole[: len(whole) // 3])
    (folder / "lone.mrxs").write_bytes(b"a MIRAX slide is nothing without its folder")
    return folder


@pytest.fixture(scope="module")
def scored(ray_nodes: list[Any], slides: Path, ensemble: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the outputs of these slides, scored undisturbed."""
    out = tmp_path_factory.mktemp("scores") / "a"
    assert score_slides.run(settings(slides, ensemble, out), False) == 0
    return out


def result(out: Path) -> dict[str, bytes]:
    """Return every file that must not depend on how the run went."""
    apart = {"manifest.json", "claim.json", "config.resolved.yaml", "timings.parquet", "lease.json", "report.html"}
    files = [path for path in out.rglob("*") if path.is_file() and path.parent.name != "records"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.name not in apart}


def plain_map(path: Path, ensemble: str) -> np.ndarray:
    """Predict a slide tile by tile, without Ray and without blocks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    members = ensembles.load_members(ensembles.find_checkpoints(ensemble), cpu)
    predictor = Predictor(members, device=cpu, config=InferenceConfig(flips=("identity", "lr")))
    with open_slide(path) as slide:
        survey, shades = survey_slide(slide, mpp=None, frame_mpp=0.5, config=TissueConfig())
        reader = RegionReader(slide, survey.slide_mpp(), 0.5)
        grid = config.build(TileConfig, TILE).grid(reader.height, reader.width)
        prob = np.zeros((reader.height, reader.width), np.uint8)
        for tile in tiles_to_predict(grid, survey.tissue(shades), 0.5):
            prob[tile.core.slices] = predictor.predict_u8(reader.read(tile.read))[tile.inside.slices]
    torch.set_num_threads(threads)
    return prob


def test_slides_through_ray_equal_plain_python(scored: Path, slides: Path, ensemble: str) -> None:
    rows = {row["id"]: row for row in tables.read_table(str(scored / "slides.parquet")).to_pylist()}
    assert list(rows) == list(GOOD)
    for name, size in GOOD.items():
        prob = plain_map(slides / f"{name}.tif", ensemble)
        assert prob.shape == size
        cascade = run_cascade(prob, settings("x", ensemble, "y").postprocess.in_pixels(0.5))
        assert np.array_equal(tifffile.imread(scored / "maps" / f"{name}.tif", level=0), prob)
        assert np.array_equal(tifffile.imread(scored / "masks" / f"{name}.tif", level=0), cascade.mask * np.uint8(255))
        assert rows[name]["stas_mm2"] == pytest.approx(cascade.mask.sum() * 0.25e-6)
        assert rows[name]["mpp_source"] == "metadata" and rows[name]["num_members"] == 2
        low, high = rows[name]["num_targets_min"], rows[name]["num_targets_max"]
        assert low is not None and high is not None and low <= high
    assert sum(row["num_targets"] for row in rows.values()) > 0


def covered(geometries: Iterable[Any], size: tuple[int, int]) -> np.ndarray:
    """Return which pixels have their centre in one of some polygons."""
    mask = np.zeros(size, bool)
    for geometry in geometries:
        x0, y0, x1, y1 = (int(value) for value in geometry.bounds)
        xs, ys = np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5)
        mask[y0:y1, x0:x1] |= shapely.contains_xy(geometry, xs, ys)
    return mask


def test_targets_are_valid_and_draw_the_mask_again(scored: Path) -> None:
    assert_documented("score_slides", scored)
    for name, size in GOOD.items():
        mask = tifffile.imread(scored / "masks" / f"{name}.tif", level=0) > 0
        written = json.loads((scored / "geojson" / f"{name}.geojson").read_text())
        shapes = [shapely.from_geojson(json.dumps(one["geometry"])) for one in written["features"]]
        table = pq.read_table(scored / "targets" / f"{name}.parquet")
        (row,) = [row for row in tables.read_table(str(scored / "slides.parquet")).to_pylist() if row["id"] == name]
        assert len(shapes) == table.num_rows == row["num_targets"]
        assert shapely.is_valid(shapes).all() and len({one["id"] for one in written["features"]}) == len(shapes)
        assert np.array_equal(covered(shapes, size), mask)
        assert np.array_equal(covered(shapely.from_wkb(table["geometry"].to_numpy()), size), mask)
        assert np.sum(table["area_um2"].to_numpy()) == pytest.approx(row["stas_mm2"] * 1e6)


def test_pages_are_drawn_of_every_slide(scored: Path) -> None:
    for name in GOOD:
        for folder in ("overviews", "galleries"):
            assert min(Image.open(scored / folder / f"{name}.png").size) > 300
    report = (scored / "report.md").read_text()
    assert all(f"| {name} |" in report for name in GOOD) and all(name in report for name in BAD)
    assert "halo 32 px" in report and "`targets_per_mm2`" in report


def test_layers_for_a_page_are_what_was_found_at_one_size(scored: Path) -> None:
    run = SlideRun(str(scored))
    for name, size in GOOD.items():
        files = {kind: Path(run.file(kind, name)) for kind in (THUMBNAILS, SMALL_MASKS, SMALL_MAPS, SMALL_STDS)}
        assert {Image.open(file).size for file in files.values()} == {small_size(size)[::-1]}
        mask, prob = (tifffile.imread(scored / folder / f"{name}.tif", level=0) for folder in ("masks", "maps"))
        assert np.array_equal(np.array(Image.open(files[SMALL_MASKS])), mask > 0)  # so small that nothing is shrunk
        assert np.array_equal(np.array(Image.open(files[SMALL_MAPS])), prob)
        assert np.array(Image.open(files[SMALL_STDS])).any()


def test_bad_slides_are_reported_and_the_others_scored(scored: Path) -> None:
    failed = {row["id"]: row for row in tables.read_table(str(scored / "failures.parquet")).to_pylist()}
    assert {name: row["reason"] for name, row in failed.items()} == BAD
    for row in failed.values():
        assert row["id"] in row["message"] and "\n" not in row["message"]
    manifest = json.loads((scored / "manifest.json").read_text())
    assert manifest["report"] == ["report.html"]
    assert manifest["num_slides"] == len(GOOD) and manifest["num_failures"] == len(BAD)
    assert 0 < manifest["times"]["actors_busy"] <= 1 and manifest["times"]["gpu_busy"] is None
    timings = tables.read_table(str(scored / "timings.parquet")).to_pylist()
    steps = ("survey_s", "decode_s", "idle_s", "predict_s", "keep_s", "wait_s", "postprocess_s", "pages_s")
    assert [row["id"] for row in timings] == list(GOOD)
    assert all(row[step] > 0 for row in timings for step in steps)


def test_a_finished_run_is_not_done_again_and_thresholds_take_no_inference(
    scored: Path,
    slides: Path,
    ensemble: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    score_slides_here(monkeypatch)
    assert score_slides.run(settings(slides, ensemble, scored), False) == 0
    assert "nothing to do" in capfd.readouterr().out
    out = tmp_path / "out"
    shutil.copytree(scored, out)
    run = settings(slides / "c.tif", ensemble, out)
    assert score_slides.run(run, False) == 0  # of the one: the files of the others are tidied away
    before = result(out)
    times = {path: path.stat().st_mtime_ns for path in (out / "blocks").rglob("*.tif")}
    other = settings(slides / "c.tif", ensemble, out, postprocess={"min_target_um2": 50})
    assert times and score_slides.run(other, False) == 0
    assert "blocks" not in capfd.readouterr().out.replace("/blocks", "")
    assert {path: path.stat().st_mtime_ns for path in (out / "blocks").rglob("*.tif")} == times
    assert result(out) != before
    assert score_slides.run(run, False) == 0
    assert result(out) == before


@pytest.mark.long
def test_a_killed_driver_and_its_actors_leave_no_trace(
    scored: Path,
    slides: Path,
    ensemble: str,
    tmp_path: Path,
    driver_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same command goes on; here it does without further processes."""
    out = tmp_path / "out"
    path = tmp_path / "score.yaml"
    path.write_text(config.dump(settings(slides, ensemble, out, **QUICK)))
    line = [sys.executable, str(ROOT / "workflows" / "score_slides.py"), "--config", str(path)]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(line, env=driver_env, start_new_session=True, stdout=log, stderr=log)
        end = time.monotonic() + 240
        while driver.poll() is None and len(list((out / "blocks").rglob("*_*.tif"))) < 3:
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.02)
        assert driver.poll() is None, (tmp_path / "log").read_text()
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    there = {path: path.stat().st_mtime_ns for path in (out / "blocks").rglob("*_*.tif")}
    assert not (out / "manifest.json").exists()
    shutil.copy(scored / "seams.json", out)
    score_slides_here(monkeypatch)
    assert score_slides.run(settings(slides, ensemble, out), False) == 0
    assert {path: path.stat().st_mtime_ns for path in there} == there, "blocks that were kept were predicted again"
    assert result(out) == result(scored) and not list(out.rglob("*.tmp"))


def test_the_resolution_that_is_given_goes_before_the_files(tmp_path: Path) -> None:
    for name in ("a.svs", "b.svs", "c.svs"):
        (tmp_path / name).write_bytes(b"x")
    table = tmp_path / "mpp.csv"
    table.write_text("image_id;mpp\na.svs;0,25\nb;0.5\n")
    items = found(tmp_path / "*.svs", mpp=0.4, mpp_csv=str(table))
    assert {item["id"]: item["mpp"] for item in items} == {"a": 0.25, "b": 0.5, "c": 0.4}
    table.write_text("image_id,mpp\na,25\n")
    with pytest.raises(ConfigError, match=r"row 2 \(a\), column mpp: '25', expected um per pixel"):
        found(tmp_path / "*.svs", mpp_csv=str(table))
    table.write_text("image_id,mpp\nz,0.25\n")
    with pytest.raises(ConfigError, match="none of its rows names a slide, such as a"):
        found(tmp_path / "*.svs", mpp_csv=str(table))


def test_what_is_given_with_a_slide_marks_its_version(tmp_path: Path) -> None:
    for name in ("a.svs", "b.svs"):
        (tmp_path / name).write_bytes(b"x")
    outlines = tmp_path / "outlines"
    outlines.mkdir()
    (empty := tmp_path / "empty").mkdir()
    (outlines / "a.geojson").write_text("{}")
    before = found(tmp_path / "*.svs")
    given = found(tmp_path / "*.svs", given=GivenConfig(tumour=str(outlines)))
    assert [item["tumour_uri"] is not None for item in given] == [True, False]
    assert given[0]["tumour_stamp"] and not given[1]["tumour_stamp"]
    assert [item["stamp"] for item in given] == [item["stamp"] for item in before]  # it changes no map
    roi = found(tmp_path / "*.svs", given=GivenConfig(roi=str(outlines)))
    assert roi[0]["stamp"] != before[0]["stamp"] and roi[1]["stamp"] == before[1]["stamp"]
    with pytest.raises(ConfigError, match=r"one file for 2 slides; give a folder"):
        found(tmp_path / "*.svs", given=GivenConfig(roi=str(outlines / "a.geojson")))
    with pytest.raises(ConfigError, match=r"has no file for any slide; name them like a\.geojson"):
        found(tmp_path / "*.svs", given=GivenConfig(tumour=str(empty)))


def test_a_list_of_slides_names_ids_and_resolutions(tmp_path: Path) -> None:
    (tmp_path / "x.svs").write_bytes(b"x")
    uri = str(tmp_path / "slides.parquet")
    tables.write_rows(uri, ListedSlide, [ListedSlide("x.svs", "case 1", 0.25)])
    (item,) = found(Path(uri))
    assert (item["id"], item["mpp"]) == ("case 1", 0.25) and item["slide_uri"].endswith("/x.svs")


def test_real_slides_are_scored_or_refused_with_a_reason(
    shared: Path, ensemble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_slides_here(monkeypatch)
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "os_py").symlink_to(shared / "data" / "slides" / "more" / "os_py")
    out = tmp_path / "out"
    assert score_slides.run(settings(folder, ensemble, out, **QUICK), False) == 0
    failed = {row["id"]: row["reason"] for row in tables.read_table(str(out / "failures.parquet")).to_pylist()}
    assert failed["boxes"] == "absurd_mpp" and failed["unopenable"] == failed["unreadable"] == "unreadable_slide"


@pytest.mark.parametrize(
    ("item", "values", "predicts_anew", "finishes_anew"),
    [
        ({"stamp": "2"}, {}, True, True),
        ({"mpp": 0.25}, {}, True, True),
        ({}, {"tile": {"halo_px": 64}}, True, True),
        ({}, {"tile": {"blend": True}}, True, True),
        ({}, {"tissue": {"margin_um": 9}}, True, True),
        ({}, {"inference": {"flips": ["identity"]}}, True, True),
        ({}, {"save": {"members": False}}, True, True),
        ({"tumour_uri": "/t.geojson", "tumour_stamp": "3"}, {}, False, True),
        ({}, {"postprocess": {"min_target_um2": 50}}, False, True),
        ({}, {"tile": {"measure": False}, "resources": {"actors": 2}, "limits": {"timeout_s": 9}}, False, False),
        ({}, {"save": {"blocks": False, "maps": False}}, False, False),
    ],
)
def test_what_the_files_of_a_slide_depend_on(
    tmp_path: Path, item: Any, values: dict[str, Any], predicts_anew: bool, finishes_anew: bool
) -> None:
    before, after, other = task_of(tmp_path), task_of(tmp_path, **values), SlideItem(**{**ITEM, **item})
    assert (before.predict_key(ITEM) != after.predict_key(other)) == predicts_anew
    assert (before.finish_key(ITEM) != after.finish_key(other)) == finishes_anew


def test_a_record_vouches_for_files_that_are_there(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    kinds = task.save.kinds()
    keys = {"predict_key": task.predict_key(ITEM), "finish_key": task.finish_key(ITEM), "limits_key": task.limits.key}
    record = SlideRecord(
        id="a",
        slide_uri="/a.svs",
        stamp="1",
        found={"num_targets": 0, "num_members": 0},
        files=kinds,
        seconds={},
        **keys,
    )
    there = {kind: {"a"} for kind in kinds} | {"galleries": set[str](), SMALL_STDS: set[str]()}
    assert not slide_plan.must_score(task, ITEM, record, there)
    assert slide_plan.must_score(task, ITEM, record, there | {"maps": set()})
    assert slide_plan.must_score(task, ITEM, replace(record, found={"num_targets": 3, "num_members": 0}), there)
    assert slide_plan.must_score(task, ITEM, replace(record, found={"num_targets": 0, "num_members": 2}), there)
    assert slide_plan.must_score(task, ITEM, replace(record, files=["maps"]), there)
    failed = replace(record, found=None, reason="no_tissue")
    assert not slide_plan.must_score(task, ITEM, failed, there)
    assert slide_plan.must_score(task, ITEM, replace(failed, reason="slow"), there)


def test_of_several_bad_blocks_the_first_is_reported_whatever_their_order(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    places = [(0, 1), (1, 0), (2, 2)]
    found = set()
    for order in itertools.permutations(places):
        key = storage.fingerprint(str(order))
        rows = []
        for row, col in order:
            block = BlockItem(
                id=f"a {row} {col}",
                slide="a",
                slide_uri="/a.svs",
                slide_stamp="1",
                predict_key=key,
                row=row,
                col=col,
            )
            before = slide_tasks.failed_before(task, block)
            outcome = before or {"reason": "unreadable_slide", "message": f"block {row}, {col}"}
            failed = {**block, **outcome}
            rows += slide_tasks.keep(task, pa.Table.from_pylist([failed], schema=slide_tasks.PREDICTED)).to_pylist()
        found.add(min((row["row"], row["col"], row["message"]) for row in rows))
    assert found == {(0, 1, "block 0, 1")}


def test_slides_beside_a_phantom_are_refused(tmp_path: Path, ensemble: str) -> None:
    given = settings(tmp_path, ensemble, tmp_path / "out", phantom={"num_slides": 1})
    with pytest.raises(ConfigError, match=r"beside phantom.*leave one out"):
        score_slides.run(given, False)


def test_slides_go_in_windows_that_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    local = [SlideItem(**{**ITEM, "id": str(number)}) for number in range(600)]
    assert [len(window) for window in slide_plan.windows(local, 10)] == [256, 256, 88]
    remote = [SlideItem(**{**ITEM, "id": str(number), "slide_uri": f"s3://b/{number}"}) for number in range(5)]
    monkeypatch.setattr(storage, "size", lambda uri: 30 if uri.endswith("2") else 10)
    found = [[item["id"] for item in window] for window in slide_plan.windows(remote, 50)]
    assert found == [["0", "1"], ["2"], ["3", "4"]]
    assert not list(slide_plan.windows([], 50))
