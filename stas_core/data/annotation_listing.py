"""Which annotation file belongs to which image, whatever its format.

A file is its image's by name: `0007.json`, `0007.geojson.gz` or `0007.jpg.geojson` for `0007.jpg`. Case and the way in
which accents are written do not count: they change between systems, and no two images may differ in them alone. A JSON
that is named like no image may be a COCO file, which names its images itself: it is looked into. A mask counts for an
image that has no other annotation, and a JPEG, which is rarely a mask, only in a folder without other files.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from stas_core import storage
from stas_core.data import ids, listing, masks
from stas_core.data.annotations import Description
from stas_core.data.images import IMAGE_SUFFIXES
from stas_core.data.shapes import FORMATS, Format
from stas_core.errors import InputError

TEXT_SUFFIXES = (".json", ".geojson", ".geojson.gz", ".json.gz", ".xml", ".xml.gz")
SUFFIXES = (*TEXT_SUFFIXES, *masks.SUFFIXES)
"""Suffixes of files that are listed as annotations, in lower case. A file's content says which format it is in."""
EXPECTED = (
    "<name>.json (labelme, GeoJSON or COCO), .geojson, .geojson.gz, .xml (ASAP) or a mask <name>.png, .tif or .bmp, or "
    "a COCO .json that names it"
)
MAX_MISSES = 20
"""After this many JSON files in a row that are named like no image and are no COCO file, no more are opened."""
_COCO_NAMES = ("coco", "instances")
"""What the names of COCO files have in them, in lower case: these are opened first."""
_NOT_OPENED = (
    f"was not opened: {MAX_MISSES} other .json files named like no image were no COCO file (if this one is, give the "
    "file itself in place of its folder)"
)

Describe = Callable[[str], Description]
"""Looks into a file; raises InputError where it cannot be read."""


@dataclass(frozen=True)
class AnnotationListing:
    """What was found."""

    uris: dict[str, str]
    """The annotations, by image id, sorted; of images that are not wanted, too."""
    refused: list[tuple[str, InputError]]
    """Ids that stand for no single usable file, made printable, and why."""
    passed_over: dict[str, int]
    """How many files there are of each suffix that is not read."""
    strangers: dict[str, str]
    """Files named like no wanted image: what each was found to be, by id."""


def find_annotations(
    source: str, wanted: Collection[str], *, image_uris: Collection[str], describe: Describe
) -> AnnotationListing:
    """Find the annotations of images under a folder, a glob, or in a single file.

    Args:
        source: where they are.
        wanted: the images' ids.
        image_uris: files that are images, and so no masks.
        describe: looks into a file.

    Raises:
        StorageError: there is no such folder, or one below it cannot be listed.
    """
    images = set(image_uris)
    files = [uri for uri in storage.list_files(source) if uri not in images]
    texts, pictures, others = _by_kind(files)
    namesake = ids.namesake_among(wanted)
    named = [(_id_of(uri, wanted, namesake), uri) for uri in texts]
    found = [(image_id, uri) for image_id, uri in named if image_id in wanted]
    strangers = {uri: image_id for image_id, uri in named if image_id not in wanted}
    said = _look_into_all(strangers, describe)
    for uri, says in said.items():
        listed = map(namesake, says.images) if isinstance(says, Description) else [strangers[uri]]
        found += [(image_id, uri) for image_id in listed]
    annotated = {image_id for image_id, _ in found}
    for uri in pictures:
        image_id = _id_of(uri, wanted, namesake)
        if image_id in annotated or (texts and uri.lower().endswith((".jpg", ".jpeg"))):
            others.append(uri)
        else:
            found.append((image_id, uri))
    uris, refused = listing.by_id(found)
    passed_over = Counter(listing.printable(listing.suffix_of(uri)) for uri in others)
    words = {strangers[uri]: says for uri, says in said.items() if not isinstance(says, Description)}
    return AnnotationListing(uris, refused, dict(sorted(passed_over.items())), words)


def _by_kind(files: Iterable[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the annotations that are text, those that are pictures, and the files that are neither."""
    texts: list[str] = []
    pictures: list[str] = []
    others: list[str] = []
    for uri in files:
        name = uri.lower()
        kind = texts if name.endswith(TEXT_SUFFIXES) else pictures if name.endswith(masks.SUFFIXES) else others
        kind.append(uri)
    return texts, pictures, others


def _id_of(uri: str, wanted: Collection[str], namesake: Callable[[str], str]) -> str:
    """Return the image id in a file's name; QuPath calls a file `0007.jpg.geojson`."""
    name = storage.name_of(uri)
    if name.lower().endswith(".gz"):
        name = name[: -len(".gz")]
    image_id = namesake(name.rpartition(".")[0])
    shorter, dot, suffix = image_id.rpartition(".")
    is_image_name = image_id not in wanted and f"{dot}{suffix}".lower() in IMAGE_SUFFIXES
    return shorter if is_image_name and (shorter := namesake(shorter)) in wanted else image_id


def _look_into_all(uris: Iterable[str], describe: Describe) -> dict[str, Description | str]:
    """Return what files that are named like no image are, in their order; some may be COCO files."""
    files = list(uris)
    said: dict[str, Description | str] = {}
    misses = 0
    for uri in sorted(files, key=lambda uri: not any(part in storage.name_of(uri).lower() for part in _COCO_NAMES)):
        if not uri.lower().endswith((".json", ".json.gz")):
            said[uri] = ""
        elif misses == MAX_MISSES:
            said[uri] = _NOT_OPENED
        else:
            said[uri] = _look_into(uri, describe)
            misses = 0 if isinstance(said[uri], Description) else misses + 1
    return {uri: said[uri] for uri in files}


def _look_into(uri: str, describe: Describe) -> Description | str:
    """Return what a COCO file of images says, else what the file is, in words."""
    try:
        found = describe(uri)
    except InputError as error:
        return f"cannot be read ({error})"
    return found if found.images else f"is {FORMATS[found.format]}"


def format_name(key: str) -> str:
    """Return a format as people call it.

    >>> format_name("asap")
    'ASAP XML'
    """
    known: dict[str, str] = {str(form): name for form, name in FORMATS.items()}
    return known.get(key, key)


def count_formats(formats: Iterable[Format | str | None]) -> str:
    """Say how many annotations there are of each format, the most frequent first."""
    counts = Counter(format_name(form) for form in formats if form)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
