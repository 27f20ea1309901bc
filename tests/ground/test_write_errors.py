"""What cannot be written: the path, the cause and the remedy in one sentence, as an error of its own kind."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from stas_core import storage
from stas_core.errors import InputError, StorageError


@contextmanager
def refused() -> Iterator[pytest.ExceptionInfo[StorageError]]:
    with pytest.raises(StorageError) as found:
        yield found
    assert type(found.value).__name__ == "WriteError" and not isinstance(found.value, InputError)


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_system_that_takes_no_more_leaves_the_old_file(tmp_path: Path) -> None:
    target, copied = tmp_path / "a.png", tmp_path / "source"
    target.write_bytes(b"old")
    copied.write_bytes(bytes(5000))
    with files_of_at_most(1000):
        with refused() as found:
            storage.write_bytes(str(target), bytes(5000))
        assert str(found.value) == (
            f"cannot write {target}: File too large (EFBIG); raise the limit on the size of files (ulimit -f), and run "
            "the same command again"
        )
        with refused():
            storage.copy_file(str(copied), str(target))
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, r"No space left on device \(ENOSPC\); free some space"),
        (errno.EDQUOT, r"\(EDQUOT\); free some of your quota"),
        (errno.EROFS, r"Read-only file system \(EROFS\); .*another out="),
        (errno.EACCES, r"Permission denied \(EACCES\); check the path and its permissions"),
        (errno.EIO, r"\(EIO\); check the path"),
    ],
)
def test_the_cause_is_named(number: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    target = str(tmp_path / "x")
    writes: list[Callable[[], None]] = [
        lambda: storage.write_bytes(target, b"1"),
        lambda: storage.write_json(target, [1]),
    ]
    for write in writes:
        with refused() as found:
            write()
        assert found.match(expected) and str(tmp_path / "x") in str(found.value)
    assert not list(tmp_path.iterdir())


def test_refusals_of_an_object_store_and_of_deletions_are_errors_of_writing_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")  # as s3fs raises it: without a number

    for name in ("pipe_file", "put_file", "rm"):
        monkeypatch.setattr(MemoryFileSystem, name, refuse)
    monkeypatch.setattr(MemoryFileSystem, "exists", lambda *_: True)
    (tmp_path / "file").touch()
    for write in (
        lambda uri: storage.write_bytes(uri, b""),
        lambda uri: storage.copy_file(str(tmp_path / "file"), uri),
        storage.remove,
        lambda uri: storage.remove_files(uri, ["a.png"]),
    ):
        with refused() as found:
            write("memory://bucket/x")
        assert found.match("cannot write memory://bucket/x: Access Denied; check the path, and the credentials")


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "masks").touch()
    with refused() as found:
        storage.write_bytes(str(tmp_path / "masks" / "a.png"), b"")
    assert found.match("cannot write .*masks/a.png: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with refused() as found:
        storage.write_bytes(str(tmp_path / "a.png"), b"")
    assert found.match("Permission denied")
