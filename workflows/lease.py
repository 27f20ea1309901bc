"""One run at a time in an output folder: a lease that its holder renews, and that a dead holder loses.

`<out>/lease.json` says who works there. It is made by an exclusive create (`storage.create`), renewed every `RENEW_S`
by a thread, and deleted at the end. A lease is dead when its process is gone, if that ran on this machine. That of
another machine is watched by the next run, which takes it over if no renewal comes: clocks of machines differ, so that
no lease is dead by its time alone. A run that was suspended for so long finds another's lease when it goes on, and ends
before it writes anything that vouches for files.
"""

import json
import os
import platform
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from stas_core import local_files, storage
from stas_core.errors import OccupiedOutputError, StorageError

LEASE = "lease.json"
RENEW_S = 10.0
LOOK_S = 1.0
"""How often a run looks whether a holder on another machine renews its lease."""
DEAD_AFTER_S = 40.0
"""For how long a holder on another machine must be silent; what its lease's time says of that counts, down to ..."""
WATCHED_S = 3 * RENEW_S
"""... for how long it is watched in any case, by this machine's clock."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    stage: str
    host: str
    machine: str
    """Tells apart machines, restarts and containers, where process ids mean different processes."""
    pid: int
    process: str
    """When the process started: ids are used again."""
    token: str
    since: float
    renewed: float
    within: str | None
    """The folder of the search that this run is a trial of. A search starts a trial again only when it is gone."""

    def is_gone(self, uri: str) -> bool:
        """Tell whether the holder that a file names is gone, or cannot be told from one that is.

        That of another machine is waited for: it lives if the file changes or is deleted.
        """
        if self.machine == machine():
            return process_start(self.pid) != self.process
        print(f"{uri} is held by another run ({self}): waiting to hear whether it still runs", flush=True)
        silent_s = max(0.0, time.time() - self.renewed)
        end = time.monotonic() + max(WATCHED_S, DEAD_AFTER_S - silent_s)
        while time.monotonic() < end:
            time.sleep(LOOK_S)
            asked = time.monotonic()
            if read_holder(uri) != self:
                return False
            if time.monotonic() - asked > RENEW_S:  # the store was away, for the holder too
                end = max(end, time.monotonic() + WATCHED_S)
        return True

    def __str__(self) -> str:
        started = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(self.since))
        return f"{self.stage}, process {self.pid} on {self.host}, since {started}"


def machine() -> str:
    """Return the scope of process ids: this boot of this machine, and the container."""
    boot, namespace = local_files.boot_id(), Path("/proc/self/ns/pid")
    if boot is not None and namespace.is_symlink():
        return f"{boot} {namespace.readlink()}"
    return f"{platform.node()} {uuid.getnode():x}"


def process_start(pid: int) -> str | None:
    """Return when a process of this machine started; None: it is gone or a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").is_file():
        try:
            state, *values = stat.read_text(errors="replace").rpartition(")")[2].split()  # a cut name is no UTF-8
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if state in "ZX" else values[18]  # in ticks since boot, independent of the clock
    line = ["ps", "-o", "lstart=", "-p", str(pid)]
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip() or None


class Lease:
    """The right of this process to write in a folder."""

    def __init__(self, out: str, stage: str, within: str | None = None):
        now, pid = time.time(), os.getpid()
        self._out = out
        self._uri = storage.join(out, LEASE)
        self._renewed_at: datetime | None = None
        self.ended = threading.Event()
        """Set once nothing is to be renewed any more."""
        self._mine = Holder(
            stage, platform.node(), machine(), pid, process_start(pid) or "", uuid.uuid4().hex, now, now, within
        )

    @property
    def run_id(self) -> str:
        """What tells this run of the folder from all others; it holds the lease under it."""
        return self._mine.token

    def acquire(self) -> None:
        """Take the lease.

        Raises:
            OccupiedOutputError: another run holds it.
        """
        is_new = storage.create(self._uri, _encode(self._mine))
        found = self._mine if is_new else read_holder(self._uri)
        if found is not None and found.token == self._mine.token:  # or a request was repeated that had succeeded
            self._renewed_at = storage.modified(self._uri)
            return
        covered = found is not None and found.within is not None and found.within == self._mine.within
        if found is None:  # released since
            self.acquire()
        elif covered or found.is_gone(self._uri):
            self._take_over(found)
        elif read_holder(self._uri) is None:  # released while it was waited for
            self.acquire()
        else:
            raise OccupiedOutputError(
                f"{self._out} is in use by another run ({found}); wait until it ends, or give another out="
            )

    def _take_over(self, found: Holder) -> None:
        # Of several runs that find the same dead lease, the one that makes this file goes on.
        marker = storage.join(self._out, f".{LEASE}.{found.token}.tmp")
        if not storage.create(marker, _encode(self._mine)):
            other = read_holder(marker)
            if other is None or not other.is_gone(marker):
                raise OccupiedOutputError(f"{self._out} is being taken over by another run; wait until it ends")
            storage.remove(marker)
            self._take_over(found)
            return
        try:
            now = read_holder(self._uri)
            if now is None or now.token != found.token:
                raise OccupiedOutputError(f"{self._out} was taken over by another run ({now}); wait until it ends")
            self._write()
        finally:
            storage.remove(marker)
        print(f"taken over from a run that is gone: {found}", flush=True)

    def renew(self) -> None:
        """Renew the lease's heartbeat.

        Raises:
            OccupiedOutputError: the lease is another's by now.
        """
        self.verify()
        self._mine = replace(self._mine, renewed=time.time())
        self._write()

    def _write(self) -> None:
        storage.write_bytes(self._uri, _encode(self._mine))
        self._renewed_at = storage.modified(self._uri)

    def verify(self) -> None:
        """Check that this run still holds the folder; call it before writing anything that vouches for files.

        Raises:
            OccupiedOutputError: it does not.
        """
        found = read_holder(self._uri)
        if found is None or found.token != self._mine.token:
            taker = "nobody: its lease.json was deleted" if found is None else str(found)
            raise OccupiedOutputError(
                f"{self._out} is no longer this run's, which was suspended or cut off for too long; it is held by "
                f"{taker}. Nothing was written that vouches for files; run again when no other run works there"
            )

    def is_renewed_before(self, path: str) -> bool:
        """Tell whether a file of the folder was written after the last renewal, by the clock of their store."""
        written = storage.modified(storage.join(self._out, path))
        return written is not None and self._renewed_at is not None and written > self._renewed_at

    def release(self) -> None:
        """Release the lease, if it is still this run's."""
        found = read_holder(self._uri)
        if found is not None and found.token == self._mine.token:
            storage.remove(self._uri)


@contextmanager
def hold(out: str, stage: str, within: str | None = None) -> Iterator[Lease]:
    """Hold the lease of a folder while the block runs; if it is lost, the block is interrupted and ends with an error.

    Args:
        out: the folder.
        stage: who asks.
        within: the folder of the search that this run is a trial of.

    Raises:
        OccupiedOutputError: another run holds the folder, or has taken it over.
    """
    lease = Lease(out, stage, within)
    lease.acquire()
    lost = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()

    def keep() -> None:
        while not lease.ended.wait(RENEW_S):
            try:
                lease.renew()
            except OccupiedOutputError:
                lost.set()
                if is_main:  # as by Ctrl-C: every stage knows how to end what it has started
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return
            except StorageError as error:  # perhaps only briefly; `verify` decides
                print(f"the lease of {out} could not be renewed, trying again: {error}", flush=True)

    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    except KeyboardInterrupt:
        if lost.is_set():
            lease.verify()
        raise
    finally:
        lease.ended.set()
        thread.join()
        lease.release()


def read_holder(uri: str) -> Holder | None:
    """Return the holder that a lease names; None: there is no lease.

    Raises:
        OccupiedOutputError: it is no lease.
    """
    if not storage.exists(uri):
        return None
    try:
        return TypeAdapter(Holder).validate_json(storage.read_bytes(uri))
    except StorageError:
        if not storage.exists(uri):  # released since
            return None
        raise
    except ValidationError as error:
        what = error.errors()[0]
        raise OccupiedOutputError(
            f"{uri} is no lease ({'.'.join(map(str, what['loc'])) or 'whole file'}: {what['msg']}); if no run works in "
            "its folder, delete it"
        ) from error


def _encode(holder: Holder) -> bytes:
    return (json.dumps(asdict(holder), indent=1) + "\n").encode()
