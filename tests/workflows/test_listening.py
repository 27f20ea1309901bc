"""What listens where while a stage runs."""

import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray

from workflows.cluster import Node


def listening() -> set[tuple[str, str, int]]:
    """Return process name, address and port of everything that this process and its descendants listen on."""
    me = psutil.Process()
    found = set()
    for process in (me, *me.children(recursive=True)):
        try:
            sockets = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        found |= {(process.name(), s.laddr.ip, s.laddr.port) for s in sockets if s.status == psutil.CONN_LISTEN}
    return found


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
"""127.0.0.1, ::1 and ::ffff:127.0.0.1 as the kernel's tables write them on a little-endian machine."""


def beyond_loopback() -> set[str]:
    """Return address and inode of every socket of this machine that listens beyond loopback, whoever's it is."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    is_listening = "0A"
    return {f"{words[1]} {words[9]}" for words in lines if words[3] == is_listening and words[1][:-5] not in LOOPBACK}


@contextmanager
def watch_listening() -> Iterator[set[tuple[str, str, int]]]:
    """Give a set that fills, while the body runs, with what we listen on beyond loopback."""
    found: set[tuple[str, str, int]] = set()
    ended = threading.Event()

    def watch() -> None:
        known: set[str] = set()
        while not ended.wait(0.1):
            seen = beyond_loopback()
            if seen - known:  # whose it is takes long to find out
                found.update(entry for entry in listening() if not is_loopback(entry[1]))
            known |= seen

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def test_what_listens_beyond_loopback_is_found() -> None:
    with watch_listening() as found, socket.create_server(("127.0.0.1", 0)), socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        end = time.monotonic() + 60
        while not found and time.monotonic() < end:
            time.sleep(0.05)
    assert [entry[1:] for entry in found] == [("0.0.0.0", port)]


def test_a_local_session_listens_on_loopback_only(ray_nodes: list[Node]) -> None:
    ray.get(ray.remote(num_cpus=1)(is_loopback).remote("::1"))  # a worker process too
    found = listening()
    assert {name for name, _, _ in found} >= {"gcs_server", "raylet"}
    assert not [entry for entry in found if not is_loopback(entry[1])]
