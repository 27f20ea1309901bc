from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stas_core import tables
from stas_core.runs import EpochMetrics, FoldFolder, OofScore
from stas_core.train import events

ROW: dict[str, Any] = {"fold": 1, "train_loss": 0.5, "lr": 1e-3, "grad_norm": 1.0, "images_per_s": 3.0}
HISTORY = [
    EpochMetrics(**ROW, epoch=1, unix_time_s=10.0),
    EpochMetrics(**ROW, epoch=2, val_dice=0.7, unix_time_s=20.0),
]


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    events.write_events(str(tmp_path), HISTORY)
    events.write_events(str(tmp_path), HISTORY)  # written anew, not appended
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, round(e.value, 4)) for e in read.Scalars("train_loss")] == [(1, 0.5), (2, 0.5)]
    assert [(e.step, e.wall_time) for e in read.Scalars("val_dice")] == [(2, 20.0)]


def test_metrics_keep_missing_validation_apart_from_zero(tmp_path: Path) -> None:
    FoldFolder(str(tmp_path)).write_metrics(HISTORY)
    table = tables.read_table(str(tmp_path / "metrics.parquet"))
    assert table.schema.equals(tables.schema_of(EpochMetrics))
    assert table["val_dice"].to_pylist() == [None, 0.7]


def test_the_oof_index_is_sorted_by_id(tmp_path: Path) -> None:
    rows = [OofScore(name, 0, "m", dice=1.0, precision=1.0, recall=1.0, tp=1, fp=0, fn=0) for name in ("b", "a")]
    FoldFolder(str(tmp_path)).write_oof(rows)
    assert tables.read_table(str(tmp_path / "oof.parquet"))["id"].to_pylist() == ["a", "b"]
