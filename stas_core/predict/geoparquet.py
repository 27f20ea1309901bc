"""Targets as GeoParquet 1.1, for geopandas, QGIS, DuckDB: a row per target, written as they come.

Geometry is WKB, in the same coordinates as the GeoJSON: level-0 px, y downwards, without a reference system on earth.
"""

import json
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from stas_core.predict.placement import TargetFacts
from stas_core.predict.polygons import TargetShapes

_ROWS_AT_ONCE = 1 << 14


class GeoParquetWriter:
    """Writes a row per target, by row groups.

    Columns: `number`, `geometry`, `area_um2` (`area_px2` where um are not known), `centroid_x`, `centroid_y` (in the
    coordinates of the geometry), `mean_prob`, `peak_prob`, `touches_border`, and those of the facts. What is not finite
    is null. The key `stas` of the file's metadata says which image it is, and what its coordinates are.
    """

    def __init__(self, path: str, facts: TargetFacts) -> None:
        """Begin a file at a local path."""
        self._facts = facts
        self._columns = _columns(facts)
        fields: list[Any] = [
            pa.field("number", pa.int32(), nullable=False),
            pa.field("geometry", pa.binary(), nullable=False),
        ]
        fields += [pa.field(name, column.type) for name, column in self._columns.items()]
        about = json.dumps(facts.record(), ensure_ascii=False)
        metadata: dict[bytes | str, bytes | str] = {"geo": json.dumps(_geo(facts)), "stas": about}
        self._schema = pa.schema(fields, metadata)
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._waiting: list[TargetShapes] = []
        self._num_waiting = 0

    def write(self, shapes: TargetShapes) -> None:
        """Add targets."""
        self._waiting.append(shapes)
        self._num_waiting += len(shapes)
        if self._num_waiting >= _ROWS_AT_ONCE:
            self._flush()

    def close(self) -> None:
        """End the file; it is no Parquet before."""
        self._flush()
        self._writer.close()

    def __enter__(self) -> "GeoParquetWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def _flush(self) -> None:
        tables = [self._rows(shapes) for shapes in self._waiting]
        self._waiting, self._num_waiting = [], 0
        if tables:
            self._writer.write_table(pa.concat_tables(tables), row_group_size=4 * _ROWS_AT_ONCE)

    def _rows(self, shapes: TargetShapes) -> pa.Table:
        placement = self._facts.placement
        points = np.stack([placement.on_level0(shapes.corners[:, axis], axis) for axis in (0, 1)], axis=1)
        geometry = shapely.to_wkb(shapes.geometry_at(points), include_srid=False)
        rows = pa.array(shapes.numbers - 1)
        columns: list[Any] = [pa.array(shapes.numbers), pa.array(geometry, pa.binary())]
        columns += [column.take(rows) for column in self._columns.values()]
        return pa.Table.from_arrays(columns, schema=self._schema)


def write_geoparquet(path: str, shapes: Iterable[TargetShapes], facts: TargetFacts) -> None:
    """Write all targets of an image; see `GeoParquetWriter`."""
    with GeoParquetWriter(path, facts) as writer:
        for some in shapes:
            writer.write(some)


def _columns(facts: TargetFacts) -> dict[str, Any]:
    targets, placement = facts.targets, facts.placement
    own: dict[str, np.ndarray] = {
        f"area_{placement.area_unit}": facts.area,
        # Those of targets count from the middle of a pixel.
        "centroid_x": placement.on_level0(targets.centroid_x + 0.5, 0),
        "centroid_y": placement.on_level0(targets.centroid_y + 0.5, 1),
        "mean_prob": targets.mean_prob,
        "peak_prob": targets.peak_prob,
        "touches_border": targets.touches_border,
    }
    taken = {"number", "geometry", *own} & facts.columns.keys()
    if taken:
        raise ValueError(f"further columns {sorted(taken)} of {facts.image_id} are written anyway; give other names")
    columns: dict[str, Any] = {name: pa.array(values) for name, values in own.items()}
    for name, values in facts.columns.items():
        if values is None:
            columns[name] = pa.nulls(len(targets), pa.float64())
        else:
            columns[name] = pa.array(values, mask=~np.isfinite(values))
    return columns


def _geo(facts: TargetFacts) -> dict[str, Any]:
    """Return what GeoParquet asks a file to say of its geometry."""
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": ["Polygon", "MultiPolygon"],
        "crs": None,
        "edges": "planar",
    }
    bbox = facts.targets.bbox
    if len(bbox):
        low, high = bbox[:, :2].min(axis=0), bbox[:, 2:].max(axis=0)
        column["bbox"] = [float(facts.placement.on_level0(end[axis], axis)) for end in (low, high) for axis in (0, 1)]
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
