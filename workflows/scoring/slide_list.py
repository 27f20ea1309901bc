"""Which slides are scored, at which resolution, and what is given with each."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from stas_core import places, storage, tables
from stas_core.config import Config, Uri
from stas_core.data import listing
from stas_core.data.id_table import read_id_table
from stas_core.data.image_tables import um_per_px
from stas_core.errors import ChangedInput, ConfigError, StorageError
from stas_core.failures import Failure
from stas_core.slides import slide_files
from stas_core.slides.run import SlideRun
from workflows.scoring.slide_plan import SlideItem

STAGE = SlideRun.STAGE
OUTLINE_SUFFIXES = (".geojson", ".json")
MASK_SUFFIXES = (*OUTLINE_SUFFIXES, ".png", ".tif", ".tiff")


@dataclass(frozen=True)
class ListedSlide:
    """A row of a list of slides."""

    slide_uri: str
    id: str | None
    """None, or no such column: the file's name without its suffix."""
    mpp: float | None
    """um per level-0 pixel; None, or no such column: what the file says."""


class GivenConfig(Config):
    """What is given with the slides: a file for a single slide, or a folder of files named by the slides' ids."""

    tumour: Uri | None = None
    """GeoJSON of the tumour's main mass, in level-0 px as QuPath exports it: for distances from it."""
    tissue: Uri | None = None
    """GeoJSON or mask image that says where tissue is, in place of the slide's colours."""
    roi: Uri | None = None
    """GeoJSON outside of which nothing is scored."""


@dataclass(frozen=True)
class SlideSource:
    """Where slides are looked for, and what is said of them; see the settings of score_slides."""

    uri: str
    mpp: float | None
    mpp_csv: str | None
    given: GivenConfig


def find_slides(given: SlideSource) -> tuple[list[SlideItem], list[Failure], dict[str, int]]:
    """Find the slides to score, with what is given for each.

    Returns items sorted by id, failure rows of ids that no file can be named by, and how many files of each other
    suffix were passed over.

    Raises:
        ConfigError: there is no slide; a list, the mpp_csv or what is given does not fit the slides.
    """
    source = given.uri
    listed: dict[str, float | None] = {}
    if source.endswith(".parquet"):
        rows = _listed(source)
        found = listing.Listing(*listing.by_id((slide_id, uri) for slide_id, uri, _ in rows), {})
        listed = {slide_id: mpp for slide_id, _, mpp in rows}
    else:
        found = slide_files.find_slides(source)
    note = found.describe("slides")
    if not found.uris and not found.refused:
        raise ConfigError(f"slides = {source} holds none ({', '.join(slide_files.SLIDE_SUFFIXES)}); {note}")
    if note:
        print(note)
    refused = [Failure.of(slide_id, STAGE, error) for slide_id, error in found.refused]
    ids = list(found.uris)
    if not ids:
        return [], refused, found.passed_over
    mpp = {slide_id: given.mpp for slide_id in ids}
    mpp |= {slide_id: value for slide_id, value in listed.items() if value is not None}
    mpp |= _mpp_of_csv(given.mpp_csv, ids)
    files = {name: _given(name, uri, ids) for name, uri in given.given.model_dump().items()}
    items = []
    for (slide_id, uri), stamp in zip(found.uris.items(), slide_files.stamps(list(found.uris.values())), strict=True):
        own = {name: by_id.get(slide_id) for name, by_id in files.items()}
        item = SlideItem(
            id=slide_id,
            slide_uri=uri,
            slide_stamp=stamp,
            stamp="",
            mpp=mpp[slide_id],
            tissue_uri=own["tissue"],
            roi_uri=own["roi"],
            tumour_uri=own["tumour"],
            tumour_stamp="",
        )
        items.append(_stamped(item, stamp))
    return items, refused, found.passed_over


def _stamped(item: SlideItem, slide_stamp: str) -> SlideItem:
    """Return a slide whose version is known, with the marks of it and of what is given as they are now."""
    stamp = " ".join([f"{item['slide_uri']} {slide_stamp}", *_marks(item["tissue_uri"], item["roi_uri"])])
    tumour_stamp = " ".join(_marks(item["tumour_uri"]))
    return SlideItem(**{**item, "slide_stamp": slide_stamp, "stamp": stamp, "tumour_stamp": tumour_stamp})


def require_unchanged(item: SlideItem) -> None:
    """Refuse a slide that is another by now, or with which something else is given.

    Raises:
        ChangedInput: it is.
    """
    (slide_stamp,) = slide_files.stamps([item["slide_uri"]])
    if slide_stamp != item["slide_stamp"]:
        raise changed(item["slide_uri"])
    if _stamped(item, slide_stamp) != item:
        raise changed(f"what is given with {item['slide_uri']}")


def changed(what: str) -> ChangedInput:
    """Return the error of what is another file by now."""
    return ChangedInput(f"{what} has changed since this run began; run again once nothing writes there")


def _marks(*uris: str | None) -> list[str]:
    """Return what marks the versions of the files that are given."""
    given = [uri for uri in uris if uri is not None]
    return [f"{uri} {mark}" for uri, mark in zip(given, storage.stamps(given), strict=True)] if given else []


def _listed(source: str) -> list[tuple[str, str, float | None]]:
    try:
        rows = tables.read_rows(source, ListedSlide, optional=("id", "mpp"))
    except StorageError as error:
        raise ConfigError(f"slides: {error}") from error
    if not rows:
        raise ConfigError(f"slides = {source} has no rows; list a slide in each")
    folder = source.rpartition("/")[0]
    found = []
    for number, row in enumerate(rows):
        uri = storage.resolve(row.slide_uri, folder, where=f"slides = {source}, row {number}, column slide_uri")
        found.append((slide_files.slide_id(uri) if row.id is None else row.id, uri, row.mpp))
    return found


def _composed(text: str) -> str:
    """Return a name with its accents composed (NFC): file systems differ in them."""
    return unicodedata.normalize("NFC", text)


def _mpp_of_csv(uri: str | None, ids: Sequence[str]) -> dict[str, float]:
    """Return the resolution of the slides that a CSV names.

    Raises:
        ConfigError: it is no such table, or none of its rows names a slide.
    """
    if uri is None:
        return {}
    source = f"mpp_csv = {uri}"
    suffixes = [ome + suffix for ome in ("", ".ome") for suffix in slide_files.SLIDE_SUFFIXES]
    table = read_id_table(storage.read_bytes(uri), "mpp", source, parse=um_per_px, suffixes=suffixes)
    unused = table.unused(ids)
    named = table.named(ids)
    if unused:
        print(f"{source}: {len(unused)} row(s) name none of the {len(ids)} slides, first {unused[0]}")
    if not named:
        raise ConfigError(f"{source}: none of its rows names a slide, such as {ids[0]}; correct its image_id column")
    return dict(zip(named, table.values_of(named), strict=True))


def _given(name: str, uri: str | None, ids: Sequence[str]) -> dict[str, str]:
    """Return the file that is given for each slide, by id.

    Raises:
        ConfigError: there is none for any slide, a single file for several, or two for one.
    """
    if uri is None:
        return {}
    key, uri = f"given.{name}", places.absolute(uri)
    suffixes = MASK_SUFFIXES if name == "tissue" else OUTLINE_SUFFIXES
    if uri.lower().endswith(suffixes):
        if len(ids) != 1:
            raise ConfigError(
                f"{key} = {uri} is one file for {len(ids)} slides; give a folder of files named by their ids"
            )
        if not storage.exists(uri):
            raise ConfigError(f"{key} = {uri} does not exist; correct the path")
        return {ids[0]: uri}
    known, strange = _by_slide(key, storage.list_files(uri, suffixes), ids)
    if strange:
        print(f"{key}: {len(strange)} file(s) of {uri} name none of the slides, first {strange[0]}")
    if not known:
        raise ConfigError(f"{key} = {uri} has no file for any slide; name them like {ids[0]}{suffixes[0]}")
    if missing := [slide_id for slide_id in ids if slide_id not in known]:
        print(f"{key}: {len(missing)} of {len(ids)} slides have none, first {missing[0]}")
    return known


def _by_slide(key: str, files: Sequence[str], ids: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the file that is named by each slide, by id, and the names of those that are by none.

    Raises:
        ConfigError: two files are for one slide.
    """
    names, found, strange = {_composed(slide_id) for slide_id in ids}, dict[str, str](), []
    for file in files:
        stem = _composed(storage.stem_of(file))
        name = next((one for one in (stem, stem.removesuffix(".ome")) if one in names), None)
        if name is None:
            strange.append(stem)
        elif (other := found.setdefault(name, file)) != file:
            raise ConfigError(f"{key}: {other} and {file} are both for the slide {name}; leave one in the folder")
    return {slide_id: found[name] for slide_id in ids if (name := _composed(slide_id)) in found}, sorted(strange)
