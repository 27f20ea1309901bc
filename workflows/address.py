"""Whether a cluster answers, before Ray is asked to join it: Ray itself tries for minutes, deaf to Ctrl-C."""

import os
import socket
import ssl

from stas_core.errors import ConfigError, ResourceError

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by `ray job submit` in the environment of the job's driver."""

TIMEOUT_S = 5.0
"""For a connection, and then for an answer."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""How gRPC begins: the preface of HTTP/2 and an empty frame of settings, which the other side answers with its own."""
_SETTINGS_FRAME = 4
_TLS_FILES = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY")


def require_cluster(address: str, timeout_s: float = TIMEOUT_S) -> None:
    """Check that something answers at `RAY_ADDRESS` that may be Ray's head node.

    Raises:
        ConfigError: the address is no host:port, or what TLS needs is not set.
        ResourceError: nothing answers there, or something that is no Ray.
    """
    if address in ("auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not host or not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"RAY_ADDRESS = {address!r}, expected host:port of the head node; unset it to run on this machine"
        )
    _require_answer(address, host, int(port), timeout_s)


def require_beyond_loopback(address: str, own_host: str, timeout_s: float = TIMEOUT_S) -> None:
    """Check that a cluster of this machine answers where Ray looks for it: not at loopback, but at the node's address.

    Args:
        address: `RAY_ADDRESS`, of a cluster that answers.
        own_host: what Ray takes the node's address to be.

    Raises:
        ResourceError: the cluster listens on loopback alone.
    """
    host, _, port = address.rpartition(":")
    if host.strip("[]") not in LOOPBACK or own_host in LOOPBACK:
        return
    try:
        _require_answer(address, own_host, int(port), timeout_s)
    except ResourceError as error:
        raise ResourceError(
            f"the Ray at RAY_ADDRESS = {address} listens on loopback alone, and Ray looks for it at {own_host}:{port}; "
            "set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, as cluster/local.sh does, or submit a job"
        ) from error


def _require_answer(address: str, host: str, port: int, timeout_s: float) -> None:
    remedy = "start the cluster or mend the address, or unset RAY_ADDRESS to run on this machine"
    try:
        with (
            socket.create_connection((host.strip("[]"), port), timeout_s) as plain,
            _encrypted(plain, host) as connection,
        ):
            connection.settimeout(timeout_s)
            connection.sendall(_HELLO)
            answer = connection.makefile("rb").read(9)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        raise ResourceError(f"no Ray answers at RAY_ADDRESS = {address} ({error}); {remedy}") from error
    if len(answer) < 9 or answer[3] != _SETTINGS_FRAME:
        raise ResourceError(f"what answers at RAY_ADDRESS = {address} is no Ray; {remedy}")


def _encrypted(plain: socket.socket, host: str) -> socket.socket:
    """Return the connection as Ray would use it: encrypted where its environment says so."""
    if os.environ.get("RAY_USE_TLS", "").lower() not in ("1", "true"):
        return plain
    files = [os.environ.get(name, "") for name in _TLS_FILES]
    if not all(files):
        raise ConfigError(f"RAY_USE_TLS is set, so {', '.join(_TLS_FILES)} must name the cluster's files; got {files}")
    context = ssl.create_default_context(cafile=files[0])
    context.load_cert_chain(files[1], files[2])
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(plain, server_hostname=host.strip("[]"))
