"""Whether a cluster answers where traffic is encrypted (`RAY_USE_TLS`)."""

import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stas_core.errors import ConfigError, ResourceError
from workflows import address

SETTINGS = bytes(3) + b"\x04" + bytes(5)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Return a certificate of 127.0.0.1 and its key, as Ray's variables name them."""
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    line = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    line += ["-subj", "/CN=stas", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(line, check=True, capture_output=True, timeout=60)
    return {"RAY_TLS_SERVER_CERT": cert, "RAY_TLS_SERVER_KEY": key, "RAY_TLS_CA_CERT": cert}


@pytest.fixture
def port(files: dict[str, str]) -> Iterator[int]:
    """Answer as gRPC does, to those who show that certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files["RAY_TLS_CA_CERT"])
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(files["RAY_TLS_SERVER_CERT"], files["RAY_TLS_SERVER_KEY"])

    def serve(listening: socket.socket) -> None:
        while True:
            try:
                plain, _ = listening.accept()
            except OSError:  # the test is over
                return
            try:
                with plain, context.wrap_socket(plain, server_side=True) as connection:
                    connection.recv(100)
                    connection.sendall(SETTINGS)
            except OSError:  # a client that speaks no TLS
                continue

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=[listening], daemon=True)
        thread.start()
        yield int(listening.getsockname()[1])
        listening.shutdown(socket.SHUT_RDWR)


def test_a_cluster_that_encrypts_is_reached_with_its_certificate(
    files: dict[str, str], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (files | {"RAY_USE_TLS": "1"}).items():
        monkeypatch.setenv(name, value)
    address.require_cluster(f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_USE_TLS", "0")
    with pytest.raises(ResourceError, match=f"127.0.0.1:{port}"):
        address.require_cluster(f"127.0.0.1:{port}", timeout_s=1)


def test_one_that_does_not_encrypt_is_refused_where_it_should(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (files | {"RAY_USE_TLS": "true"}).items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as plain:
        taken = plain.getsockname()[1]
        with pytest.raises(ResourceError, match="no Ray answers"):
            address.require_cluster(f"127.0.0.1:{taken}", timeout_s=0.5)
    monkeypatch.delenv("RAY_TLS_SERVER_KEY")
    with (
        socket.create_server(("127.0.0.1", 0)) as plain,
        pytest.raises(ConfigError, match="RAY_TLS_SERVER_KEY must name"),
    ):
        address.require_cluster(f"127.0.0.1:{plain.getsockname()[1]}", timeout_s=0.5)
