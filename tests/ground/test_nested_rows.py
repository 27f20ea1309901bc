"""Rows that hold rows of a class of their own: one, perhaps none, and any number of them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core import storage, tables
from stas_core.errors import WrongColumns
from stas_core.tables import Int32


@dataclass(frozen=True)
class Point:
    """A place in px."""

    x: Int32
    y: float | None


@dataclass(frozen=True)
class Shape:
    """An outline with its name."""

    name: str
    points: list[Point]
    centre: Point | None


@dataclass(frozen=True)
class Drawing:
    """An image with what is drawn on it: rows in rows in rows."""

    id: str
    origin: Point
    largest: Shape | None
    shapes: list[Shape]
    notes: list[str]


points = st.builds(
    Point, x=st.integers(-(2**31), 2**31 - 1), y=st.none() | st.floats(allow_nan=False, allow_infinity=False)
)
shapes = st.builds(Shape, name=st.text(max_size=3), points=st.lists(points, max_size=3), centre=st.none() | points)
drawings = st.builds(
    Drawing,
    id=st.text(max_size=3),
    origin=points,
    largest=st.none() | shapes,
    shapes=st.lists(shapes, max_size=3),
    notes=st.lists(st.text(max_size=3), max_size=2),
)


def test_a_row_in_a_row_is_a_struct() -> None:
    fields: list[tables.Field] = [pa.field("x", pa.int32(), nullable=False), pa.field("y", pa.float64())]
    point = pa.struct(fields)
    of_shape: list[tables.Field] = [
        pa.field("name", pa.string(), nullable=False),
        pa.field("points", pa.list_(point), nullable=False),
        pa.field("centre", point),
    ]
    shape = pa.struct(of_shape)
    of_drawing: list[tables.Field] = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("origin", point, nullable=False),
        pa.field("largest", shape),
        pa.field("shapes", pa.list_(shape), nullable=False),
        pa.field("notes", pa.list_(pa.string()), nullable=False),
    ]
    assert tables.schema_of(Drawing) == pa.schema(of_drawing)


@settings(max_examples=40)
@given(st.lists(drawings, max_size=4))
def test_nested_rows_come_back_as_they_were(rows: list[Drawing]) -> None:
    assert tables.from_table(Drawing, tables.to_table(Drawing, rows)) == rows
    tables.write_rows("memory://nested/rows.parquet", Drawing, rows)
    assert tables.read_rows("memory://nested/rows.parquet", Drawing) == rows
    # As Ray and JSON hand them over: by name.
    assert [tables.from_values(Drawing, asdict(row)) for row in rows] == rows
    assert [tables.from_values(Drawing, json.loads(json.dumps(asdict(row)))) for row in rows] == rows


@settings(max_examples=30)
@given(st.lists(drawings, max_size=3))
def test_equal_nested_rows_give_equal_bytes(rows: list[Drawing]) -> None:
    for name in ("a", "b"):
        tables.write_rows(f"memory://nested/{name}.parquet", Drawing, [*rows])
    first, second = (storage.read_bytes(f"memory://nested/{name}.parquet") for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("column", [pa.array([1]), pa.array(["x"]), pa.array([None], pa.list_(pa.int64()))])
def test_a_column_that_holds_no_rows_is_named(column: Any, tmp_path: Path) -> None:
    whole = tables.to_table(Drawing, [Drawing("a", Point(1, None), None, [], [])])
    uri = str(tmp_path / "t.parquet")
    for name in ("origin", "shapes"):
        tables.write_table(uri, whole.set_column(whole.column_names.index(name), name, column))
        with pytest.raises(WrongColumns, match=f"t.parquet: .*{name}"):
            tables.read_rows(uri, Drawing)
