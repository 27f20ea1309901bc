"""Scoring from end to end: through Ray and in plain Python, its tables, its bad inputs, what it refuses."""

import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from stas_core import storage, tables
from stas_core.data import images
from stas_core.errors import (
    CheckpointError,
    ConfigError,
    StaleOutputError,
)
from stas_core.failures import Failure
from stas_core.predict import ensemble as ensembles
from stas_core.predict import geojson, postprocess
from stas_core.predict.placement import TargetFacts
from stas_core.predict.polygons import trace_shapes
from stas_core.predict.postprocess import PostprocessConfig
from stas_core.predict.predictor import Predictor
from stas_core.review import ReviewField
from stas_core.scored_runs import ScoredImage, ScoredTarget
from tests.docs.documented import assert_documented
from tests.scoring.here import score_images_here
from tests.workflows.made import make_ensemble, settings
from workflows import score_images
from workflows.cluster import Node
from workflows.scoring import image_results
from workflows.scoring.tasks import LimitsConfig, SaveConfig, ScoreTask


def test_scoring_through_ray_equals_plain_python(scored: Path, many_images: Path, ensemble: str) -> None:
    run = settings(many_images, ensemble, scored)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    members = ensembles.load_members(ensembles.find_checkpoints(ensemble), cpu)
    predictor = Predictor(members, device=cpu, config=run.inference)
    rows = tables.read_table(str(scored / "images.parquet")).to_pylist()
    assert [row["id"] for row in rows] == sorted(path.stem for path in many_images.iterdir())
    for row in rows[:8]:
        image = images.decode_image(Path(row["image_uri"]).read_bytes(), row["id"])
        (prediction,) = predictor.predict([image])
        prob = prediction.prob_u8()
        cascade = postprocess.run_cascade(prob, run.postprocess)
        labels, targets = postprocess.find_targets(cascade.mask, prob)
        stored = {
            folder: np.asarray(Image.open(scored / folder / f"{row['id']}.png"))
            for folder in ("masks", "maps", "disagreement")
        }
        assert np.array_equal(stored["masks"], cascade.mask * np.uint8(255))
        assert np.array_equal(stored["maps"], prob)
        assert np.array_equal(stored["disagreement"], prediction.std_u8())
        assert row["foreground_share"] == cascade.mask.mean()
        assert (row["num_targets"], row["stage"], row["num_passes"]) == (len(targets), cascade.step, 4)
        assert row["mean_disagreement"] == float(prediction.std.mean(dtype=torch.float64))
        outlines = geojson.to_geojson(trace_shapes(labels), TargetFacts(row["id"], targets))
        assert (scored / "geojson" / f"{row['id']}.geojson").read_bytes() == outlines
    torch.set_num_threads(threads)


def test_archives_and_tables_hold_every_image(scored: Path) -> None:
    assert_documented("score_images", scored)
    rows = tables.read_table(str(scored / "images.parquet"))
    targets = tables.read_table(str(scored / "targets.parquet"))
    assert rows.schema.equals(tables.schema_of(ScoredImage)) and targets.schema.equals(tables.schema_of(ScoredTarget))
    assert targets.num_rows == sum(row["num_targets"] for row in rows.to_pylist()) > 0
    with zipfile.ZipFile(scored / "segmentation.zip") as archive:
        assert archive.namelist() == [f"{image_id}.png" for image_id in rows["id"].to_pylist()]
        for name in archive.namelist():
            assert archive.read(name) == (scored / "masks" / name).read_bytes()
    boxes = json.loads((scored / "detection.json").read_text())
    assert list(boxes) == rows["id"].to_pylist()
    first = targets.to_pylist()[0]
    expected = [first["x0"], first["y0"], first["x1"] - 1, first["y1"] - 1, round(first["mean_prob"], 6)]
    assert boxes[first["id"]][0] == expected
    review = tables.read_rows(str(scored / "review.parquet"), ReviewField)
    assert [row.rank for row in review] == list(range(1, len(review) + 1)) and review
    assert {row.id for row in review} <= set(rows["id"].to_pylist())
    assert tables.read_table(str(scored / "timings.parquet")).num_rows == rows.num_rows
    assert (scored / "contact_sheet.png").exists()
    assert json.loads((scored / "manifest.json").read_text())["report"] == ["report.html"]


def test_bad_inputs_are_quarantined_and_the_rest_goes_on(
    phantom_folder: Path, ensemble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_images_here(monkeypatch)
    source, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(phantom_folder / "images", source)
    good = sorted(source.iterdir())[0]
    expected = {
        "truncated": "unreadable_image",
        "grey": "wrong_channels",
        "deep": "wrong_bit_depth",
        "empty": "empty_file",
        "large": "oversized_image",
        "blocking": "not_a_file",
        good.stem: "duplicate_id",
    }
    (source / "truncated.jpg").write_bytes(good.read_bytes()[:900])
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(source / "grey.png")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(source / "deep.png")
    (source / "empty.jpg").touch()
    Image.fromarray(np.zeros((200, 200, 3), np.uint8)).save(source / "large.png")
    os.mkfifo(source / "blocking.png")
    shutil.copy(good, source / f"{good.stem}.jpeg")
    limits = {"max_pixels": 30_000, "timeout_s": 1.5}
    run = settings(source, ensemble, out, limits=limits)
    assert score_images.run(run, False) == 1
    table = tables.read_table(str(out / "failures.parquet"))
    assert table.schema.equals(tables.schema_of(Failure))
    assert {row["id"]: row["reason"] for row in table.to_pylist()} == expected
    assert all(row["id"] in row["message"] for row in table.to_pylist())
    assert tables.read_table(str(out / "images.parquet")).num_rows == 7
    allowed = run.model_copy(update={"max_failed_fraction": 0.6})
    assert score_images.run(allowed, False) == 0


def test_images_and_outputs_must_not_lie_within_each_other(phantom_folder: Path, ensemble: str, tmp_path: Path) -> None:
    source = tmp_path / "images"
    shutil.copytree(phantom_folder / "images", source)
    for out in (source, source / "scores", tmp_path):
        with pytest.raises(ConfigError, match="lie within each other"):
            score_images.run(settings(source, ensemble, out), True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match=r"other, which holds none of this stage's outputs, .* has thesis\.txt"):
        score_images.run(settings(source, ensemble, tmp_path / "other"), True)
    assert len(list(source.iterdir())) == 8 and (tmp_path / "other" / "thesis.txt").exists()


def test_the_folder_of_another_stage_is_left_alone(
    ray_nodes: list[Node], phantom_folder: Path, ensemble: str, tmp_path: Path
) -> None:
    """A slip in out= must not cost a cohort its masks, nor a stranger's folder its own."""
    cohort, strange = tmp_path / "cohort", tmp_path / "strange"
    for folder in (cohort, strange):
        storage.write_bytes(f"{folder}/masks/truth.png", b"drawn by hand")
    storage.write_json(f"{cohort}/manifest.json", {"stage": "prepare_data"})
    source = phantom_folder / "images"
    for force in (False, True):
        with pytest.raises(StaleOutputError, match="cohort holds what prepare_data made, not score_images"):
            score_images.run(settings(source, ensemble, cohort), force)
        with pytest.raises(
            ConfigError, match=r"strange(, which holds none of this stage| has masks/, which score_images)"
        ):
            score_images.run(settings(source, ensemble, strange), force)
    within = make_ensemble(tmp_path / "models" / "run")
    with pytest.raises(ConfigError, match=r"out = .*models holds ensemble.uri = .*, which is read"):
        score_images.run(settings(source, within, tmp_path / "models"), False)
    for folder in (cohort, strange):
        assert [path.name for path in (folder / "masks").iterdir()] == ["truth.png"]


def test_ids_that_name_no_file_are_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    bad = ["", ".hidden", "slide/field", "../field", "a\\b", "ä" * 101]
    rows = [{"id": name, "image_uri": f"{number}.png"} for number, name in enumerate([*bad, "good", "ä" * 100])]
    source = str(tmp_path / "list.parquet")
    tables.write_table(source, pa.Table.from_pylist(rows))
    items, refused, _ = score_images.find_images(source)
    assert [item["id"] for item in items] == ["good", "ä" * 100]
    assert {failure.id: failure.reason for failure in refused} == dict.fromkeys(bad, "unusable_id")
    assert all("names no file; give 1 to 200 bytes without" in failure.message for failure in refused)
    tables.write_table(source, pa.Table.from_pylist([*rows, {"id": "x", "image_uri": None}]))
    with pytest.raises(ConfigError, match="row 8 has no image_uri"):
        score_images.find_images(source)


def test_weights_that_do_not_load_are_told_before_anything_starts(phantom_folder: Path, tmp_path: Path) -> None:
    run = Path(make_ensemble(tmp_path / "run"))
    weights = run / "fold_1" / "checkpoints" / "last" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="fold_1/checkpoints/last"):
        score_images.run(settings(phantom_folder / "images", str(run), tmp_path / "out"), False)


def test_the_contact_sheet_needs_no_image(
    scored: Path, many_images: Path, ensemble: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ScoreTask(str(scored), "", PostprocessConfig(), SaveConfig(), LimitsConfig())
    found = next(one.found for one in task.run.records() if one.targets)
    assert found is not None
    whole = image_results.contact_sheet(task, [found], 1)
    assert whole != image_results.contact_sheet(task, [replace(found, image_uri="/gone.jpg")], 1)
    assert f"{found.id} is drawn on white: cannot read /gone.jpg" in capsys.readouterr().out


def test_wrong_sources_are_named(tmp_path: Path, phantom_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no images"):
        (tmp_path / "empty").mkdir()
        score_images.find_images(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"needs a cohort\.parquet"):
        score_images.find_images(str(phantom_folder / "images"), "hold-out")


def test_a_cohort_is_a_list_of_images(cohort_uri: str) -> None:
    items, twice, _ = score_images.find_images(cohort_uri, "train")
    assert len(items) == 8 and not twice
    with pytest.raises(ConfigError, match=r"data\.split = hold-out: .* has \['train'\]"):
        score_images.find_images(cohort_uri, "hold-out")
