"""The hosts of the tests themselves: what a cable does to what two of them send each other."""

import os
import sys
from collections.abc import Iterator

import pytest

from tests.cluster.hosts import SWITCH, Host, Network, why_no_hosts
from tests.cluster.hosts_with_ray import wait_for

# Answers a line with a line, with a megabyte, or with how many datagrams have come.
_SERVER = """
import socket
datagrams = socket.socket(type=socket.SOCK_DGRAM)
datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
datagrams.bind(("0.0.0.0", 5000))
datagrams.settimeout(0.5)

def count():
    num = 0
    try:
        while datagrams.recv(9):
            num += 1
    except TimeoutError:
        return b"%05d" % num

listening = socket.create_server(("0.0.0.0", 5000))
while True:
    with listening.accept()[0] as connection, connection.makefile("rwb") as lines:
        while line := lines.readline():
            lines.write({b"all\\n": bytes(1000000), b"num\\n": b""}.get(line, line) or count())
            lines.flush()
"""
# Sends datagrams; prints how many arrived.
_SENDER = """
import socket, sys
datagrams = socket.socket(type=socket.SOCK_DGRAM)
for _ in range(400):
    datagrams.sendto(b"datagram", (sys.argv[1], 5000))
with socket.create_connection((sys.argv[1], 5000)) as connection, connection.makefile("rwb") as lines:
    lines.write(b"num\\n")
    lines.flush()
    print(int(lines.read(5)))
"""
# Prints the median seconds of twenty lines and back, and those of the megabyte.
_CLIENT = """
import socket, statistics, sys, time
with socket.create_connection((sys.argv[1], 5000)) as connection, connection.makefile("rwb") as lines:
    spent = []
    for line, num_bytes in [(b"line\\n", 5)] * 20 + [(b"all\\n", 1000000)]:
        begin = time.perf_counter()
        lines.write(line)
        lines.flush()
        assert len(lines.read(num_bytes)) == num_bytes
        spent.append(time.perf_counter() - begin)
    print(statistics.median(spent[:-1]), spent[-1])
"""


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[tuple[Host, Host]]:
    if reason := why_no_hosts():
        pytest.skip(reason)
    network = Network({"PATH": os.environ["PATH"]}, {})
    try:
        server, client = network.host(1), network.host(2)
        server.start(sys.executable, "-c", _SERVER)
        listens = "import socket; socket.create_connection(('127.0.0.1', 5000))"
        wait_for(lambda: server.start(sys.executable, "-c", listens).wait() == 0, seconds=20)
        yield server, client
    finally:
        network.close()


_ARP = """
import socket, sys
for address in sys.argv[1:]:  # an answer, or a refusal, of each
    socket.socket().connect_ex((address, 9))
for line in open("/proc/net/arp"):
    if line.split()[0] in sys.argv[1:]:
        print(line.split()[0], line.split()[3])
"""


def _seconds(server: Host, client: Host) -> tuple[float, float]:
    line, megabyte = client.run(sys.executable, "-c", _CLIENT, server.address, timeout_s=30).split()
    return float(line), float(megabyte)


def test_a_poor_cable_is_late_or_slow_until_it_is_repaired(two_hosts: tuple[Host, Host]) -> None:
    server, client = two_hosts
    client.spoil(latency_ms=40, lost_share=0.02)  # what is lost is sent again
    late, _ = _seconds(server, client)
    client.repair()
    client.spoil(kb_per_s=1000)
    _, slow = _seconds(server, client)
    client.repair()
    line, megabyte = _seconds(server, client)
    assert late >= 0.08 and slow >= 0.9
    assert line < late / 4 and megabyte < slow / 2


def test_all_keep_their_addresses_whatever_is_plugged_in(two_hosts: tuple[Host, Host]) -> None:
    """Else hosts go on sending to the former ones."""

    def known() -> str:
        shown = client.run(sys.executable, "-c", _ARP, SWITCH, server.address)
        assert shown.count("02:00:00:00:00:") == 2
        return shown

    server, client = two_hosts
    before = known()
    server.spoil(latency_ms=1)
    spoilt = known()
    server.repair()
    assert before == spoilt == known()


def test_a_poor_cable_loses_a_share(two_hosts: tuple[Host, Host]) -> None:
    server, client = two_hosts

    def arrived() -> int:
        return int(client.run(sys.executable, "-c", _SENDER, server.address, timeout_s=30))

    assert arrived() == 400
    client.spoil(lost_share=0.25)
    lossy = arrived()
    client.repair()
    assert 240 <= lossy <= 360
