"""CSV files that people write: one value per image, keyed by the column `image_id`.

Read: UTF-8 with or without a byte order mark, UTF-16 with one; cells separated by commas, semicolons or tabs; any line
ends; quotes; header names in any case; further columns; empty rows; blanks around cells; a row that repeats what an
earlier one says. An id may carry the extension of its image file.

What could be meant in two ways is refused, by file, row and column: other code pages, missing cells, cells with control
characters, rows that contradict each other.
"""

import codecs
import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from stas_core.errors import ConfigError

KEY = "image_id"
SEPARATORS = ",;\t"

# Zero-width characters too: cells that look the same must be the same.
_BLANK = r"[\s\u200b\u200e\u200f\u2060\ufeff]+"
_BLANK_ENDS = re.compile(rf"^{_BLANK}|{_BLANK}$")
_WHOLE_NUMBER = re.compile(r"([+-]?[0-9]{1,9})(?:\.0*)?")

V = TypeVar("V")


@dataclass(frozen=True)
class Entry(Generic[V]):
    """A value and its row in the file; the header is row 1."""

    value: V
    row: int


@dataclass(frozen=True)
class IdTable(Generic[V]):
    """One column of a CSV by image id."""

    source: str
    """What errors call the file: its config key and path."""
    column: str
    entries: dict[str, Entry[V]]
    suffixes: Sequence[str]

    @property
    def values(self) -> list[V]:
        """Return the values of all rows."""
        return [entry.value for entry in self.entries.values()]

    def values_of(self, ids: Sequence[str]) -> list[V]:
        """Return the value of each image.

        Raises:
            ConfigError: an image has no row, or two that contradict each other (`a` and `a.jpg`).
        """
        found: dict[str, Entry[V]] = {}
        for image_id, entry in self._named(ids):
            if image_id is not None:
                _require_agreement(self, image_id, found.setdefault(image_id, entry), entry)
        keys = [_clean(image_id) for image_id in ids]
        missing = [image_id for image_id, key in zip(ids, keys, strict=True) if key not in found]
        if missing:
            raise ConfigError(
                f"{self.source} has no row for {len(missing)} of {len(ids)} images, first {missing[0]}; add them, or "
                "leave the key out"
            )
        return [found[key].value for key in keys]

    def unused(self, ids: Sequence[str]) -> list[str]:
        """Return the ids in the file that name none of the images."""
        return [key for key, (image_id, _) in zip(self.entries, self._named(ids), strict=True) if image_id is None]

    def named(self, ids: Sequence[str]) -> list[str]:
        """Return the images that have a row."""
        found = {image_id for image_id, _ in self._named(ids)}
        return [image_id for image_id in ids if _clean(image_id) in found]

    def _named(self, ids: Sequence[str]) -> Iterator[tuple[str | None, Entry[V]]]:
        """Yield the image that each row names, if it is one of `ids`."""
        known = {_clean(image_id) for image_id in ids}
        for key, entry in self.entries.items():
            stems = [key[: -len(suffix)] for suffix in self.suffixes if key.lower().endswith(suffix)]
            yield next((name for name in (key, *stems) if name in known), None), entry


def read_id_table(
    data: bytes, column: str, source: str, *, parse: Callable[[str], V], suffixes: Sequence[str] = ()
) -> IdTable[V]:
    """Read one column of a CSV.

    Args:
        data: the file.
        column: its name in the header.
        source: what errors call the file.
        parse: makes a value of a cell that is not blank; a ValueError says what was expected.
        suffixes: extensions that ids may carry, in lower case.

    Raises:
        ConfigError: the file is no such table, or contradicts itself.

    Example:
        >>> table = read_id_table(b"image_id;fold\\r\\na;0\\r\\nb;1.0", "fold", "folds.csv", parse=whole_number)
        >>> table.values_of(["b", "a"])
        [1, 0]
    """
    rows = _read_rows(_decode(data, source), column, source)
    table: IdTable[V] = IdTable(source, column, {}, suffixes)
    for row, (image_id, cell) in rows:
        try:
            entry = Entry(parse(cell), row)
        except ValueError as error:
            raise ConfigError(f"{source}, row {row} ({image_id}), column {column}: {error}") from error
        _require_agreement(table, image_id, table.entries.setdefault(image_id, entry), entry)
    if not table.entries:
        raise ConfigError(f"{source} has no rows below its header; expected one per image")
    return table


def whole_number(cell: str) -> int:
    """Return the whole number of a cell; spreadsheets and pandas write 3 as 3.0."""
    found = _WHOLE_NUMBER.fullmatch(cell)
    if found is None:
        raise ValueError(f"invalid literal {cell!r}; expected a whole number such as 0 or 3")
    return int(found[1])


def _require_agreement(table: IdTable[V], image_id: str, one: Entry[V], other: Entry[V]) -> None:
    if one.value != other.value:
        raise ConfigError(
            f"{table.source}, rows {one.row} and {other.row} contradict each other: {image_id} has {table.column} "
            f"{one.value!r} and {other.value!r}; keep the right one"
        )


def _decode(data: bytes, source: str) -> str:
    """Return the text of UTF-8, or of UTF-16 where a byte order mark says so."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{source}, row {row}: byte {error.start} is not {'UTF-16' if utf16 else 'UTF-8'}: another code page, or a "
            'damaged file; save it as "CSV UTF-8"'
        ) from error
    if "\0" in text:
        row = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError(
            f'{source}, row {row} holds a NUL character: a damaged file, or no text at all; save it as "CSV UTF-8"'
        )
    return text


def _read_rows(text: str, column: str, source: str) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield (row, (id, cell)) of the rows that are not empty, cleaned and complete."""
    separator = _separator(text, column, source)
    # strict: a quote that is never closed would swallow the rows after it.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    header: list[str] = []
    start = 0
    try:
        for cells in reader:
            row, start = start + 1, reader.line_num
            cleaned = [_clean(cell) for cell in cells]
            if not any(cleaned):
                continue
            if not header:
                header = [name.casefold() for name in cleaned]
                continue
            _require_complete(cleaned, header, column, f"{source}, row {row}")
            yield row, (cleaned[header.index(KEY)], cleaned[header.index(column.casefold())])
    except csv.Error as error:
        raise ConfigError(f"{source}, row {start + 1}: {error}; check its quotes") from error


def _separator(text: str, column: str, source: str) -> str:
    """Detect the separator: the one with which the header has both columns, each once."""
    header = next((line for line in io.StringIO(text, newline=None) if _clean(line)), "")
    if not header:
        raise ConfigError(f"{source} is empty; expected a header with {KEY} and {column}, and a row per image")
    shown: list[str] = []
    for separator in SEPARATORS:
        try:
            cells = next(csv.reader([header], delimiter=separator, skipinitialspace=True))
        except csv.Error:  # a cell of 100 kB: no table
            cells = [header]
        names = [_clean(name) for name in cells]
        counts = [[name.casefold() for name in names].count(name) for name in (KEY, column.casefold())]
        if min(counts) >= 1:
            if max(counts) > 1:
                raise ConfigError(f"{source} has columns {names}, expected {KEY} and {column} once each; rename others")
            return separator
        shown = max(shown, names, key=len)
    raise ConfigError(
        f"{source} has columns {shown!s:.200}, expected {KEY} and {column}; name them so in the first row"
    )


def _require_complete(cells: Sequence[str], header: Sequence[str], column: str, where: str) -> None:
    if any(cells[len(header) :]):
        raise ConfigError(
            f"{where} has {len(cells)} cells, the header has {len(header)}; put cells that hold a separator in quotes"
        )
    for name in (KEY, column):
        position = header.index(name.casefold())
        cell = cells[position] if position < len(cells) else ""
        if not cell:
            raise ConfigError(f"{where}, column {name} is empty; expected a value for every image: fill it in")
        if bad := _control_characters(cell):
            raise ConfigError(f"{where}, column {name}: {cell!r} holds {bad[0]!r}; expected text of one line")


def _control_characters(cell: str) -> list[str]:
    return [character for character in cell if unicodedata.category(character) == "Cc"]


def _clean(cell: str) -> str:
    """Strip blanks and compose accents (NFC): file systems and editors differ in them."""
    return unicodedata.normalize("NFC", _BLANK_ENDS.sub("", cell))
