"""Records of a million images in a hundred files: `records/part-<number>-<mark>.parquet`, beside loose JSON records.

Workers leave a loose record for each image, and tell the driver what it says; now and then the driver packs those of
finished images into a part and deletes the loose ones, without having read or listed them. A part is whole or absent
and never changed, so a stop between any two steps leaves each record in one place or in both. Of several records of an
image the loose one holds, else that of the latest part: what is done anew is taken back by a loose record
(`ImageRecord.taken_back`), and nothing is ever deleted that hides an older one.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stas_core import local_files, storage, tables
from stas_core.errors import StorageError
from stas_core.scored_runs import RECORDS, ImageRecord, ScoredImage, ScoredRun, ScoredTarget

PART_ROWS = 10_000
"""Loose records that are packed at a time."""
_ROWS_PER_GROUP = 1000
CHUNK_ROWS = 8192
"""Records that are read at a time, in the order of ids; tables of a run are written in pieces that follow from it."""
_MAX_SMALL_PARTS = 16
_READ_THREADS = 16


@dataclass(frozen=True)
class StepTime:
    """How long a step took."""

    step: str
    seconds: float | None


@dataclass(frozen=True)
class PackedRecord:
    """A row of a part: an `ImageRecord`."""

    id: str
    image_uri: str
    stamp: str
    reason: str | None
    message: str
    predict_key: str
    finish_key: str
    limits_key: str
    seconds: list[StepTime]
    found: ScoredImage | None
    targets: list[ScoredTarget]
    folders: list[str]


F = TypeVar("F", bound=Mapping[str, Any])
SCHEMA = tables.schema_of(PackedRecord)
_PLAIN = ("id", "image_uri", "stamp", "reason", "message", "predict_key", "finish_key", "limits_key")


def pack(records: Iterable[ImageRecord]) -> pa.Table:
    """Return records as rows of a part, sorted by id."""
    rows: list[dict[str, Any]] = []
    for record in sorted(records, key=lambda one: one.id):
        found = record.found
        look = None if found is None or found.look is None else vars(found.look)
        rows.append(
            {
                **{name: getattr(record, name) for name in _PLAIN},
                "seconds": [{"step": step, "seconds": seconds} for step, seconds in record.seconds.items()],
                "found": None if found is None else {**vars(found), "look": look},
                "targets": [vars(target) for target in record.targets],
                "folders": list(record.folders),
            }
        )
    try:
        return pa.Table.from_pylist(rows, schema=SCHEMA)
    except (pa.ArrowException, TypeError):
        for row in rows:
            _require_packable(row)
        raise


def _require_packable(row: dict[str, Any]) -> None:
    try:
        pa.Table.from_pylist([row], schema=SCHEMA)
    except (pa.ArrowException, TypeError) as error:
        raise StorageError(
            f"the record of {row['id']} holds a value of a wrong kind ({error}); restore it, or start over by --force"
        ) from error


def unpack(table: pa.Table) -> list[ImageRecord]:
    """Return the records of rows of a part."""
    return [_unpacked(row) for row in tables.from_table(PackedRecord, table)]


def _unpacked(row: PackedRecord) -> ImageRecord:
    seconds = {one.step: one.seconds for one in row.seconds}
    return ImageRecord(**{**vars(row), "seconds": seconds})


def names(run: ScoredRun) -> list[str]:
    """Return the names of a run's parts, the latest last."""
    uri = run.path(RECORDS)
    found = storage.list_files(uri, (".parquet",)) if storage.exists(uri) else []
    return [name for name in map(storage.name_of, found) if name.startswith("part-")]


def compact(run: ScoredRun, ids: Iterable[str] | None = None, *, verify: Callable[[], None]) -> None:
    """Pack loose records into parts and delete them.

    Args:
        run: the run, whose driver this is.
        ids: of images that nobody works on any more; None: nobody works on any.
        verify: raises if this driver has lost the run's folder to another one.

    Raises:
        StorageError: one is no record.
    """
    wanted = sorted(run.files(RECORDS) if ids is None else set(ids))
    for start in range(0, len(wanted), PART_ROWS):
        verify()
        _compact_some(run, wanted[start : start + PART_ROWS])


def packing(run: ScoredRun, rows: Iterable[F], *, verify: Callable[[], None]) -> Iterator[F]:
    """Yield the rows of images that are finished, and pack their records, which the rows bring, as they become many."""
    finished: dict[str, bytes] = {}
    number: int | None = None
    for row in rows:
        yield row
        finished[row["id"]] = row["record"]
        if len(finished) >= PART_ROWS:
            verify()
            number = _last_number(run) if number is None else number
            where = run.path(RECORDS)
            table = pack(ImageRecord.from_json(json.loads(record), where) for record in finished.values())
            number = _write_part(run, table, after=number)
            # An image that was finished twice over has a record that says the same, but for the seconds.
            _remove_loose(run, list(finished))
            finished.clear()


def compact_if_many(run: ScoredRun, *, verify: Callable[[], None]) -> None:
    """Pack the loose records if they are more than a part holds; nobody may be working on an image."""
    loose = run.files(RECORDS)
    if len(loose) > PART_ROWS:
        compact(run, loose, verify=verify)


def _compact_some(run: ScoredRun, ids: Sequence[str]) -> None:
    before = _stamps(run, ids)
    there = [item_id for item_id in ids if before[item_id] is not None]
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        records = list(pool.map(run.read_record, [run.file(RECORDS, item_id) for item_id in there]))
    _write_part(run, pack(records), after=_last_number(run))
    after = _stamps(run, there)  # what was written since is newer than the part, and stays
    _remove_loose(run, [one for one in there if after[one] == before[one]])


def _remove_loose(run: ScoredRun, ids: Sequence[str]) -> None:
    _, suffix = run.KINDS[RECORDS]
    storage.remove_files(run.path(RECORDS), [one + suffix for one in ids])


def _stamps(run: ScoredRun, ids: Sequence[str]) -> dict[str, str | None]:
    """Return the version mark of each loose record; None: there is none."""
    if storage.is_local(run.uri):
        there = {one for one in ids if storage.local_path(run.file(RECORDS, one)).exists()}
    else:
        there = set(ids) & run.files(RECORDS).keys()  # one listing, which has the marks of all
    marks = dict(zip(sorted(there), storage.stamps([run.file(RECORDS, one) for one in sorted(there)]), strict=True))
    return {one: marks.get(one) for one in ids}


def _last_number(run: ScoredRun) -> int:
    return max((int(name.split("-")[1]) for name in names(run)), default=0)


def _write_part(run: ScoredRun, table: pa.Table, *, after: int) -> int:
    """Write a part behind the one of a number; return its own."""
    if table.num_rows == 0:
        return after
    number = after + 1
    # Drivers of which one has lost the folder never write the same file.
    mark = storage.fingerprint(*(str(one) for name in ("id", "predict_key") for one in table[name].to_pylist()))[:8]
    uri = storage.join(run.path(RECORDS), f"part-{number:06d}-{mark}.parquet")
    tables.write_table(uri, table, rows_per_group=_ROWS_PER_GROUP)
    return number


def tidy(run: ScoredRun, records: "Records", *, verify: Callable[[], None]) -> None:
    """Delete parts of which no record holds; where many are small, write theirs anew in full ones."""
    live = records.live_rows()
    dead = [name for name, count in live.items() if count == 0]
    small = [name for name, count in live.items() if 0 < count < PART_ROWS // 2]
    if len(small) > _MAX_SMALL_PARTS:
        verify()
        number = _last_number(run)
        for table in records.of_parts(small):
            number = _write_part(run, table, after=number)
        dead += small
    if dead:
        verify()
        storage.remove_files(run.path(RECORDS), dead)


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        raise StorageError(
            f"{uri} is no part of a run's records ({str(error).splitlines()[0]}); restore it, or start over by --force"
        ) from error


class _Part:
    """A part on this machine's disk, of which a group of rows is in memory."""

    def __init__(self, uri: str, path: str):
        self._uri = uri
        with _reading(uri):
            self._file = pq.ParquetFile(path)
            self.ids = self._file.read(columns=["id"])["id"].combine_chunks()
        about = self._file.metadata
        sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._held: tuple[int, tuple[str, ...] | None, pa.Table] | None = None

    def close(self) -> None:
        self._file.close()

    def take(self, rows: np.ndarray, columns: tuple[str, ...] | None) -> pa.Table:
        """Return rows, whose numbers ascend."""
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        found = [self._group(int(group), columns).take(rows[groups == group] - self._starts[group])
                 for group in np.unique(groups)]  # fmt: skip
        return pa.concat_tables(found)

    def _group(self, group: int, columns: tuple[str, ...] | None) -> pa.Table:
        if self._held is None or self._held[:2] != (group, columns):
            with _reading(self._uri):
                table = self._file.read_row_group(group, columns=list(columns) if columns else None)
            if columns is None and table.schema != SCHEMA:  # of a version that knew fewer figures, or more
                table = pa.Table.from_pylist(table.to_pylist(), schema=SCHEMA)
            self._held = (group, columns, table)
        return self._held[2]


class _Loose:
    """The loose records, as a part that is later than all."""

    def __init__(self, records: Sequence[ImageRecord]):
        self._table = pack(records)
        self.ids = self._table["id"].combine_chunks()

    def close(self) -> None:
        """Do nothing: there is no file."""

    def take(self, rows: np.ndarray, columns: tuple[str, ...] | None) -> pa.Table:
        """Return rows."""
        found = self._table.take(rows)
        if columns is None:
            return found
        sink = pa.BufferOutputStream()  # columns of columns are chosen as in a part
        pq.write_table(found, sink)
        return pq.ParquetFile(pa.BufferReader(sink.getvalue())).read(columns=list(columns))


class Records:
    """The records of a run that hold, one for each image, sorted by id; the loose ones are in memory."""

    def __init__(self, parts: Mapping[str, _Part], loose: _Loose):
        self._names = [*parts, None]
        self._parts: list[_Part | _Loose] = [*parts.values(), loose]
        ids = [part.ids for part in self._parts]
        sizes = np.array([len(one) for one in ids])
        every = pa.concat_arrays(ids)
        part_of = np.repeat(np.arange(len(ids), dtype=np.int32), sizes)
        by_id = pa.table({"id": every, "part": pa.array(part_of)})
        order = pc.sort_indices(by_id, sort_keys=[("id", "ascending"), ("part", "descending")])
        ordered = every.take(order)
        first = np.ones(len(every), bool)
        if len(every) > 1:
            first[1:] = pc.not_equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False)
        chosen = order.to_numpy()[first].astype(np.int64)
        self._part_of = part_of[chosen]
        self._row_of = chosen - (np.cumsum(sizes) - sizes)[self._part_of]

    def __len__(self) -> int:
        return len(self._part_of)

    @property
    def part_names(self) -> list[str | None]:
        """The part that has each record, by position; None: it is a loose one."""
        return [self._names[index] for index in self._part_of]

    def chunks(self, *columns: str) -> Iterator[pa.Table]:
        """Yield the records as rows of parts, a few thousand at a time; of all columns, or those named."""
        for start in range(0, len(self), CHUNK_ROWS):
            yield self.take(np.arange(start, min(start + CHUNK_ROWS, len(self))), *columns)

    def take(self, positions: np.ndarray, *columns: str) -> pa.Table:
        """Return records by their positions in the order of ids."""
        part_of, row_of = self._part_of[positions], self._row_of[positions]
        order = np.lexsort((row_of, part_of))
        pieces = [self._parts[index].take(np.sort(row_of[part_of == index]), columns or None)
                  for index in np.unique(part_of)]  # fmt: skip
        return pa.concat_tables(pieces).take(np.argsort(order))

    def live_rows(self) -> dict[str, int]:
        """Return how many records of each part hold."""
        counts = np.bincount(self._part_of, minlength=len(self._names))
        return {name: int(count) for name, count in zip(self._names, counts, strict=True) if name is not None}

    def of_parts(self, chosen: Iterable[str]) -> Iterator[pa.Table]:
        """Yield the records that hold of some parts, sorted by id, in pieces of a part's size."""
        positions = np.flatnonzero(np.isin(self._part_of, [self._names.index(name) for name in chosen]))
        for start in range(0, len(positions), PART_ROWS):
            yield self.take(positions[start : start + PART_ROWS])


@contextmanager
def opened(run: ScoredRun) -> Iterator[Records]:
    """Give the records of a run that hold. Parts that lie elsewhere are copied to this machine for the time.

    Raises:
        StorageError: a file among them is no record, or no part.
    """
    with ExitStack() as stack:
        paths = {name: storage.join(run.path(RECORDS), name) for name in names(run)}
        local = dict(paths)
        if not storage.is_local(run.uri):
            folder = stack.enter_context(local_files.temporary_folder())
            local = {name: str(Path(folder, name)) for name in paths}
            with ThreadPoolExecutor(_READ_THREADS) as pool:
                list(pool.map(storage.fetch_file, paths.values(), map(Path, local.values())))
        parts = {}
        for name, uri in paths.items():
            parts[name] = _Part(uri, local[name])
            stack.callback(parts[name].close)
        yield Records(parts, _Loose(run.records()))


@lru_cache(maxsize=2)
def _whole_part(uri: str) -> pa.Table:
    with _reading(uri):
        return pq.read_table(pa.BufferReader(storage.read_bytes(uri)))


def read_one(run: ScoredRun, part: str, item_id: str) -> ImageRecord | None:
    """Return an image's record in a part, if it is there; blocks of images follow ids, and mostly need one part."""
    table = _whole_part(storage.join(run.path(RECORDS), part))
    row = pc.index(table["id"], item_id).as_py()
    if row < 0:
        return None
    return _unpacked(tables.from_table(PackedRecord, pa.Table.from_pylist(table.slice(row, 1).to_pylist(), SCHEMA))[0])
