"""An ensemble as one ONNX file: what the stage writes, checks and says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from stas_core import storage, tables
from stas_core.data import images
from stas_core.predict import onnx_export
from stas_core.predict.onnx_export import ImageCheck
from tests.docs.documented import assert_documented
from tests.workflows.made import make_ensemble, make_images
from workflows.export_model import MOST_CHECKED

Stage = Callable[..., Any]


def test_an_ensemble_becomes_one_file_that_is_checked_and_described(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble, source = make_ensemble(tmp_path / "folds"), make_images(tmp_path / "images", 23, num_distinct=2)
    out = tmp_path / "onnx"
    arguments = (f"ensemble.uri={ensemble}", f"data.images={source}", f"out={out}", "inference.flips=[identity,lr]")
    planned = stage("export_model", *arguments, "--plan")
    assert planned.status == 0 and "2 member(s) as one file, to be checked on 20 images" in planned.out
    assert not out.exists()
    done = stage("export_model", *arguments)
    assert done.status == 0, done.err
    checks = tables.read_rows(f"{out}/check.parquet", ImageCheck)
    assert len(checks) == MOST_CHECKED and max(check.max_difference for check in checks) <= 1
    assert {(check.height_px, check.width_px) for check in checks} == {(96, 128)}
    assert_documented("export_model", out)
    held = storage.read_json(f"{out}/manifest.json")["forecast"]["disk_bytes"]
    assert held["actual"] / 1.5 < held["forecast"] < held["actual"] * 1.5
    assert (out / "report.html").exists() and storage.read_json(f"{out}/manifest.json")["num_images"] == MOST_CHECKED

    card = (out / "MODEL_CARD.md").read_text()
    assert "Flips: identity, lr." in card and "not a medical device" in card and "Verdict: " in card
    monkeypatch.chdir(out)  # the card's own example runs, on an image beside it
    example = card.split("```python\n")[1].split("```")[0]
    found = dict[str, Any]()
    (out / "field.jpg").write_bytes((source / "field_00000.jpg").read_bytes())
    exec(example, found)
    image = images.decode_image((source / "field_00000.jpg").read_bytes(), "it")
    assert found["probability"].shape == image.shape[:2] and np.ptp(found["probability"]) > 0
    session = onnxruntime.InferenceSession(str(out / "ensemble.onnx"))
    assert session.get_modelmeta().custom_metadata_map["flips"] == "identity lr"

    monkeypatch.chdir(tmp_path)
    again = stage("export_model", *arguments)
    assert again.status == 0 and "nothing to do" in again.out
    assert "nothing: it is up to date" in stage("export_model", *arguments, "--plan").out

    monkeypatch.setattr(onnx_export.OnnxPredictor, "predict_u8", lambda self, image: np.full(image.shape[:2], 7, "u1"))
    wrong = stage("export_model", *arguments, "--force")
    assert wrong.status == 1 and "VERDICT: do not use" in wrong.out and "at most 1" in wrong.out
    assert (out / "ensemble.onnx").exists()


def test_what_cannot_be_exported_is_refused_before_anything_is_written(stage: Stage, tmp_path: Path) -> None:
    ensemble = make_ensemble(tmp_path / "folds")
    done = stage("export_model", f"ensemble.uri={ensemble}", f"out={tmp_path}/out", "inference.adaptive_px=5")
    assert done.status == 2 and "inference.adaptive_px = 5 cannot be expressed" in done.err
    assert not (tmp_path / "out").exists()


def test_a_plan_leaves_out_the_images_that_the_check_leaves_out(stage: Stage, tmp_path: Path) -> None:
    ensemble, source = make_ensemble(tmp_path / "folds"), make_images(tmp_path / "images", 3)
    paths = sorted(source.iterdir())
    arguments = (f"ensemble.uri={ensemble}", f"data.images={source}", f"out={tmp_path}/out", "--plan")
    paths[0].write_bytes(paths[0].read_bytes()[:99])
    planned = stage("export_model", *arguments)
    assert planned.status == 0 and "from 2 images tried here" in planned.out
    assert f"note      {paths[0].stem} is left out of the check: " in planned.out
    for path in paths[1:]:
        path.write_bytes(b"")
    none = stage("export_model", *arguments)
    assert none.status == 2 and "none of the 3 images taken can be read; give others to check the file on" in none.err
