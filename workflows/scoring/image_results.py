"""What a run of score_images comes to: records gathered into tables and archives, and stale files deleted.

Records are read a few thousand at a time, in the order of ids; what is kept of an image is a few numbers.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stas_core import failures, record_parts, review, scored_verdicts, storage, tables
from stas_core.arrays import RgbImage
from stas_core.data import images, overlay
from stas_core.data.reference import CohortReference
from stas_core.errors import ConfigError, InputError, OccupiedOutputError
from stas_core.failures import Failure
from stas_core.predict import exports
from stas_core.record_parts import Records
from stas_core.review import ReviewField
from stas_core.scored_runs import MASKS, RECORDS, ScoredImage, ScoredRun, ScoredTarget
from stas_core.scored_verdicts import ImageFigures
from stas_core.verdicts import VerdictConfig
from workflows.conclusion import recorded
from workflows.progress import doing
from workflows.scoring.guarded_reader import GuardedReader
from workflows.scoring.tasks import STEPS, Item, ScoreTask

STAGE = ScoredRun.STAGE
SHEET_IMAGES, SHEET_WIDTH_PX = 16, 480
READ_THREADS = 16
MOST_REVIEWED = 10_000
"""Images of the review queue: the first of it."""
_MASKS_AT_ONCE = 256
_HELD = ("id", "stamp", "reason", "predict_key", "finish_key", "limits_key")
_BOX = ("x0", "y0", "x1", "y1", "mean_prob")
_TYPES: dict[str, pa.DataType] = {"id": pa.string()} | dict.fromkeys(STEPS, pa.float64())
_TIMINGS = pa.schema(_TYPES)


@dataclass(frozen=True)
class Given:
    """What a run is given, beside its ensemble."""

    items: Sequence[Item]
    refused: Sequence[Failure]
    passed_over: Mapping[str, int]
    reference: CohortReference | None
    """What the ensemble was trained on, if it says that."""
    unchecked: tuple[str, ...]
    """Of the pixel size, in words."""


@doing("gathering the results, writing the tables and the contact sheet")
def write_results(
    task: ScoreTask,
    given: Given,
    *,
    own: frozenset[str],
    limits: VerdictConfig,
    verify: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Gather the records into tables and archives; delete stale files of the run's `own` ids.

    Args:
        task: of the run.
        given: its images.
        own: all ids that files of the folder are called by.
        limits: of the verdict.
        verify: raises if the run has lost its folder to another one.

    Raises:
        ConfigError, OccupiedOutputError: as `require_held`.
    """
    run = task.run
    record_parts.compact_if_many(run, verify=verify)
    with record_parts.opened(run) as records:
        positions, failed_ids = require_held(task, records, given.items)
        good_ids = [item["id"] for item in given.items if item["id"] not in failed_ids]
        prune(task, set(good_ids), {item["id"] for item in given.items}, own)
        gathered = _write_tables(task, records, positions, given, limits)
        for line in failures.lines(gathered.failed):
            print(line)
        if task.save.archive:
            with storage.written_whole(run.path(run.SEGMENTATION)) as path, path.open("wb") as file:
                exports.write_archive(file, _masks(task, good_ids))
        if good_ids:
            storage.write_bytes(
                run.path(run.CONTACT_SHEET), contact_sheet(task, _spread(records, gathered), len(good_ids))
            )
        record_parts.tidy(run, records, verify=verify)
    verdict = gathered.figures.verdict(len(gathered.failed), unchecked=given.unchecked)
    counts = {"num_failures": len(gathered.failed), "num_targets": gathered.num_targets}
    return {"num_images": len(good_ids), **counts, **recorded(verdict, limits)}


def require_held(task: ScoreTask, records: Records, items: Sequence[Item]) -> tuple[np.ndarray, set[str]]:
    """Return where the records of a run's images are, by id, and which have failed; all are found to be this run's.

    Raises:
        ConfigError: an image has none.
        OccupiedOutputError: a record is not this run's: what it says, and its files, follow from other settings.
    """
    stamps = {item["id"]: item["stamp"] for item in items}
    positions, failed, strange = array("q"), set[str](), list[str]()
    position, own_finish, own_limits = 0, task.finish_key, task.limits.key
    for table in records.chunks(*_HELD):
        columns = [table[name].to_pylist() for name in _HELD]
        for item_id, stamp, reason, predict_key, finish_key, limited_by in zip(*columns, strict=True):
            if (known := stamps.get(item_id)) is not None:
                positions.append(position)
                key_holds = finish_key == own_finish if reason is None else limited_by == own_limits
                if (stamp, predict_key) != (known, task.predict_key) or not key_holds:
                    strange.append(item_id)
                if reason is not None:
                    failed.add(item_id)
            position += 1
    run = task.run
    where = run.path(RECORDS)
    if len(positions) < len(stamps):
        found = {item_id for table in records.chunks("id") for item_id in table["id"].to_pylist()}
        lost = stamps.keys() - found
        raise ConfigError(f"{len(lost)} {run.ITEMS} have no record in {where}, e.g. {min(lost)}; run again")
    if strange:
        raise OccupiedOutputError(
            f"{len(strange)} of {len(positions)} records in {where} are of other settings or {run.ITEMS}, e.g. "
            f"{strange[0]}: another run has worked there in the meantime; run again when none does"
        )
    return np.array(positions, np.int64), failed


def _pieces(positions: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(positions), record_parts.CHUNK_ROWS):
        yield positions[start : start + record_parts.CHUNK_ROWS]


@dataclass
class _Gathered:
    """What is kept of the records when the tables are written."""

    figures: ImageFigures
    failed: list[Failure]
    good: array  # type: ignore[type-arg]
    """Positions of the records of images that were scored."""
    num_targets: int = 0
    queue: list[ReviewField] = field(default_factory=list)
    """The images so far that most deserve a look, without ranks."""

    def review(self, found: Sequence[ScoredImage], boxes: pa.Table, reference: CohortReference | None) -> None:
        """Take images and their targets into the review queue."""
        usual = None if reference is None else reference.disagreement
        columns: list[list[Any]] = [boxes[name].to_pylist() for name in ("mean_prob", "area_px")]
        (sure, areas), end = columns, 0
        for image in found:
            start, end = end, end + image.num_targets
            relative = image.mean_disagreement / usual if usual else None
            doubts = review.doubts_of(image.drift, relative, sure[start:end], areas[start:end])
            if doubts:
                priority = round(review.together(doubts.values()), 4)
                row = ReviewField(0, image.id, image.image_uri, priority, list(doubts), len(doubts), None)
                self.queue.append(row)
        self.queue = review.first(self.queue, MOST_REVIEWED)


def _write_tables(
    task: ScoreTask, records: Records, positions: np.ndarray, given: Given, limits: VerdictConfig
) -> _Gathered:
    """Write the tables and the file of detections."""
    run = task.run
    gathered = _Gathered(ImageFigures(given.reference, limits), list(given.refused), array("q"))
    with ExitStack() as stack:
        wanted = {run.TABLE: tables.schema_of(ScoredImage), run.TARGETS: tables.schema_of(ScoredTarget)}
        wanted |= {run.TIMINGS: _TIMINGS}
        write = {
            name: stack.enter_context(tables.writing_table(run.path(name), wanted[name]))
            for name in reversed(list(wanted))  # that of the images is in its place first
        }
        path = stack.enter_context(storage.written_whole(run.path(run.DETECTION)))
        detections = stack.enter_context(path.open("w", encoding="utf-8", newline=""))

        def boxes() -> Iterator[tuple[str, list[exports.Box]]]:
            for some in _pieces(positions):
                table = records.take(some)
                is_good = pc.is_null(table["reason"])
                gathered.good.extend(some[is_good.to_numpy()].tolist())
                failed = table.filter(pc.invert(is_good)).select(["id", "reason", "message"]).to_pylist()
                gathered.failed += [Failure(row["id"], STAGE, row["reason"], row["message"]) for row in failed]
                good = table.filter(is_good)
                rows = _flat(tables.schema_of(ScoredImage), good["found"])
                found = scored_verdicts.with_drift(tables.from_table(ScoredImage, rows), given.reference)
                gathered.figures.add(found)
                write[run.TABLE](_with_drift(rows, found))
                targets = _flat(tables.schema_of(ScoredTarget), pc.list_flatten(good["targets"]))
                gathered.num_targets += targets.num_rows
                write[run.TARGETS](targets)
                gathered.review(found, targets, given.reference)
                write[run.TIMINGS](_timings(table))
                yield from _boxes(found, targets)

        for text in exports.detection_lines(boxes()):
            detections.write(text)
    gathered.failed.sort(key=lambda failure: failure.id)
    tables.write_rows(run.path(run.FAILURES), Failure, gathered.failed)
    tables.write_rows(run.path(run.REVIEW), ReviewField, review.queue(gathered.queue))
    return gathered


def _flat(schema: pa.Schema, column: Any) -> pa.Table:
    """Return a column of rows as a table."""
    rows = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return pa.Table.from_arrays([pc.struct_field(rows, field.name) for field in schema], schema=schema)


def _with_drift(rows: pa.Table, found: Sequence[ScoredImage]) -> pa.Table:
    for name in ("drift", "drift_of"):  # the other columns are there already
        index, values = rows.column_names.index(name), [getattr(image, name) for image in found]
        rows = rows.set_column(index, rows.field(index), pa.array(values, rows.field(index).type))
    return rows


def _rows(row_type: type[ScoredImage], column: Any) -> list[ScoredImage]:
    return tables.from_table(row_type, _flat(tables.schema_of(row_type), column))


def _timings(table: pa.Table) -> pa.Table:
    listed: list[Any] = table["seconds"].to_pylist()
    seconds = [{one["step"]: one["seconds"] for one in row} for row in listed]
    columns = [pa.array([row.get(step) for row in seconds], pa.float64()) for step in STEPS]
    return pa.Table.from_arrays([table["id"].combine_chunks(), *columns], schema=_TIMINGS)


def _boxes(found: Sequence[ScoredImage], targets: pa.Table) -> Iterator[tuple[str, list[exports.Box]]]:
    rows: list[Any] = list(zip(*(targets[name].to_pylist() for name in _BOX), strict=True))
    end = 0
    for image in found:
        start, end = end, end + image.num_targets
        yield image.id, rows[start:end]


def _masks(task: ScoreTask, ids: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for start in range(0, len(ids), _MASKS_AT_ONCE):  # masks of many thousand images never lie in memory together
            chunk = ids[start : start + _MASKS_AT_ONCE]
            data = pool.map(storage.read_bytes, [task.file(MASKS, image_id) for image_id in chunk])
            yield from zip((f"{image_id}.png" for image_id in chunk), data, strict=True)


def prune(task: ScoreTask, good: set[str], known: set[str], own: frozenset[str]) -> None:
    """Delete files of images that were removed or failed since, of kinds no longer wanted, and temporary ones.

    Files of ids that are not the run's `own` are somebody else's, and stay.
    """
    wanted = {folder: good for folder in task.save.folders()} | {RECORDS: known}
    for folder in task.run.KINDS:
        kept = wanted.get(folder, set())
        for name in [name for name in task.run.ids_of(folder) if name not in kept and name in own]:
            storage.remove(task.file(folder, name))
    storage.sweep(task.out)


def _spread(records: Records, gathered: _Gathered) -> list[ScoredImage]:
    """Return images spread evenly over the range of foreground shares."""
    ordered = np.array(gathered.good)[np.argsort(np.array(gathered.figures.shares), kind="stable")]
    chosen = np.unique(np.linspace(0, len(ordered) - 1, min(SHEET_IMAGES, len(ordered))).round().astype(int))
    return _rows(ScoredImage, records.take(ordered[chosen])["found"])


def contact_sheet(task: ScoreTask, shown: Sequence[ScoredImage], num_images: int) -> bytes:
    """Draw some of a run's images."""
    from stas_core.figures import contact_sheet as sheets

    with closing(GuardedReader()) as reader:
        tiles = [sheets.Tile(*_tile(task, scored, reader)) for scored in shown]
    return sheets.contact_sheet(tiles, columns=4, title=f"{num_images} scored images, by foreground share")


def _tile(task: ScoreTask, scored: ScoredImage, reader: GuardedReader) -> tuple[RgbImage, str]:
    mask_uri = task.file(MASKS, scored.id)
    mask = images.decode_mask(storage.read_bytes(mask_uri), mask_uri)
    image = np.full((*mask.shape, 3), 255, np.uint8)
    limits = task.limits
    try:
        found = reader.read(scored.image_uri, max_pixels=limits.max_pixels, timeout_s=limits.timeout_s)
        image = found if found.shape == image.shape else image
    except InputError as error:
        print(f"contact sheet: {scored.id} is drawn on white: {error}")
    drawn = overlay.thumbnail(overlay.draw(image, truth=None, prediction=mask), width_px=SHEET_WIDTH_PX)
    return drawn, f"{scored.id}: {scored.foreground_share:.1%} foreground, {scored.num_targets} target(s)"
