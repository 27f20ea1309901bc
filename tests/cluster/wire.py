"""A poor cable: a program that carries frames between a host's end and the switch, late, not all, or slowly.

    python -m tests.cluster.wire PORT TAP LATENCY_MS LOST_SHARE KB_PER_S

In the network namespace of the switch. It makes the device TAP, for the switch, and takes what comes in at PORT, which
must not hang on the switch any more. Frames keep the header in which the kernel notes what a card would still do
to them (checksums, cutting into packets).
"""

import argparse
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x400454CA, 0x0002, 0x1000, 0x4000
_SOL_PACKET, _PACKET_VNET_HDR, _ETH_P_ALL, _PACKET_OUTGOING = 263, 15, 3, 4
_LARGEST_FRAME = 1 << 17
_LONGEST_QUEUE_S = 0.5
"""What would wait longer for a slow line is lost, as in the buffer of a real one."""


@dataclass
class _Way:
    """One of the two directions."""

    send: Callable[[bytes], object]
    free_s: float = 0.0
    """When its line has carried what it was given, by the monotonic clock."""


@dataclass
class _Cable:
    latency_s: float
    lost_share: float
    bytes_per_s: float
    luck: random.Random = field(default_factory=lambda: random.Random(0))
    _waiting: list[tuple[float, int, _Way, bytes]] = field(default_factory=list)
    _num_taken: int = 0

    def take(self, frame: bytes, way: _Way) -> None:
        """Take a frame, which leaves later or never."""
        now = time.monotonic()
        begin_s = max(now, way.free_s)
        if self.luck.random() < self.lost_share or begin_s - now > _LONGEST_QUEUE_S:
            return
        way.free_s = begin_s + len(frame) / self.bytes_per_s
        self._num_taken += 1
        heapq.heappush(self._waiting, (way.free_s + self.latency_s, self._num_taken, way, frame))

    def deliver(self) -> float | None:
        """Send what is due; return in how many seconds the next is, None where there is none."""
        while self._waiting:
            due_in_s = self._waiting[0][0] - time.monotonic()
            if due_in_s > 0:
                return due_in_s
            *_, way, frame = heapq.heappop(self._waiting)
            try:
                way.send(frame)
            except OSError:  # its buffer is full, or its device is down: the frame is lost, as on a cable
                continue
        return None


def _make_tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    return tap


def _open_port(name: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    port.bind((name, _ETH_P_ALL))
    return port


def _carry(cable: _Cable, port: socket.socket, tap: int) -> None:
    to_host, to_switch = _Way(port.send), _Way(lambda frame: os.write(tap, frame))
    while True:
        ready, *_ = select.select([port.fileno(), tap], [], [], cable.deliver())
        try:
            if port.fileno() in ready:
                frame, source = port.recvfrom(_LARGEST_FRAME)
                if source[2] != _PACKET_OUTGOING:  # not what was sent from here
                    cable.take(frame, to_switch)
            if tap in ready:
                cable.take(os.read(tap, _LARGEST_FRAME), to_host)
        except OSError:  # its device is down
            time.sleep(0.01)


def main() -> None:
    """Carry frames until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in {"port": str, "tap": str, "latency_ms": float, "lost_share": float, "kb_per_s": float}.items():
        parser.add_argument(name, type=kind)
    told = parser.parse_args()
    port, tap = _open_port(told.port), _make_tap(told.tap)
    print("ready", flush=True)
    _carry(_Cable(told.latency_ms / 1e3, told.lost_share, told.kb_per_s * 1e3), port, tap)


if __name__ == "__main__":
    main()
