"""The files that a stage is given: found below a folder, by id, with what cannot be used and what is passed over.

An id is a file's name without its suffix, or what a table says.
"""

import posixpath
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from stas_core import storage
from stas_core.data import ids
from stas_core.errors import DuplicateId, InputError, OversizedImage, UnusableId

_SLIDES = frozenset({".svs", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".bif", ".svslide", ".czi", ".isyntax", ".zvi"})
_UNSEEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories of control characters, lone surrogates (a name's bytes that are not UTF-8) and line ends."""


@dataclass(frozen=True)
class Listing:
    """What was found."""

    uris: dict[str, str]
    """The files that can be used, by id, sorted."""
    refused: list[tuple[str, InputError]]
    """Ids that stand for no single usable file, made printable, and why."""
    passed_over: dict[str, int]
    """How many files there are of each suffix that is not read."""
    slides: tuple[str, ...] = ()
    """Those of them that are whole slides."""

    def describe(self, key: str) -> str:
        """Describe the files that were passed over, in one line; "" if none were."""
        kinds = in_words(self.passed_over)
        return f"{key}: passed over {kinds}" if kinds else ""

    def with_ids_of(self, wanted: Collection[str]) -> "Listing":
        """Return a copy whose files have the ids of those wanted that they are named alike (`ids.as_file`)."""
        namesake = ids.namesake_among(wanted)
        uris = dict(sorted((namesake(image_id), uri) for image_id, uri in self.uris.items()))
        return replace(self, uris=uris, refused=[(namesake(image_id), error) for image_id, error in self.refused])

    def with_slides_refused(self) -> "Listing":
        """Return a copy that refuses slides by name instead of passing them over, for a stage that takes fields."""
        found = [(printable(storage.name_of(uri)), _slide(uri)) for uri in self.slides]
        suffixes = {suffix_of(uri) for uri in self.slides}
        others = {suffix: count for suffix, count in self.passed_over.items() if suffix not in suffixes}
        return Listing(self.uris, [*self.refused, *found], others)


def find(source: str, suffixes: Sequence[str]) -> Listing:
    """Find the files with one of the suffixes (in lower case) under a folder or glob; hidden files are ignored.

    Raises:
        StorageError: there is no such folder, or one below it cannot be listed.
    """
    found = storage.list_files(source)
    wanted = [uri for uri in found if suffix_of(uri) in suffixes]
    others = [uri for uri in found if suffix_of(uri) not in suffixes]
    uris, refused = by_id((storage.stem_of(uri), uri) for uri in wanted)
    counts = Counter(printable(suffix_of(uri)) for uri in others)
    slides = tuple(uri for uri in others if suffix_of(uri) in _SLIDES)
    return Listing(uris, refused, dict(sorted(counts.items())), slides)


def _slide(uri: str) -> InputError:
    return OversizedImage(
        f"{printable(uri)} is a whole slide, not a field: cut it into fields, or score it by score_slides"
    )


def in_words(counts: Mapping[str, int]) -> str:
    """Say how many files there are of each suffix."""
    return ", ".join(f"{count} {_kind(suffix)}" for suffix, count in counts.items())


def by_id(found: Iterable[tuple[str, str]]) -> tuple[dict[str, str], list[tuple[str, InputError]]]:
    """Sort files by id; return those that can be used, and the ids that cannot, with the reason."""
    grouped: dict[str, list[str]] = {}
    for image_id, uri in found:
        grouped.setdefault(image_id, []).append(uri)
    alike: dict[str, list[str]] = {}
    for image_id in sorted(grouped):
        alike.setdefault(ids.as_file(image_id), []).append(image_id)
    uris: dict[str, str] = {}
    refused: list[tuple[str, InputError]] = []
    for image_id, group in sorted(grouped.items()):
        error = _refuse(image_id, group) or _refuse_alike([grouped[one][0] for one in alike[ids.as_file(image_id)]])
        if error is None:
            uris[image_id] = group[0]
        else:
            refused.append((printable(image_id), error))
    return uris, refused


def _refuse(image_id: str, uris: Sequence[str]) -> InputError | None:
    shown = " and ".join(printable(uri) for uri in uris)
    if (objection := ids.objection(image_id)) is not None:
        return UnusableId(f"{shown}: {objection}")
    if any(_has_unseen(uri) for uri in uris):
        return UnusableId(f"the path of {shown} has control characters or is not UTF-8; rename its folder")
    if len(uris) < 2:
        return None
    if all(storage.name_of(uri).startswith(image_id) for uri in uris):
        return DuplicateId(f"{shown} have the same name; ids must be unique, rename one")
    return DuplicateId(
        f"{shown} are for the same image {image_id}: a COCO file names its images itself, and names that differ only "
        "in case or in how accents are written are one; ids must be unique, rename one or take it out"
    )


def _refuse_alike(uris: Sequence[str]) -> InputError | None:
    """Refuse ids that some disks do not tell apart: their files would overwrite each other."""
    if len(uris) < 2:
        return None
    shown = " and ".join(printable(uri) for uri in uris)
    return DuplicateId(
        f"{shown} have names that differ only in case or in how accents are written, which is one name to some disks; "
        "ids must be unique there, too: rename one"
    )


def _has_unseen(text: str) -> bool:
    return any(unicodedata.category(character) in _UNSEEN for character in text)


def printable(text: str) -> str:
    """Escape what cannot be printed or stored in a name: bytes that are not UTF-8, control characters."""
    return "".join(_escape(character) if _has_unseen(character) else character for character in text)


def _escape(character: str) -> str:
    code = ord(character)
    # Python keeps a byte that is not UTF-8 as a surrogate of its own.
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()


def suffix_of(uri: str) -> str:
    """Return the suffix of a file's name, in lower case."""
    return posixpath.splitext(storage.name_of(uri))[1].lower()


def _kind(suffix: str) -> str:
    return f"{suffix} (whole slides)" if suffix in _SLIDES else suffix or "without a suffix"
