"""An object store that is away for a while delays a run; what no wait mends is told at once."""

import time
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import register_implementation

from stas_core import patience, storage
from stas_core.errors import ConfigError, StorageError, WriteError


class HTTPClientError(Exception):
    """As botocore's, whose subclasses are connections that fail or break."""


class ReadTimeoutError(HTTPClientError):
    pass


class ClientError(Exception):
    """As botocore's: an answer of the server."""

    def __init__(self, status: int):
        super().__init__(f"status {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


class HttpError(Exception):
    """As gcsfs', whose code is a number or a text."""

    def __init__(self, code: int | str):
        super().__init__(f"code {code}")
        self.code = code


class HttpResponseError(Exception):
    """As that of Azure's clients; `response` is an object."""

    def __init__(self, status_code: int):
        super().__init__(f"status {status_code}")
        self.response, self.status_code = object(), status_code


class FlakyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Raises what it is given, once each, before it does what is asked."""

    protocol = "flaky"
    cachable = False
    trouble: list[Exception] = []  # noqa: RUF012 - shared by all instances

    def _fail(self) -> None:
        if self.trouble:
            raise self.trouble.pop(0)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> Any:
        self._fail()
        return super().cat_file(path, start, end, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: Any = "overwrite", **kwargs: Any) -> Any:
        self._fail()
        return super().pipe_file(path, value, mode, **kwargs)

    def exists(self, path: str, **kwargs: Any) -> bool:
        self._fail()
        return bool(super().exists(path, **kwargs))


register_implementation("flaky", FlakyFileSystem, clobber=True)


def translated(error: Exception) -> OSError:
    """Return what s3fs makes of an answer."""
    made = OSError(5, str(error))
    made.__cause__ = error
    return made


AWAY = [
    ConnectionRefusedError("no one there"),
    TimeoutError("hangs"),
    ReadTimeoutError("broke off"),
    translated(ClientError(503)),
    ClientError(500),
    HttpError(503),
]
ANSWERS = [ClientError(429), HttpError("429"), HttpError("502"), HttpResponseError(500)]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the waits, which are noted in place of waiting."""
    found: list[float] = []
    clock = [100.0]

    def sleep(seconds: float) -> None:
        found.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setenv(patience.VARIABLE, "60")
    return found


def test_a_store_that_is_away_for_a_while_is_waited_for(
    waits: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FlakyFileSystem, "trouble", list(AWAY))
    storage.write_bytes("flaky://bucket/a", b"data")
    assert waits == [0.5, 1, 2, 4, 8, 10]
    assert "cannot write flaky://bucket/a: no one there; " in caplog.text and "trying again for 60 s" in caplog.text
    for error in AWAY + ANSWERS:
        monkeypatch.setattr(FlakyFileSystem, "trouble", [error])
        assert storage.read_bytes("flaky://bucket/a") == b"data"
        monkeypatch.setattr(FlakyFileSystem, "trouble", [error])
        assert storage.exists("flaky://bucket/a")


def test_patience_ends_with_the_errors_own_words(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlakyFileSystem, "trouble", [ConnectionRefusedError("no one there")] * 99)
    with pytest.raises(WriteError, match=r"cannot write flaky://bucket/a: .*no one there"):
        storage.write_bytes("flaky://bucket/a", b"")
    assert sum(waits) == 60
    monkeypatch.setenv(patience.VARIABLE, "0")
    with pytest.raises(StorageError, match="cannot read flaky://bucket/a: no one there"):
        storage.read_bytes("flaky://bucket/a")
    assert sum(waits) == 60


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("nothing there"),
        PermissionError("not for you"),
        translated(ClientError(403)),
        translated(ClientError(404)),
        HttpError(401),
        HttpError("invalid"),
        HttpResponseError(403),
        ValueError("no credentials"),
    ],
)
def test_what_no_wait_mends_is_told_at_once(
    error: Exception, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlakyFileSystem, "trouble", [error])
    with pytest.raises(StorageError):
        storage.read_bytes("flaky://bucket/a")
    assert not waits


@pytest.mark.parametrize("value", ["a minute", "-1", "inf", "nan", ""])
def test_a_patience_that_is_no_number_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.VARIABLE, value)
    with pytest.raises(ConfigError, match=r"STAS_STORAGE_PATIENCE_S = .*, expected seconds, such as 90"):
        patience.patience_s()


def test_a_place_is_the_same_to_arrow() -> None:
    storage.write_bytes("memory://bucket/folder/a", b"data")
    filesystem, path = storage.as_arrow("memory://bucket/folder")
    assert filesystem is not None
    with filesystem.open_input_stream(f"{path}/a") as stream:
        assert stream.read() == b"data"
    assert storage.as_arrow("/x/y") == (None, "/x/y")
