"""What the CPU tasks of score_images do: read and finish images; each takes and gives Arrow rows.

A row carries its image and map as bytes, so that images of all sizes share a schema. A row that failed carries the
reason instead and goes through the later steps untouched, to be recorded with the rest. Nothing here loads torch.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import cv2
import numpy as np
import pyarrow as pa

from stas_core import record_parts, storage, tables
from stas_core.arrays import Labels
from stas_core.config import Config
from stas_core.data import appearance, images, overlay
from stas_core.data.appearance import Look
from stas_core.errors import CrashedPrediction, InputError, UnreadableFile, as_input_error
from stas_core.predict import exports, geojson, postprocess
from stas_core.predict.placement import TargetFacts
from stas_core.predict.polygons import trace_shapes
from stas_core.predict.postprocess import PostprocessConfig, Targets
from stas_core.scored_runs import (
    GEOJSON,
    GEOJSON_GZ,
    MAPS,
    MASKS,
    OVERLAYS,
    STDS,
    ImageRecord,
    ScoredImage,
    ScoredRun,
    ScoredTarget,
)
from stas_core.tables import Int32
from workflows.scoring.guarded_reader import LimitsConfig as LimitsConfig  # part of a ScoreTask
from workflows.scoring.guarded_reader import reader


class ListedItem(TypedDict):
    """An image to score."""

    id: str
    image_uri: str
    stamp: str
    """Marks its version."""


class Item(ListedItem, total=False):
    """The same, as Ray Data passes it on."""

    part: str | None
    """Where its record from before is: a part of the run's records, or `LOOSE`; null: it had none when the run began,
    so that no worker asks the store for one. Left out: like `LOOSE`."""


LOOSE = "loose"
"""A record of its own may be there, and none is in a part."""


class Outcome(TypedDict):
    """How a step ended."""

    reason: str | None
    """Code of why it failed; None: it did not."""
    message: str | None


class DecodedRow(Item, Outcome, total=False):
    """What reading gives of an image; without size and pixels if it failed."""

    height: Int32
    """px"""
    width: Int32
    """px"""
    image: bytes
    """height x width x 3 bytes, RGB."""
    look: Look
    decode_s: float


class FoundMap(TypedDict, total=False):
    """What prediction finds."""

    prob: bytes
    """A byte per pixel: probability k / 255."""
    std: bytes
    """A byte per pixel: the members' standard deviation, k / 510; there if it is saved."""
    mean_disagreement: float
    """The mean of that deviation over pixels, 0 to 0.5."""
    num_passes: Int32


class PredictTimes(TypedDict, total=False):
    """An image's share of the seconds of its batch."""

    predict_s: float
    gpu_watched_s: float
    """Its share of those that the GPU was watched; there if there is one."""
    gpu_busy_s: float
    """Its share of those in which the GPU was busy."""


class PredictedRow(DecodedRow, FoundMap, PredictTimes, total=False):
    """What prediction gives of an image that was read; its pixels are kept for the overlay only."""


class FinishedRow(TypedDict):
    """What finishing gives of an image: why it failed, if it did, and the seconds of each step."""

    id: str
    reason: str | None
    decode_s: float | None
    predict_s: float | None
    postprocess_s: float
    write_s: float
    gpu_watched_s: float | None
    gpu_busy_s: float | None
    record: bytes
    """The JSON of the record that was left of it."""


STEPS: tuple[Literal["decode_s", "predict_s", "postprocess_s", "write_s"], ...]
STEPS = ("decode_s", "predict_s", "postprocess_s", "write_s")
ITEM, DECODED, PREDICTED, FINISHED = map(tables.schema_of, (Item, DecodedRow, PredictedRow, FinishedRow))


class SaveConfig(Config):
    """Which files are written for each image beside its mask."""

    maps: bool = True
    """The 8-bit probability map. With it, other post-processing later takes no inference."""
    disagreement: bool = False
    """The members' standard deviation as k / 510."""
    overlays: bool = True
    """The image with its targets outlined, as JPEG."""
    geojson: bool = True
    """Targets as QuPath objects."""
    geojson_gz: bool = False
    """The same, compressed."""
    archive: bool = True
    """segmentation.zip, all masks as the competition wants them: each is read for it, at the end of every run."""

    def folders(self) -> list[str]:
        """Return the folders of the files that are written for every image."""
        chosen = {MAPS: self.maps, STDS: self.disagreement, OVERLAYS: self.overlays}
        chosen |= {GEOJSON: self.geojson, GEOJSON_GZ: self.geojson_gz}
        return [MASKS, *(folder for folder, wanted in chosen.items() if wanted)]


@dataclass(frozen=True)
class ScoreTask:
    """What the tasks need to know of a run; `out` is absolute."""

    out: str
    predict_key: str
    """Cache key of a probability map: weights, inference settings, device, threads."""
    postprocess: PostprocessConfig
    save: SaveConfig
    limits: LimitsConfig

    @property
    def finish_key(self) -> str:
        """Cache key of the other outputs: the map's key, the post-processing, and how targets are written."""
        return storage.fingerprint(self.predict_key, self.postprocess.model_dump_json(), geojson.FORMAT)

    @property
    def run(self) -> ScoredRun:
        """Where the files go."""
        return ScoredRun(self.out)

    def file(self, folder: str, image_id: str) -> str:
        """Return where an image's file of a kind is."""
        return self.run.file(folder, image_id)


def decode(task: ScoreTask, table: pa.Table) -> pa.Table:
    """Read and decode images, each within its deadline."""
    rows: list[DecodedRow] = [_new_row(item) for item in tables.from_table(Item, table)]
    for row in rows:
        _decode_row(task, row)
    return tables.to_table(DecodedRow, rows)


def _new_row(item: Item) -> PredictedRow:
    return {
        "id": item["id"],
        "image_uri": item["image_uri"],
        "stamp": item["stamp"],
        "part": item.get("part", LOOSE),
        "reason": None,
        "message": None,
    }


def _decode_row(task: ScoreTask, row: DecodedRow) -> None:
    start = time.perf_counter()
    for _ in range(1 + task.limits.retries):
        try:
            image = reader().read(row["image_uri"], max_pixels=task.limits.max_pixels, timeout_s=task.limits.timeout_s)
        except InputError as error:
            row["reason"], row["message"] = error.reason, str(error)
        else:
            row["reason"] = row["message"] = None
            row["height"], row["width"], row["image"] = image.shape[0], image.shape[1], image.tobytes()
            row["look"] = appearance.measure(image)
            break
    row["decode_s"] = time.perf_counter() - start


def finish(task: ScoreTask, table: pa.Table) -> pa.Table:
    """Post-process maps and write everything an image leaves; its record goes last and marks it as done."""
    cv2.setNumThreads(1)
    rows = tables.from_table(PredictedRow, table)
    return tables.to_table(FinishedRow, [_finish_row(task, row) for row in rows])


def _finish_row(task: ScoreTask, row: PredictedRow) -> FinishedRow:
    start = time.perf_counter()
    reason, message = row["reason"], row["message"]
    found, targets, files = None, list[ScoredTarget](), dict[str, bytes]()
    if reason is None:
        try:
            found, targets, files = make_outputs(task, row)
        except Exception as error:  # noqa: BLE001 - one image must not end a run of thousands
            failure = as_input_error(error, row["image_uri"])
            reason, message = failure.reason, str(failure)
    middle = time.perf_counter()
    _take_back_stale_record(task, row)
    for folder, data in files.items():
        storage.write_bytes(task.file(folder, row["id"]), data)
    finished: FinishedRow = {
        "record": b"",
        "id": row["id"],
        "reason": reason,
        "decode_s": row["decode_s"],
        "predict_s": row["predict_s"],
        "postprocess_s": middle - start,
        "write_s": time.perf_counter() - middle,
        "gpu_watched_s": row["gpu_watched_s"],
        "gpu_busy_s": row["gpu_busy_s"],
    }
    record = ImageRecord(
        id=row["id"],
        image_uri=row["image_uri"],
        stamp=row["stamp"],
        reason=reason,
        message=message or "",
        found=found,
        targets=targets,
        folders=list(files),
        predict_key=task.predict_key,
        finish_key=task.finish_key,
        limits_key=task.limits.key,
        seconds={step: finished[step] for step in STEPS},
    )
    task.run.write_record(record)
    finished["record"] = json.dumps(record.to_json()).encode()
    return finished


def record_crash(task: ScoreTask, item: Item, cause: str) -> list[FinishedRow]:
    """Record that an image ended every process that worked on it, alone, twice."""
    message = f"the pipeline failed over it alone, twice ({cause}); if memory ran out, cut the image into fields"
    failed = _new_row(item)
    failed["reason"], failed["message"] = CrashedPrediction.reason, message
    return tables.from_table(FinishedRow, finish(task, tables.to_table(PredictedRow, [failed])))


def _take_back_stale_record(task: ScoreTask, row: PredictedRow) -> None:
    """Take back a stale record before its files are overwritten.

    A stop in between would leave it to vouch for files that are no longer its own. It is hidden rather than deleted:
    there may be older ones, in parts.
    """
    record = _record_of(task, row)
    if record is None:
        return
    if record.stamp != row["stamp"] or record.predict_key != task.predict_key:
        task.run.write_record(record.taken_back())
    elif record.finish_key != task.finish_key:
        task.run.write_record(replace(record, finish_key=""))  # the map still holds, and its record is needed


def _record_of(task: ScoreTask, item: Item) -> ImageRecord | None:
    """Return the record of an image from before, loose or in the part that its item names."""
    part = item.get("part", LOOSE)
    if part is None:
        return None
    loose = task.run.record(item["id"])
    return record_parts.read_one(task.run, part, item["id"]) if loose is None and part != LOOSE else loose


def make_outputs(task: ScoreTask, row: PredictedRow) -> tuple[ScoredImage, list[ScoredTarget], dict[str, bytes]]:
    """Post-process a predicted row; return what was found, and the image's files by folder."""
    size, image_id = (row["height"], row["width"]), row["id"]
    prob = np.frombuffer(row["prob"], np.uint8).reshape(size)
    cascade = postprocess.run_cascade(prob, task.postprocess)
    labels, targets = postprocess.find_targets(cascade.mask, prob)
    found = ScoredImage(
        id=image_id,
        image_uri=row["image_uri"],
        height=row["height"],
        width=row["width"],
        foreground_share=float(cascade.mask.mean()),
        num_targets=len(targets),
        stage=cascade.step,
        mean_disagreement=row["mean_disagreement"],
        num_passes=row["num_passes"],
        look=row["look"],
    )
    makers = _file_makers(row, labels, targets)
    return found, exports.target_rows(image_id, targets), {folder: makers[folder]() for folder in task.save.folders()}


def _file_makers(row: PredictedRow, labels: Labels, targets: Targets) -> dict[str, Callable[[], bytes]]:
    size, mask = labels.shape, labels > 0

    def plane(data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8).reshape(size)

    def targets_as_geojson(*, compress: bool) -> bytes:
        return geojson.to_geojson(trace_shapes(labels), TargetFacts(row["id"], targets), compress=compress)

    def outlined() -> bytes:
        image = np.frombuffer(row["image"], np.uint8).reshape(*size, 3)
        return images.encode_jpeg(overlay.draw(image, truth=None, prediction=mask))

    return {
        MASKS: lambda: images.encode_map(mask.astype(np.uint8) * 255),
        MAPS: lambda: images.encode_map(plane(row["prob"])),
        STDS: lambda: images.encode_map(plane(row["std"])),
        OVERLAYS: outlined,
        GEOJSON: lambda: targets_as_geojson(compress=False),
        GEOJSON_GZ: lambda: targets_as_geojson(compress=True),
    }


def refinish(task: ScoreTask, table: pa.Table) -> pa.Table:
    """Finish images again from their saved maps; the image itself is read only for its overlay."""
    return finish(task, read_maps(task, table))


def read_maps(task: ScoreTask, table: pa.Table) -> pa.Table:
    """Return what was predicted of images, from their saved maps."""
    return tables.to_table(PredictedRow, [_from_saved_map(task, item) for item in tables.from_table(Item, table)])


def _from_saved_map(task: ScoreTask, item: Item) -> PredictedRow:
    row = _new_row(item)
    row["decode_s"] = row["predict_s"] = 0.0
    record = _record_of(task, item)
    if record is not None and (found := record.found) is not None:
        row["height"], row["width"] = found.height, found.width
        row["mean_disagreement"], row["num_passes"] = found.mean_disagreement, found.num_passes
        if found.look is not None:
            row["look"] = found.look
    if task.save.overlays:
        _decode_row(task, row)
    start = time.perf_counter()
    try:
        row["prob"] = _saved_plane(task, MAPS, item["id"])
        if task.save.disagreement:
            row["std"] = _saved_plane(task, STDS, item["id"])
    except InputError as error:  # recorded as failed, the image is predicted anew by the next run
        row["reason"] = UnreadableFile.reason
        row["message"] = f"the map that was saved is damaged, run again: {error}"
    row["decode_s"] += time.perf_counter() - start
    return row


def _saved_plane(task: ScoreTask, folder: str, image_id: str) -> bytes:
    uri = task.file(folder, image_id)
    return images.decode_map(storage.read_bytes(uri), uri).tobytes()
