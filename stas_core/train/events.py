"""TensorBoard events of a fold's history; a module of its own, because TensorBoard is slow to import."""

import io
from collections.abc import Sequence
from dataclasses import asdict

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from stas_core import storage
from stas_core.runs import EpochMetrics


def write_events(uri: str, history: Sequence[EpochMetrics]) -> None:
    """Write the whole history as one TensorBoard event file.

    Written anew each time from the history, which a restart carries over: unlike with an appending writer, an epoch
    that was redone after a crash stands in it once, and any storage will do.
    """
    sink = io.BytesIO()
    writer = RecordWriter(sink)
    start = history[0].unix_time_s if history else 0.0
    writer.write(Event(wall_time=start, file_version="brain.Event:2").SerializeToString())
    for row in history:
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in asdict(row).items()
            if name not in ("fold", "epoch", "unix_time_s") and value is not None
        ]
        event = Event(wall_time=row.unix_time_s, step=row.epoch, summary=Summary(value=values))
        writer.write(event.SerializeToString())
    writer.flush()
    storage.write_bytes(storage.join(uri, "events.out.tfevents.0.stas"), sink.getvalue())
