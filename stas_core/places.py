"""Where paths and URIs lead to, however they are spelled: whether two are one place, or one lies within another."""

import os
import posixpath
import re
from pathlib import Path

from stas_core import storage


def absolute(uri: str) -> str:
    """Make `uri` independent of the working directory; a local path also loses needless slashes and dots."""
    return uri if not storage.is_local(uri) else _tidy(uri)


def _tidy(path: str) -> str:
    path = os.path.join(Path.cwd(), _expand_home(path.removeprefix("file://")))
    # What `..` means is only known once links are followed.
    tidy = os.path.realpath(path) if ".." in path.split("/") else os.path.normpath(path)
    return "/" + tidy.lstrip("/")  # POSIX keeps two leading slashes


def _expand_home(path: str) -> str:
    return str(Path.home()) + path[1:] if path == "~" or path.startswith("~/") else path


def place(uri: str) -> str:
    """Return the one spelling of the place that a path or URI names: links followed, `..`, `//` and aliases gone.

    For comparing places. To open a file, use `uri` itself: an object's name may well contain `..`.
    """
    scheme, separator, rest = uri.partition("://")
    scheme = scheme.lower()
    if not separator or scheme in ("file", "local"):
        return "/" + os.path.realpath(_tidy(rest if separator else uri)).lstrip("/")
    path = posixpath.normpath("/" + rest).strip("/")
    return f"{storage.ALIASES.get(scheme, scheme)}://{path}"


def is_within(uri: str, folder: str) -> bool:
    """Tell whether a path or URI is `folder` or lies below it, however the two are spelled."""
    return f"{place(uri).rstrip('/')}/".startswith(f"{place(folder).rstrip('/')}/")


def fixed_root(uri: str) -> str:
    """Return the folder below which a glob finds its files; `uri` itself if it is no glob, or is there by this name."""
    wildcard = re.search(r"[*?[]", uri)
    if wildcard is None or storage.exists(uri):
        return uri
    return uri[: wildcard.start()].rpartition("/")[0] or ("/" if uri.startswith("/") else ".")
