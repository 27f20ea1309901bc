"""One way to read and write local paths and object-store URIs (`s3://`, `gs://`, `memory://`...), atomically.

A local write goes to a temporary name beside its target and is renamed; an object is put whole. A reader never
sees half a file. Credentials and endpoints are fsspec's own (`~/.config/fsspec/`, the cloud's usual files).
"""

import errno
import hashlib
import json
import os
import posixpath
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

from stas_core import local_files
from stas_core.errors import LocalDiskError, StasError, StorageError, WriteError
from stas_core.patience import patient

UNREADABLE = "unreadable"
_REQUESTS_AT_ONCE = 16
_WRITE_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "its file system is mounted read-only: mount it for writing, or give another out=",
}
ALIASES = {"s3a": "s3", "gcs": "gs"}
"""Second names of schemes."""
_GRACE_S = 2.0


def is_local(uri: str) -> bool:
    """Tell whether `uri` is a path of this machine (`/x`, `x`, `file:///x`)."""
    return "://" not in uri or uri.startswith("file://")


def is_absolute(uri: str) -> bool:
    """Tell whether `uri` means the same in any working directory."""
    return "://" in uri or os.path.isabs(uri)


def local_path(uri: str) -> Path:
    """Return the local path of a local `uri`."""
    if not is_local(uri):
        raise StorageError(f"{uri} is not a local path; give one without a scheme, or file://")
    return Path(uri.removeprefix("file://"))


def join(uri: str, *parts: str) -> str:
    """Append path parts to a local path or URI."""
    return posixpath.join(uri, *parts)


def resolve(path: str, folder: str, *, where: str) -> str:
    """Resolve a path that was read from a file in `folder`: absolute paths stay, relative ones lie below the folder.

    Args:
        path: path or URI, as it was read.
        folder: the folder of the file.
        where: what errors call the place that it was read from.

    Raises:
        StorageError: it is empty, or relative and leads out of the folder.

    Example:
        >>> resolve("masks/0007.png", "s3://data/cohort", where="cohort.parquet, row 0")
        's3://data/cohort/masks/0007.png'
    """
    if is_absolute(path):
        return path
    if not path:
        raise StorageError(f"{where} is empty; expected a path or URI")
    if ".." in path.split("/"):
        raise StorageError(
            f"{where}: {path!r} leads out of {folder or 'its folder'}; expected a path below it, or an absolute one"
        )
    return join(folder, path)


def name_of(uri: str) -> str:
    """Return the last path part."""
    return posixpath.basename(uri.rstrip("/"))


def stem_of(uri: str) -> str:
    """Return the last path part without its extension."""
    return posixpath.splitext(name_of(uri))[0]


def _open_filesystem(uri: str) -> tuple[Any, str]:
    # Not by fsspec's url_to_fs, which takes `::` in a name for a chain of file systems.
    scheme = "file" if is_local(uri) else uri.partition("://")[0]
    try:
        backend = fsspec.get_filesystem_class(scheme)
        filesystem = fsspec.filesystem(scheme, **backend._get_kwargs_from_urls(uri))
        path = backend._strip_protocol(uri)
    except (ValueError, ImportError) as error:
        raise StorageError(f"cannot open {uri}: {error}; install the fsspec backend of its scheme") from error
    if ALIASES.get(scheme, scheme) in ALIASES.values() and not path.strip("/"):
        raise StorageError(f"{uri} names no bucket; give {scheme}://BUCKET/FOLDER")
    return filesystem, path


def as_arrow(uri: str) -> tuple[pyarrow.fs.FileSystem | None, str]:
    """Return a place as pyarrow has it: a file system and a path on it; of this machine's, None and the path.

    Left to itself, pyarrow knows nothing of fsspec's credentials and endpoints.
    """
    filesystem, path = _open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        return None, path
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path  # type: ignore[abstract]


def _unreadable(uri: str, error: Exception) -> StorageError:
    reason = getattr(error, "strerror", None) or error
    if isinstance(error, FileNotFoundError) and is_local(uri) and (path := local_path(uri)).is_symlink():
        reason = f"it is a link to {path.readlink()}, which is not there"
    return StorageError(f"cannot read {uri}: {reason}; {_remedy(uri)}")


def _remedy(uri: str) -> str:
    if is_local(uri):
        return "check the path and its permissions"
    return "check the path, and the credentials and endpoint that this machine has for it"


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Raise whatever goes wrong within as a `StorageError` that names `uri`, the cause and the remedy."""
    try:
        yield
    except StasError:
        raise
    except Exception as error:  # object stores raise what they like: no credentials, no endpoint
        raise _unreadable(uri, error) from error


@contextmanager
def writing(uri: str) -> Iterator[None]:
    """Raise whatever goes wrong within as a `WriteError` that names `uri`, the cause and the remedy.

    Below a temporary folder of this process it is a `LocalDiskError`.
    """
    try:
        yield
    except StasError:
        raise
    except Exception as error:  # as in _reading
        number = error.errno if isinstance(error, OSError) and error.errno is not None else 0
        reason = f"{os.strerror(number)} ({errno.errorcode[number]})" if number in errno.errorcode else error
        remedy = _WRITE_REMEDIES.get(number) or _remedy(uri)
        kind = LocalDiskError if is_local(uri) and local_files.is_temporary(str(local_path(uri))) else WriteError
        raise kind(f"cannot write {uri}: {reason}; {remedy}, and run the same command again") from error


@contextmanager
def telling_full_disk(what: str, *, is_local: bool = False) -> Iterator[None]:
    """Raise what a disk that takes no more raises within (not other errors) as a `WriteError` that names `what`.

    Args:
        what: is written.
        is_local: to this machine's own disk: as a `LocalDiskError`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _WRITE_REMEDIES:
            raise
        try:
            with writing(what):
                raise
        except WriteError as told:
            if not is_local:
                raise
            raise LocalDiskError(str(told)) from error


@patient
def read_bytes(uri: str, end: int | None = None) -> bytes:
    """Read a whole file, or its first `end` bytes."""
    filesystem, path = _open_filesystem(uri)
    with _reading(uri):
        if isinstance(filesystem, LocalFileSystem):
            local_files.require_file(uri, Path(path).stat().st_mode)
        data: bytes = filesystem.cat_file(path, end=end)
    return data


@patient
def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file; a reader sees the old one or the new one."""
    filesystem, path = _open_filesystem(uri)
    with writing(uri):
        if not isinstance(filesystem, LocalFileSystem):
            filesystem.pipe_file(path, data)
            return
        with local_files.replacing(Path(path)) as temporary, open(temporary, "wb") as file:
            file.write(data)


def sweep(uri: str) -> None:
    """Delete the temporary files of killed writers below a local folder; nobody else may be writing there."""
    for path in local_files.find_all(str(local_path(uri))) if is_local(uri) else ():
        if local_files.leftover_of(name_of(path)) is not None:
            with writing(path):
                Path(path).unlink(missing_ok=True)


def create(uri: str, data: bytes) -> bool:
    """Create a file unless it exists; of several writers at most one gets True.

    Local files are linked into place; object stores put them on the condition that there is none (`If-None-Match`, as
    S3 and its like have it). A store without that is asked after a grace period whose data it kept.
    """
    filesystem, path = _open_unlisted(uri)
    with writing(uri):
        try:
            if isinstance(filesystem, LocalFileSystem):
                local_files.create(Path(path), data)
                return True
            if filesystem.exists(path):
                return False
            try:
                filesystem.pipe_file(path, data, mode="create")
            except (TypeError, NotImplementedError):
                filesystem.pipe_file(path, data)
                time.sleep(_GRACE_S)
            filesystem.invalidate_cache(path)
            return bool(filesystem.cat_file(path) == data)  # a store may ignore the condition
        except FileExistsError:
            return False


@patient
def copy_file(path: str, uri: str) -> None:
    """Copy a local file to a path or URI, in pieces; a reader sees the old one or the new one."""
    filesystem, target = _open_filesystem(uri)
    with writing(uri):
        if not isinstance(filesystem, LocalFileSystem):
            filesystem.put_file(path, target)
            return
        with local_files.replacing(Path(target)) as temporary:
            shutil.copyfile(path, temporary)


@contextmanager
def written_whole(uri: str) -> Iterator[Path]:
    """Give a local path to write to, of the same name; when the block has ended, its file is where `uri` says."""
    with local_files.temporary_folder() as folder, telling_full_disk(folder):
        path = Path(folder, name_of(uri))
        yield path
        copy_file(str(path), uri)


@patient
def fetch_file(uri: str, path: Path) -> None:
    """Copy a file of any place to a local path, in pieces; the path is not safe to read before this returns."""
    filesystem, source = _open_filesystem(uri)
    with _reading(uri), telling_full_disk(str(path)):
        filesystem.get_file(source, str(path))
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def read_json(uri: str) -> Any:
    """Read a JSON file."""
    data = read_bytes(uri)
    refuse_stand_in(uri, data, "JSON")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{uri} is not valid JSON: {error}; copy it again, or let what made it make it anew"
        ) from error


def read_record(uri: str, *keys: str) -> dict[str, Any]:
    """Read a JSON file that must hold an object with these keys."""
    record = read_json(uri)
    if not isinstance(record, dict):
        raise StorageError(f"{uri} holds a JSON {type(record).__name__}, expected an object with {', '.join(keys)}")
    for key in keys:
        if key not in record:
            raise StorageError(
                f"{uri} has no {key!r}, only {sorted(record)}; was it made by another program, or cut short?"
            )
    return record


def write_json(uri: str, value: Any) -> None:
    """Write JSON with a fixed layout, so that equal values give equal bytes."""
    write_bytes(uri, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def refuse_stand_in(uri: str, data: bytes, kind: str) -> None:
    """Refuse an empty file, or the pointer that Git LFS leaves in place of one."""
    if not data:
        raise StorageError(f"{uri} holds 0 bytes, expected {kind}; copy it again, or let what made it make it anew")
    if data.startswith(b"version https://git-lfs"):
        raise StorageError(f"{uri} is a Git LFS pointer, not the {kind} file itself; run `git lfs pull` where it lies")


def _open_unlisted(uri: str) -> tuple[Any, str]:
    """Open like `_open_filesystem`, with listings not cached: other processes may have written since."""
    filesystem, path = _open_filesystem(uri)
    below = [folder for folder in getattr(filesystem, "dircache", ()) if folder.startswith(f"{path.rstrip('/')}/")]
    for folder in (*below, path):
        filesystem.invalidate_cache(folder)  # and the folders above
    return filesystem, path


@patient
def exists(uri: str) -> bool:
    """Tell whether a file or folder is there. Where that cannot be told (a mount that is away), it is an error."""
    filesystem, path = _open_unlisted(uri)
    with _reading(uri):
        return local_files.exists(path) if isinstance(filesystem, LocalFileSystem) else bool(filesystem.exists(path))


@patient
def modified(uri: str) -> datetime | None:
    """Return when a file was written, by the clock of its store; None: this store does not tell."""
    filesystem, path = _open_unlisted(uri)
    with _reading(uri):
        try:
            return cast(datetime, filesystem.modified(path))
        except NotImplementedError:
            return None


@patient
def list_files(uri: str, suffixes: Iterable[str] = ("",)) -> list[str]:
    """List the files under a folder, a glob or a single file, recursively, sorted, by lower-case suffix (default: all).

    Hidden files and folders (a leading dot) below what is given are left out. What is there under exactly this name is
    no glob, whatever characters it has. Links to folders are followed, each folder is listed once.

    Raises:
        StorageError: it is not there, a glob matches folders alone, or a folder below it cannot be listed.
    """
    filesystem, path = _open_unlisted(uri)
    wanted = tuple(suffixes)
    local = isinstance(filesystem, LocalFileSystem)
    root = path.rstrip("/")
    with _reading(uri):
        if filesystem.isdir(path):
            found = (local_files.find_files if local else filesystem.find)(path)
        elif exists(uri) or (local and os.path.lexists(path)):
            found = [path]
        elif (wildcard := re.search(r"[*?[]", path)) is not None:
            root = path[: wildcard.start()].rpartition("/")[0]
            found = list(local_files.find_matches(path, root)) if local else []
            named = {} if found else filesystem.glob(path, detail=True)
            found = found or [name for name, about in named.items() if about["type"] != "directory"]
            if not found and named and not path.endswith("*"):
                raise StorageError(f"{uri} matches folders alone, such as {min(named)}; append /* or /**")
        else:
            raise StorageError(f"{uri} does not exist; give a folder, a glob or a file")
    visible = [p for p in found if not any(part.startswith(".") for part in p.removeprefix(root).split("/"))]
    chosen = sorted(p for p in visible if p.lower().endswith(wanted))
    return chosen if is_local(uri) else [filesystem.unstrip_protocol(p) for p in chosen]


@patient
def walk(uri: str) -> list[str]:
    """Return the path of every file below a folder relative to it, hidden ones too; links are named, not followed."""
    filesystem, path = _open_unlisted(uri)
    root = f"{path.rstrip('/')}/"
    with _reading(uri):
        find = local_files.find_all if isinstance(filesystem, LocalFileSystem) else filesystem.find
        return sorted(found.removeprefix(root) for found in find(path) if found.startswith(root))


@patient
def entries(uri: str) -> list[str]:
    """Return the names of what a folder holds, files and folders; none where there is no folder.

    Raises:
        StorageError: it is a file, or cannot be read.
    """
    filesystem, path = _open_unlisted(uri)
    with _reading(uri):
        if filesystem.isfile(path):
            raise StorageError(f"{uri} is a file; give a folder")
        names = filesystem.ls(path, detail=False) if exists(uri) else []
    return sorted(name_of(name) for name in names if name.rstrip("/") != path.rstrip("/"))


@patient
def remove_files(uri: str, names: Sequence[str]) -> None:
    """Remove files below a folder, by their relative paths, and the folders in it that this leaves empty."""
    filesystem, path = _open_unlisted(uri)
    if not isinstance(filesystem, LocalFileSystem):
        if names:
            with writing(uri):
                filesystem.rm([f"{path.rstrip('/')}/{name}" for name in names])
        return
    for name in names:
        with writing(f"{path}/{name}"):
            Path(path, name).unlink(missing_ok=True)
    with writing(uri):
        local_files.remove_empty_parents(path, names)


@patient
def remove(uri: str) -> None:
    """Remove a file or a whole folder, if it exists."""
    filesystem, path = _open_unlisted(uri)
    with writing(uri):
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)


@patient
def size(uri: str) -> int:
    """Return a file's size in bytes, without reading it."""
    filesystem, path = _open_filesystem(uri)
    with _reading(uri):
        return int(filesystem.size(path) or 0)


@patient
def stamp(uri: str) -> str:
    """Return a cheap version mark of a file (size and modification time or object tag), without reading it.

    Of an object that `list_files` has found it is the mark at that time: no further request is made.
    """
    filesystem, path = _open_filesystem(uri)
    with _reading(uri):
        if isinstance(filesystem, LocalFileSystem):
            status = Path(path).stat()  # of what a link leads to
            return f"{status.st_size}:{status.st_mtime}"
        info = filesystem.info(path)
    tag = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or info.get("created")
    return f"{info.get('size')}:{tag}"


def stamps(uris: Sequence[str]) -> list[str]:
    """Return the version mark of each file, or `UNREADABLE`; several are requested at a time.

    Reading that one fails, too, and is then reported.
    """
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(_stamp_or_note, uris))


def _stamp_or_note(uri: str) -> str:
    try:
        return stamp(uri)
    except StorageError:
        return UNREADABLE


def fingerprint(*parts: bytes | str) -> str:
    """Return a 128-bit hex digest of the parts. Lengths are hashed too: ("ab", "c") differs from ("a", "bc")."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
