"""A disk that takes no more while a search runs: it ends at once, and its trials stay open."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from ray.tune import TuneError

from stas_core import config, storage
from stas_core.data.cohort import CohortRow
from stas_core.errors import ConfigError, DeletedOutputError, DivergedError, StasError, StorageError, WriteError
from stas_core.search.space import Dimension, SearchConfig
from stas_core.train.recipe import FoldRecipe
from tests.workflows.made import make_ensemble, make_oof_run
from workflows import choose_ensemble, tune_postprocess, tune_training
from workflows.choose_ensemble import ChooseEnsembleConfig
from workflows.cluster import Node
from workflows.folds.ledger import Ledger
from workflows.folds.proposals import Proposals
from workflows.folds.trial import failure_of
from workflows.full_disk import UntilFullDisk, tune_state
from workflows.tune_postprocess import TunePostprocessConfig
from workflows.tune_training import TuneTrainingConfig

WHY = "cannot write /data/x: No space left on device (ENOSPC); free some space there"
SPACE = {"optim.lr": {"low": 1e-5, "high": 1e-1, "log": True}}


def without_space(monkeypatch: pytest.MonkeyPatch, stage: Any, name: str, folder: Path) -> None:
    """Put a file where a folder should be before a function of a stage: whatever is written below it is refused."""
    function = getattr(stage, name)

    def wrapped(*arguments: Any) -> Any:
        folder.touch()
        return function(*arguments)

    monkeypatch.setattr(stage, name, wrapped)


def refused(run: Any, where: Path) -> None:
    with pytest.raises(StorageError, match=f"^cannot write {where}.*run the same command again$") as found:
        run()
    assert type(found.value).__name__ == "WriteError"


@pytest.mark.parametrize(
    ("error", "failures", "expected"),
    [
        (None, {}, {}),
        (WriteError(WHY), {}, {"unwritable": WHY}),
        (None, {0: "stopped before its last epoch", 1: f"WriteError: {WHY}"}, {"unwritable": WHY}),
        (None, {0: "DivergedError: lower optim.lr", 1: f"WriteError: {WHY}"}, {"unwritable": WHY}),
        (None, {1: f"LocalDiskError: node 10.0.0.1: {WHY}"}, {"unwritable": f"node 10.0.0.1: {WHY}"}),
        (DeletedOutputError("out was deleted"), {}, {"unwritable": "out was deleted"}),
        (None, {1: "DivergedError: lower optim.lr"}, {"failed": "fold 1: DivergedError: lower optim.lr"}),
        (ConfigError("one value under BatchNorm"), {}, {"failed": "one value under BatchNorm"}),
        (DivergedError("lower optim.lr"), {}, {"failed": "lower optim.lr"}),
    ],
)
def test_why_a_trial_failed(error: Exception | None, failures: dict[int, str], expected: dict[str, str]) -> None:
    assert failure_of(error, failures) == expected


@pytest.mark.parametrize(
    ("error", "failures"),
    [(StorageError("a bucket that is away"), {}), (None, {0: "StorageError: a bucket that is away"})],
)
def test_what_a_further_attempt_may_mend_is_raised(error: Exception | None, failures: dict[int, str]) -> None:
    with pytest.raises(StasError, match="a bucket that is away"):
        failure_of(error, failures)


def proposals(out: Path) -> Proposals:
    space = {key: config.build(Dimension, values) for key, values in SPACE.items()}
    return Proposals(Ledger(str(out), space, 3), SearchConfig(num_settings=4, num_random=2), [], 4)


def test_a_trial_that_could_not_write_stays_open_and_nothing_new_is_proposed(tmp_path: Path) -> None:
    search = proposals(tmp_path)
    assert isinstance(search.suggest("a"), dict) and not search.until.stop_all()
    result = {"epoch": 1, "dice": float("nan"), "unwritable": WHY, "time_total_s": 1.0}
    assert search.until("a", result)
    search.on_trial_complete("a", result)
    assert search.until.stop_all() and search.suggest("b") == "FINISHED"
    with pytest.raises(WriteError, match="No space left"):
        search.until.raise_noted()
    assert [record.state for record in Ledger(str(tmp_path), search._ledger.space, 3).records] == ["open"]


def test_a_search_whose_own_record_cannot_be_written_ends(tmp_path: Path) -> None:
    search = proposals(tmp_path)
    assert isinstance(search.suggest("a"), dict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "write_json", lambda *_: exec("raise error", {"error": WriteError(WHY)}))
        search.on_trial_result("a", {"epoch": 1, "dice": 0.5, "time_total_s": 1.0})
    assert search.until.stop_all()
    assert not search.until("a", {"epoch": 2, "dice": 0.6})  # it is the search that ends, not this trial as if weak


def test_temporary_files_that_find_no_room_end_a_search_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    of_tune = "Traceback (most recent call last):\n...\nOSError: [Errno 28] No space left on device\n"
    for error in (TuneError(of_tune), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        found = pytest.raises(WriteError, match=r"^Ray Tune cannot write .*: No space left .*TMPDIR")
        with found, tune_state() as folder:
            raise error
        assert not Path(folder).exists()
    with pytest.raises(TuneError, match="another cause"), tune_state():
        raise TuneError("another cause")
    monkeypatch.setattr(tempfile, "tempdir", __file__)
    with pytest.raises(WriteError, match=r"^cannot make a temporary folder: .*set TMPDIR"), tune_state():
        pass


def test_a_search_of_trainings_ends_at_once(
    ray_nodes: list[Node], tiny_recipe: FoldRecipe, cohort_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    without_space(monkeypatch, tune_training, "_search", out / "trials")
    train = tiny_recipe.model_dump(mode="json")
    train["data"]["cohort"] = cohort_uri
    values = {"out": str(out), "train": train, "space": SPACE, "search": {"num_settings": 4, "num_random": 4}}
    wanted = config.build(TuneTrainingConfig, values | {"parallel_trials": 1})
    refused(lambda: tune_training.run(wanted, False), out / "trials" / "0000")
    assert [trial["state"] for trial in storage.read_json(str(out / "search.json"))["trials"]] == ["open"]
    assert not (out / "trials.parquet").exists()


def test_a_search_of_thresholds_ends_at_once(
    ray_nodes: list[Node],
    cohort_rows: list[CohortRow],
    cohort_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, run = tmp_path / "out", make_oof_run(tmp_path / "run", cohort_rows, cohort_uri)
    without_space(monkeypatch, tune_postprocess, "_search", out / "studies")
    met: list[str] = []

    def note(until: UntilFullDisk, study: str, result: dict[str, Any]) -> bool:
        met.append(study)
        return take_note(until, study, result)

    take_note = UntilFullDisk.__call__
    monkeypatch.setattr(UntilFullDisk, "__call__", note)
    space = {"steps.0.high": {"low": 50, "high": 250}}
    values = {"run": run, "out": str(out), "space": space, "search": {"num_settings": 4, "num_random": 4}}
    wanted = config.build(TunePostprocessConfig, values)
    refused(lambda: tune_postprocess.run(wanted, False), out / "studies")
    assert len(met) == len(set(met)) > 0  # no study is tried again
    assert not (out / "trials.parquet").exists()


def test_a_choice_of_members_ends_at_once(
    ray_nodes: list[Node],
    cohort_rows: list[CohortRow],
    cohort_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = [make_oof_run(tmp_path / name, cohort_rows, cohort_uri) for name in ("a", "b")]
    for run in runs:
        make_ensemble(Path(run))
    out = tmp_path / "out"
    without_space(monkeypatch, choose_ensemble, "predict_maps", out / "maps")
    wanted = config.build(ChooseEnsembleConfig, {"runs": runs, "out": str(out), "flip_sets": [["identity"]]})
    refused(lambda: choose_ensemble.run(wanted, False), out / "maps")
