"""What an image's id may be: in every stage it becomes part of file names and URIs."""

import unicodedata
from collections.abc import Callable, Collection

MAX_ID_BYTES = 200
"""File systems allow names of 255; suffixes and temporary names need some."""

# fsspec chains file systems with "::", and takes what follows "?versionId=" for the version of an object.
_FORBIDDEN = ("/", "\\", "::", "?versionId=")


def as_file(image_id: str) -> str:
    """Return a key that is equal for ids that some disks take for one file name: those differ in case or accents' form.

    Example:
        >>> as_file("Slide 7") == as_file("slide 7")
        True
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", image_id).casefold())


def namesake_among(wanted: Collection[str]) -> Callable[[str], str]:
    """Return what tells which wanted id a name stands for: itself, or the only one alike (`as_file`); else the name.

    Example:
        >>> namesake_among(["M\u00fcller1", "8"])("mu\u0308ller1")
        'Müller1'
    """
    alike: dict[str, list[str]] = {}
    for image_id in wanted:
        alike.setdefault(as_file(image_id), []).append(image_id)

    def namesake(name: str) -> str:
        found = [name] if name in wanted else alike.get(as_file(name), [])
        return found[0] if len(found) == 1 else name

    return namesake


def objection(image_id: str) -> str | None:
    """Return why an id cannot be used in file names; None: it can."""
    usable = (
        image_id
        and not image_id.startswith(".")
        and not any(text in image_id for text in _FORBIDDEN)
        and not any(unicodedata.category(character) in ("Cc", "Cs") for character in image_id)  # Cs: not UTF-8
        and len(image_id.encode()) <= MAX_ID_BYTES
    )
    if usable:
        return None
    shown = repr(image_id if len(image_id) <= MAX_ID_BYTES else f"{image_id[:40]}...")
    return (
        f"the id {shown} names no file; give 1 to {MAX_ID_BYTES} bytes without {' '.join(_FORBIDDEN)} and control "
        "characters, in UTF-8, not beginning with a dot"
    )
