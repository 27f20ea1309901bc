"""Records of other settings never pass for those of a run."""

from dataclasses import replace
from pathlib import Path

import pytest

from stas_core import storage
from stas_core.errors import OccupiedOutputError, StorageError
from stas_core.predict.postprocess import PostprocessConfig
from workflows.score_images import gather_records, read_records
from workflows.scoring.tasks import LimitsConfig, SaveConfig, ScoreTask


@pytest.mark.parametrize("key", ["stamp", "predict_key", "finish_key"])
def test_a_record_that_another_run_wrote_in_the_meantime_ends_the_run(tmp_path: Path, key: str) -> None:
    task = ScoreTask(str(tmp_path), "weights", PostprocessConfig(), SaveConfig(), LimitsConfig())
    keys = {"predict_key": "weights", "finish_key": task.finish_key, "limits_key": task.limits.key, "seconds": {}}
    items = [{"id": name, "image_uri": f"{name}.png", "stamp": "1"} for name in ("a", "b")]
    for item in items:
        storage.write_json(task.file("records", item["id"]), item | keys)
    assert [record["id"] for record in gather_records(task, items)] == ["a", "b"]
    storage.write_json(task.file("records", "b"), items[1] | keys | {key: "other"})
    with pytest.raises(OccupiedOutputError, match=r"1 of 2 records .* are of other settings .* e\.g\. b:"):
        gather_records(task, items)
    assert replace(task, limits=LimitsConfig(retries=3)).limits.key != task.limits.key


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"{}", b'{"id": "a", "stamp": "1"}'])
def test_a_damaged_record_is_named(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "a.json").write_bytes(damaged)
    with pytest.raises(StorageError, match=r"records/a\.json"):
        read_records(str(tmp_path))
