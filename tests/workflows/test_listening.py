"""What listens where while a stage runs."""

import ipaddress
import threading
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def watch_listening() -> Iterator[set[tuple[str, str, int]]]:
    """Give a set that fills, while the body runs, with all that is listened on."""
    found: set[tuple[str, str, int]] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            found.update(listening())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def test_a_local_session_listens_on_loopback_only(ray_nodes: list[Node]) -> None:
    ray.get(ray.remote(num_cpus=1)(is_loopback).remote("::1"))  # a worker process too
    found = listening()
    assert {name for name, _, _ in found} >= {"gcs_server", "raylet"}
    assert not [entry for entry in found if not is_loopback(entry[1])]
