"""An image measured with its annotation: its mask, and its row of the cohort before the split, or why it has none.

Rows are kept in parts as they come, so that a run measures only what is new or changed.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from stas_core import storage, tables
from stas_core.data import images, truth
from stas_core.data.annotations import AnnotationConfig
from stas_core.data.cohort import SCHEMA
from stas_core.errors import TRY_AGAIN, InputError, UnknownLabel
from workflows.field_inputs import Item
from workflows.scoring.guarded_reader import MeasureLimits, reader

# What a run remembers of each image: its cohort values before the split, or why it failed, and the inputs' marks. From
# the schema of the cohort, with its measured columns nullable: a class of rows would state each of them again.
PART_SCHEMA = pa.schema(
    [
        *(field.with_nullable(True) for field in SCHEMA if field.name not in ("group", "split", "fold")),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("annotation_format", pa.string()),
        pa.field("label_counts", pa.string()),  # JSON: how many shapes there are of each label
        pa.field("limits", pa.string(), nullable=False),
        pa.field("stamp", pa.string(), nullable=False),
    ]
)


def mask_name(image_id: str) -> str:
    """Return the path of an image's mask in the folder of the cohort."""
    return f"masks/{image_id}.png"


def measure_item(item: Item, out: str, config: AnnotationConfig, limits: MeasureLimits | None = None) -> dict[str, Any]:
    """Measure one image and write its mask; return its row, with the reason where it cannot be used."""
    limits = limits or MeasureLimits()
    row: dict[str, Any] = dict.fromkeys(PART_SCHEMA.names) | item | {"limits": limits.key}
    name = mask_name(item["id"])
    for attempt in range(1 + limits.retries):
        try:
            measured = reader().measure(item, config=config, limits=limits)
            break
        except InputError as error:
            if error.reason == UnknownLabel.reason:
                row |= _labels_of(item, config, limits)
            if error.reason not in TRY_AGAIN or attempt == limits.retries:
                return row | {"reason": error.reason, "message": str(error)}
    storage.write_bytes(storage.join(out, name), images.encode_mask(measured.mask))
    return row | measured.values | {"mask_uri": name}


def _labels_of(item: Item, config: AnnotationConfig, limits: MeasureLimits) -> dict[str, Any]:
    """Return the format and labels of an annotation that has unknown ones, so that the run can list them all."""
    try:
        found = reader().describe(item["annotation_uri"], item["id"], config=config, limits=limits)
    except InputError:
        return {}  # the row states what was wrong with it first
    return {"annotation_format": found.format, "label_counts": json.dumps(found.labels, ensure_ascii=False)}


def _part_folder(out: str, config: AnnotationConfig) -> str:
    # Other annotation settings make other masks, other versions other columns or masks: their parts are kept apart.
    kept_as = storage.fingerprint(truth.READ_AS, config.model_dump_json(), *PART_SCHEMA.names)
    return storage.join(out, "parts", kept_as)


def write_part(out: str, rows: Sequence[dict[str, Any]], config: AnnotationConfig) -> None:
    """Keep rows that were measured."""
    name = f"{time.time_ns():020d}.parquet"  # later parts replace earlier rows of the same id
    table = pa.Table.from_pylist(list(rows), schema=PART_SCHEMA)
    tables.write_table(storage.join(_part_folder(out, config), name), table)


def read_parts(out: str, config: AnnotationConfig) -> list[dict[str, Any]]:
    """Return the rows that were kept, the later ones of an id last."""
    folder = _part_folder(out, config)
    if not storage.exists(folder):
        return []
    parts = (tables.read_table(uri, PART_SCHEMA) for uri in storage.list_files(folder, (".parquet",)))
    return [row for part in parts for row in part.to_pylist()]


def stale_items(
    items: Sequence[Item], done: Mapping[str, Mapping[str, Any]], out: str, limits: MeasureLimits
) -> list[Item]:
    """Return the items to measure: new, changed, without a mask, over a limit, or worth another try."""
    masks = storage.join(out, "masks")
    written = {storage.stem_of(uri) for uri in storage.list_files(masks, (".png",))} if storage.exists(masks) else set()

    def holds(row: Mapping[str, Any]) -> bool:
        if row["reason"] is None:
            return row["id"] in written and row["height"] * row["width"] <= limits.max_pixels
        return row["reason"] not in TRY_AGAIN and row["limits"] == limits.key

    up_to_date = {row["stamp"] for row in done.values() if holds(row)}
    return [item for item in items if item["stamp"] not in up_to_date]
