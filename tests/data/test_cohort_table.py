"""What `read_cohort` takes, what it refuses, and what is done about files that are not those it was made from."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stas_core import storage
from stas_core.data import cohort, images
from stas_core.data.annotations import AnnotationConfig
from stas_core.data.cohort import CohortRow
from stas_core.data.fields import load_image, load_mask
from stas_core.errors import InputError, StasError, StorageError
from stas_core.predict import ensemble
from stas_core.scores import evaluation


def write(folder: Path, cohort_uri: str, **columns: Sequence[Any]) -> str:
    """Write the cohort with other values; return its URI."""
    table = pq.read_table(cohort_uri)
    for name, values in columns.items():
        field = table.schema.field(name)
        kind = field.type if name != "stain_matrix" else pa.list_(pa.float64())
        table = table.set_column(table.column_names.index(name), name, pa.array(values, kind))
    pq.write_table(table, folder / "cohort.parquet")
    return str(folder / "cohort.parquet")


BAD = [
    ("id", "../../x", "can name a file"),
    ("id", "/etc/x", "can name a file"),
    ("id", "a/b", "can name a file"),
    ("id", "..", "can name a file"),
    ("id", "", "can name a file"),
    ("id", "a\nb", "can name a file"),
    ("id", "a::b", "can name a file"),
    ("id", "x" * 300, "can name a file"),
    ("id", None, "row 3 has no id"),
    ("mask_uri", "../../secret.png", "leads out of"),
    ("mask_uri", "masks/../../x.png", "leads out of"),
    ("mask_uri", "", "mask_uri is empty"),
    ("image_uri", "", "image_uri is empty"),
    ("image_uri", "../x.jpg", "leads out of"),
    ("image_uri", None, "row 3 has no image_uri"),
    ("height", 0, "expected 1 px or more"),
    ("width", -5, "expected 1 to"),
    ("width", 2**31 - 1, "expected 1 to"),
    ("fold", -1, "expected 0 or more"),
    ("fold", None, "expected null where split is hold-out"),
    ("split", "test", "expected train or hold-out"),
    ("stratum", 7, "expected 0 to 6"),
    ("foreground_share", float("nan"), "expected 0 to 1"),
    ("num_targets", 99, "as many as target_areas_px"),
    ("target_areas_px", [0], "1 px or more"),
    ("stain_matrix", [1.0, 2.0], "stain_matrix"),
    ("stain_matrix", [float("inf")] * 6, "finite"),
    ("stain_matrix", None, "null where"),
]


@pytest.mark.parametrize(("column", "value", "message"), BAD, ids=[f"{c}={str(v)[:20]!r}" for c, v, _ in BAD])
def test_a_value_that_no_cohort_has_is_refused_by_row_and_column(
    cohort_uri: str, tmp_path: Path, column: str, value: Any, message: str
) -> None:
    values = pq.read_table(cohort_uri)[column].to_pylist()
    values[3] = value
    with pytest.raises(StorageError, match=message) as caught:
        cohort.read_cohort(write(tmp_path, cohort_uri, **{column: values}))
    assert "cohort.parquet" in str(caught.value) and column in str(caught.value) and "\n" not in str(caught.value)


def test_an_id_that_occurs_twice_is_refused(cohort_uri: str, tmp_path: Path) -> None:
    values = pq.read_table(cohort_uri)["id"].to_pylist()
    with pytest.raises(StorageError, match=rf"row 1 \('{values[0]}'\): another row has this id"):
        cohort.read_cohort(write(tmp_path, cohort_uri, id=[values[0], *values[:-1]]))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(max_size=30) | st.text("./\\ab\0:", max_size=9))
def test_whatever_id_is_read_names_a_file_in_its_folder(cohort_uri: str, tmp_path: Path, image_id: str) -> None:
    values = pq.read_table(cohort_uri)["id"].to_pylist()
    uri = write(tmp_path, cohort_uri, id=[image_id, *values[1:]])
    try:
        row = cohort.read_cohort(uri)[0]
    except StasError:
        return
    path = Path(storage.join(str(tmp_path), "masks", f"{row.id}.png"))
    assert path.resolve().parent == tmp_path.resolve() / "masks"


def test_further_columns_and_what_pandas_makes_of_the_table_are_read(
    cohort_uri: str, cohort_rows: list[CohortRow], tmp_path: Path
) -> None:
    frame = pq.read_table(cohort_uri).to_pandas()
    frame["note"] = "x"
    frame["fold"] = frame["fold"].astype("float64")
    frame["height"] = frame["height"].astype("int64")
    frame[sorted(map(str, frame))].to_parquet(tmp_path / "cohort.parquet")
    shutil.copytree(Path(cohort_uri).parent / "masks", tmp_path / "masks")
    rows = cohort.read_cohort(str(tmp_path / "cohort.parquet"))
    assert [replace(row, mask_uri="") for row in rows] == [replace(row, mask_uri="") for row in cohort_rows]
    assert all(load_mask(row).any() for row in rows if row.num_targets)


def test_a_cohort_of_an_earlier_version_is_made_again(cohort_uri: str, tmp_path: Path) -> None:
    old = pq.read_table(cohort_uri).drop_columns(["image_fingerprint", "mask_fingerprint"])
    pq.write_table(old, tmp_path / "cohort.parquet")
    with pytest.raises(StorageError, match=r"no column 'image_fingerprint'.*made again with prepare_data"):
        cohort.read_cohort(str(tmp_path / "cohort.parquet"))


@pytest.fixture
def moved(cohort_rows: list[CohortRow], tmp_path: Path) -> list[CohortRow]:
    """Return the rows of a copy of the cohort's images and masks, which a test may change."""
    rows = []
    for row in cohort_rows:
        image, mask = tmp_path / Path(row.image_uri).name, tmp_path / Path(row.mask_uri).name
        shutil.copy(row.image_uri, image)
        shutil.copy(row.mask_uri, mask)
        rows.append(replace(row, image_uri=str(image), mask_uri=str(mask)))
    return rows


def test_an_image_that_was_swapped_since_is_not_read_with_its_old_mask(moved: list[CohortRow]) -> None:
    load_image(moved[0], 1.0)
    shutil.copy(moved[1].image_uri, moved[0].image_uri)  # of the same size
    with pytest.raises(InputError, match=rf"{moved[0].id}: .* has changed since .*run prepare_data again"):
        load_image(moved[0], 1.0)


def test_a_mask_that_is_not_the_one_that_was_made_is_not_read(moved: list[CohortRow]) -> None:
    mask = load_mask(moved[0])
    Path(moved[0].mask_uri).write_bytes(images.encode_map(mask * np.uint8(255)))
    assert np.array_equal(load_mask(moved[0]), mask)  # another encoding of the same pixels
    Path(moved[0].mask_uri).write_bytes(images.encode_mask(~mask))
    with pytest.raises(InputError, match=rf"{moved[0].id}.* is not the mask .*run prepare_data again"):
        load_mask(moved[0])


def test_a_truth_that_was_swapped_since_is_not_scored_against(moved: list[CohortRow]) -> None:
    absent = dict.fromkeys(["map_uri", "against_uri", "against_map_uri"], "")
    truth, other = moved[0], moved[1]
    item = {"id": truth.id, "group": "", "truth_uri": truth.mask_uri, "mask_uri": other.mask_uri, **absent}
    item |= {"truth_fingerprint": truth.mask_fingerprint}
    assert evaluation.score_files(evaluation.PairedFiles(**item), AnnotationConfig()).failure is None
    shutil.copy(other.mask_uri, truth.mask_uri)
    found = evaluation.score_files(evaluation.PairedFiles(**item), AnnotationConfig())
    assert found.score is None and found.failure is not None
    assert found.failure.reason == "changed_input" and "run prepare_data again" in found.failure.message


@pytest.mark.parametrize("name", ["../other/checkpoints/last", "fold_0/../../x"])
def test_an_ensemble_names_members_below_its_folder_or_by_an_absolute_path(tmp_path: Path, name: str) -> None:
    uri = str(tmp_path / "ensemble.json")
    storage.write_json(uri, {"members": [{"checkpoint": "fold_0/checkpoints/last"}, {"checkpoint": "/x/last"}]})
    assert ensemble.find_checkpoints(uri) == [f"{tmp_path}/fold_0/checkpoints/last", "/x/last"]
    storage.write_json(uri, {"members": [{"checkpoint": name}]})
    with pytest.raises(StorageError, match="checkpoint of member 0"):
        ensemble.find_checkpoints(uri)
