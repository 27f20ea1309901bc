"""Object stores that cannot be reached: one sentence with the path, the cause and the remedy, whatever is asked."""

from collections.abc import Callable

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from stas_core import storage
from stas_core.errors import StorageError

ASKED: list[Callable[[str], object]] = [
    storage.exists,
    storage.list_files,
    storage.walk,
    storage.entries,
    storage.read_bytes,
]


class NoCredentials(Exception):
    """As object stores raise them: no OSError."""


@pytest.mark.parametrize("ask", ASKED, ids=lambda ask: ask.__name__)
def test_a_store_without_credentials_is_one_sentence(
    ask: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NoCredentials("Unable to locate credentials")

    for name in ("info", "ls", "find", "exists", "isdir", "isfile", "cat_file"):
        monkeypatch.setattr(MemoryFileSystem, name, refuse)
    with pytest.raises(StorageError, match=r"cannot read memory://b/x: Unable to locate.*credentials and endpoint"):
        ask("memory://b/x")


@pytest.mark.parametrize("uri", ["s3://", "s3:///", "s3a://"])
@pytest.mark.parametrize("ask", ASKED, ids=lambda ask: ask.__name__)
def test_a_scheme_alone_names_no_bucket(ask: Callable[[str], object], uri: str) -> None:
    with pytest.raises(StorageError, match="names no bucket; give s3"):
        ask(uri)
