"""Reading annotation files that may hold anything: limits that are checked before memory is taken."""

import json
import zlib
from typing import Any

from stas_core.errors import EmptyFile, OversizedAnnotation, UnreadableAnnotation

MAX_BYTES = 64_000_000
"""Largest annotation file that is read, unpacked; only an embedded image makes one this large."""
MAX_VALUES = 4_000_000
"""Most values in an annotation, counted as its commas and opening brackets: each takes up to 100 bytes once parsed."""
MAX_SHOWN = 60
"""Characters that an error quotes from a file."""
_GZIP = b"\x1f\x8b"


def check_num_bytes(num_bytes: int, name: str) -> None:
    """Refuse an annotation file that is too large to be read.

    Raises:
        OversizedAnnotation: naming the file, its size and the limit.
    """
    if num_bytes > MAX_BYTES:
        raise OversizedAnnotation(
            f"annotation of {name} holds {num_bytes:,} bytes, more than the limit of {MAX_BYTES:,}; save it without "
            "the image inside (labelme: File > Save With Image Data, off), or as several files"
        )


def unpacked(data: bytes, name: str) -> bytes:
    """Return a file's bytes, those of a gzip archive unpacked.

    Raises:
        EmptyFile, OversizedAnnotation, UnreadableAnnotation: naming the file.
    """
    if not data:
        raise EmptyFile(f"annotation of {name} holds 0 bytes; save it again")
    check_num_bytes(len(data), name)
    if not data.startswith(_GZIP):
        return data
    unpacker = zlib.decompressobj(wbits=31)
    try:
        found = unpacker.decompress(data, MAX_BYTES + 1)
    except zlib.error as error:
        raise UnreadableAnnotation(f"annotation of {name} is a damaged gzip archive: {error}; pack it again") from error
    check_num_bytes(len(found), name)
    if not unpacker.eof:
        raise UnreadableAnnotation(f"annotation of {name} is a gzip archive that is cut short; copy it again")
    if not found:
        raise EmptyFile(f"annotation of {name} is a gzip archive of 0 bytes; save it again")
    return found


def in_utf8(data: bytes) -> bytes:
    """Return JSON in UTF-8, whichever of its encodings it is in.

    Raises:
        UnicodeDecodeError: it is in none of them.
    """
    encoding = json.detect_encoding(data)
    return data if encoding == "utf-8" else data.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")


def parse_json(data: bytes, name: str, max_values: int = MAX_VALUES) -> Any:
    """Parse JSON of a limited number of values.

    Raises:
        UnicodeDecodeError: it is not UTF-8, nor UTF-16 or UTF-32.
        OversizedAnnotation, UnreadableAnnotation: naming the file.
    """
    num_values = sum(map(data.count, (b",", b"[", b"{")))
    if num_values > max_values:
        raise OversizedAnnotation(
            f"annotation of {name} holds some {num_values:,} values, more than the limit of {max_values:,}; outline "
            "its targets with fewer points, or save it as several files"
        )
    try:
        return json.loads(data)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableAnnotation(f"annotation of {name} is not JSON: {error}; save it again") from error


def shown(text: object) -> str:
    """Return text from a file as errors quote it: short and printable."""
    known = repr(text)
    return known if len(known) <= MAX_SHOWN else f"{known[:MAX_SHOWN]}..."
