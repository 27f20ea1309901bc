"""Runs that end well and have little to show: what they say then."""

import json
from pathlib import Path

import pytest

from stas_core import config
from stas_core.data.cohort import read_cohort
from tests.scoring.here import score_images_here
from tests.workflows.made import make_ensemble, settings
from workflows import prepare_data, score_images
from workflows.prepare_data import PrepareConfig


@pytest.mark.usefixtures("prepared_here")
def test_a_cohort_without_any_target_is_made_with_a_warning(
    phantom_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"shapes": [], "imageHeight": 96, "imageWidth": 128}
    (tmp_path / "phantom_0000.json").write_text(json.dumps(shapes))  # the other has none at all
    for name in ("phantom_0000", "phantom_0001"):
        (tmp_path / f"{name}.jpg").write_bytes((phantom_folder / "images" / f"{name}.jpg").read_bytes())
    data = {"images": f"{tmp_path}/*.jpg", "annotations": f"{tmp_path}/*.json", "unannotated": "negative"}
    values = {"data": data, "split": {"num_folds": 2, "hold_out_fraction": 0}}
    out = f"{tmp_path}_out"
    assert prepare_data.run(config.build(PrepareConfig, values | {"out": out}), False) == 0
    said = capsys.readouterr().out
    assert "1 of 2 images have no annotation and count as images without targets" in said
    assert "VERDICT: look at this" in said and "none of the 2 images has a target; expected some with" in said
    assert [row.num_targets for row in read_cohort(f"{out}/cohort.parquet")] == [0, 0]


def test_where_nothing_was_scored_no_contact_sheet_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    score_images_here(monkeypatch)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.jpg").write_bytes(b"no image")
    scoring = settings(tmp_path / "images", make_ensemble(tmp_path / "run"), tmp_path / "out")
    assert score_images.run(scoring, False) == 1
    said = capsys.readouterr().out
    assert "0 images in" in said and "contact_sheet" not in said
