import errno
import os
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from stas_core import places, storage, tables
from stas_core.errors import StorageError


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path}"


def test_write_read_list_remove(root: str) -> None:
    for name in ("a/one.JPG", "a/b/two.jpg", "a/three.txt", "a/.hidden.jpg"):
        storage.write_bytes(storage.join(root, name), name.encode())
    found = storage.list_files(storage.join(root, "a"), (".jpg",))
    assert [storage.name_of(uri) for uri in found] == ["two.jpg", "one.JPG"]
    assert storage.read_bytes(found[0]) == b"a/b/two.jpg"
    assert storage.list_files(storage.join(root, "a", "*.txt"), (".txt",))[0].endswith("three.txt")
    storage.remove(storage.join(root, "a"))
    assert not storage.exists(found[0])
    storage.remove(storage.join(root, "a"))


def test_tables_and_json_round_trip_with_equal_bytes(root: str) -> None:
    table = pa.table({"x": [1, 2], "y": ["a", None]})
    one, two = storage.join(root, "1.parquet"), storage.join(root, "2.parquet")
    tables.write_table(one, table)
    tables.write_table(two, table)
    assert tables.read_table(one).equals(table)
    assert storage.read_bytes(one) == storage.read_bytes(two)
    storage.write_json(storage.join(root, "v.json"), {"a": [1, "é"]})
    assert storage.read_json(storage.join(root, "v.json")) == {"a": [1, "é"]}


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    versions = {bytes([k]) * 400_000 for k in range(8)}
    storage.write_bytes(uri, next(iter(versions)))

    def write_all() -> None:
        for data in versions:
            storage.write_bytes(uri, data)

    writer = threading.Thread(target=write_all)
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add(storage.read_bytes(uri))
    writer.join()
    assert seen <= versions
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_stamp_changes_with_content(root: str) -> None:
    uri = storage.join(root, "f")
    storage.write_bytes(uri, b"1")
    before = storage.stamp(uri)
    assert storage.stamp(uri) == before
    storage.write_bytes(uri, b"22")
    assert storage.stamp(uri) != before


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_fingerprint_separates_parts(one: list[bytes], two: list[bytes]) -> None:
    assert (storage.fingerprint(*one) == storage.fingerprint(*two)) == (one == two)


def test_errors_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*/none"):
        storage.read_bytes(str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"none does not exist"):
        storage.list_files(str(tmp_path / "none"), (".jpg",))
    with pytest.raises(StorageError, match="cannot open nonsense://x"):
        storage.read_bytes("nonsense://x")
    (tmp_path / "file").write_bytes(b"{")
    with pytest.raises(StorageError, match="not valid JSON"):
        storage.read_json(str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot write"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"")


def test_whatever_a_backend_raises_names_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        pass

    def fail(*arguments: object, **settings: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    for name in ("cat_file", "pipe_file", "info"):
        monkeypatch.setattr(MemoryFileSystem, name, fail)
    with pytest.raises(StorageError, match="cannot read memory://b/x: Unable to locate credentials"):
        storage.read_bytes("memory://b/x")
    with pytest.raises(StorageError, match="cannot write memory://b/x: Unable"):
        storage.write_bytes("memory://b/x", b"")
    with pytest.raises(StorageError, match="cannot read memory://b/x: Unable"):
        storage.stamp("memory://b/x")


def test_whether_a_local_file_is_there_is_told_or_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert storage.exists(f"{tmp_path}/file") and storage.exists(str(tmp_path))
    for name in ("gone", "file/below", "n" * 300):
        assert not storage.exists(f"{tmp_path}/{name}")

    def lose_disk(path: str, **_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lose_disk)
        with pytest.raises(StorageError, match=rf"^cannot read {tmp_path}/file: Input/output error; check the path"):
            storage.exists(f"{tmp_path}/file")


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_disk(_: str) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    assert storage.walk(f"{tmp_path}/gone") == []
    monkeypatch.setattr(os, "scandir", lose_disk)
    with pytest.raises(StorageError, match=rf"^cannot read {tmp_path}: Stale file handle"):
        storage.walk(str(tmp_path))


def test_names_with_wildcards_and_hidden_parents(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "run[2]"
    storage.write_bytes(str(folder / "a.png"), b"1")
    storage.write_bytes(str(folder / ".b.png"), b"1")
    expected = [str(folder / "a.png")]
    assert storage.list_files(str(folder), (".png",)) == expected
    assert storage.list_files(str(tmp_path / ".cache" / "*" / "*.png"), (".png",)) == expected
    assert storage.list_files(expected[0], (".png",)) == expected
    storage.remove(str(folder))
    assert not folder.exists()


def test_absolute_and_local() -> None:
    assert storage.is_absolute("/x") and storage.is_absolute("s3://b/x") and not storage.is_absolute("x")
    assert storage.is_local("x") and storage.is_local("file:///x") and not storage.is_local("s3://b/x")
    assert places.absolute("s3://b/x") == "s3://b/x"
    assert storage.local_path("file:///x") == Path("/x")


def test_copies_are_whole_and_leftovers_are_swept(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    uri = str(tmp_path / "out" / "copy.zip")
    storage.copy_file(str(tmp_path / "source"), uri)
    assert storage.read_bytes(uri) == b"abc"
    leftover = tmp_path / "out" / "masks" / ".a.png.0123.tmp"
    storage.write_bytes(str(leftover), b"half")
    storage.sweep(str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["copy.zip"]
    with pytest.raises(StorageError, match="cannot write"):
        storage.copy_file(str(tmp_path / "nothing"), uri)
