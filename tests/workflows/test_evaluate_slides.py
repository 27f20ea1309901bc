"""Evaluation of a run of score_slides: equal to plain Python, what is missing is told, wrong settings are refused."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stas_core import config, storage, tables
from stas_core.arrays import Mask, label_components
from stas_core.data import images
from stas_core.data.annotations import AnnotationConfig
from stas_core.errors import ConfigError
from stas_core.failures import Failure
from stas_core.scored_runs import MAPS, MASKS
from stas_core.scores import metrics
from stas_core.scores.bootstrap import BootstrapConfig
from stas_core.slides import evaluated
from stas_core.slides.evaluated import EvaluatedSlide, FrocRow, SlideFiles, SlideOutcome, SlideSummary
from stas_core.slides.run import SlideRun
from tests.docs.documented import assert_documented
from tests.slides.made import keep_scored, noise
from workflows import evaluate, forecast
from workflows.evaluate import EvaluateConfig
from workflows.evaluation import estimate, slides

pytestmark = pytest.mark.usefixtures("ray_nodes")

SIZE = (300, 400)
IDS = ["a", "b"]
TISSUE_MM2 = {"a": 0.5, "b": 2.0}


def truth_of(slide_id: str) -> Mask:
    """Return a mask of rectangles, at level 0: twice the maps' size."""
    mask = np.zeros((SIZE[0] * 2, SIZE[1] * 2), bool)
    for x0 in range(40, 700, 120):
        mask[100:180, x0 : x0 + 60] = True
    mask[400:460, 300:340] = slide_id == "b"
    return mask


def mask_of(slide_id: str) -> Mask:
    """Return the truth in the maps' frame, of which it lacks a part, and invented targets."""
    mask: Mask = truth_of(slide_id)[::2, ::2].copy()
    mask[:, :70] = False
    mask[200:210, 20:300:40] = True
    return mask


def write_run(folder: Path, ids: list[str]) -> SlideRun:
    run = SlideRun(str(folder))
    for slide_id in ids:
        prob = np.maximum(noise(*SIZE, 7)[..., 0], 120)
        keep_scored(run, slide_id, mask_of(slide_id), prob=prob, level0_px=2.0)
    frame = {"frame_height": SIZE[0], "frame_width": SIZE[1]}
    rows = [{"id": slide_id, "tissue_mm2": TISSUE_MM2[slide_id], **frame} for slide_id in ids]
    tables.write_table(run.path(run.TABLE), pa.Table.from_pylist(rows))
    tables.write_rows(run.path(run.FAILURES), Failure, [])
    return run


@pytest.fixture
def run(tmp_path: Path) -> SlideRun:
    return write_run(tmp_path / "run", IDS)


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """Return a folder with the outlines of one slide and the mask of the other."""
    folder = tmp_path / "truth"
    folder.mkdir()
    corners = [(x0, 100) for x0 in range(40, 700, 120)]
    rings = [[[x, y], [x + 60, y], [x + 60, y + 80], [x, y + 80], [x, y]] for x, y in corners]
    polygons = [{"type": "Polygon", "coordinates": [ring]} for ring in rings]
    (folder / "a.geojson").write_text(json.dumps({"type": "GeometryCollection", "geometries": polygons}))
    (folder / "b.png").write_bytes(images.encode_mask(truth_of("b")))
    return folder


def settings(out: Path, run: SlideRun, /, **values: Any) -> EvaluateConfig:
    given = {"out": str(out), "run": run.uri, **values}
    return config.build(EvaluateConfig, config.merge({"bootstrap": {"num_resamples": 200}}, given))


def plainly(items: list[SlideFiles], annotation: AnnotationConfig) -> Iterator[SlideOutcome]:
    """Do without Ray what `slides.stream` does."""
    return (evaluated.evaluate_files(item, annotation) for item in items)


def test_through_ray_equals_plain_python(run: SlideRun, truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = settings(out, run, truth={"slides": str(truth)})
    assert evaluate.run(made, False) == 0
    files = [
        SlideFiles(one, run.uri, TISSUE_MM2[one], f"{truth}/{name}", run.file(MASKS, one), run.file(MAPS, one))
        for one, name in (("a", "a.geojson"), ("b", "b.png"))
    ]
    plain = [evaluated.evaluate_files(one, tile_px=64) for one in files]
    scores = tables.read_rows(f"{out}/scores.parquet", EvaluatedSlide)
    assert scores == [one.score for one in plain]
    summary = tables.read_rows(f"{out}/summary.parquet", SlideSummary)
    assert summary == evaluated.summarise_slides(plain, made.bootstrap)
    curves = [(one.id, one.froc()) for one in plain] + [(None, evaluated.pooled_froc(plain))]
    rows = [row for name, curve in curves for row in evaluated.froc_rows(name, curve)]
    assert tables.read_rows(f"{out}/froc.parquet", FrocRow) == rows

    b = scores[1]  # whose truth is a mask: the counts are those of the arrays
    expected = truth_of("b")[1::2, 1::2]
    assert b.pixels == metrics.count(mask_of("b"), expected)
    assert b.targets == metrics.count_targets(mask_of("b"), expected)
    assert (b.true_per_mm2, b.found_per_mm2) == (7 / 2, 13 / 2)
    assert b.sensitivity_at_4 == b.target_recall == 6 / 7
    of = {row.score: row for row in summary}
    assert of["dice"].mean == pytest.approx(np.mean([row.dice for row in scores])) and of["dice"].low is None
    assert of["dice"].pooled == (scores[0].pixels + b.pixels).dice
    assert of["true_per_mm2"].pooled == (6 + 7) / 2.5
    assert (out / "figures" / "froc.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "report.md").read_text()
    assert "scored 2; **without a score 0**" in text and "| b | 2 |" in text and "](figures/froc.png)" in text
    assert_documented("evaluate", out)
    small = {
        kind: images.decode_mask((out / "layers" / f"b.{kind}.png").read_bytes(), kind)[::2, ::2]
        for kind in ("truth", "missed", "false")  # of level 0's size: both slides are small
    }
    assert np.array_equal(small["truth"], expected) and label_components(small["missed"])[0] - 1 == b.target_fn
    assert label_components(small["false"])[0] - 1 == b.target_fp


def test_a_plan_tries_the_largest_slide_or_its_middle(
    run: SlideRun, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"id": name, "tissue_mm2": TISSUE_MM2[name], "frame_height": SIZE[0], "frame_width": SIZE[1] * times}
        for name, times in (("a", 1), ("b", 1000))
    ]
    tables.write_table(run.path(run.TABLE), pa.Table.from_pylist(rows))  # of the frame a plan reads the size here
    tried, seconds, wanted = list[str](), list[float](), settings(tmp_path / "out", run, truth={"slides": str(truth)})
    score = evaluated.evaluate_files

    def noted(files: SlideFiles, annotation: AnnotationConfig, **given: Any) -> SlideOutcome:
        start = time.perf_counter()
        found = score(files, annotation, **given)
        tried.append(files.id)
        seconds.append(time.perf_counter() - start)
        return found

    monkeypatch.setattr(evaluated, "evaluate_files", noted)
    (found,) = evaluate.plan(wanted, False)
    assert tried == ["b", "b"] and found.seconds and found.basis.startswith("from b of 120.0 Mpx, tried here")
    assert found.memory_bytes and found.disk_bytes and found.layout.endswith("a slide per CPU")
    # Of a slide that would take minutes its middle is tried: the time is that of the whole all the same.
    monkeypatch.setattr(estimate, "MOST_TRIED_PX", 1e6)
    (large,) = evaluate.plan(wanted, False)
    assert large.basis.startswith("from 1 Mpx in the middle of b of 120.0 Mpx") and len(seconds) == 4
    assert large.seconds == pytest.approx(120 * seconds[-1] + forecast.START_S, rel=0.1)
    Path(run.file(MASKS, "b")).write_bytes(b"broken")
    (found,) = evaluate.plan(wanted, False)
    assert found.seconds is None and found.basis.startswith("b, which was tried, has no score: ")
    assert not (tmp_path / "out").exists()


def test_rows_in_the_middle_of_a_slide_are_scored_as_the_arrays_are(run: SlideRun, truth: Path) -> None:
    """What is tried of a slide that would take minutes is the same work."""
    files = SlideFiles("b", run.uri, 2.0, f"{truth}/b.png", run.file(MASKS, "b"), run.file(MAPS, "b"))
    found = evaluated.evaluate_files(files, most_px=140 * SIZE[1] + 7, tile_px=64)
    rows = slice(80, 220)
    assert found.score is not None
    assert found.score.pixels == metrics.count(mask_of("b")[rows], truth_of("b")[1::2, 1::2][rows])
    assert found.score.pixels.tp < evaluated.evaluate_files(files).score.pixels.tp  # type: ignore[union-attr]
    narrow = evaluated.evaluate_files(files, most_px=1)
    assert narrow.score is not None


def test_a_second_run_does_nothing_until_a_file_changes(
    run: SlideRun, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored: list[list[str]] = []

    def plain(items: list[SlideFiles], annotation: AnnotationConfig) -> Any:
        scored.append([item.id for item in items])
        return plainly(items, annotation)

    monkeypatch.setattr(slides, "stream", plain)
    made = settings(tmp_path / "out", run, truth={"slides": str(truth)})
    assert evaluate.run(made, False) == 0
    timed = ("manifest.json", "report.html")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.name not in timed}
    assert evaluate.run(made, True) == 0
    assert all(path.read_bytes() == data for path, data in before.items() if path.name != "claim.json")
    assert evaluate.run(made, False) == 0
    assert "nothing to do" in capsys.readouterr().out and scored == [IDS, IDS]
    (truth / "b.png").write_bytes(images.encode_mask(~truth_of("b")))
    assert evaluate.run(made, False) == 0
    assert scored == [IDS] * 3


def test_every_slide_on_one_side_alone_is_reported(
    run: SlideRun, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slides, "stream", plainly)
    rows = [{"id": name, "tissue_mm2": 1.0} for name in ("a", "b", "c", "d")]
    tables.write_table(run.path(run.TABLE), pa.Table.from_pylist(rows))
    tables.write_rows(run.path(run.FAILURES), Failure, [Failure("e", "score_slides", "no_tissue", "is blank")])
    (truth / "b.png").write_bytes(images.encode_mask(truth_of("b")[:-2]))
    for name in ("c", "e", "f"):
        (truth / f"{name}.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    (truth / "note.txt").write_text("")
    made = settings(tmp_path / "out", run, truth={"slides": str(truth)})
    assert evaluate.run(made, False) == 1
    found = {one.id: one for one in tables.read_rows(f"{made.out}/failures.parquet", Failure)}
    assert {name: (one.stage, one.reason) for name, one in found.items()} == {
        "b": ("evaluate", "size_mismatch"),
        "c": ("evaluate", "not_scored"),
        "d": ("evaluate", "no_truth"),
        "e": ("score_slides", "no_tissue"),
        "f": ("evaluate", "not_scored"),
    }
    assert "has 800x598 px, expected those of the run's maps, 400x300, or level 0's 800x600" in found["b"].message
    assert "no masks/c.tif; score it with save.masks=true" in found["c"].message
    text = (tmp_path / "out" / "report.md").read_text()
    assert "with targets" not in text  # slides have no means of such subsets
    assert "## Missing: 4" in text and "## Without truth: 1" in text
    assert "Slides of the truth: 5; scored 1; **without a score 4**" in text
    facts = storage.read_json(f"{made.out}/manifest.json")
    assert facts["report"] == ["report.html"]
    assert (facts["num_missing"], facts["num_without_truth"], facts["passed_over"]) == (4, 1, {".txt": 1})
    assert evaluate.run(made.model_copy(update={"max_missing_fraction": 0.8}), False) == 0


def test_one_file_is_the_truth_of_one_slide_and_a_run_needs_no_maps(tmp_path: Path, truth: Path) -> None:
    run = write_run(tmp_path / "run", ["b"])
    Path(run.file(MAPS, "b")).unlink()
    (tmp_path / "mask of b.png").write_bytes((truth / "b.png").read_bytes())
    pairs = slides.find_pairs(run.uri, str(tmp_path / "mask of b.png"))
    (outcome,) = map(evaluated.evaluate_files, pairs.items)
    assert outcome.score is not None and not outcome.score.has_map
    assert outcome.matched_prob + outcome.missed_prob == [1.0] * 13
    assert outcome.score.sensitivity_at_2 == 0 and outcome.score.sensitivity_at_4 == outcome.score.target_recall


def test_slides_without_targets_have_no_sensitivity_and_many_have_intervals(run: SlideRun, truth: Path) -> None:
    pairs = slides.find_pairs(run.uri, str(truth))
    first, second = map(evaluated.evaluate_files, pairs.items)
    assert first.score is not None and second.score is not None
    none = {name: None for name in (*evaluated.SENSITIVITIES, "sensitivity_mean")}
    empty = EvaluatedSlide(**{**asdict(first.score), **none, "id": "c", "target_tp": 0, "target_fn": 0})
    outcomes = [first, second, SlideOutcome("c", empty, None, [], [0.5])] * 3
    of = {row.score: row for row in evaluated.summarise_slides(outcomes, BootstrapConfig(num_resamples=200))}
    assert (of["dice"].num_slides, of["sensitivity_mean"].num_slides) == (9, 6)
    assert of["sensitivity_mean"].low is None and of["true_per_mm2"].pooled_low is None
    for name in ("dice", "precision", "target_f1"):
        row = asdict(of[name])
        assert row["low"] <= row["mean"] <= row["high"] and row["pooled_low"] <= row["pooled"] <= row["pooled_high"]
    assert evaluated.froc_rows("c", outcomes[2].froc()) == [FrocRow("c", 0.5, None, 2.0)]


def test_what_was_not_scored_is_neither_found_nor_missed(
    tmp_path: Path, truth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slides, "stream", plainly)
    run = write_run(tmp_path / "run", ["b"])
    ring = [[190, 0], [600, 0], [600, 300], [190, 300], [190, 0]]  # cuts two of the rectangles of level 0
    roi = json.dumps({"type": "Polygon", "coordinates": [ring]}).encode()
    keep_scored(run, "b", mask_of("b"), prob=None, level0_px=2.0, roi=roi)
    Path(run.file(MAPS, "b")).unlink()
    inside = np.zeros(SIZE, bool)
    inside[:150, 95:300] = True
    expected = truth_of("b")[1::2, 1::2] & inside
    (truth / "a.geojson").unlink()
    made = settings(tmp_path / "out", run, truth={"slides": str(truth)})
    assert evaluate.run(made, False) == 0
    (row,) = tables.read_rows(f"{made.out}/scores.parquet", EvaluatedSlide)
    assert row.has_region and row.targets == metrics.count_targets(mask_of("b") & inside, expected)
    assert (row.num_outside, row.num_cut, row.fn) == (3, 1, metrics.count(mask_of("b") & inside, expected).fn)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Slides with a region of interest: 1; 3 true target(s) outside of it left out" in text


def test_classes_that_are_no_targets_are_listed_or_their_slide_has_no_truth(
    run: SlideRun, truth: Path, tmp_path: Path
) -> None:
    given = {"slides": str(truth)}
    evaluate.run(settings(tmp_path / "plain", run, truth=given), False)
    expected = tables.read_rows(f"{tmp_path}/plain/scores.parquet", EvaluatedSlide)
    values = json.loads((truth / "a.geojson").read_text())
    ring = [[0, 0], [790, 0], [790, 590], [0, 590], [0, 0]]
    tissue = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}
    features = [tissue | {"properties": {"classification": {"name": "Tissue"}}}]
    features += [{"type": "Feature", "geometry": one, "properties": {}} for one in values["geometries"]]
    (truth / "a.geojson").write_text(json.dumps(features))
    assert evaluate.run(settings(tmp_path / "out", run, truth=given), False) == 1
    (found,) = tables.read_rows(f"{tmp_path}/out/failures.parquet", Failure)
    assert (found.id, found.reason) == ("a", "unknown_label")
    assert "truth.annotation.labels.Tissue=target (or ignore)" in found.message
    listed = given | {"annotation": {"labels": {"STAS": "target", "Tissue": "ignore"}}}
    evaluate.run(settings(tmp_path / "out", run, truth=listed), False)
    assert tables.read_rows(f"{tmp_path}/out/scores.parquet", EvaluatedSlide) == expected
    plans = [evaluate.plan(settings(tmp_path / "new", run, truth=truth), False)[0] for truth in (given, listed)]
    assert "annotation.labels.Tissue" in plans[0].basis and plans[1].seconds


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"truth": {"slides": "{tmp}/truth", "annotation": {"coordinates": "pixels"}}},
            "truth.annotation.coordinates = pixels says how annotations of images .*labels and unknown_labels",
        ),
        (
            {"truth": {"masks": "/m"}},
            "truth.masks = /m is the truth of images, but run = .* is one of score_slides; give",
        ),
        (
            {"truth": {"cohort": "/c.parquet"}},
            "truth.cohort = /c.parquet .*; give truth.slides=<folder of <id>.geojson",
        ),
        (
            {"truth": {"slides": "{tmp}/truth"}, "against": "/o"},
            "against = /o .* is one of score_slides; evaluate each",
        ),
        (
            {"truth": {"slides": "{tmp}/truth/b.png", "masks": "/m"}},
            "give one of .*; now: truth.masks = /m, truth.slides",
        ),
        ({"truth": {"slides": "{tmp}/truth", "split": "train"}}, "truth.split = train needs truth.cohort"),
        ({"truth": {"slides": "{tmp}/truth"}, "bootstrap": {"by": "group"}}, "bootstrap.by = group needs truth.cohort"),
        ({"truth": {"slides": "{tmp}/other.geojson"}}, "other.geojson is one file, and the run has 2 slides; give a"),
        (
            {"truth": {"slides": "{tmp}/empty"}},
            "empty holds no .geojson, .*; give the folder of files named by .* a.geo",
        ),
        ({"truth": {"slides": "{tmp}/truth"}, "run": "{tmp}/empty"}, "empty holds no slides.parquet; give the output"),
        (
            {"truth": {"slides": "{tmp}/truth"}, "run": "{tmp}/fields"},
            "fields is one of score_images; give truth.cohort",
        ),
        ({"truth": {"slides": "{tmp}/truth"}, "out": "{tmp}/truth/out"}, "truth.slides = .* lie within each other"),
        ({"truth": {"slides": "{tmp}/truth"}, "out": "{tmp}"}, "holds run = .*, which is read"),
    ],
)
def test_wrong_settings_say_what_to_do(
    run: SlideRun, truth: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    storage.write_bytes(f"{tmp_path}/fields/images.parquet", b"")

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        return value.format(tmp=tmp_path)

    with pytest.raises(ConfigError, match=message):
        evaluate.run(settings(tmp_path / "out", run, **filled(values)), False)
