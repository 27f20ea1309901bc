"""Records of other settings never pass for those of a run."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stas_core import record_parts, storage
from stas_core.errors import OccupiedOutputError, StorageError
from stas_core.predict.postprocess import PostprocessConfig
from stas_core.scored_runs import ImageRecord, ScoredImage, ScoredRun, ScoredTarget
from workflows.scoring.image_results import require_held
from workflows.scoring.tasks import Item, LimitsConfig, SaveConfig, ScoreTask


def scored(image_id: str, **values: Any) -> ImageRecord:
    found = ScoredImage(image_id, f"{image_id}.png", 20, 30, 0.25, 1, 1, 0.125, 4)
    target = ScoredTarget(image_id, 1, 150, 12.5, 9.5, 5, 5, 20, 15, 0.75, 0.875, False)
    files = {"found": found, "targets": [target], "folders": ["masks", "maps"], "seconds": {"decode_s": 0.5}}
    plain = {"image_uri": f"{image_id}.png", "stamp": "1", "predict_key": "weights", "limits_key": "none"}
    return ImageRecord(**{"id": image_id, **plain, **files, **values})


@pytest.mark.parametrize("key", ["stamp", "predict_key", "finish_key"])
def test_a_record_that_another_run_wrote_in_the_meantime_ends_the_run(tmp_path: Path, key: str) -> None:
    task = ScoreTask(str(tmp_path), "weights", PostprocessConfig(), SaveConfig(), LimitsConfig())
    items = [Item(id=name, image_uri=f"{name}.png", stamp="1") for name in ("a", "b")]
    records = [scored(item["id"], finish_key=task.finish_key, limits_key=task.limits.key) for item in items]
    for record in records:
        task.run.write_record(record)
    with record_parts.opened(task.run) as found:
        assert require_held(task, found, items)[0].tolist() == [0, 1]
    storage.write_json(task.file("records", "b"), records[1].to_json() | {key: "other"})
    with (
        record_parts.opened(task.run) as found,
        pytest.raises(OccupiedOutputError, match=r"1 of 2 records .* are of other settings .* e\.g\. b:"),
    ):
        require_held(task, found, items)
    assert replace(task, limits=LimitsConfig(retries=3)).limits.key != task.limits.key


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"{}", b'{"id": "a", "stamp": "1"}'])
def test_a_damaged_record_is_named(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "a.json").write_bytes(damaged)
    with pytest.raises(StorageError, match=r"records/a\.json"):
        ScoredRun(str(tmp_path)).records()


AS_WRITTEN = """{
 "id": "a",
 "image_uri": "a.png",
 "stamp": "1",
 "height": 20,
 "width": 30,
 "foreground_share": 0.25,
 "num_targets": 1,
 "stage": 1,
 "mean_disagreement": 0.125,
 "num_passes": 4,
 "targets": [
  {
   "id": "a",
   "target": 1,
   "area_px": 150,
   "centroid_x": 12.5,
   "centroid_y": 9.5,
   "x0": 5,
   "y0": 5,
   "x1": 20,
   "y1": 15,
   "mean_prob": 0.75,
   "peak_prob": 0.875,
   "touches_border": false
  }
 ],
 "folders": [
  "masks",
  "maps"
 ],
 "predict_key": "weights",
 "finish_key": "these",
 "limits_key": "none",
 "seconds": {
  "decode_s": 0.5
 }
}
"""
FAILED = """{
 "id": "a",
 "image_uri": "a.png",
 "stamp": "1",
 "reason": "empty_file",
 "message": "a.png holds 0 bytes",
 "predict_key": "weights",
 "finish_key": "these",
 "limits_key": "none",
 "seconds": {
  "decode_s": null,
  "write_s": 0.5
 }
}
"""


@pytest.mark.parametrize("text", [AS_WRITTEN, FAILED])
def test_records_are_read_and_written_as_they_were(tmp_path: Path, text: str) -> None:
    run = ScoredRun(str(tmp_path))
    storage.write_bytes(run.file("records", "a"), text.encode())
    record = run.record("a")
    assert record is not None
    if text == AS_WRITTEN:
        assert record == scored("a", finish_key="these")
    storage.remove(run.file("records", "a"))
    run.write_record(record)
    assert Path(run.file("records", "a")).read_text() == text
    assert run.record("b") is None


@given(
    st.builds(ScoredImage, id=st.just("a"), image_uri=st.just("a.png"), mean_disagreement=st.floats(0, 0.5)),
    st.lists(st.builds(ScoredTarget, mean_prob=st.floats(0, 1), peak_prob=st.floats(0, 1)), max_size=3),
    st.lists(st.sampled_from(["masks", "maps"]), max_size=2),
)
def test_any_record_comes_back(found: ScoredImage, targets: list[ScoredTarget], folders: list[str]) -> None:
    assume("NaN" not in (text := json.dumps([asdict(found), [asdict(one) for one in targets]])))
    assume("Infinity" not in text)
    record = scored("a", finish_key="", found=found, targets=targets, folders=folders)
    run = ScoredRun("memory://records")
    run.write_record(record)
    assert run.record("a") == record
    assert run.records() == [record]


@pytest.mark.parametrize(
    "damage", [{"height": None}, {"targets": None}, {"targets": [{"id": "a"}]}, {"targets": [3]}, {"seconds": None}]
)
def test_a_record_that_lacks_a_value_is_named(tmp_path: Path, damage: dict[str, Any]) -> None:
    run = ScoredRun(str(tmp_path))
    values = scored("a", finish_key="these").to_json() | damage
    kept = {key: value for key, value in values.items() if value is not None}
    storage.write_json(run.file("records", "a"), kept)
    with pytest.raises(StorageError, match=r"records/a\.json (says neither|has no)"):
        run.records()
