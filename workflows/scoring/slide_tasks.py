"""What the CPU tasks of score_slides do: survey slides, read blocks of them, and keep what was predicted.

Tables of slides and of blocks go through Ray Data; a row that failed carries the reason and goes through the later
steps untouched. Nothing here loads torch.
"""

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar, cast

import cv2
import pyarrow as pa

from stas_core import local_files, storage, tables
from stas_core.arrays import RgbImage
from stas_core.errors import CrashedPrediction, InputError, StorageError, WriteError, as_input_error
from stas_core.slides import slide_files
from stas_core.slides.blocks import SlideMaps, block_name
from stas_core.slides.run import FAILED, SlideRecord
from stas_core.slides.staging import SlideCache
from stas_core.slides.survey import Survey, TissueShades, blocks_to_predict, tiles_to_predict
from stas_core.slides.tiling import Box, Grid
from stas_core.slides.tissue import Tissue
from stas_core.tables import Int32
from workflows.scoring.guarded_reader import LimitsConfig, TissueSettings, reader
from workflows.scoring.slide_list import changed, require_unchanged
from workflows.scoring.slide_plan import BlockItem, SlideItem, SlideTask, kinds_of
from workflows.scoring.tasks import Outcome, PredictTimes

if TYPE_CHECKING:
    from stas_core.slides.finish import SlideToFinish

T = TypeVar("T")


class SurveyedRow(TypedDict):
    """What is told of a survey; its results are in files."""

    id: str
    reason: str | None
    """Code of why it failed; None: it did not."""
    message: str | None
    survey_s: float


class ReadRow(BlockItem, Outcome, total=False):
    """What reading gives of a block; without pixels if it failed."""

    frame_height: Int32
    """px of the slide's frame"""
    frame_width: Int32
    tile_rows: list[Int32]
    """Rows of the tiles to predict, and in `tile_cols` their columns."""
    tile_cols: list[Int32]
    box: list[Int32]
    """y0, x0, y1, x1 of what was read, in px of the slide's frame."""
    image: bytes
    """Its pixels, height x width x 3 bytes, RGB."""
    decode_s: float


class FoundBlock(TypedDict, total=False):
    """What prediction finds."""

    file: bytes
    """As `blocks.encode_block` has it."""
    num_px: int
    """Pixels of the cores of its tiles."""


class _TimedBlock(BlockItem, Outcome, PredictTimes, total=False):
    decode_s: float
    idle_s: float
    """How long its actor had waited for it."""


class PredictedBlock(_TimedBlock, FoundBlock, total=False):
    """What prediction gives of a block that was read."""


class KeptBlock(_TimedBlock, total=False):
    """What is told of a block whose file was written."""

    num_px: int
    write_s: float


class FinishedSlide(TypedDict):
    """What finishing gives of a slide; all else is in files."""

    id: str
    reason: str | None
    """Code of why it failed; None: it did not."""
    seconds: dict[str, float]
    """Of each of its steps."""


READ, PREDICTED = map(tables.schema_of, (ReadRow, PredictedBlock))


@contextmanager
def slide_at(task: SlideTask, uri: str) -> Iterator[str]:
    """Yield the path of a slide on this node, to which it is copied first if it lies in an object store.

    Raises:
        InputError: it cannot be had.
    """
    folder = task.cache.folder or str(Path(tempfile.gettempdir()) / f"stas-slides-{os.getuid()}")
    with SlideCache(storage.local_path(folder), int(task.cache.max_gb * 1e9)).use(uri) as path:
        try:
            yield str(path)
        except InputError as error:
            if storage.is_local(uri):
                raise
            raise type(error)(str(error).replace(str(path), uri)) from error  # where the copy lies differs


def attempt(limits: LimitsConfig, do: Callable[[], T]) -> T | InputError:
    """Return what came of the first attempt that did not fail, or the error of the last."""
    for left in reversed(range(1 + limits.retries)):
        try:
            return do()
        except WriteError:
            raise  # what lies in the surroundings is no slide's fault
        except (InputError, StorageError) as error:
            if not left:
                return as_input_error(error, "")
    raise ValueError(f"limits.retries = {limits.retries}, expected 0 or more")


def survey(task: SlideTask, table: pa.Table) -> pa.Table:
    """Survey slides: write what is found, or record the slide as failed."""
    rows = [_survey_row(task, item) for item in tables.from_table(SlideItem, table)]
    return tables.to_table(SurveyedRow, rows)


def _survey_row(task: SlideTask, item: SlideItem) -> SurveyedRow:
    start = time.perf_counter()

    def look() -> tuple[Survey, TissueShades, bytes | None]:
        with slide_at(task, item["slide_uri"]) as path:
            values, shades = reader().survey(
                path,
                mpp=item["mpp"],
                frame_mpp=task.frame_mpp,
                tissue=TissueSettings(task.tissue.model_dump(mode="json"), item["tissue_uri"], item["roi_uri"]),
                limits=task.limits.of_survey(),
            )
        survey, roi_uri = Survey.from_json(values, item["slide_uri"]), item["roi_uri"]
        roi = None if roi_uri is None else storage.read_bytes(roi_uri)
        require_unchanged(item)  # after all of it was read
        return survey, shades, roi

    found = attempt(task.limits, look)
    reason, message = None, None
    if isinstance(found, InputError):
        reason, message = found.reason, str(found)
        record_failure(task, item, reason, message)
    else:
        survey, shades, roi = found
        task.run.write_survey(item["id"], task.survey_key(item), survey=survey, tissue=shades, roi=roi)
    return {"id": item["id"], "reason": reason, "message": message, "survey_s": time.perf_counter() - start}


def record_failure(task: SlideTask, item: SlideItem, reason: str, message: str) -> None:
    """Record that a slide could not be scored."""
    task.run.write_record(
        SlideRecord(
            id=item["id"],
            slide_uri=item["slide_uri"],
            stamp=item["stamp"],
            reason=reason,
            message=message,
            predict_key=task.predict_key(item),
            finish_key=task.finish_key(item),
            limits_key=task.limits.key,
        )
    )


@dataclass(frozen=True)
class Layout:
    """A slide as it is cut into tiles."""

    survey: Survey
    tissue: Tissue
    """What is scored."""
    whole: Tissue
    """Beyond the region of interest too."""
    grid: Grid

    @property
    def mpp(self) -> float:
        """Return the um per pixel of the frame."""
        return self.survey.frame_mpp

    @classmethod
    def of(cls, task: SlideTask, slide_id: str) -> "Layout":
        """Return the layout of a slide that was surveyed."""
        return cls.after(task, *task.run.survey(slide_id))

    @classmethod
    def after(cls, task: SlideTask, survey: Survey, shades: TissueShades) -> "Layout":
        """Return the layout that a survey gives."""
        whole = survey.tissue(shades, whole=True)
        return cls(survey, survey.tissue(shades), whole, task.tile.grid(survey.frame_height, survey.frame_width))

    def predicted(self) -> list[tuple[int, int]]:
        """Return row and column of each tile that is predicted."""
        return [(tile.row, tile.col) for tile in tiles_to_predict(self.grid, self.tissue, self.mpp)]


@dataclass(frozen=True)
class Pixels:
    """The pixels of a slide that was surveyed, by the reader that can be ended."""

    task: SlideTask
    uri: str
    survey: Survey

    @property
    def mpp(self) -> float:
        """Return the um per pixel of the frame."""
        return self.survey.frame_mpp

    def read(self, box: Box) -> RgbImage:
        """Return a box of the frame."""
        return self.read_at(box, self.mpp)

    def read_at(self, box: Box, mpp: float) -> RgbImage:
        """Return a box of the frame of another resolution, in um/px."""
        with slide_at(self.task, self.uri) as path:
            return reader().read_region(path, self.survey.slide_mpp(), mpp, box, self.task.limits)

    def thumbnail(self, max_px: int) -> RgbImage:
        """Return the whole slide, its longer side at most `max_px`."""
        with slide_at(self.task, self.uri) as path:
            return reader().read_thumbnail(path, max_px, self.task.limits.of_survey())


@functools.lru_cache(maxsize=4)
def _layout(task: SlideTask, slide_id: str, _predict_key: str) -> Layout:
    return Layout.of(task, slide_id)


@functools.lru_cache(maxsize=4)
def _parts_of(uri: str, _predict_key: str) -> list[str]:
    return slide_files.parts_of(uri)


@dataclass(frozen=True)
class OpenSlide:
    """A slide that was surveyed, before its blocks are predicted."""

    item: SlideItem
    missing: Sequence[BlockItem]
    """The blocks that are not kept yet, in scan order."""
    reason: str | None = None
    """Why it cannot be scored, which is recorded: its tumour's outline is none."""


def open_slide(task: SlideTask, item: SlideItem) -> OpenSlide | None:
    """Look at a slide once, for all that its prediction needs; None: it has no survey that holds."""
    found = task.run.survey_by(item["id"], task.survey_key(item))
    if found is None:
        return None
    if (reason := _check_tumour(task, item, found[0])) is not None:
        return OpenSlide(item, [], reason)
    there = set(storage.entries(folder)) if storage.exists(folder := task.blocks(item)) else set()
    blocks = blocks_of(task, item, Layout.after(task, *found))
    return OpenSlide(item, [block for block in blocks if block_name(block["row"], block["col"]) not in there])


def blocks_of(task: SlideTask, item: SlideItem, layout: Layout) -> list[BlockItem]:
    """Return the blocks of a slide that was surveyed, in scan order."""
    key = task.predict_key(item)
    return [
        BlockItem(
            id=f"{item['id']} {block.row} {block.col}",
            slide=item["id"],
            slide_uri=item["slide_uri"],
            slide_stamp=item["slide_stamp"],
            predict_key=key,
            row=block.row,
            col=block.col,
        )
        for block, _ in blocks_to_predict(layout.grid, task.tile.block, layout.tissue, layout.mpp)
    ]


def read(task: SlideTask, table: pa.Table) -> pa.Table:
    """Read the pixels of blocks, each within its deadline."""
    return tables.to_table(ReadRow, [_read_row(task, block) for block in tables.from_table(BlockItem, table)])


def _read_row(task: SlideTask, item: BlockItem) -> ReadRow:
    start = time.perf_counter()
    row = cast(ReadRow, item)
    row["reason"] = row["message"] = None
    failed = failed_before(task, row)
    if failed is not None:
        row["reason"], row["message"], row["decode_s"] = failed["reason"], failed["message"], 0.0
        return row
    layout = _layout(task, row["slide"], row["predict_key"])
    block = layout.grid.block(row["row"], row["col"], task.tile.block)
    tiles = [tile for tile in block.tiles if layout.tissue.tissue_in(tile.core, layout.mpp)]
    box = Box(
        min(tile.read.y0 for tile in tiles),
        min(tile.read.x0 for tile in tiles),
        max(tile.read.y1 for tile in tiles),
        max(tile.read.x1 for tile in tiles),
    )

    def look() -> RgbImage:
        pixels = Pixels(task, row["slide_uri"], layout.survey).read(box)
        if slide_files.stamps_of([_parts_of(row["slide_uri"], row["predict_key"])]) != [row["slide_stamp"]]:
            raise changed(row["slide_uri"])
        return pixels

    row["frame_height"], row["frame_width"] = layout.grid.height, layout.grid.width
    row["tile_rows"], row["tile_cols"] = [tile.row for tile in tiles], [tile.col for tile in tiles]
    row["box"] = list(box)
    found = attempt(task.limits, look)
    if isinstance(found, InputError):
        row["reason"], row["message"] = found.reason, str(found)
    else:
        row["image"] = found.tobytes()
    row["decode_s"] = time.perf_counter() - start
    return row


def failed_before(task: SlideTask, row: BlockItem) -> Outcome | None:
    """Return the failure of an earlier block of the slide: then this one need not be read.

    Blocks before the first that fails are all read, so that which failure is reported does not depend on the order.
    """
    uri = storage.join(task.run.blocks(row["slide"], row["predict_key"]), FAILED)
    if not storage.exists(uri):
        return None
    values = storage.read_record(uri, "row", "col", "reason", "message")
    if (values["row"], values["col"]) >= (row["row"], row["col"]):
        return None
    return {"reason": values["reason"], "message": values["message"]}


def keep(task: SlideTask, table: pa.Table) -> pa.Table:
    """Write the files of blocks; a block is done when its file is there."""
    return tables.to_table(KeptBlock, [_keep_row(task, row) for row in tables.from_table(PredictedBlock, table)])


def _keep_row(task: SlideTask, row: PredictedBlock) -> KeptBlock:
    start = time.perf_counter()
    folder = task.run.blocks(row["slide"], row["predict_key"])
    if row["reason"] is None:
        storage.write_bytes(storage.join(folder, block_name(row["row"], row["col"])), row["file"])
    elif failed_before(task, row) is None:
        failed = {"row": row["row"], "col": row["col"], "reason": row["reason"], "message": row["message"]}
        storage.write_json(storage.join(folder, FAILED), failed)
    kept = cast(KeptBlock, row)  # its file stays behind: it is no column of what is told
    kept["write_s"] = time.perf_counter() - start
    return kept


def record_crash(task: SlideTask, block: BlockItem, cause: str) -> list[KeptBlock]:
    """Keep that a block ended every process that worked on it, as the failure of its slide."""
    where = f"{block['slide_uri']}: the pipeline failed over block {block['row']}, {block['col']}"
    row = cast(PredictedBlock, dict(block))
    row["reason"], row["message"] = CrashedPrediction.reason, f"{where} alone, twice ({cause})"
    return tables.from_table(KeptBlock, keep(task, tables.to_table(PredictedBlock, [row])))


def finish(task: SlideTask, item: SlideItem, before: Mapping[str, float] | None = None) -> FinishedSlide:
    """Finish a slide whose blocks are all kept; its record goes last and marks it as done.

    Args:
        task: the run.
        item: the slide.
        before: seconds of the steps before this one, and when the last of them ended (`begun_unix_s`).
    """
    from stas_core.figures.slide_pages import write_pages
    from stas_core.slides.finish import Stopwatch, finish_slide

    cv2.setNumThreads(1)
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps what the outlines of a million targets took
    watch, kinds, spent = Stopwatch(), task.save.kinds(), dict(before or {})
    if "begun_unix_s" in spent:  # clocks of machines differ
        watch.seconds["wait_s"] = max(0.0, time.time() - spent.pop("begun_unix_s"))
    try:
        with local_files.temporary_folder() as name, storage.telling_full_disk(name):
            folder = Path(name)
            given = _to_finish(task, item, folder)
            done = finish_slide(given, kinds, folder, watch)
            with watch.timing("pages_s"):
                files = done.files | write_pages(given, done.targets, kinds, folder)
            require_unchanged(item)  # the pages show its pixels
            with watch.timing("write_s"):
                for kind, path in files.items():
                    storage.copy_file(str(path), task.run.file(kind, item["id"]))
        lacks = set(kinds) - set(kinds_of(kinds, done.row))
        made = [kind for kind in kinds if kind in files or kind in lacks]
    except WriteError:
        raise  # what lies in the surroundings is no slide's fault
    except Exception as error:  # noqa: BLE001 - one slide must not end a run of thousands
        failure = as_input_error(error, item["slide_uri"])
        record_failure(task, item, failure.reason, str(failure))
        return {"id": item["id"], "reason": failure.reason, "seconds": watch.seconds}
    task.run.write_record(
        SlideRecord(
            id=item["id"],
            slide_uri=item["slide_uri"],
            stamp=item["stamp"],
            found=done.row,
            files=made,
            predict_key=task.predict_key(item),
            finish_key=task.finish_key(item),
            limits_key=task.limits.key,
            seconds=spent | watch.seconds,
        )
    )
    if not task.save.blocks:
        storage.remove(task.blocks(item))
    return {"id": item["id"], "reason": None, "seconds": watch.seconds}


def _check_tumour(task: SlideTask, item: SlideItem, survey: Survey) -> str | None:
    """Read the tumour's outline of a slide that was surveyed; record the slide as failed if it is none.

    Returns the reason, if it is. What is wrong with it is told before anything is predicted.
    """
    from stas_core.slides.finish import read_tumour

    uri = item["tumour_uri"]
    if uri is not None:
        try:
            read_tumour(storage.read_bytes(uri), uri, survey)
        except (InputError, StorageError) as error:
            failure = as_input_error(error, uri)
            record_failure(task, item, failure.reason, str(failure))
            return failure.reason
    return None


def _to_finish(task: SlideTask, item: SlideItem, folder: Path) -> "SlideToFinish":
    from stas_core.slides.finish import SlideToFinish, read_tumour

    layout = Layout.of(task, item["id"])
    predicted = layout.predicted()
    survey, tumour_uri = layout.survey, item["tumour_uri"]
    region = task.run.region(item["id"], survey)
    covers = None if region is None else region.covers
    blocks, copies = task.blocks(item), None
    if not storage.is_local(blocks):
        copies = folder / "blocks"
        copies.mkdir()
    return SlideToFinish(
        id=item["id"],
        uri=item["slide_uri"],
        survey=survey,
        tissue=layout.tissue,
        whole=layout.whole,
        maps=SlideMaps(blocks, layout.grid, task.tile, predicted, covers, copies=copies),
        num_predicted=len(predicted),
        num_members=task.num_members if task.save.members and task.num_members > 1 else 0,
        config=task.postprocess.in_pixels(layout.mpp),
        tumour=None if tumour_uri is None else read_tumour(storage.read_bytes(tumour_uri), tumour_uri, survey),
        pixels=Pixels(task, item["slide_uri"], survey),
    )
