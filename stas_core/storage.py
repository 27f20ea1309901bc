"""One way to read and write local paths and object-store URIs (`s3://`, `gs://`, `memory://`...), atomically.

A local write goes to a temporary name beside its target and is renamed; an object is put whole. A reader never
sees half a file. Credentials and endpoints are fsspec's own (`~/.config/fsspec/`, the cloud's usual files).
"""

import hashlib
import json
import os
import posixpath
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from stas_core.errors import StorageError

_REQUESTS_AT_ONCE = 16


def is_local(uri: str) -> bool:
    """Tell whether `uri` is a path of this machine (`/x`, `x`, `file:///x`)."""
    return "://" not in uri or uri.startswith("file://")


def is_absolute(uri: str) -> bool:
    """Tell whether `uri` means the same in any working directory."""
    return "://" in uri or os.path.isabs(uri)


def absolute(uri: str) -> str:
    """Return `uri` made independent of the working directory."""
    return uri if is_absolute(uri) else os.path.abspath(uri)


def local_path(uri: str) -> Path:
    """Return the local path of a local `uri`."""
    if not is_local(uri):
        raise StorageError(f"{uri} is not a local path; give one without a scheme, or file://")
    return Path(uri.removeprefix("file://"))


def join(uri: str, *parts: str) -> str:
    """Append path parts to a local path or URI."""
    return posixpath.join(uri, *parts)


def is_within(uri: str, folder: str) -> bool:
    """Tell whether a path or URI is a folder or lies anywhere below it; both absolute."""
    return f"{uri.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def name_of(uri: str) -> str:
    """Return the last path part."""
    return posixpath.basename(uri.rstrip("/"))


def stem_of(uri: str) -> str:
    """Return the last path part without its extension."""
    return posixpath.splitext(name_of(uri))[0]


def _open_filesystem(uri: str) -> tuple[Any, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise StorageError(f"cannot open {uri}: {error}; install the fsspec backend of its scheme") from error
    return filesystem, path


def _unreadable(uri: str, error: Exception) -> StorageError:
    reason = getattr(error, "strerror", None) or error
    return StorageError(f"cannot read {uri}: {reason}; check the path and its permissions")


def _unwritable(uri: str, error: Exception) -> StorageError:
    return StorageError(f"cannot write {uri}: {error}; check the path and its permissions")


def read_bytes(uri: str) -> bytes:
    """Read a whole file."""
    filesystem, path = _open_filesystem(uri)
    try:
        data: bytes = filesystem.cat_file(path)
    except Exception as error:  # object stores raise what they like: no credentials, no endpoint
        raise _unreadable(uri, error) from error
    return data


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file; a reader sees the old one or the new one."""
    filesystem, path = _open_filesystem(uri)
    try:
        if not isinstance(filesystem, LocalFileSystem):
            filesystem.pipe_file(path, data)
            return
        target = Path(path)
        temporary = _temporary(target)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except Exception as error:  # as in read_bytes
        raise _unwritable(uri, error) from error


def _temporary(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"


def sweep(uri: str) -> None:
    """Delete what writers that were killed left half-written below a local folder; nobody else may be writing there."""
    if is_local(uri):
        for leftover in local_path(uri).rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)


def copy_file(path: str, uri: str) -> None:
    """Copy a local file to a path or URI, in pieces; a reader sees the old one or the new one."""
    filesystem, target = _open_filesystem(uri)
    try:
        if not isinstance(filesystem, LocalFileSystem):
            filesystem.put_file(path, target)
            return
        temporary = _temporary(Path(target))
        try:
            shutil.copyfile(path, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except Exception as error:  # as in read_bytes
        raise _unwritable(uri, error) from error


def read_json(uri: str) -> Any:
    """Read a JSON file."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{uri} is not valid JSON: {error}") from error


def write_json(uri: str, value: Any) -> None:
    """Write JSON with a fixed layout, so that equal values give equal bytes."""
    write_bytes(uri, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file."""
    return pq.read_table(pa.BufferReader(read_bytes(uri)), columns=columns)


def write_table(uri: str, table: pa.Table) -> None:
    """Write a Parquet file; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(uri, sink.getvalue().to_pybytes())


def _open_unlisted(uri: str) -> tuple[Any, str]:
    """Open like `_open_filesystem`, and forget what was listed there: other processes may have written since."""
    filesystem, path = _open_filesystem(uri)
    filesystem.invalidate_cache(path)
    return filesystem, path


def exists(uri: str) -> bool:
    """Tell whether a file or folder is there."""
    filesystem, path = _open_unlisted(uri)
    return bool(filesystem.exists(path))


def list_files(uri: str, suffixes: Iterable[str]) -> list[str]:
    """List the files under a folder, a glob or a single file, recursively, sorted, by lower-case suffix.

    Hidden files and folders (a leading dot) below what is given are left out. What is there under exactly this name is
    no glob, whatever characters it has.
    """
    filesystem, path = _open_unlisted(uri)
    wanted = tuple(suffixes)
    root = path.rstrip("/")
    if filesystem.isfile(path):
        found = [path]
    elif filesystem.exists(path):
        found = filesystem.find(path)
    elif (wildcard := re.search(r"[*?[]", path)) is not None:
        found = filesystem.glob(path)
        root = path[: wildcard.start()].rpartition("/")[0]
    else:
        raise StorageError(f"{uri} does not exist; give a folder, a glob or a file")
    visible = [p for p in found if not any(part.startswith(".") for part in p.removeprefix(root).split("/"))]
    chosen = sorted(p for p in visible if p.lower().endswith(wanted))
    return chosen if is_local(uri) else [filesystem.unstrip_protocol(p) for p in chosen]


def remove(uri: str) -> None:
    """Remove a file or a whole folder; nothing there is fine."""
    filesystem, path = _open_unlisted(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def size(uri: str) -> int:
    """Return a file's size in bytes, without reading it."""
    filesystem, path = _open_filesystem(uri)
    try:
        return int(filesystem.size(path) or 0)
    except Exception as error:  # as in read_bytes
        raise _unreadable(uri, error) from error


def stamp(uri: str) -> str:
    """Return a cheap version mark of a file (size and modification time or object tag), without reading it.

    Of an object that `list_files` has found it is the mark at that time: no further request is made.
    """
    filesystem, path = _open_filesystem(uri)
    try:
        info = filesystem.info(path)
    except Exception as error:  # as in read_bytes
        raise _unreadable(uri, error) from error
    tag = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or info.get("created")
    return f"{info.get('size')}:{tag}"


def stamps(uris: Sequence[str]) -> list[str]:
    """Return the version mark of each file, asking for many at a time."""
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(stamp, uris))


def fingerprint(*parts: bytes | str) -> str:
    """Return a 128-bit hex digest of the parts, each with its length, so that borders count."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
