"""An S3-compatible object store in this process, which fails on purpose, and remembers when each object was put."""

import logging
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import fsspec
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.server import ThreadedMotoServer
from werkzeug.serving import make_server

BUCKET = "stas"
CREDENTIALS = {"FSSPEC_S3_KEY": "testing", "FSSPEC_S3_SECRET": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
Failure = Literal["503", "hang", "reset"]
_SLOW_DOWN = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code><Message>on purpose</Message></Error>"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Put:
    """An object that was put as a whole."""

    at_s: float
    """By the monotonic clock."""
    path: str
    """Below the bucket."""


class _Quiet(MotoRequestHandler):
    def log(self, *_: Any) -> None:
        """Leave the terminal to the tests."""


class FaultyStore:
    """The store: one door, with faults, for the hosts, and one without, on loopback, for the test."""

    def __init__(self, listening: socket.socket) -> None:
        """Serve those who connect to the socket, and this process."""
        self.failure: Failure | None = None
        """How every request of the hosts fails from now on; None: they do not."""
        self.puts: list[Put] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        host, port = listening.getsockname()
        self.uri, self.endpoint = f"s3://{BUCKET}", f"http://{host}:{port}"
        self._server = make_server(host, port, self._answer, True, request_handler=_Quiet, fd=listening.fileno())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._plain = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._plain.start()
        logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line per request
        at = "http://{}:{}".format(*self._plain.get_host_and_port())
        self.files = fsspec.filesystem(
            "s3", endpoint_url=at, key="testing", secret="testing", skip_instance_cache=True, use_listings_cache=False
        )
        self.files.mkdir(BUCKET)

    def environment(self) -> dict[str, str]:
        """Return what points fsspec of the hosts here."""
        return CREDENTIALS | {"FSSPEC_S3_ENDPOINT_URL": self.endpoint}

    def close(self) -> None:
        """End both doors."""
        self.failure = None
        self._server.shutdown()
        self._plain.stop()

    def upload(self, folder: Path, name: str) -> str:
        """Put a folder's files below this name; return its URI."""
        self.files.put(f"{folder}/", f"{BUCKET}/{name}/", recursive=True)
        return f"{self.uri}/{name}"

    def download(self, name: str, folder: Path) -> Path:
        """Get what lies below this name as a folder; return it."""
        folder.mkdir(parents=True)
        for path in self.files.find(f"{BUCKET}/{name}"):
            target = folder / path.removeprefix(f"{BUCKET}/{name}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.files.cat_file(path))
        return folder

    def remove(self, name: str) -> None:
        """Delete what lies below this name."""
        self.files.rm(f"{BUCKET}/{name}", recursive=True)

    def names(self, name: str) -> list[str]:
        """Return the path of every object below this name, relative to it."""
        return [path.removeprefix(f"{BUCKET}/{name}/") for path in self.files.find(f"{BUCKET}/{name}")]

    def put_times(self, pattern: str) -> list[float]:
        """Return when each object was put whose path matches this from its start."""
        return [put.at_s for put in list(self.puts) if re.match(pattern, put.path)]

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self.failure == "503":
            start_response(
                "503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(_SLOW_DOWN)))]
            )
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [_SLOW_DOWN]
        if self.failure is not None:
            while self.failure == "hang":
                time.sleep(0.1)
            connection: socket.socket = environ["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            connection.close()
            raise ConnectionResetError("on purpose")
        answer: Iterable[bytes] = self._app(environ, start_response)
        if environ["REQUEST_METHOD"] == "PUT":
            self.puts.append(Put(time.monotonic(), unquote(environ["PATH_INFO"]).removeprefix(f"/{BUCKET}/")))
        return answer
