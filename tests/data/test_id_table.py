import csv
import io
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core.data.id_table import IdTable, read_id_table
from stas_core.errors import ConfigError

# What a cell may hold: any text of one line that does not begin or end with blanks, with its accents composed.
words = (
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cf", "Z"]), min_size=1, max_size=12)
    .map(lambda text: unicodedata.normalize("NFC", text))
    .filter(lambda text: text == text.strip())
)
names = st.lists(words, min_size=1, max_size=3).map(" ".join)
encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])


def read(data: bytes, column: str = "group") -> IdTable[str]:
    return read_id_table(data, column, "split.groups_csv = g.csv", parse=str, suffixes=(".jpg", ".png"))


def write(rows: list[list[str]], encoding: str = "utf-8", **dialect: object) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows(rows)  # type: ignore[arg-type]
    return file.getvalue().encode(encoding)


@settings(max_examples=40)
@given(
    st.dictionaries(names, names, min_size=1, max_size=6),
    encodings,
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.booleans(),
)
def test_what_a_csv_writer_writes_is_read_back(
    groups: dict[str, str], encoding: str, separator: str, line_end: str, quoting: int, swapped: bool
) -> None:
    order = slice(None, None, -1 if swapped else 1)
    rows = [["image_id", "note", "group"][order], *([name, "x", group][order] for name, group in groups.items())]
    data = write(rows, encoding, delimiter=separator, lineterminator=line_end, quoting=quoting)
    assert read(data).values_of(list(groups)) == list(groups.values())


@settings(max_examples=40)
@given(st.dictionaries(names, names, min_size=1, max_size=6), st.data())
def test_rows_that_contradict_each_other_are_always_refused(groups: dict[str, str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(groups)))
    other = data.draw(names.filter(lambda group: group != groups[name]))
    rows = [[*row] for row in groups.items()]
    rows.insert(data.draw(st.integers(0, len(rows))), [name, other])
    with pytest.raises(ConfigError, match=r"rows \d+ and \d+ contradict each other"):
        read(write([["image_id", "group"], *rows]))


@settings(max_examples=40)
@given(st.binary(max_size=60) | names.map(lambda text: f"image_id,group\n{text}".encode()))
def test_any_file_is_read_or_refused_in_one_sentence(data: bytes) -> None:
    try:
        read(data)
    except ConfigError as error:
        assert str(error).startswith("split.groups_csv = g.csv") and "\n" not in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "image_id,group\na,P 0 \nb,P 0\n",
        "Image_ID , GROUP\n a,P 0\nb ,P 0\n",
        "image_id, group\na, P 0\nb,\tP 0\n",
        "\n\nimage_id,group\n\na,P 0\n,\nb,P 0\n\n",
        'image_id,group\n"a","P 0"\nb,"P 0"',
        "image_id;group;note\na;P 0;1,5\nb;P 0;2,5\n",
        "image_id,group,\na,P 0,\nb,P 0,,,\n",
        "image_id,group\na.jpg,P 0\nb.PNG,P 0\n",
        "image_id,group\na,P 0\nb,P 0\na,P 0 \n",
        "image_id,group\na,P 0\u200b\nb,\u00a0P 0\n",
    ],
)
def test_what_is_unambiguous_is_read(text: str) -> None:
    assert read(text.encode()).values_of(["a", "b"]) == ["P 0", "P 0"]


def test_accents_are_one_thing_however_they_are_written() -> None:
    composed, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    table = read(f"image_id,group\n{apart},Zo{apart}\nb,Zo{composed}\n".encode())
    assert table.values_of([composed, "b"]) == [f"Zo{composed}"] * 2 == table.values_of([apart, "b"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty; expected a header with image_id and group"),
        (b"\n \n", "is empty"),
        (b"image_id,group\n", "has no rows below its header"),
        (b"id,group\na,P\n", r"has columns \['id', 'group'\], expected image_id and group"),
        (b"image_id|group\na|P\n", r"has columns \['image_id|group'\]"),
        (b"image_id,group,Group\na,P,Q\n", "expected image_id and group once each"),
        (b"image_id,group\na,P\nb,\n", "row 3, column group is empty"),
        (b"image_id,group\na,P\nb\n", "row 3, column group is empty"),
        (b"image_id,group\n,P\n", "row 2, column image_id is empty"),
        (b"image_id,group\na,Doe, John\n", "row 2 has 3 cells, the header has 2"),
        (b'image_id,group\na,"P\nb,P\n', "row 2: .*check its quotes"),
        (b'image_id,group\na,"P\nb,P"\n', r"row 2, column group: 'P\\nb,P' holds '\\n'"),
        (b"image_id,group\na,P\nb\0,P\n", "row 3 holds a NUL"),
        ("image_id,group\na,P\nb,病人\n".encode("big5"), "row 3: byte 21 is not UTF-8.*CSV UTF-8"),
        ("image_id,group\na,P\nb,Zoë\n".encode("latin-1"), "row 3: byte 23 is not UTF-8"),
        ("image_id,group\na,P\n".encode("utf-16-le"), "NUL"),
        ("image_id,group\na,P\n".encode("utf-16")[:-1], "is not UTF-16"),
        (b"x" * 200_000, "has columns"),
        (b"image_id,group\na," + b"x" * 200_000, "row 2: field larger"),
    ],
)
def test_what_is_not_is_refused_by_row_and_column(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(data)
    assert len(str(caught.value)) < 500


def test_an_extension_is_ignored_only_where_no_image_is_named_so() -> None:
    table = read(b"image_id,group\na,P\na.jpg,Q\n")  # a.jpg.png has the id a.jpg
    assert table.values_of(["a", "a.jpg"]) == ["P", "Q"]
    with pytest.raises(ConfigError, match=r"rows 2 and 3 contradict each other: a has group 'P' and 'Q'"):
        table.values_of(["a"])


def test_rows_without_an_image_are_counted_and_images_without_a_row_refused() -> None:
    table = read(b"image_id,group\na,P\nb,P\nc.jpg,P\n")
    assert table.unused(["a", "c"]) == ["b"]
    with pytest.raises(ConfigError, match="has no row for 2 of 3 images, first x"):
        table.values_of(["a", "x", "y"])
