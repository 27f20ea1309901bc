"""CSVs of images that hold no target, and of their um per pixel, on their way into a cohort."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stas_core import config
from stas_core.data import images
from stas_core.data.cohort import CohortRow, read_cohort
from stas_core.data.image_tables import um_per_px
from stas_core.errors import ConfigError
from stas_core.failures import Failure
from stas_core.tables import read_rows
from workflows import pipeline, prepare_data
from workflows.pipeline import PipelineConfig
from workflows.prepare_data import PrepareConfig

LABELME = (
    '{"shapes": [{"label": "STAS", "shape_type": "polygon", "points": [[4, 4], [30, 4], [30, 30], [4, 30]]}],'
    ' "imageWidth": 64, "imageHeight": 48}'
)
pytestmark = pytest.mark.usefixtures("prepared_here")


@pytest.fixture
def fields(tmp_path: Path) -> Path:
    """Write images a, b, c and d; a and b with an annotation."""
    folder = tmp_path / "fields"
    folder.mkdir()
    for number, name in enumerate("abcd"):
        pixels = np.random.default_rng(number).integers(60, 220, (48, 64, 3), np.uint8)
        (folder / f"{name}.png").write_bytes(images.encode_png(pixels))
    for name in "ab":
        (folder / f"{name}.json").write_text(LABELME)
    return folder


def prepare(fields: Path, out: Path, **data: Any) -> tuple[int, Mapping[str, CohortRow], list[str]]:
    """Return the status, the rows by id, and the ids that failed."""
    values = {"images": f"{fields}/*.png", "annotations": f"{fields}/*.json", **data}
    split = {"num_folds": 2, "hold_out_fraction": 0}
    status = prepare_data.run(config.build(PrepareConfig, {"out": str(out), "data": values, "split": split}), False)
    rows = {row.id: row for row in read_cohort(f"{out}/cohort.parquet")}
    return status, rows, [failure.id for failure in read_rows(f"{out}/failures.parquet", Failure)]


def test_listed_images_hold_no_target_and_others_without_an_annotation_fail(
    fields: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "negatives.csv"
    listed.write_text("image_id;why\nc.png;reviewed\nz;gone\n")
    status, rows, failed = prepare(fields, tmp_path / "out", negatives=str(listed))
    assert (status, sorted(rows), failed) == (1, ["a", "b", "c"], ["d"])
    assert rows["c"].num_targets == 0 and rows["a"].num_targets == 1
    assert "negatives.csv: 1 row(s) name no image to prepare, first z" in capsys.readouterr().out
    listed.write_text("image_id\nc\nd\n")  # another list is another cohort
    status, rows, failed = prepare(fields, tmp_path / "out", negatives=str(listed))
    assert (status, sorted(rows), failed) == (0, ["a", "b", "c", "d"], [])


def test_an_image_that_is_listed_and_annotated_is_refused(fields: Path, tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text("image_id\nb\nc\n")
    with pytest.raises(ConfigError, match=r"n\.csv: 1 of its images have an annotation, such as b: .*b\.json"):
        prepare(fields, tmp_path / "out", negatives=f"{tmp_path}/n.csv")


def test_a_coco_file_that_lists_an_image_without_shapes_says_the_same(fields: Path, tmp_path: Path) -> None:
    for path in fields.glob("*.json"):
        path.unlink()
    size = {"width": 64, "height": 48}
    images = [{"id": number, "file_name": f"{name}.png", **size} for number, name in enumerate("abc", start=1)]
    square = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[4, 4, 30, 4, 30, 30, 4, 30]], "iscrowd": 0}
    coco = {"images": images, "annotations": [square], "categories": [{"id": 1, "name": "STAS"}]}
    (fields / "all.json").write_text(json.dumps(coco))
    (tmp_path / "n.csv").write_text("image_id\nb\nd\n")
    status, rows, _ = prepare(fields, tmp_path / "out", negatives=f"{tmp_path}/n.csv")
    assert status == 0 and {name: row.num_targets for name, row in rows.items()} == {"a": 1, "b": 0, "c": 0, "d": 0}


def test_a_pixel_size_of_its_own_comes_before_that_of_all(fields: Path, tmp_path: Path) -> None:
    table = tmp_path / "mpp.csv"
    table.write_text("image_id,mpp\na.png,0.25\n")
    given = {"mpp_csv": str(table), "mpp": 0.5, "unannotated": "negative"}
    _, rows, _ = prepare(fields, tmp_path / "out", **given)
    assert {name: row.mpp for name, row in rows.items()} == {"a": 0.25, "b": 0.5, "c": 0.5, "d": 0.5}
    assert {row.mpp_source for row in rows.values()} == {"given"}
    table.write_text("image_id,mpp\na.png,0.5\n")
    _, rows, _ = prepare(fields, tmp_path / "out", **given)
    assert {row.mpp for row in rows.values()} == {0.5}


@pytest.mark.parametrize("cell", ["", "0,5", " 0.2523", "5", "0.05"])
def test_numbers_are_read_as_people_write_them(cell: str) -> None:
    if cell:
        assert um_per_px(cell) == float(cell.replace(",", "."))
    else:
        with pytest.raises(ValueError, match=r"expected um per pixel, 0\.05 to 5"):
            um_per_px(cell)


@pytest.mark.parametrize("cell", ["0.5 um", "nan", "inf", "20", "0", "-0.5", "x"])
def test_what_no_microscope_has_is_refused_by_row(cell: str, fields: Path, tmp_path: Path) -> None:
    (tmp_path / "mpp.csv").write_text(f"image_id,mpp\na,{cell}\n")
    with pytest.raises(ConfigError, match=r"data\.mpp_csv = .*, row 2 \(a\), column mpp: .*expected um per pixel"):
        prepare(fields, tmp_path / "out", mpp_csv=f"{tmp_path}/mpp.csv")


def test_a_pipeline_keeps_what_is_said_of_its_images(fields: Path, tmp_path: Path) -> None:
    data = {"images": str(fields), "annotations": str(fields), "mpp": 0.25, "unannotated": "negative"}
    given = config.build(PipelineConfig, {"out": str(tmp_path / "out"), "prepare": {"data": data}})
    opened, _ = pipeline._opened(given)
    assert opened.prepare.data == given.prepare.data
