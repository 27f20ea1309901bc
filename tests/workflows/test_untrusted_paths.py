"""Ids and paths that stages read from tables never lead out of a stage's folders. Nothing here starts Ray."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stas_core import config, tables
from stas_core.data.cohort import CohortRow
from stas_core.errors import ConfigError, StasError, StorageError
from stas_core.runs import TrainingRun
from tests.workflows.made import make_oof_run
from workflows import choose_ensemble, score_images
from workflows.folds.training import TrainFoldsConfig, chosen_folds, train


@pytest.fixture
def run_uri(cohort_rows: list[CohortRow], cohort_uri: str, tmp_path: Path) -> str:
    return make_oof_run(tmp_path / "run", cohort_rows, cohort_uri)


def test_an_id_that_leaves_the_folder_trains_nothing(cohort_uri: str, tmp_path: Path) -> None:
    table = pq.read_table(cohort_uri)
    names = ["../../x", *table["id"].to_pylist()[1:]]
    table = table.set_column(0, table.schema.field("id"), pa.array(names))
    pq.write_table(table, tmp_path / "cohort.parquet")
    out = tmp_path / "a" / "out"
    with pytest.raises(StorageError, match=r"row 0 \('\.\./\.\./x'\), column id"):
        train(
            config.build(TrainFoldsConfig, {"data": {"cohort": str(tmp_path / "cohort.parquet")}, "out": str(out)}),
            False,
        )
    assert not out.exists()


@pytest.mark.parametrize("fold", [0, None])
def test_a_cohort_without_other_folds_to_train_on(cohort_rows: list[CohortRow], fold: int | None) -> None:
    rows = [replace(row, fold=fold) for row in cohort_rows]
    with pytest.raises(ConfigError, match="two or more are needed"):
        chosen_folds(TrainFoldsConfig(), rows)


@pytest.mark.parametrize("name", ["../../../secret.png", "oof/../../../x.png", ""])
def test_a_map_outside_its_fold_is_not_read(run_uri: str, name: str) -> None:
    index = f"{run_uri}/fold_1/oof.parquet"
    table = pq.read_table(index)
    maps = pa.array([name, *table["map_uri"].to_pylist()[1:]])
    pq.write_table(table.set_column(2, table.schema.field("map_uri"), maps), index)
    with pytest.raises(StorageError, match=r"fold_1/oof.parquet: row 0 .*column map_uri"):
        TrainingRun(run_uri).maps()


def test_an_image_counts_once(run_uri: str) -> None:
    index = f"{run_uri}/fold_0/oof.parquet"
    table = pq.read_table(index)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), index)
    with pytest.raises(ConfigError, match="an earlier row has this image"):
        TrainingRun(run_uri).maps()


@pytest.mark.parametrize("text", ["", "data: x\n", "[1]\n", "data: {cohort: null}\n"])
def test_a_run_that_names_no_cohort(run_uri: str, text: str) -> None:
    Path(run_uri, "config.resolved.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config.resolved.yaml names no data.cohort"):
        TrainingRun(run_uri).maps()


def test_members_of_two_runs_keep_their_names_apart(tmp_path: Path) -> None:
    runs = [str(tmp_path / name) for name in ("x/a", "y/a", "z/a#0")]
    with pytest.raises(ConfigError, match="two folders go by the name a#0"):
        choose_ensemble._members(runs, 0, 0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_uri": ["a.jpg", "../../b.jpg"]}, r"row 1, column image_uri: '../../b.jpg' leads out of"),
        ({"image_uri": ["a.jpg", None]}, "row 1 has no image_uri"),
        ({"image_uri": ["a.jpg", ""]}, "row 1, column image_uri is empty"),
        ({"image_uri": [1.5, 2.5]}, "'image_uri' is of type double, expected string"),
        ({"image_uri": ["a.jpg"], "id": [1.0]}, "'id' is of type double, expected string"),
        ({"path": ["a.jpg"]}, r"no column 'image_uri'.*it has \['path'\]"),
        ({"image_uri": pa.array([], pa.string())}, "has no rows"),
    ],
)
def test_a_list_of_images_that_cannot_be_used(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    uri = str(tmp_path / "list.parquet")
    pq.write_table(pa.table(columns), uri)
    with pytest.raises(StasError, match=message) as caught:
        score_images.find_images(uri)
    assert "list.parquet" in str(caught.value)


def test_a_split_that_a_list_does_not_have(cohort_uri: str) -> None:
    with pytest.raises(ConfigError, match=r"data.split = hold-out: .* has \['train'\]; choose one"):
        score_images.find_images(cohort_uri, "hold-out")


def test_ids_that_name_no_file_are_failures_of_their_images(tmp_path: Path) -> None:
    bad = ["../x", "a/b", "", ".x", "a::b", "a?versionId=1", "a\tb", "x" * 201]
    good = ["7", "Präparat 3", "a.b", "图 像"]
    uri = str(tmp_path / "list.parquet")
    images = [f"/data/{number}.jpg" for number in range(len(bad + good))]
    tables.write_table(uri, pa.table({"image_uri": images, "id": bad + good}))
    items, refused, _ = score_images.find_images(uri)
    assert sorted(item["id"] for item in items) == sorted(good)
    assert {failure.id: failure.reason for failure in refused} == dict.fromkeys(
        [*bad[:6], r"a\tb", bad[7]], "unusable_id"
    )
