"""Which files are slides, and which are parts of one."""

import io
import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence

from stas_core import storage
from stas_core.data import images, listing
from stas_core.data.listing import Listing

VENDOR_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm")
SLIDE_SUFFIXES = (*VENDOR_SUFFIXES, *images.IMAGE_SUFFIXES)
_HEADER_BYTES = 1 << 17


def find_slides(source: str) -> Listing:
    """Find the slides under a folder or glob, or a single one; what is part of another slide is no slide.

    Raises:
        StorageError: there is no such folder, or one below it cannot be listed.
    """
    found = storage.list_files(source)
    folders = tuple(posixpath.splitext(uri)[0] + "/" for uri in found if uri.lower().endswith(".mrxs"))
    own = [uri for uri in found if not uri.startswith(folders)] if folders else found
    dicom = [uri for uri in own if uri.lower().endswith(".dcm")]
    wanted = [uri for uri in own if uri.lower().endswith(SLIDE_SUFFIXES) and not uri.lower().endswith(".dcm")]
    others = Counter(posixpath.splitext(uri)[1].lower() for uri in own if not uri.lower().endswith(SLIDE_SUFFIXES))
    uris, refused = listing.by_id([(slide_id(uri), uri) for uri in wanted] + list(_dicom_slides(dicom)))
    return Listing(uris, refused, {listing.printable(suffix): count for suffix, count in sorted(others.items())})


def slide_id(uri: str) -> str:
    """Return what a slide is called: its file's name without suffixes.

    Example:
        >>> slide_id("/data/0007.ome.tif")
        '0007'
    """
    return storage.stem_of(uri).removesuffix(".ome")


def parts_of(uri: str) -> list[str]:
    """Return all files of a slide, itself included: those of its folder (MIRAX), or of its series (DICOM)."""
    return _parts([uri])[0]


def stamps(uris: Sequence[str]) -> list[str]:
    """Return what marks the version of each slide, with all its files."""
    return stamps_of(_parts(uris))


def stamps_of(parts: Sequence[Sequence[str]]) -> list[str]:
    """Return what marks the version of each slide, from its files as `parts_of` gives them."""
    marks = iter(storage.stamps([part for files in parts for part in files]))
    found = []
    for files in parts:
        own = [next(marks) for _ in files]
        found.append(own[0] if len(own) == 1 else storage.fingerprint(*own))
    return found


def _parts(uris: Sequence[str]) -> list[list[str]]:
    """Return the files of each slide; each folder of DICOM is looked through once, as its files' heads are read."""
    folders = dict.fromkeys(_folder(uri) for uri in uris if uri.lower().endswith(".dcm"))
    series = {uri: files for folder in folders for files in _series(_dicom_in(folder)) for uri in files}
    return [series.get(uri) or _own_files(uri) for uri in uris]


def _own_files(uri: str) -> list[str]:
    folder = posixpath.splitext(uri)[0]
    return [uri, *(storage.list_files(folder) if uri.lower().endswith(".mrxs") and storage.exists(folder) else ())]


def _folder(uri: str) -> str:
    return uri.rpartition("/")[0]


def _dicom_in(folder: str) -> list[str]:
    found = storage.list_files(folder, (".dcm",)) if storage.exists(folder) else []  # a list may name what is gone
    return [uri for uri in found if _folder(uri) == folder]


def _dicom_slides(uris: Iterable[str]) -> Iterable[tuple[str, str]]:
    by_folder: dict[str, list[str]] = {}
    for uri in uris:
        by_folder.setdefault(_folder(uri), []).append(uri)
    for folder, beside in sorted(by_folder.items()):
        groups = _series(beside)
        for files in groups:
            alone = len(groups) == 1 and len(files) > 1
            yield (storage.name_of(folder) if alone else slide_id(files[0])), files[0]


def _series(uris: Sequence[str]) -> list[list[str]]:
    """Group the DICOM files of a folder by the series that they say they belong to."""
    groups: dict[str, list[str]] = {}
    for uri in sorted(uris):
        groups.setdefault(_series_of(uri) or uri, []).append(uri)
    return list(groups.values())


def _series_of(uri: str) -> str | None:
    """Return the series of a DICOM file; None: it names none within its head, or is none."""
    import pydicom  # only where there is DICOM

    head = io.BytesIO(storage.read_bytes(uri, _HEADER_BYTES))
    try:
        found = pydicom.dcmread(head, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"], force=True)
        return str(found.SeriesInstanceUID)
    except Exception:  # noqa: BLE001 - it raises what it likes on what is no DICOM: opening it will tell
        return None
