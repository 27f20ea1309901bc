"""What is read of tables and records that another program wrote, or that came over damaged."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stas_core import storage, tables
from stas_core.errors import StorageError

FIELDS: list[tables.Field] = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("fold", pa.int32()),
    pa.field("areas", pa.list_(pa.int64())),
]
SCHEMA = pa.schema(FIELDS)
ROWS: list[dict[str, Any]] = [{"id": "a", "fold": 0, "areas": [1, 2]}, {"id": "b", "fold": None, "areas": []}]
TABLE = pa.Table.from_pylist(ROWS, schema=SCHEMA)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "t.parquet holds 0 bytes, expected Parquet"),
        (LFS_POINTER, "t.parquet is a Git LFS pointer, not the Parquet file itself; run `git lfs pull`"),
        (b"id,fold\na,0\n", "t.parquet is not a Parquet file"),
        (parquet(TABLE)[:-20], "t.parquet is cut short"),
        (parquet(TABLE)[:4] + b"\0" * 40 + parquet(TABLE)[-4:], "t.parquet is damaged"),
    ],
)
def test_what_is_no_whole_parquet_file_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(data)
    with pytest.raises(StorageError, match=message):
        tables.read_table(str(tmp_path / "t.parquet"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": None}, "has no column 'id' .*expected one of string.*it has .'fold', 'areas'"),
        ({"id": pa.array([1.0, 2.0])}, "column 'id' is of type double, expected string"),
        ({"id": pa.array(["a", None])}, "row 1 has no id"),
        ({"fold": pa.array(["0", "1"])}, "column 'fold' is of type string, expected int32"),
        ({"fold": pa.array([0.5, 1.0])}, "column 'fold' is of type double, expected int32, and its values do not fit"),
        ({"fold": pa.array([2**40, 1])}, "column 'fold' is of type int64, expected int32, and its values do not fit"),
        ({"areas": pa.array([1, 2])}, "column 'areas' is of type int64, expected list<"),
    ],
)
def test_a_column_that_does_not_fit_is_named_with_both_types(
    columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    held = {name: TABLE[name] for name in TABLE.column_names} | columns
    uri = str(tmp_path / "t.parquet")
    tables.write_table(uri, pa.table({name: column for name, column in held.items() if column is not None}))
    with pytest.raises(StorageError, match=message) as raised:
        tables.read_table(uri, SCHEMA)
    assert uri in str(raised.value)


def test_what_pandas_and_polars_write_is_read_as_the_schema_has_it(tmp_path: Path) -> None:
    foreign = pa.table(
        {
            "note": ["x", "y"],
            "areas": pa.array([[1, 2], []], pa.large_list(pa.int32())),
            "fold": pa.array([0.0, None], pa.float64()),
            "id": pa.array(["a", "b"]).dictionary_encode(),
        }
    )
    uri = str(tmp_path / "t.parquet")
    tables.write_table(uri, foreign)
    assert tables.read_table(uri, SCHEMA).equals(TABLE)
    bare = pa.table({"id": ["a", "b"]})
    tables.write_table(uri, bare)
    read = tables.read_table(uri, SCHEMA, optional=("fold", "areas"))
    assert read.schema.equals(SCHEMA) and read["fold"].to_pylist() == [None, None]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_tables_are_read_or_refused_by_name(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(parquet(TABLE))
    for position in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=6)):
        whole[position] = data.draw(st.integers(0, 255))
    uri = str(tmp_path / "t.parquet")
    Path(uri).write_bytes(whole)
    try:
        tables.read_table(uri, SCHEMA).to_pylist()
    except StorageError as error:
        assert uri in str(error)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "r.json holds 0 bytes, expected JSON"),
        (LFS_POINTER, "r.json is a Git LFS pointer"),
        (b'{"inputs": ', "r.json is not valid JSON"),
        (b"[" * 100_000, "r.json is not valid JSON"),
        ('{"ä": 1}'.encode("latin-1"), "r.json is not valid JSON"),
        (b"[1]", "r.json holds a JSON list, expected an object with inputs"),
        (b'{"config": 1}', "r.json has no 'inputs', only .'config'"),
    ],
)
def test_a_record_that_is_none_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(data)
    with pytest.raises(StorageError, match=message):
        storage.read_record(str(tmp_path / "r.json"), "inputs")


def test_a_record_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"inputs": "x", "more": 1}))
    assert storage.read_record(str(tmp_path / "r.json"), "inputs") == {"inputs": "x", "more": 1}


@dataclass(frozen=True)
class Measured:
    """A row with every kind of column."""

    id: str
    count: tables.Int32
    level: tables.Int8
    size: int
    share: float
    good: bool
    note: str | None
    areas: list[int]
    matrix: Annotated[list[float], pa.list_(pa.float64(), 2)] | None


measured = st.builds(
    Measured,
    id=st.text(max_size=5),
    count=st.integers(-(2**31), 2**31 - 1),
    level=st.integers(-128, 127),
    size=st.integers(-(2**63), 2**63 - 1),
    share=st.floats(allow_nan=False),
    good=st.booleans(),
    note=st.none() | st.text(max_size=5),
    areas=st.lists(st.integers(0, 9), max_size=3),
    matrix=st.none() | st.lists(st.floats(allow_nan=False), min_size=2, max_size=2),
)


@given(rows=st.lists(measured, max_size=4))
def test_rows_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, rows: list[Measured]) -> None:
    uri = str(tmp_path_factory.mktemp("rows") / "rows.parquet")
    tables.write_rows(uri, Measured, rows)
    assert tables.read_rows(uri, Measured) == rows


def test_a_row_class_is_its_schema() -> None:
    fields: list[tables.Field] = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("count", pa.int32(), nullable=False),
        pa.field("level", pa.int8(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("share", pa.float64(), nullable=False),
        pa.field("good", pa.bool_(), nullable=False),
        pa.field("note", pa.string()),
        pa.field("areas", pa.list_(pa.int64()), nullable=False),
        pa.field("matrix", pa.list_(pa.float64(), 2)),
    ]
    assert tables.schema_of(Measured) == pa.schema(fields)


class Found(TypedDict):
    id: str
    reason: str | None


class Read(Found, total=False):
    height: tables.Int32
    tiles: list[tables.Int32]


def test_rows_of_dictionaries_have_a_schema_and_what_they_lack_is_null() -> None:
    fields: list[tables.Field] = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("height", pa.int32()),
        pa.field("tiles", pa.list_(pa.int32())),
    ]
    table = tables.to_table(Read, [Read(id="a", reason=None, height=3, tiles=[1]), Read(id="b", reason="slow")])
    assert table.schema == pa.schema(fields)
    assert tables.from_table(Found, table) == [{"id": "a", "reason": None}, {"id": "b", "reason": "slow"}]
    assert tables.from_table(Read, table)[1] == {"id": "b", "reason": "slow", "height": None, "tiles": None}
