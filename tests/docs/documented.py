"""Holds the Parquet files of a run to the data dictionary."""

from pathlib import Path

import pyarrow.parquet as pq

from docs.generate.dictionary import INTERNAL, Table, tables_of


def assert_documented(stage: str, out: Path) -> None:
    """Assert that each Parquet file below a stage's folder is described, with these columns and types."""
    found = [path for path in sorted(out.rglob("*.parquet")) if not _is_internal(path.relative_to(out))]
    if stage == "tune_training":  # whose trials are runs of train_folds
        found = [path for path in found if path.parent == out]
    assert found != []
    for path in found:
        name = path.relative_to(out)
        described = [table for table in tables_of(stage) if name.match(table.pattern.replace("{id}", "*"))]
        assert described, f"{stage} writes {name}, which is in no table of docs/generate/dictionary.py"
        assert any(_fits(table, path) for table in described), f"{name} has other columns than its description"


def _is_internal(name: Path) -> bool:
    return any(name.match(pattern) for pattern in INTERNAL)


def _fits(table: Table, path: Path) -> bool:
    described = {field.name: field.type for field in table.columns}
    written = {field.name: field.type for field in pq.read_schema(path)}
    if table.further:  # columns that depend on the run
        written = {name: kind for name, kind in written.items() if name in described}
    return written == described
