"""Files of this machine: whole or absent, of one writer, and found through links without going round in circles."""

import errno
import fcntl
import functools
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fsspec.utils import glob_translate

from stas_core.errors import LocalDiskError, NotAFile, StorageError

_MAX_NAME_BYTES = 255
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{4,32}\.tmp")
"""A temporary name of `replacing`, which a killed writer leaves behind."""
_TEMPORARY = set[Path]()
"""The temporary folders that this process has."""
_HELD = ".held"
"""File in a temporary folder, locked by its process."""


def require_file(uri: str, mode: int) -> None:
    """Refuse anything but a regular file: reading a pipe or a device may block for ever.

    Raises:
        NotAFile: saying what it is.
    """
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        raise NotAFile(f"{uri} is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file; give the file itself")


@contextmanager
def temporary_folder(prefix: str = "stas-") -> Iterator[str]:
    """Give an empty folder for temporary files below `TMPDIR`, else the system's, which is deleted at the end.

    That of a process which was killed meanwhile is deleted by the next one of this user that asks for one.

    Raises:
        LocalDiskError: there is no place for it; the message says which were tried.

    Example:
        >>> with temporary_folder() as folder:
        ...     Path(folder).is_dir()
        True
    """
    try:
        _remove_abandoned(tempfile.gettempdir())
        made = tempfile.TemporaryDirectory(prefix=prefix)
    except OSError as error:
        raise _no_room(error) from error
    with made as outer, ExitStack() as held:
        try:
            held.callback(os.close, _hold(Path(outer)))
            files = Path(outer, "files")
            files.mkdir()
        except OSError as error:
            raise _no_room(error) from error
        _TEMPORARY.add(files)
        held.callback(_TEMPORARY.discard, files)
        yield str(files)


def is_temporary(path: str) -> bool:
    """Tell whether a path is, or lies below, a temporary folder that this process has now."""
    return not _TEMPORARY.isdisjoint((Path(path), *Path(path).parents))


def _no_room(error: OSError) -> LocalDiskError:
    return LocalDiskError(
        f"cannot make a temporary folder: {error}; free some space there, or set TMPDIR to a folder that has room and "
        "can be written, and run the same command again"
    )


def _hold(folder: Path) -> int:
    """Lock a folder as long as this process lives; return the descriptor to close."""
    lock = os.open(folder / ".new", os.O_CREAT | os.O_RDWR, 0o600)
    os.write(lock, _machine())
    with suppress(OSError):  # a file system without locks: what is left there stays
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Path(folder, ".new").rename(folder / _HELD)  # under its name it is always locked, or its process is gone
    return lock


def boot_id() -> str | None:
    """Return what tells this start of this machine from any other; None: this system does not say it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.is_file() else None


def _machine() -> bytes:
    return f"{platform.node()} {boot_id() or ''}".strip().encode()


@functools.cache
def _remove_abandoned(root: str) -> None:
    """Remove the temporary folders below `root` whose processes are gone; once, for a process that starts.

    Locks may hold on one machine alone: those of others on a shared disk are left alone.
    """
    try:
        with os.scandir(root) as found:
            folders = [one for one in found if one.name.startswith("stas-") and one.is_dir(follow_symlinks=False)]
    except OSError:  # it may be written, but not listed
        return
    for folder in folders:
        try:
            if folder.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            lock = os.open(f"{folder.path}/{_HELD}", os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # no such folder, or another process has just removed it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.read(lock, 4096) == _machine():
                shutil.rmtree(folder.path)
        except OSError:  # in use; or what is left of it is the next one's to remove
            continue
        finally:
            os.close(lock)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary name beside `target`; what was written there takes the place of `target` once it is on disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def leftover_of(name: str) -> str | None:
    """Return the file that a temporary name of a killed writer stands for; None: it is no such name."""
    match = _LEFTOVER.fullmatch(name)
    return None if match is None else match["name"]


def create(target: Path, data: bytes) -> None:
    """Write a whole file where there is none.

    Raises:
        FileExistsError: there is one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    try:
        temporary.write_bytes(data)
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with target.open("xb") as file:
                file.write(data)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    mark = f".{uuid.uuid4().hex}.tmp"
    name = os.fsencode(target.name)[: _MAX_NAME_BYTES - len(mark) - 1]
    return target.parent / f".{os.fsdecode(name)}{mark}"


def exists(path: str) -> bool:
    """Tell whether a file or folder is there; a link counts as what it leads to.

    Raises:
        OSError: that cannot be told: its disk is away, or its folder may not be searched.
    """
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # so that no file has that name
            return False
        raise
    return True


def find_all(root: str) -> Iterator[str]:
    """Yield every file below a local folder, hidden ones too; links are named, not followed.

    Raises:
        OSError: a folder cannot be listed. One that is deleted meanwhile, or was never there, has no files.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for folder, folders, names in os.walk(root.rstrip("/") or "/", onerror=refuse):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        yield from (os.path.join(folder, name) for name in [*names, *links])


def bytes_of(paths: Iterable[str]) -> int:
    """Return what local files take; those that are gone, or never were, take nothing."""
    total = 0
    for path in paths:
        with suppress(FileNotFoundError, NotADirectoryError):
            total += os.lstat(path).st_size
    return total


@dataclass(frozen=True)
class Counted:
    """What files take, as far as they were counted."""

    num_bytes: int
    missing: str = ""
    """Why there may be more; empty: all were counted."""


def count_bytes(paths: Iterable[str], within_s: float, is_meant: Callable[[str], bool] = lambda _: True) -> Counted:
    """Return what those of these local files take that are meant, in a limited time; gone ones take nothing.

    Args:
        paths: looked at one by one, so that a lazy listing is cut off, too, and may end with an OSError.
        within_s: how long they are counted.
        is_meant: whether a path is counted.
    """
    total, end = 0, time.monotonic() + within_s
    try:
        for path in paths:
            if time.monotonic() >= end:
                return Counted(total, f"not all files could be counted within {within_s:g} s")
            total += bytes_of([path]) if is_meant(path) else 0
    except OSError as error:
        return Counted(total, f"not all files can be counted: {error}")
    return Counted(total)


def bytes_below(folder: str) -> int:
    """Return what the files below a local folder take.

    Raises:
        OSError: as `find_all`.
    """
    return bytes_of(find_all(folder))


def remove_empty_parents(root: str, names: Iterable[str]) -> None:
    """Remove the folders below `root` that files of these relative names lay in, where they are empty now."""
    parents = {parent for name in names for parent in Path(name).parents if parent != Path()}
    for parent in sorted(parents, key=lambda one: -len(one.parts)):
        folder = Path(root, parent)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def find_matches(pattern: str, root: str) -> Iterator[str]:
    """Yield the local files that a glob matches; only `**` reaches below the pattern's own depth."""
    below = pattern.removeprefix(root).strip("/")
    matches = re.compile(glob_translate(pattern)).match
    depth = sys.maxsize if "**" in below else below.count("/")
    return (path for path in find_files(root or "/", depth) if matches(path))


def find_files(root: str, depth: int = sys.maxsize) -> Iterator[str]:
    """Yield the visible files below a local folder, down to `depth` folders deep, through links to folders too.

    A folder that is reached twice is listed once, where it lies rather than where a link leads to it: links may form
    loops, and the same image under two names would count as two.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [(root, 0)], deque[tuple[str, int]]()
    while folders or links:
        folder, level = folders.pop() if folders else links.popleft()
        try:
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise StorageError(
                f"cannot list {folder}: {error.strerror}; check its permissions, or take it out of {root}"
            ) from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # A link that leads nowhere, or where one may not look, counts as a file: reading it says why.
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # noqa: PTH112
                if level < depth:
                    (links if entry.is_symlink() else folders).append((entry.path, level + 1))
            else:
                yield entry.path
