"""What the CPU tasks of score_images do: read and finish images; each takes and gives Arrow rows.

A row carries its image and map as bytes, so that images of all sizes share a schema. A row that failed carries the
reason instead and goes through the later steps untouched, to be recorded with the rest. Nothing here loads torch.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict, get_type_hints

import cv2
import numpy as np
import pyarrow as pa

from stas_core import storage
from stas_core.arrays import Labels
from stas_core.config import Config
from stas_core.data import images, overlay
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
    RECORDS,
    STDS,
    ImageRecord,
    ScoredImage,
    ScoredRun,
    ScoredTarget,
)
from workflows.scoring.guarded_reader import LimitsConfig as LimitsConfig  # part of a ScoreTask
from workflows.scoring.guarded_reader import reader


class Item(TypedDict):
    """An image to score, as Ray Data passes it on."""

    id: str
    image_uri: str
    stamp: str
    """Marks its version."""


Columns = list[tuple[str, pa.DataType]]
ITEM: Columns = [(name, pa.string()) for name in get_type_hints(Item)]
_OUTCOME: Columns = [("reason", pa.string()), ("message", pa.string()), ("decode_s", pa.float64())]
_SIZE: Columns = [("height", pa.int32()), ("width", pa.int32())]
DECODED = pa.schema([*ITEM, *_SIZE, ("image", pa.large_binary()), *_OUTCOME])
"""What reading gives. `image`: height x width x 3 bytes, RGB; height and width in px; times in s. `reason` is null
unless the image failed; then there are no pixels."""
_MAPS: Columns = [("image", pa.large_binary()), ("prob", pa.large_binary()), ("std", pa.large_binary())]
_PREDICTION: Columns = [("mean_disagreement", pa.float64()), ("num_passes", pa.int32())]
_GPU: Columns = [("gpu_watched_s", pa.float64()), ("gpu_busy_s", pa.float64())]
PREDICTED = pa.schema([*ITEM, *_SIZE, *_MAPS, *_PREDICTION, *_OUTCOME, ("predict_s", pa.float64()), *_GPU])
"""What prediction gives. `prob`: a byte per pixel, probability k / 255; `std`: the members' standard deviation,
k / 510, null unless it is saved; `mean_disagreement`: its mean over pixels, 0 to 0.5. `image` is kept for overlays
only. `gpu_` are the image's shares of the seconds that the GPU was watched, and of these busy; null without one."""
_STEPS: Columns = [(f"{step}_s", pa.float64()) for step in ("decode", "predict", "postprocess", "write")]
FINISHED = pa.schema([("id", pa.string()), ("reason", pa.string()), *_STEPS, *_GPU])
"""What finishing gives: why an image failed (null: it did not), and the seconds of each step."""


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
    return pa.Table.from_pylist([_decode_row(task, row) for row in table.to_pylist()], schema=DECODED)


def _decode_row(task: ScoreTask, row: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    found: dict[str, Any] = {}
    for _ in range(1 + task.limits.retries):
        try:
            image = reader().read(row["image_uri"], max_pixels=task.limits.max_pixels, timeout_s=task.limits.timeout_s)
        except InputError as error:
            found = {"reason": error.reason, "message": str(error)}
        else:
            found = {"height": image.shape[0], "width": image.shape[1], "image": image.tobytes()}
            break
    return row | found | {"decode_s": time.perf_counter() - start}


def finish(task: ScoreTask, table: pa.Table) -> pa.Table:
    """Post-process maps and write everything an image leaves; its record goes last and marks it as done."""
    cv2.setNumThreads(1)
    return pa.Table.from_pylist([_finish_row(task, row) for row in table.to_pylist()], schema=FINISHED)


def _finish_row(task: ScoreTask, row: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    outcome: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    if row["reason"] is None:
        try:
            found, targets, files = make_outputs(task, row)
            outcome = {"found": found, "targets": targets, "folders": list(files)}
        except Exception as error:  # noqa: BLE001 - one image must not end a run of thousands
            failure = as_input_error(error, row["image_uri"])
            row |= {"reason": failure.reason, "message": str(failure)}
    if row["reason"] is not None:
        outcome = {"reason": row["reason"], "message": row["message"]}
    middle = time.perf_counter()
    _drop_stale_record(task, row)
    for folder, data in files.items():
        storage.write_bytes(task.file(folder, row["id"]), data)
    seconds = {"decode_s": row["decode_s"], "predict_s": row["predict_s"], "postprocess_s": middle - start}
    seconds["write_s"] = time.perf_counter() - middle
    keys: dict[str, Any] = {
        "predict_key": task.predict_key,
        "finish_key": task.finish_key,
        "limits_key": task.limits.key,
    }
    outcome |= {name: row[name] for name, _ in ITEM}
    task.run.write_record(ImageRecord(**outcome, **keys, seconds=seconds))
    gpu = {name: row[name] for name in ("gpu_watched_s", "gpu_busy_s")}
    return {"id": row["id"], "reason": row["reason"], **seconds, **gpu}


def record_crash(task: ScoreTask, item: Mapping[str, Any], cause: str) -> list[dict[str, Any]]:
    """Record that an image ended every process that worked on it, alone, twice."""
    message = f"the pipeline failed over it alone, twice ({cause}); if memory ran out, cut the image into fields"
    failed = dict.fromkeys(PREDICTED.names) | dict(item) | {"reason": CrashedPrediction.reason, "message": message}
    rows: list[dict[str, Any]] = finish(task, pa.Table.from_pylist([failed], schema=PREDICTED)).to_pylist()
    return rows


def _drop_stale_record(task: ScoreTask, row: Mapping[str, Any]) -> None:
    """Invalidate a stale record before its files are overwritten: a crash in between must not leave it in force.

    A stop in between would leave it to vouch for files that are no longer its own.
    """
    record = task.run.record(row["id"])
    if record is None:
        return
    if record.stamp != row["stamp"] or record.predict_key != task.predict_key:
        storage.remove(task.file(RECORDS, row["id"]))
    elif record.finish_key != task.finish_key:
        task.run.write_record(replace(record, finish_key=""))  # the map still holds, and its record is needed


def make_outputs(task: ScoreTask, row: Mapping[str, Any]) -> tuple[ScoredImage, list[ScoredTarget], dict[str, bytes]]:
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
    )
    makers = _file_makers(row, labels, targets)
    return found, exports.target_rows(image_id, targets), {folder: makers[folder]() for folder in task.save.folders()}


def _file_makers(row: Mapping[str, Any], labels: Labels, targets: Targets) -> dict[str, Callable[[], bytes]]:
    size, mask = labels.shape, labels > 0

    def plane(name: str) -> np.ndarray:
        return np.frombuffer(row[name], np.uint8).reshape(size)

    def targets_as_geojson(*, compress: bool) -> bytes:
        return geojson.to_geojson(trace_shapes(labels), TargetFacts(row["id"], targets), compress=compress)

    def outlined() -> bytes:
        image = np.frombuffer(row["image"], np.uint8).reshape(*size, 3)
        return images.encode_jpeg(overlay.draw(image, truth=None, prediction=mask))

    return {
        MASKS: lambda: images.encode_map(mask.astype(np.uint8) * 255),
        MAPS: lambda: images.encode_map(plane("prob")),
        STDS: lambda: images.encode_map(plane("std")),
        OVERLAYS: outlined,
        GEOJSON: lambda: targets_as_geojson(compress=False),
        GEOJSON_GZ: lambda: targets_as_geojson(compress=True),
    }


def refinish(task: ScoreTask, table: pa.Table) -> pa.Table:
    """Finish images again from their saved maps; the image itself is read only for its overlay."""
    rows = [_from_saved_map(task, row) for row in table.to_pylist()]
    return finish(task, pa.Table.from_pylist(rows, schema=PREDICTED))


def _from_saved_map(task: ScoreTask, row: dict[str, Any]) -> dict[str, Any]:
    record = task.run.record(row["id"])
    known = {} if record is None or record.found is None else asdict(record.found)
    row = dict.fromkeys(PREDICTED.names) | row | {key: known[key] for key in PREDICTED.names if key in known}
    row |= {"decode_s": 0.0, "predict_s": 0.0}
    if task.save.overlays:
        row = _decode_row(task, row)
    start = time.perf_counter()
    try:
        for column, folder in (("prob", MAPS), ("std", STDS)):
            if column == "prob" or task.save.disagreement:
                uri = task.file(folder, row["id"])
                row[column] = images.decode_map(storage.read_bytes(uri), uri).tobytes()
    except InputError as error:  # recorded as failed, the image is predicted anew by the next run
        row |= {"reason": UnreadableFile.reason, "message": f"the map that was saved is damaged, run again: {error}"}
    return row | {"decode_s": row["decode_s"] + time.perf_counter() - start}
