"""Tables as files (Parquet) and their rows as objects: a frozen dataclass is a row's type and its schema in one.

    @dataclass(frozen=True)
    class Failure:
        id: str
        num_tries: Int32
        message: str | None

    write_rows(uri, Failure, rows)
    rows = read_rows(uri, Failure)

`str`, `int` (64 bits), `float` (64 bits), `bool`, lists of these and further such classes (structs in Arrow) are
columns; `X | None` may be null. Other widths are `Annotated[int, pa.int32()]`; the two common ones have names. The
docstring under a field describes its column, in the file too.

Rows that go from one task of Ray Data to the next are dictionaries, and their class is a `TypedDict`: its schema is
made in the same way, and a key that a row may lack is a column that may be null.
"""

import ast
import inspect
import textwrap
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import pyarrow as pa
import pyarrow.parquet as pq

from stas_core import storage
from stas_core.errors import StorageError, WrongColumns

Int8 = Annotated[int, pa.int8()]
Int32 = Annotated[int, pa.int32()]
_TYPES: dict[type, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    bytes: pa.large_binary(),
}
_PARQUET_MARK = b"PAR1"


_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)
R = TypeVar("R")

if TYPE_CHECKING:  # generic for the type checker only
    Field = pa.Field[Any]
    Column = pa.ChunkedArray[Any]
else:
    Field, Column = pa.Field, pa.ChunkedArray


def schema_of(row_type: type[Any]) -> pa.Schema:
    """Return the schema of a row's class: its fields in their order; those of a dataclass with their docstrings.

    Example:
        >>> from typing import TypedDict
        >>> class Decoded(TypedDict, total=False):
        ...     height: Int32
        >>> schema_of(Decoded)
        height: int32
    """
    hints = get_type_hints(row_type, include_extras=True)
    if is_typeddict(row_type):
        made, lacking = [_field(name, hint, None) for name, hint in hints.items()], row_type.__optional_keys__
        return pa.schema([field.with_nullable(field.nullable or field.name in lacking) for field in made])
    texts = descriptions(row_type)
    return pa.schema([_field(field.name, hints[field.name], texts.get(field.name)) for field in fields(row_type)])


def _field(name: str, hint: Any, text: str | None) -> Field:
    kind = _without_none(hint)
    return pa.field(name, _type(kind), nullable=kind is not hint, metadata={"description": text} if text else None)


def descriptions(row_type: type[Any]) -> Mapping[str, str]:
    """Return the docstrings under the fields of a row's class, as one line each, by name of field."""
    found: dict[str, str] = {}
    for kind in reversed(row_type.__mro__):
        if is_dataclass(kind):
            found |= _docstrings(kind)
    return found


@cache
def _docstrings(kind: Callable[..., Any]) -> Mapping[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):  # typed at a prompt
        return {}
    (made,) = ast.parse(source).body
    body = made.body if isinstance(made, ast.ClassDef) else []
    found = {}
    for field, text in pairwise(body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                found[name] = " ".join(words.split())
    return found


def _without_none(hint: Any) -> Any:
    """Return the type of a value that is there."""
    if get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
        (hint,) = (option for option in get_args(hint) if option is not type(None))
    return hint


def _type(hint: Any) -> pa.DataType:
    if get_origin(hint) is Annotated:
        return next(mark for mark in get_args(hint) if isinstance(mark, pa.DataType))
    if get_origin(hint) is list:
        return pa.list_(_type(*get_args(hint)))
    if isinstance(hint, type) and is_dataclass(hint):
        return pa.struct(list(schema_of(hint)))
    return _TYPES[hint]


def to_table(row_type: type[R], rows: Iterable[R]) -> pa.Table:
    """Return rows as a table; keys of a dictionary that are no fields of its class are left out."""
    schema, inner, listed = schema_of(row_type), _inner(row_type), list(rows)
    if is_typeddict(row_type):
        plain = [{**row, **_plain(row, inner)} for row in cast(list[dict[str, Any]], listed)]
        return pa.Table.from_pylist(plain, schema=schema)
    columns = []
    for field in schema:
        values = [getattr(row, field.name) for row in listed]
        if field.name in inner:
            values = [_values(value) for value in values]
        columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def from_table(row_type: type[R], table: pa.Table) -> list[R]:
    """Return the rows of a table with (at least) the columns of their class; it may lack keys that a row may lack."""
    inner, optional = _inner(row_type), getattr(row_type, "__optional_keys__", frozenset[str]())
    lacking = optional - set(table.column_names)
    names = [name for name in schema_of(row_type).names if name not in lacking]
    inner = {name: kind for name, kind in inner.items() if name not in lacking}
    return [_build(row_type, row, inner) for row in table.select(names).to_pylist()]


def from_values(row_type: type[R], values: Mapping[str, Any]) -> R:
    """Return the row whose values are given by name, as Arrow, Ray and JSON give them."""
    return _build(row_type, values, _inner(row_type))


def _build(row_type: type[R], values: Mapping[str, Any], inner: Mapping[str, type[Any]]) -> R:
    return row_type(**{**values, **{name: _row(kind, values[name]) for name, kind in inner.items()}})


def _inner(row_type: Any) -> Mapping[str, Any]:
    """Return the columns that hold rows of a class of their own, or lists of them, and that class."""
    return _inner_once(row_type)


@cache
def _inner_once(row_type: Callable[..., Any]) -> Mapping[str, Any]:
    found = {}
    for name, hint in get_type_hints(row_type).items():
        kind = _without_none(hint)
        kind = get_args(kind)[0] if get_origin(kind) is list else kind
        if is_dataclass(kind):
            found[name] = kind
    return found


def _plain(row: Mapping[str, Any], inner: Iterable[str]) -> dict[str, Any]:
    return {name: _values(row[name]) for name in inner if name in row}


def _values(value: Any) -> Any:
    if isinstance(value, list):
        return [_values(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _values(getattr(value, field.name)) for field in fields(value)}
    return value  # plain, or as Arrow gave it


def _row(kind: type[Any], value: Any) -> Any:
    if isinstance(value, list):
        return [_row(kind, one) for one in value]
    return None if value is None else from_values(kind, value)


def read_rows(uri: str, row_type: type[R], *, optional: Collection[str] = ()) -> list[R]:
    """Read a Parquet file as row objects, with the checks of `read_table`.

    Raises:
        StorageError: it cannot be read, or is no whole Parquet file.
        WrongColumns: a column is missing, of another type, or null where it must not be.
    """
    return from_table(row_type, read_table(uri, schema_of(row_type), optional=optional))


def write_rows(uri: str, row_type: type[R], rows: Iterable[R]) -> None:
    """Write rows as a Parquet file; equal rows give equal bytes.

    Example:
        >>> from stas_core.failures import Failure
        >>> rows = [Failure("0007", "prepare_data", "empty_file", "0007.jpg holds 0 bytes")]
        >>> write_rows("memory://example/failures.parquet", Failure, rows)
        >>> read_rows("memory://example/failures.parquet", Failure) == rows
        True
    """
    write_table(uri, to_table(row_type, rows))


def read_table(uri: str, schema: pa.Schema | None = None, *, optional: Collection[str] = ()) -> pa.Table:
    """Read a Parquet file.

    Args:
        uri: path or URI.
        schema: what is needed of it. The table comes back with these columns, in this order and of these types; numbers
            and texts that other programs store in another width are converted where nothing is lost, integers to text.
        optional: columns of `schema` that the file may lack; they are null then.

    Raises:
        StorageError: it cannot be read, or is no whole Parquet file.
        WrongColumns: a column is missing, of another type, or null where it must not be.
    """
    data = storage.read_bytes(uri)
    storage.refuse_stand_in(uri, data, "Parquet")
    try:
        table = pq.read_table(pa.BufferReader(data))
        table.validate(full=True)  # text that is not UTF-8 would fail later, far from here
    except Exception as error:  # damaged bytes: Arrow raises what it likes
        whole = data.startswith(_PARQUET_MARK) and data.endswith(_PARQUET_MARK)
        what = "is damaged" if whole else "is cut short" if data.startswith(_PARQUET_MARK) else "is not a Parquet file"
        raise StorageError(
            f"{uri} {what} ({_first_line(error)}); copy it again, or let what made it make it anew"
        ) from error
    return table if schema is None else conforming(uri, table, schema, optional=optional)


def conforming(uri: str, table: pa.Table, schema: pa.Schema, *, optional: Collection[str] = ()) -> pa.Table:
    """Return what is needed of a table that was read from `uri`, as `read_table` does.

    Raises:
        WrongColumns: as `read_table`.
    """
    return pa.Table.from_arrays([_column(uri, table, field, optional) for field in schema], schema=schema)


def _column(uri: str, table: pa.Table, field: Field, optional: Collection[str]) -> Column:
    number = table.column_names.count(field.name)
    if number == 0 and field.name in optional:
        return pa.chunked_array([pa.array([None] * table.num_rows, field.type)])
    if number != 1:
        found = f"{number} columns" if number else "no column"
        raise WrongColumns(
            f"{uri} has {found} {field.name!r} (expected one of {field.type}); it has {table.column_names}"
        )
    column = table[field.name]
    wrong = f"{uri}: column {field.name!r} is of type {column.type}, expected {field.type}"
    if not _same_kind(column.type, field.type):
        raise WrongColumns(f"{wrong}; store it as that")
    try:
        column = column.cast(field.type)
    except pa.ArrowException as error:
        raise WrongColumns(f"{wrong}, and its values do not fit ({_first_line(error)}); store it as that") from error
    if column.null_count and not field.nullable and field.name not in optional:
        row = column.is_null().to_pylist().index(True)
        raise WrongColumns(
            f"{uri}: row {row} has no {field.name} (and {column.null_count - 1} more of {table.num_rows} rows); "
            "give one, or drop the row"
        )
    return column


def _same_kind(found: pa.DataType, expected: pa.DataType) -> bool:
    """Tell whether values of one type may be read as the other: pandas and polars write other widths than we do."""
    if isinstance(found, pa.DictionaryType):
        found = found.value_type
    if pa.types.is_null(found) or found == expected:
        return True
    if pa.types.is_integer(found) and _is_text(expected):
        return True  # images and patients are often numbered
    kinds = (_is_number, _is_text, pa.types.is_boolean)
    if isinstance(found, _LISTS) and isinstance(expected, _LISTS):
        return _same_kind(found.value_type, expected.value_type)
    return any(kind(found) and kind(expected) for kind in kinds)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def write_table(uri: str, table: pa.Table, *, rows_per_group: int | None = None) -> None:
    """Write a Parquet file, whose groups of rows can be read one at a time; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=rows_per_group)
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


@contextmanager
def writing_table(uri: str, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Give a function that adds rows to a Parquet file, a table at a time; it is there when the block has ended.

    Equal tables, in equal pieces, give equal bytes.
    """
    with storage.written_whole(uri) as path, pq.ParquetWriter(path, schema, compression="zstd") as sink:
        yield lambda table: sink.write_table(table)
