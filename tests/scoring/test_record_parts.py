"""Records in parts: whatever stops between any two writes, none is lost, and none vouches for files of another run."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core import record_parts, storage
from stas_core.data import images
from stas_core.data.appearance import Look
from stas_core.errors import OccupiedOutputError, StorageError
from stas_core.predict.postprocess import PostprocessConfig
from stas_core.scored_runs import MAPS, RECORDS, ImageRecord, ScoredRun
from tests.scoring.test_gathering import scored
from workflows.scoring import image_results, tasks
from workflows.scoring.settling import read_standings, split_todo
from workflows.scoring.tasks import PREDICTED, Item, LimitsConfig, SaveConfig, ScoreTask

SAVE = SaveConfig(overlays=False, geojson=False)
IDS = "abcdef"


def free() -> None:
    """Stand for a lease that is held."""


def in_parts(run: ScoredRun) -> list[ImageRecord]:
    with record_parts.opened(run) as records:
        return [record for table in records.chunks() for record in record_parts.unpack(table)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_parts, "PART_ROWS", 2)
    monkeypatch.setattr(record_parts, "CHUNK_ROWS", 3)
    monkeypatch.setattr(record_parts, "_MAX_SMALL_PARTS", 2)


@pytest.mark.parametrize("out", ["memory://parts/out", None])
@pytest.mark.usefixtures("small")
def test_records_come_back_from_parts_as_they_were(tmp_path: Path, out: str | None) -> None:
    run = ScoredRun(out or str(tmp_path))
    good = scored("b", finish_key="these")
    assert good.found is not None
    seen = replace(good.found, look=Look(brightness=1.5, sharpness=None), drift=None)
    records = [
        replace(good, id=name, found=replace(seen, id=name), targets=[replace(good.targets[0], id=name)] * number)
        for number, name in enumerate("adcé")
    ]
    failed = scored("e", found=None, targets=[], folders=[], reason="slow", message="too slow", finish_key="")
    odd = scored("f.parquet", finish_key="these", seconds={"decode_s": None, "another_s": 1.5})
    for record in (*records, failed, odd):
        run.write_record(record)
    expected = sorted([*records, failed, odd], key=lambda one: one.id)
    assert in_parts(run) == expected
    record_parts.compact(run, ["a", "c", "d", "nothing"], verify=free)
    assert sorted(run.files(RECORDS)) == ["e", "f.parquet", "é"] and len(record_parts.names(run)) == 2
    assert in_parts(run) == expected
    record_parts.compact_if_many(run, verify=free)
    assert not run.files(RECORDS) and len(record_parts.names(run)) == 4
    assert in_parts(run) == expected
    assert record_parts.read_one(run, record_parts.names(run)[0], "a") == records[0]
    assert record_parts.read_one(run, record_parts.names(run)[0], "é") is None


@pytest.mark.usefixtures("small")
def test_the_latest_record_of_an_image_holds(tmp_path: Path) -> None:
    run = ScoredRun(str(tmp_path))
    for stamp in ("1", "2", "3"):
        for name in "abc":
            run.write_record(scored(name, finish_key="these", stamp=stamp))
        record_parts.compact(run, verify=free)
    run.write_record(scored("b", finish_key="these", stamp="4"))
    assert [record.stamp for record in in_parts(run)] == ["3", "4", "3"]
    with record_parts.opened(run) as found:
        record_parts.tidy(run, found, verify=free)
    assert len(record_parts.names(run)) == 2  # none holds of the others
    assert [record.stamp for record in in_parts(run)] == ["3", "4", "3"]


@pytest.mark.usefixtures("small")
def test_many_small_parts_become_full_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ScoredRun(str(tmp_path))
    monkeypatch.setattr(record_parts, "PART_ROWS", 4)
    for name in "edcba":
        run.write_record(scored(name, finish_key="these", stamp=name))
        record_parts.compact(run, verify=free)
    with record_parts.opened(run) as found:
        record_parts.tidy(run, found, verify=free)
    assert [name[:11] for name in record_parts.names(run)] == ["part-000006", "part-000007"]
    assert [record.stamp for record in in_parts(run)] == list("abcde")


def test_who_lost_the_folder_packs_nothing(tmp_path: Path) -> None:
    run = ScoredRun(str(tmp_path))
    run.write_record(scored("a", finish_key="these"))

    def lost() -> None:
        raise OccupiedOutputError("another run has it")

    with pytest.raises(OccupiedOutputError):
        record_parts.compact(run, verify=lost)
    assert list(run.files(RECORDS)) == ["a"] and not record_parts.names(run)


def test_a_record_that_was_written_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, write = ScoredRun(str(tmp_path)), storage.write_bytes
    for name in "ab":
        run.write_record(scored(name, finish_key="these"))

    def write_bytes(uri: str, data: bytes) -> None:
        write(uri, data)
        if uri.endswith(".parquet"):
            run.write_record(scored("b", finish_key="later, by a task that was thought lost"))

    monkeypatch.setattr(storage, "write_bytes", write_bytes)
    record_parts.compact(run, verify=free)
    assert list(run.files(RECORDS)) == ["b"]
    assert [record.finish_key[:5] for record in in_parts(run)] == ["these", "later"]


@pytest.mark.parametrize("damaged", [b"", b"PAR1", b"{}", b"PAR1" * 30])
def test_a_damaged_part_is_named(tmp_path: Path, damaged: bytes) -> None:
    run = ScoredRun(str(tmp_path))
    storage.write_bytes(run.path("records/part-000001-0000.parquet"), damaged)
    with pytest.raises(StorageError, match=r"records/part-000001-0000\.parquet is no part .* restore it"):
        in_parts(run)


class Stopped(BaseException):
    """The driver and all its tasks are killed."""


@contextmanager
def stopping_after(num_writes: int | None) -> Iterator[None]:
    """Stop before a write or a deletion; files are deleted one by one."""
    left = [1_000_000 if num_writes is None else num_writes]

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped
            return step(*given)

        return call

    remove_files = counted(storage.remove_files)
    steps: dict[str, Any] = {
        "write_bytes": counted(storage.write_bytes),
        "remove": counted(storage.remove),
        "remove_files": lambda uri, names: [remove_files(uri, [name]) for name in names],
    }
    with mock.patch.multiple(storage, **steps):
        yield


class Run:
    """A run that is stopped before some write, if it makes so many."""

    def __init__(self, out: str, key: int, min_target_px: int, ids: str):
        cascade = PostprocessConfig(min_target_px=min_target_px)
        self.key = key
        self.task = ScoreTask(out, f"weights {key}", cascade, SAVE, LimitsConfig())
        self.items = [Item(id=name, image_uri=f"{name}.png", stamp="1") for name in sorted(ids)]
        self.finished = list[str]()

    def go(self, num_writes: int | None = None) -> bool:
        """Do what a driver and its tasks do; tell whether they came to the end."""
        with stopping_after(num_writes):
            try:
                self._go()
            except Stopped:
                return False
        return True

    def _go(self) -> None:
        run = self.task.run
        record_parts.compact_if_many(run, verify=free)
        fresh, from_maps = split_todo(self.items, read_standings(run, self.items), self.task)
        for _ in record_parts.packing(run, map(self._predict, fresh), verify=free):
            pass
        for _ in record_parts.packing(run, map(self._finish_again, from_maps), verify=free):
            pass
        record_parts.compact_if_many(run, verify=free)
        with record_parts.opened(run) as records:
            image_results.require_held(self.task, records, self.items)
            known = {item["id"] for item in self.items}
            image_results.prune(self.task, known, known, frozenset(IDS))
            record_parts.tidy(run, records, verify=free)

    def _predict(self, item: Item) -> dict[str, Any]:
        prob = np.full((4, 5), self.key, np.uint8)  # so that the map says what made it
        values = {"height": 4, "width": 5, "prob": prob.tobytes(), "mean_disagreement": 0.0, "num_passes": 4}
        row = dict.fromkeys(PREDICTED.names) | dict(item) | values | {"decode_s": 0.0}
        (found,) = tasks.finish(self.task, pa.Table.from_pylist([row], schema=PREDICTED)).to_pylist()
        self.finished.append(item["id"])
        return dict(found)

    def _finish_again(self, item: Item) -> dict[str, Any]:
        (found,) = tasks.refinish(self.task, pa.Table.from_pylist([item])).to_pylist()
        self.finished.append(item["id"])
        return dict(found)

    def check(self, before: dict[str, ImageRecord]) -> None:
        """Check every record against the files, those of finished images, and those that the run did not touch."""
        after = {one.id: one for one in in_parts(self.task.run)}
        for name, record in after.items():
            if record.predict_key:
                assert self._map_key(name) in (None, int(record.predict_key[-1])), name
        for name in self.finished:
            assert self._is_done(after[name]), name
        listed = {item["id"] for item in self.items}
        for name, record in before.items():
            if name in listed and self._is_done(record) and self._map_key(name) is not None:
                assert self._is_done(after[name]), name

    def _is_done(self, record: ImageRecord) -> bool:
        return (record.predict_key, record.finish_key) == (self.task.predict_key, self.task.finish_key)

    def _map_key(self, image_id: str) -> int | None:
        """Return the key under which an image's map was made; None: it has none."""
        uri = self.task.file(MAPS, image_id)
        return int(images.decode_map(storage.read_bytes(uri), uri)[0, 0]) if storage.exists(uri) else None


def all_done(run: Run) -> bool:
    return sorted(one.id for one in in_parts(run.task.run) if one.id in {item["id"] for item in run.items}) == [
        item["id"] for item in run.items
    ]


@pytest.mark.parametrize(
    ("part_rows", "runs"),
    [
        (2, [(1, 1, "abcd")]),
        (2, [(1, 1, "abc"), (1, 2, "abc")]),  # other thresholds
        (4, [(1, 1, IDS), (2, 1, "ace")]),  # other weights, of fewer images
        (2, [(1, 1, "abcde"), (2, 1, "b"), (1, 1, "bc")]),  # and back
    ],
)
def test_a_stop_before_any_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_rows: int, runs: list[tuple[int, int, str]]
) -> None:
    for name, value in {"PART_ROWS": part_rows, "CHUNK_ROWS": 3, "_MAX_SMALL_PARTS": 1}.items():
        monkeypatch.setattr(record_parts, name, value)
    for earlier in runs[:-1]:
        assert Run(str(tmp_path / "before"), *earlier).go()
    before = {one.id: one for one in in_parts(ScoredRun(str(tmp_path / "before")))}
    for num_writes in range(1_000):
        out = tmp_path / str(num_writes)
        if before:
            shutil.copytree(tmp_path / "before", out)
        stopped = Run(str(out), *runs[-1])
        ended = stopped.go(num_writes)
        stopped.check(before)
        then = {one.id: one for one in in_parts(stopped.task.run)}
        again = Run(str(out), *runs[-1])
        assert again.go() and all_done(again)
        again.check(then)
        assert not set(again.finished) & set(stopped.finished)  # nothing is done twice
        if ended:
            break
        shutil.rmtree(out)


RUNS = st.lists(
    st.tuples(
        st.integers(1, 2),  # weights
        st.integers(1, 2),  # thresholds
        st.sets(st.sampled_from(IDS), min_size=1).map("".join),
        st.one_of(st.none(), st.integers(0, 60)),  # writes until all is killed
    ),
    min_size=2,
    max_size=5,
)


@settings(max_examples=15, deadline=None)
@given(RUNS)
def test_any_runs_stopped_anywhere(runs: list[tuple[int, int, str, int | None]]) -> None:
    out = tempfile.mkdtemp()
    try:
        with mock.patch.multiple(record_parts, PART_ROWS=2, CHUNK_ROWS=3):
            for key, min_target_px, ids, num_writes in runs:
                run = Run(out, key, min_target_px, ids)
                before = {one.id: one for one in in_parts(run.task.run)}
                run.go(num_writes)
                run.check(before)
    finally:
        shutil.rmtree(out)
