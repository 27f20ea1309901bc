"""What a run folder is: where a training run keeps what, and how the next stage opens it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stas_core import config as configs
from stas_core import storage, tables
from stas_core.data import cohort as cohorts
from stas_core.data.cohort import CohortRow
from stas_core.errors import ConfigError


@dataclass(frozen=True)
class OofMap:
    """An out-of-fold map and where its truth is found."""

    uri: str
    fold: int
    row: CohortRow


def find_maps(run_uri: str, cohort_uri: str | None) -> list[OofMap]:
    """Return the out-of-fold maps of a training run with the rows of its cohort, sorted by fold and id.

    Raises:
        ConfigError: the run has fewer than two folds with maps, or images that the cohort does not know.
    """
    if cohort_uri is None:
        resolved = storage.join(run_uri, "config.resolved.yaml")
        if not storage.exists(resolved):
            raise ConfigError(f"run = {run_uri}: no config.resolved.yaml there; give the out= of a train_folds run")
        cohort_uri = _trained_on(resolved)
    rows = {row.id: row for row in cohorts.read_cohort(cohort_uri)}
    found = []
    for fold in cohorts.folds_of(list(rows.values())):
        folder = storage.join(run_uri, f"fold_{fold}")
        if not storage.exists(storage.join(folder, "fold.json")):
            continue
        index = storage.join(folder, "oof.parquet")
        listed: set[str] = set()
        for number, oof in enumerate(tables.read_table(index, OOF_SCHEMA).to_pylist()):
            where = f"{index}: row {number} ({oof['id']!r:.60})"
            if oof["id"] not in rows:
                raise ConfigError(f"{where}: {cohort_uri} does not know this image; set cohort=")
            if oof["id"] in listed:
                raise ConfigError(f"{where}: an earlier row has this image; train the fold again")
            listed.add(oof["id"])
            uri = storage.resolve(oof["map_uri"], folder, where=f"{where}, column map_uri")
            found.append(OofMap(uri, fold, rows[oof["id"]]))
    if len({oof.fold for oof in found}) < 2:
        raise ConfigError(
            f"run = {run_uri}: {len({oof.fold for oof in found})} finished fold(s); a setting is chosen on some folds "
            "and judged on another, so train at least two"
        )
    return sorted(found, key=lambda oof: (oof.fold, oof.row.id))


def _trained_on(resolved: str) -> str:
    """Return the cohort that the config of a training run names."""
    values = configs.parse_yaml(storage.read_bytes(resolved).decode(), resolved)
    data = values.get("data") if isinstance(values, dict) else None
    cohort_uri = data.get("cohort") if isinstance(data, dict) else None
    if not isinstance(cohort_uri, str):
        raise ConfigError(f"{resolved} names no data.cohort; give the out= of a train_folds run, or set cohort=")
    return cohort_uri


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


def write_oof_index(uri: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the index of out-of-fold maps, sorted by id."""
    ordered = sorted((dict(row) for row in rows), key=lambda row: row["id"])
    tables.write_table(uri, pa.Table.from_pylist(ordered, schema=OOF_SCHEMA))
