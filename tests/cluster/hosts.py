"""Hosts of a cluster, made of Linux namespaces of this machine: root only.

A host has its own address, host name, processes and IPC, and its own /tmp, /dev/shm, /run, /var/tmp and home (/srv),
empty at first. What else it sees is this machine's disk, read-only, as machines started from one image do: Python,
packages, checkout. Nothing written on one host is seen on another. All hang on one switch, with an address of its own.

Namespaces have no names: all of it ends with the process that made it, even where that is killed.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO

from tests.conftest import ROOT

NETWORK = "10.77.0"
SWITCH = f"{NETWORK}.254"
"""Where the process that makes the hosts listens for them, as their object store."""
NEEDED = ("ip", "unshare", "nsenter", "setpriv", "bash")
HOME = "/srv"
SHOWN = sorted({path for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix)) if path.is_relative_to("/tmp")})
"""What hosts see of this machine's /tmp: code, where it lies there."""
_CLONE_NEWNET = 0x40000000
_NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")

# The first process of a host: its mounts, then waiting, which also buries the orphans among its processes.
_BOOT = r"""
name=$1 network=$2 disk=$3 shm=$4; shift 4
mount --make-rprivate /
hostname "$name"
ip link set lo up
mount -t proc proc /proc
mount -t tmpfs -o size=16m tmpfs /run
mkdir /run/tmp
mount -t tmpfs -o "size=$disk,mode=1777" tmpfs /run/tmp
for path; do # what lies below this machine's /tmp is still seen
    mkdir -p "/run$path"
    mount --bind "$path" "/run$path"
    mount -o remount,bind,ro "/run$path"
done
mount --move /run/tmp /tmp
mount -t tmpfs -o size=16m tmpfs /srv
{ echo 127.0.0.1 localhost; for number in 1 2 3 4 5; do echo "$network.$number h$number"; done; } >/srv/hosts
mount --bind /srv/hosts /etc/hosts
sed 's#^\(root:[^:]*:0:0:[^:]*\):[^:]*:#\1:/srv:#' /etc/passwd >/srv/passwd
mount --bind /srv/passwd /etc/passwd
mount -t tmpfs -o "size=$shm,mode=1777" tmpfs /dev/shm
mount -t tmpfs -o size=16m,mode=1777 tmpfs /var/tmp
mount -o remount,bind,ro /
echo booted
exec <&- >/srv/boot.log 2>&1
while :; do sleep 3600 & wait $!; done
"""


def why_no_hosts() -> str | None:
    """Return why this machine can have no such hosts."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are made of Linux namespaces, which need root"
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        return f"{', '.join(missing)} not installed: apt-get install iproute2 util-linux"
    links = "ip link add name h1 type veth peer name eth0 && ip link add name switch type bridge"
    line = ["unshare", *_NAMESPACES, "--fork", "sh", "-c", f"mount -t tmpfs tmpfs /srv && {links}"]
    tried = subprocess.run(line, capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"no namespaces, links or bridges here: {tried.stderr.strip()}"


def _until_parent_dies(*line: str) -> list[str]:
    return ["setpriv", "--pdeathsig", "KILL", *line]


def _checked(*line: str) -> None:
    subprocess.run(line, check=True, capture_output=True)


@dataclass
class Host:
    """A machine that is on or off; what it held is gone once it is off."""

    number: int
    switch_pid: int
    environment: Mapping[str, str]
    disk: str = "1g"
    """Size of /tmp, as of all its own disk."""
    shm: str = "256m"
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What lies in its home when it is turned on, by name."""

    @property
    def name(self) -> str:
        return f"h{self.number}"

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    @property
    def shown(self) -> tuple[str, ...]:
        """Names in its /tmp of what lies there on this machine, and is seen."""
        return tuple(path.parts[2] for path in SHOWN)

    @property
    def root(self) -> Path:
        """The host's file system, as seen from here."""
        return Path(f"/proc/{self.pid}/root")

    def turn_on(self) -> None:
        """Boot it: empty disks, and a cable to the switch."""
        boot = ["bash", "-euc", _BOOT, "boot", self.name, NETWORK, self.disk, self.shm, *map(str, SHOWN)]
        line = _until_parent_dies("unshare", *_NAMESPACES, "--kill-child", *boot)
        self._unshare = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        assert self._unshare.stdout is not None
        assert self._unshare.stdout.readline() == "booted\n", f"{self.name} did not boot"
        self.pid = int(Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text())
        switch = ["nsenter", "--target", str(self.switch_pid), "--net", "ip", "link"]
        # One that is turned on anew has the card that it had: others remember its address.
        card = ["eth0", "address", f"02:00:00:00:00:{self.number:02x}"]
        _checked(*switch, "add", self.name, "type", "veth", "peer", "name", *card, "netns", str(self._unshare.pid))
        _checked(*switch, "set", self.name, "master", "switch", "up")
        own = ["nsenter", "--target", str(self.pid), "--net", "ip"]
        _checked(*own, "address", "add", f"{self.address}/24", "dev", "eth0")
        _checked(*own, "link", "set", "eth0", "up")
        _checked(*own, "route", "add", "default", "via", SWITCH)  # it leads nowhere, but programs look for one
        for name, data in self.files.items():
            path = self.root / HOME.strip("/") / name
            path.write_bytes(data)
            path.chmod(0o600)

    def turn_off(self) -> None:
        """Cut the power: no process says goodbye, no packet leaves any more."""
        if not self.is_on:
            return
        subprocess.run(self._link("down"), check=False, capture_output=True)  # there is none if it did not boot
        self._unshare.kill()
        self._unshare.wait()
        assert self._unshare.stdout is not None
        self._unshare.stdout.close()
        subprocess.run(
            ["nsenter", "--target", str(self.switch_pid), "--net", "ip", "link", "delete", self.name],
            check=False, capture_output=True,
        )  # fmt: skip

    @property
    def is_on(self) -> bool:
        return hasattr(self, "_unshare") and self._unshare.poll() is None

    def cut(self) -> None:
        """Pull its cable."""
        _checked(*self._link("down"))

    def mend(self) -> None:
        """Plug its cable in again."""
        _checked(*self._link("up"))

    def spoil(self, *, latency_ms: float = 0, lost_share: float = 0, kb_per_s: float = 1e6) -> None:
        """Put a poor cable in place of its own, until `repair`: what the latency, losses and rate are each way."""
        switch = ["nsenter", "--target", str(self.switch_pid), "--net"]
        told = [self.name, self._tap, *map(str, (latency_ms, lost_share, kb_per_s))]
        line = _until_parent_dies(*switch, sys.executable, "-m", "tests.cluster.wire", *told)
        self._wire = subprocess.Popen(line, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        assert self._wire.stdout is not None and self._wire.stdout.readline() == "ready\n"
        # Without ARP: this end would answer for the addresses of the switch.
        _checked(*switch, "ip", "link", "set", self.name, "nomaster", "arp", "off")
        _checked(*switch, "ip", "link", "set", self._tap, "master", "switch", "up")

    def repair(self) -> None:
        """Give it its own cable again."""
        self._wire.kill()  # its device goes with it
        self._wire.wait()
        assert self._wire.stdout is not None
        self._wire.stdout.close()
        switch = ["nsenter", "--target", str(self.switch_pid), "--net"]
        _checked(*switch, "ip", "link", "set", self.name, "master", "switch", "arp", "on")

    @property
    def _tap(self) -> str:
        return f"tap{self.number}"

    def _link(self, state: str) -> list[str]:
        return ["nsenter", "--target", str(self.switch_pid), "--net", "ip", "link", "set", self.name, state]

    def start(self, *line: str, output: IO[bytes] | int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Start a program on it; killing the process that is returned kills that program."""
        inside = ["nsenter", "--target", str(self.pid), *_NAMESPACES, f"--wd={self.root}{HOME}"]
        values = [f"{name}={value}" for name, value in self.environment.items()]
        return subprocess.Popen(
            [*inside, *_until_parent_dies("env", "-i", *values, *line)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *line: str, timeout_s: float = 120) -> str:
        """Run a program on it; return what it prints.

        Raises:
            AssertionError: it fails.
        """
        with tempfile.TemporaryFile() as output:
            process = self.start(*line, output=output)
            try:
                status = process.wait(timeout_s)
            finally:
                process.kill()
                process.wait()
            output.seek(0)
            told = output.read().decode(errors="replace")
        assert status == 0, f"{self.name}: {line} ended with {status}: {told}"
        return told

    def processes(self) -> dict[int, str]:
        """Return the command lines of its processes, by their ids here."""
        own = Path(f"/proc/{self.pid}/ns/pid").stat().st_ino
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "ns" / "pid").stat().st_ino == own:
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    found[int(folder.name)] = line
            except OSError:  # it has ended since, or is none of ours
                continue
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        for pid in self.processes():
            if pid != self.pid:
                os.kill(pid, number)


class Network:
    """A switch, and the hosts that hang on it."""

    def __init__(self, environment: Mapping[str, str], files: Mapping[str, bytes]) -> None:
        """Make the switch.

        Args:
            environment: all that programs on hosts find in their environment.
            files: what lies in each host's home.
        """
        self.environment, self._files = dict(environment), dict(files)
        line = _until_parent_dies("unshare", "--net", "sh", "-c", "echo made; exec sleep infinity")
        self._switch = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        assert self._switch.stdout is not None and self._switch.stdout.readline() == "made\n"
        ip = ["nsenter", "--target", str(self._switch.pid), "--net", "ip"]
        # Its own choice of address changes with what is plugged in; hosts would send to the former one for a minute.
        _checked(*ip, "link", "add", "switch", "address", "02:00:00:00:00:fe", "type", "bridge")
        _checked(*ip, "address", "add", f"{SWITCH}/24", "dev", "switch")
        _checked(*ip, "link", "set", "switch", "up")
        self.hosts: dict[int, Host] = {}

    def host(self, number: int, **sizes: str) -> Host:
        """Return a host that was just turned on, in place of one of the same number."""
        if number in self.hosts:
            self.hosts[number].turn_off()
        self.hosts[number] = Host(number, self._switch.pid, self.environment, files=self._files, **sizes)
        self.hosts[number].turn_on()
        return self.hosts[number]

    @cached_property
    def listening(self) -> socket.socket:
        """A socket of this process at the switch's address, for the hosts alone to connect to."""
        with ThreadPoolExecutor(1) as thread:  # only a thread of its own may change its network
            return thread.submit(self._listen).result()

    def _listen(self) -> socket.socket:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/proc/{self._switch.pid}/ns/net") as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        return socket.create_server((SWITCH, 9000), backlog=128)

    def turn_off(self) -> None:
        """Turn all hosts off."""
        for host in self.hosts.values():
            host.turn_off()

    def close(self) -> None:
        """End all hosts, and the switch."""
        with ExitStack() as ends:  # each of them, whatever fails
            if "listening" in self.__dict__:
                ends.callback(self.listening.close)
            ends.callback(self._switch.wait)
            ends.callback(self._switch.kill)
            for host in self.hosts.values():
                ends.callback(host.turn_off)
