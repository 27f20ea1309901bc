"""Slides of object stores, copied to this machine: readers of slides jump about in local files.

    cache = SlideCache(Path("/scratch/slides"), max_bytes=200 * 10**9)
    with cache.use("s3://hospital/0007.svs") as path, open_slide(path) as slide:
        ...

A slide is one folder of the cache, `<key>-<bytes>`, where it lies whole: it is copied under a name with a leading dot
and renamed. The key follows from its URI and version. Processes and threads of one machine share a cache by locks
(`flock`) on `.<key>.lock`: shared by those that use the slide, exclusive for who copies or evicts it; `.lock` guards
the sum of sizes. The system lets go of the locks of a process that dies, and the next one clears up after it.
"""

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from stas_core import storage
from stas_core.errors import IncompleteSlide, StorageError
from stas_core.slides import slide_files

_POLL_S = 0.2
_NUM_TRIES = 3
"""How often a slide may change while it is copied."""
_FREE_SHARE, _FREE_BYTES = 0.15, 20 * 10**9
"""What copies leave free of the disk, the lesser of the two: Kubernetes evicts where less than 10 or 15 % are free."""
_UNKNOWN_PARTS = (".vms", ".vmu")
"""Formats of several files whose names only their reader knows."""
_ENTRY = re.compile(r"\.[0-9a-f]{32}-[0-9]+\.tmp|[0-9a-f]{32}-[0-9]+")
"""Names of copies, half of one and whole: whatever else lies in the folder is somebody else's."""


@dataclass(frozen=True)
class _Version:
    """What is to be copied."""

    uri: str
    key: str
    names: dict[str, str]
    """Each file's URI, and its path relative to the slide's folder."""
    num_bytes: int

    @property
    def entry(self) -> str:
        return f"{self.key}-{self.num_bytes}"


@dataclass(frozen=True)
class SlideCache:
    """Copies of slides in a local folder; the least recently used go when others need their room."""

    folder: Path
    max_bytes: int
    """Of all copies together; fewer where their disk has no more to spare."""
    wait_s: float = 3600.0
    """How long to wait for room while all copies are in use."""

    def fetch(self, uri: str) -> Path:
        """Return the path of a local slide, or of a copy that may be evicted as soon as others need its room.

        What is open by then can be read to its end, which is of no help to formats of several files: see `use`.

        Raises:
            StorageError: as `use`.
        """
        with self.use(uri) as path:
            return path

    @contextmanager
    def use(self, uri: str) -> Iterator[Path]:
        """Give the path of a local slide, or of a copy that stays as long as the block runs.

        Raises:
            StorageError: the slide is larger than the cache, all room is in use for too long, it changes all the time,
                or it cannot be read.
            IncompleteSlide: which files it consists of is not known.
            WriteError: the folder cannot be written, or its disk is full of other files.
        """
        if storage.is_local(uri):
            yield storage.local_path(uri)
            return
        with storage.writing(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
        for _ in range(_NUM_TRIES):
            version = self._look(uri)
            with self._lock(f".{version.key}.lock") as lock:
                if self._is_there(version, lock) or self._copy(version, lock):
                    yield self.folder / version.entry / version.names[uri]
                    return
        raise StorageError(f"{uri} changed while it was copied, {_NUM_TRIES} times; run again once it is complete")

    def _look(self, uri: str) -> _Version:
        if uri.lower().endswith(_UNKNOWN_PARTS):
            raise IncompleteSlide(f"{uri} is of several files, by names of their own; copy its folder to a local path")
        if not storage.exists(uri):
            raise StorageError(f"{uri} does not exist; give the URI of a slide")
        names = {part: _name_within(part, uri) for part in slide_files.parts_of(uri)}
        num_bytes = sum(storage.size(part) for part in names)
        if num_bytes > self.max_bytes:
            raise StorageError(
                f"{uri} holds {num_bytes / 1e9:.3g} GB, and the cache of slides at most {self.max_bytes / 1e9:.3g} GB; "
                f"give it more, or copy the slide to a local path"
            )
        key = storage.fingerprint(uri, *slide_files.stamps_of([list(names)]))
        return _Version(uri, key, names, num_bytes)

    @contextmanager
    def _lock(self, name: str) -> Iterator[int]:
        with storage.writing(str(self.folder / name)):
            lock = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield lock
        finally:
            os.close(lock)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Run a block that no other process of this cache runs at the same time."""
        with self._lock(".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _is_there(self, version: _Version, lock: int) -> bool:
        """Tell whether a copy is there, which then stays as long as the lock is held."""
        fcntl.flock(lock, fcntl.LOCK_SH)
        entry = self.folder / version.entry
        if not entry.is_dir():
            return False
        os.utime(entry)
        return True

    def _copy(self, version: _Version, lock: int) -> bool:
        """Copy a slide, unless another process has by now; False: it is not the version that was meant."""
        fcntl.flock(lock, fcntl.LOCK_EX)
        entry = self.folder / version.entry
        if not entry.is_dir():
            temporary = self.folder / f".{version.entry}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that died
            self._reserve(temporary, version)
            try:
                for part, name in version.names.items():
                    path = temporary / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    storage.fetch_file(part, path)
                copied = sum((temporary / name).stat().st_size for name in version.names.values())
                if copied != version.num_bytes or self._look(version.uri) != version:
                    return False
                temporary.rename(entry)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        with self._alone():  # a lock is let go of while it turns into another kind
            if not entry.is_dir():
                return False
            fcntl.flock(lock, fcntl.LOCK_SH)
            return True

    def _reserve(self, temporary: Path, version: _Version) -> None:
        """Make the folder that a slide is copied to, which counts as its bytes, once there is room."""
        end = time.monotonic() + self.wait_s
        while True:
            with self._alone():
                if self._make_room(version.num_bytes):
                    with storage.writing(str(temporary)):
                        temporary.mkdir()
                    return
            if time.monotonic() > end:
                free = shutil.disk_usage(self.folder).free
                raise StorageError(
                    f"{version.uri} found no room for its {version.num_bytes / 1e9:.3g} GB in {self.wait_s:.0f} s: too "
                    f"much of the {self.max_bytes / 1e9:.3g} GB of {self.folder} is in use, or of its disk "
                    f"({free / 1e9:.3g} GB free); give the cache or the disk more, or process fewer slides at a time"
                )
            time.sleep(_POLL_S)

    def _make_room(self, num_bytes: int) -> bool:
        """Evict copies, the least recently used first, until there is room; False: the rest is in use.

        Raises:
            WriteError: no copy is left to evict, and the disk has no room.
        """
        entries = sorted(self._entries(), key=lambda path: path.stat().st_mtime_ns)
        leftovers = [path for path in entries if path.suffix == ".tmp"]
        for path in leftovers + [path for path in entries if path.suffix != ".tmp"]:
            if (path in leftovers or self._room(entries) < num_bytes) and self._evict(path):
                entries.remove(path)
        if self._room(entries) >= num_bytes:
            return True
        fits = sum(map(_bytes_of, entries)) + num_bytes <= self.max_bytes
        if fits and self._free(entries) >= num_bytes:  # less stays free than should: others have filled the disk
            return True
        if fits and not entries:
            with storage.writing(str(self.folder)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return False

    def _room(self, entries: Sequence[Path]) -> int:
        """Return how much may come beside these copies: of the cache, and of its disk, which others fill, too."""
        spared = min(int(_FREE_SHARE * shutil.disk_usage(self.folder).total), _FREE_BYTES)
        return min(self.max_bytes - sum(map(_bytes_of, entries)), self._free(entries) - spared)

    def _free(self, entries: Sequence[Path]) -> int:
        """Return what is free of the disk once the copies that are being made have come."""
        coming = sum(_bytes_of(path) - _bytes_within(path) for path in entries if path.suffix == ".tmp")
        return shutil.disk_usage(self.folder).free - coming

    def _entries(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _ENTRY.fullmatch(path.name) and path.is_dir()]

    def _evict(self, path: Path) -> bool:
        """Remove a copy, or what a process that died left of one, unless it is in use."""
        key = path.name.lstrip(".").partition("-")[0]
        with self._lock(f".{key}.lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if path.suffix != ".tmp":  # half of a copy must not pass for a whole one
                path = path.rename(path.with_name(f".{path.name}.tmp"))
            with storage.writing(str(path)):
                shutil.rmtree(path)
            return True


def _name_within(part: str, uri: str) -> str:
    """Return the path of a slide's file relative to the folder that the slide lies in.

    Raises:
        StorageError: it would lie elsewhere, which objects' names may say.
    """
    folder = uri.rpartition("/")[0] + "/"
    name = part.removeprefix(folder)
    if name == part or name.startswith("/") or {"", ".", ".."} & set(name.split("/")):
        raise StorageError(f"{uri}: its file {part} does not lie below {folder}; rename it there")
    return name


def _bytes_of(path: Path) -> int:
    return int(path.name.removesuffix(".tmp").rpartition("-")[2])


def _bytes_within(folder: Path) -> int:
    sizes = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # its copy has just been given its name
            sizes += path.stat().st_size if path.is_file() else 0
    return sizes
