"""What a fold leaves beside its weights and maps: metrics by epoch, and its result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stas_core import tables

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


def write_metrics(uri: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Write the metrics table of a fold."""
    tables.write_table(uri, pa.Table.from_pylist([dict(row) for row in history], schema=METRICS_SCHEMA))


@dataclass(frozen=True)
class FoldResult:
    """What a finished fold reports; per-image scores are in its out-of-fold index."""

    fold: int
    epochs: int
    dice: float
    precision: float
    recall: float
    last_val_dice: float
    best_val_dice: float
    best_epoch: int
    train_seconds: float
    images_per_s: float
    ran_on: Sequence[str]
    """What it was trained on, one after the other; more than one, and its bytes are not those of an undisturbed run."""
