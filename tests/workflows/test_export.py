"""Masks go out as annotations of every format and come back, corrected or not, into a cohort."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stas_core import config, storage
from stas_core.arrays import Mask
from stas_core.data import images
from stas_core.data.cohort import read_cohort
from stas_core.errors import ConfigError
from stas_core.failures import Failure
from stas_core.predict.annotation_files import EXPORTED
from stas_core.tables import read_rows
from tests.conftest import ROOT
from tests.docs.documented import assert_documented
from tests.workflows.made import assert_foreseen
from tests.workflows.test_evaluate import write_run
from workflows import export, prepare_data
from workflows.export import ExportConfig
from workflows.prepare_data import PrepareConfig

SIZE = (90, 120)


pytestmark = pytest.mark.usefixtures("prepared_here")


def masks() -> dict[str, Mask]:
    """Return noise with holes and parts that meet at corners, a ring, nothing, and everything."""
    rng = np.random.default_rng(0)
    noise = rng.random((SIZE[0] // 3, SIZE[1] // 3)) > 0.6
    ring = np.zeros(SIZE, bool)
    ring[20:70, 30:90] = True
    ring[35:50, 40:60] = False
    blocks = np.kron(noise, np.ones((3, 3), bool))
    return {"blocks": blocks, "ring": ring, "none": np.zeros(SIZE, bool), "all": np.ones(SIZE, bool)}


@pytest.fixture
def scored(tmp_path: Path) -> str:
    return write_run(tmp_path / "run", masks())


def settings(out: Path, **values: Any) -> ExportConfig:
    return config.build(ExportConfig, {"out": str(out), **values})


def prepared(scored: str, annotations: str, out: Path) -> dict[str, Mask]:
    values = {"data": {"images": f"{scored}/inputs", "annotations": annotations}, "out": str(out)}
    made = config.build(PrepareConfig, values | {"split": {"num_folds": 2, "hold_out_fraction": 0}})
    assert prepare_data.run(made, False) == 0
    rows = read_cohort(f"{out}/cohort.parquet")
    return {row.id: images.decode_mask(storage.read_bytes(row.mask_uri), row.id) for row in rows}


@pytest.mark.parametrize("form", EXPORTED)
def test_an_export_writes_about_what_was_planned(form: str, tmp_path: Path) -> None:
    """Of a COCO file, too, which is written at the end."""
    scored = write_run(
        tmp_path / "run", {f"{name}_{turn}": mask for name, mask in masks().items() for turn in range(8)}
    )
    given = settings(tmp_path / "out", run=scored, formats=[form])
    (planned,) = export.plan(given, False)
    assert export.run(given, False) == 0
    assert_foreseen(planned, tmp_path / "out")


def test_predictions_go_back_into_a_cohort_to_the_pixel_in_every_format(
    scored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.run(settings(tmp_path / "out", run=scored, formats=list(EXPORTED)), False) == 0
    told = capsys.readouterr().out
    assert f"labelme: {tmp_path}/out/labelme; correct them in place: labelme {tmp_path}/out/labelme\n" in told
    for form in EXPORTED:
        found = prepared(scored, f"{tmp_path}/out/{export.FOLDERS[form]}", tmp_path / form)
        assert found.keys() == masks().keys()
        assert all(np.array_equal(found[name], mask) for name, mask in masks().items()), form
    cohort = f"{tmp_path}/labelme/cohort.parquet"
    assert export.run(settings(tmp_path / "again", cohort=cohort, formats=["geojson"], label="nest"), False) == 0
    assert_documented("export", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "manifest.json").read_text())["next"][0]["command"].endswith(
        f"annotation.labels.nest=target out={tmp_path}/again-cohort"
    )
    first, again = (json.loads((tmp_path / out / "geojson" / "ring.geojson").read_text()) for out in ("out", "again"))
    assert again["features"][0]["geometry"] == first["features"][0]["geometry"]
    assert again["features"][0]["properties"]["classification"]["name"] == "nest"
    opened = json.loads((tmp_path / "out" / "labelme" / "ring.json").read_text())["imagePath"]
    assert (tmp_path / "out" / "labelme" / opened).resolve() == (tmp_path / "run" / "inputs" / "ring.png").resolve()


def test_it_ends_with_the_command_that_takes_the_corrections(
    scored: str, tmp_path: Path, stage: Callable[..., Any]
) -> None:
    expected = (
        f"next, to make a cohort of the corrected files:\n  python {ROOT}/workflows/prepare_data.py "
        f"data.images={scored}/inputs data.annotations={tmp_path}/out/geojson out={tmp_path}/out-cohort\n"
    )
    for _ in range(2):  # the second time there is nothing to do
        done = stage("export", f"run={scored}", f"out={tmp_path}/out")
        assert (done.status, done.out[-len(expected) :]) == (0, expected), done.err


def test_corrections_in_place_are_read_and_never_written_over(
    scored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = settings(tmp_path / "out", run=scored)
    assert export.run(made, False) == 0
    path = tmp_path / "out" / "labelme" / "ring.json"
    values = json.loads(path.read_text())
    square = [[2, 2], [12, 2], [12, 12], [2, 12]]
    values["shapes"].append(values["shapes"][0] | {"points": square})
    path.write_text(json.dumps(values))
    found = prepared(scored, f"{tmp_path}/out/labelme", tmp_path / "cohort")
    assert found["ring"].sum() == masks()["ring"].sum() + 100
    capsys.readouterr()
    assert export.run(made, False) == 0
    assert "nothing to do" in capsys.readouterr().out
    refused = r"1 file\(s\) in .*/out were corrected .* such as labelme/ring.json"
    for do in (export.run, export.plan):  # of the same settings and masks, too
        with pytest.raises(ConfigError, match=refused):
            do(made, True)
    storage.write_bytes(f"{scored}/masks/none.png", images.encode_mask(masks()["ring"]))
    for force in (False, True):
        with pytest.raises(ConfigError, match=refused):
            export.run(made, force)
    assert json.loads(path.read_text()) == values
    assert export.run(settings(tmp_path / "other", run=scored), False) == 0


def test_what_was_drawn_beside_an_export_is_not_deleted(scored: str, tmp_path: Path) -> None:
    """Of an image whose mask could not be read, or in another format."""
    storage.write_bytes(f"{scored}/masks/none.png", b"damaged")
    made = settings(tmp_path / "out", run=scored, formats=["labelme"], max_failed_fraction=0.5)
    assert export.run(made, False) == 0
    (tmp_path / "out" / "labelme" / ".ring.json.0123abcd.part").write_text("")
    (tmp_path / "out" / "labelme" / "notes.txt").write_text("kept")
    assert export.run(made, True) == 0  # of what the stage would not write nothing is in danger
    for name in ("labelme/none.json", "geojson/ring.geojson"):
        storage.write_bytes(f"{tmp_path}/out/{name}", b"drawn")
        for given in (made, settings(tmp_path / "out", run=scored)):
            with pytest.raises(ConfigError, match=f"1 file.* or added since the export, such as {name}, and would be"):
                export.run(given, True)
        assert export.run(made, False) == 0  # there is nothing to do
        (tmp_path / "out" / name).unlink()
    assert (tmp_path / "out" / "labelme" / "notes.txt").exists() and export.run(made, True) == 0


def test_a_corrected_export_of_an_earlier_version_is_up_to_date(
    scored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It had no review, and told its inputs by these texts."""
    config = settings(tmp_path / "out", run=scored, formats=["labelme"])
    assert export.run(config, False) == 0
    items = export.find_items(config)
    assert str(items[0]) == (
        f"Item(id={items[0].id!r}, image_uri={items[0].image_uri!r}, mask_uri={items[0].mask_uri!r}, fingerprint='')"
    )
    manifest = storage.read_json(f"{tmp_path}/out/manifest.json")
    del manifest["config"]["review"], manifest["config"]["most_reviewed"]
    texts = [f"{item} {storage.stamp(item.mask_uri)}" for item in items]
    storage.write_json(f"{tmp_path}/out/manifest.json", manifest | {"inputs": storage.fingerprint(*texts)})
    (tmp_path / "out" / "labelme" / "ring.json").write_text("corrected")
    capsys.readouterr()
    assert export.run(config, False) == 0 and "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "out" / "labelme" / "ring.json").read_text() == "corrected"


def test_what_cannot_be_exported_says_why(scored: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one of run and cohort; now: run = None"):
        export.run(settings(tmp_path / "out"), False)
    with pytest.raises(ConfigError, match=r"run = .*/none holds no images.parquet"):
        export.run(settings(tmp_path / "out", run=f"{tmp_path}/none"), False)
    storage.write_bytes(f"{scored}/masks/ring.png", b"no picture")
    assert export.run(settings(tmp_path / "out", run=scored, formats=["coco"]), False) == 1
    (failure,) = read_rows(f"{tmp_path}/out/failures.parquet", Failure)
    assert (failure.id, failure.reason) == ("ring", "unreadable_image")
    listed = json.loads((tmp_path / "out" / "coco" / "coco.json").read_text())["images"]
    assert [image["file_name"] for image in listed] == ["all.png", "blocks.png", "none.png"]


def test_the_scripts_for_qupath_name_files_as_the_stages_do() -> None:
    """They cannot be run here; what they rely on is held by name."""
    scripts = [
        (ROOT / "docs" / "qupath" / f"{name}.groovy").read_text() for name in ("import_results", "export_corrections")
    ]
    assert all('id + ".geojson"' in script and script.count("{") == script.count("}") for script in scripts)
    assert "PathIO.readObjectsFromGeoJSON(" in scripts[0] and "PathIO.exportObjectsAsGeoJSON(" in scripts[1]
