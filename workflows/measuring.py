"""An image measured with its annotation: its mask, and its row of the cohort before the split, or why it has none."""

import json
from typing import Any

import pyarrow as pa

from stas_core import storage
from stas_core.data import images
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


def measure_item(item: Item, out: str, config: AnnotationConfig, limits: MeasureLimits | None = None) -> dict[str, Any]:
    """Measure one image and write its mask; return its row, with the reason where it cannot be used."""
    limits = limits or MeasureLimits()
    row: dict[str, Any] = dict.fromkeys(PART_SCHEMA.names) | item | {"limits": limits.key}
    mask_name = f"masks/{item['id']}.png"
    for attempt in range(1 + limits.retries):
        try:
            measured = reader().measure(item, config=config, limits=limits)
            break
        except InputError as error:
            if error.reason == UnknownLabel.reason:
                row |= _labels_of(item, config, limits)
            if error.reason not in TRY_AGAIN or attempt == limits.retries:
                return row | {"reason": error.reason, "message": str(error)}
    storage.write_bytes(storage.join(out, mask_name), images.encode_mask(measured.mask))
    return row | measured.values | {"mask_uri": mask_name}


def _labels_of(item: Item, config: AnnotationConfig, limits: MeasureLimits) -> dict[str, Any]:
    """Return the format and labels of an annotation that has unknown ones, so that the run can list them all."""
    try:
        found = reader().describe(item["annotation_uri"], item["id"], config=config, limits=limits)
    except InputError:
        return {}  # the row states what was wrong with it first
    return {"annotation_format": found.format, "label_counts": json.dumps(found.labels, ensure_ascii=False)}
