"""What run folders are opened by, and what is said of folders that are none."""

from pathlib import Path

import pytest

from stas_core import storage
from stas_core.errors import CheckpointError, ConfigError, StorageError
from stas_core.networks import checkpoints
from stas_core.runs import TrainingRun, read_ensemble, write_ensemble
from stas_core.scored_runs import ScoredRun


def test_a_folder_without_a_fold_is_no_training_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match=r"run = .* holds no fold_<k>; give the out= of a train_folds run"):
            TrainingRun.open("run", str(folder))
    (tmp_path / "fold_1").mkdir()
    assert TrainingRun.open("run", str(tmp_path)).fold(1).uri == str(tmp_path / "fold_1")


def test_a_folder_without_its_table_is_no_scored_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"against = .* holds no images.parquet; give the output folder of score_"):
        ScoredRun.open("against", str(tmp_path))


def test_checkpoints_are_found_by_fold_once_they_are_whole(tmp_path: Path) -> None:
    run = TrainingRun(str(tmp_path / "run [1]"))
    assert run.checkpoints() == [] and run.fold(0).checkpoints() == []
    whole = [[run.fold(fold).epoch(3), run.fold(fold).last] for fold in (0, 12)]
    for folder in (folder for fold in whole for folder in fold):
        storage.write_bytes(f"{folder}/{checkpoints.RECORD}", b"{}")
    storage.write_bytes(f"{run.fold(1).epoch(1)}/{checkpoints.WEIGHTS}", b"")  # its record would come last
    assert run.checkpoints() == whole
    assert run.fold(12).checkpoints() == whole[1] and run.fold(1).checkpoints() == []


def test_an_ensemble_names_checkpoints_beside_it_or_anywhere(tmp_path: Path) -> None:
    uri = str(tmp_path / TrainingRun.ENSEMBLE)
    write_ensemble(uri, [{"checkpoint": "fold_0/checkpoints/last"}, {"checkpoint": "s3://b/one"}], flips=["identity"])
    assert read_ensemble(uri) == [str(tmp_path / "fold_0/checkpoints/last"), "s3://b/one"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "names no members"),
        ([{"checkpoint": ""}], 'has no "checkpoint"'),
        ([{"checkpoint": "a"}, {"checkpoint": "a"}], "names a twice"),
        ([{"checkpoint": "../a"}], "leads out of"),
    ],
)
def test_an_ensemble_that_cannot_be_used(tmp_path: Path, members: list[dict[str, str]], message: str) -> None:
    uri = str(tmp_path / TrainingRun.ENSEMBLE)
    write_ensemble(uri, members)
    with pytest.raises((CheckpointError, StorageError), match=message):
        read_ensemble(uri)
