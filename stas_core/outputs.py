"""Write what a run leaves for people and other tools: metrics as Parquet and as TensorBoard events."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from stas_core import storage

METRICS_SCHEMA = pa.schema(
    [
        pa.field("fold", pa.int32(), nullable=False),
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("train_loss", pa.float64(), nullable=False),
        pa.field("lr", pa.float64(), nullable=False),
        pa.field("grad_norm", pa.float64(), nullable=False),
        pa.field("images_per_s", pa.float64(), nullable=False),
        pa.field("val_dice", pa.float64()),
        pa.field("val_precision", pa.float64()),
        pa.field("val_recall", pa.float64()),
        pa.field("unix_time_s", pa.float64(), nullable=False),
    ]
)
"""One row per epoch; the `val_` columns are null in epochs that were not validated."""

OOF_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("fold", pa.int32(), nullable=False),
        pa.field("map_uri", pa.string(), nullable=False),
        pa.field("dice", pa.float64(), nullable=False),
        pa.field("precision", pa.float64(), nullable=False),
        pa.field("recall", pa.float64(), nullable=False),
        pa.field("tp", pa.int64(), nullable=False),
        pa.field("fp", pa.int64(), nullable=False),
        pa.field("fn", pa.int64(), nullable=False),
    ]
)
"""One row per out-of-fold image: where its 8-bit map is (relative to the table's folder) and how it scores at 0.5."""


def write_metrics(uri: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Write the metrics table of a fold."""
    storage.write_table(uri, pa.Table.from_pylist([dict(row) for row in history], schema=METRICS_SCHEMA))


def write_events(uri: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Write the whole history as one TensorBoard event file.

    Written anew each time from the history, which a restart carries over: unlike with an appending writer, an epoch
    that was redone after a crash stands in it once, and any storage will do.
    """
    sink = io.BytesIO()
    writer = RecordWriter(sink)
    start = history[0]["unix_time_s"] if history else 0.0
    writer.write(Event(wall_time=start, file_version="brain.Event:2").SerializeToString())
    for row in history:
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name not in ("fold", "epoch", "unix_time_s") and value is not None
        ]
        event = Event(wall_time=row["unix_time_s"], step=row["epoch"], summary=Summary(value=values))
        writer.write(event.SerializeToString())
    writer.flush()
    storage.write_bytes(storage.join(uri, "events.out.tfevents.0.stas"), sink.getvalue())


def write_oof_index(uri: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the index of out-of-fold maps, sorted by id."""
    ordered = sorted((dict(row) for row in rows), key=lambda row: row["id"])
    storage.write_table(uri, pa.Table.from_pylist(ordered, schema=OOF_SCHEMA))
