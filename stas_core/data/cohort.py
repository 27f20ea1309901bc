"""The cohort table: one row per image with its files, statistics, stratum, split, fold and stain.

Written once by `prepare_data`, read by every later stage; `CohortRow` is the contract. What is read is checked: ids
become file names.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import pyarrow as pa
from pydantic import Field

from stas_core import review, storage, tables
from stas_core.arrays import Mask
from stas_core.config import Config, Uri
from stas_core.data import annotations, appearance, ids, images, stain, truth
from stas_core.data.annotations import AnnotationConfig
from stas_core.data.id_table import IdTable, read_id_table, whole_number
from stas_core.errors import ChangedInput, ConfigError, NotAFile, StorageError, WrongColumns
from stas_core.tables import Int8, Int32

STRATUM_EDGES = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1)
"""Lower edges of the published foreground-share strata; each holds its lower edge, the last also 1."""

TRAIN, HOLD_OUT = "train", "hold-out"


class SplitConfig(Config):
    """How images are divided into a hold-out and cross-validation folds."""

    num_folds: int = Field(5, ge=2)
    """Number of cross-validation folds."""
    hold_out_fraction: float = Field(0.1263, ge=0, lt=1)
    """Share of the images that no fold ever sees (published: 133 of 1053)."""
    seed: int = 0
    """Seed of the shuffle within strata."""
    groups_csv: Uri | None = None
    """CSV with columns `image_id,group`: images of one group (patient, slide) never straddle folds."""
    published_csv: Uri | None = None
    """CSV with a published split, columns `image_id,fold`; taken as it is instead of drawing one."""
    hold_out_fold: int | None = None
    """Which fold of the published split becomes the hold-out; the others keep their numbers."""


@dataclass(frozen=True)
class CohortRow:
    """One row of the cohort table. As read, `image_uri`, `annotation_uri` and `mask_uri` are resolved."""

    id: str
    image_uri: str
    annotation_uri: str
    mask_uri: str
    """In the file relative to its folder."""
    height: Int32
    """In px, like `width`."""
    width: Int32
    num_polygons: Int32
    """Of the annotation; several may make one target."""
    num_targets: Int32
    """8-connected components of the mask."""
    target_areas_px: list[int]
    """Their areas, in raster order."""
    foreground_share: float
    """Share of the image's pixels that are target, 0 to 1."""
    stratum: Int8
    """Index into `STRATUM_EDGES`, by `foreground_share`."""
    group: str
    """Patient or slide; without groups the image's own id."""
    split: str
    """`train` or `hold-out`."""
    fold: Int32 | None
    """None: hold-out."""
    stain_matrix: Annotated[list[float], pa.list_(pa.float64(), 6)] | None
    """3 x 2, row-major; None, like `stain_max_c`, where the image has no tissue."""
    stain_max_c: Annotated[list[float], pa.list_(pa.float64(), 2)] | None
    findings: list[str]
    """Oddities of the annotation that were kept, in words."""
    fingerprint: str
    """Of the image's and the annotation's bytes."""
    image_fingerprint: str
    """Of the image's bytes; who reads the image holds it to this."""
    mask_fingerprint: str
    """Of the mask's pixels; who reads the mask holds it to this."""
    brightness: float | None = None
    """Like `sharpness` as `appearance.Look` has it; null in a cohort of an earlier version."""
    sharpness: float | None = None
    mpp: float | None = None
    """um per pixel, where the file states it or somebody gave it."""
    mpp_source: str | None = None
    """given (a setting) or file; null where it is not known."""

    @property
    def content(self) -> str:
        """Return what later stages count the row by: of one annotation, other labels make another mask."""
        return f"{self.image_fingerprint} {self.mask_fingerprint}"

    @property
    def stain(self) -> stain.Stain | None:
        """Return the stain estimate, or None where the image has no tissue."""
        if self.stain_matrix is None or self.stain_max_c is None:
            return None
        return stain.Stain(np.array(self.stain_matrix).reshape(3, 2), np.array(self.stain_max_c))


SCHEMA = tables.schema_of(CohortRow)


@dataclass(frozen=True)
class Measurement:
    """What one image and its annotation say, before folds are drawn."""

    mask: Mask
    values: dict[str, Any]


def stratum_of(foreground_share: float) -> int:
    """Return the published stratum 0..6 of a foreground share."""
    return int(np.searchsorted(STRATUM_EDGES, foreground_share, side="right")) - 1


def measure(
    image_data: bytes,
    annotation_data: bytes,
    name: str,
    *,
    config: AnnotationConfig,
    max_pixels: int = images.MAX_PIXELS,
) -> Measurement:
    """Decode one image and its annotation and measure what the cohort table states.

    Raises:
        InputError: the image or annotation is unreadable, of the wrong kind, or they contradict each other.
    """
    image = images.decode_image(image_data, name, max_pixels=max_pixels)
    mask, findings, annotation = truth.read_annotation(annotation_data, name, image.shape[:2], config, name)
    areas = target_areas(mask)
    share = float(mask.mean())
    estimate = stain.estimate(image)
    brightness, sharpness = appearance.measure_light(image)
    values = {
        "height": image.shape[0],
        "width": image.shape[1],
        "num_polygons": annotations.num_polygons(annotation, config),
        "num_targets": len(areas),
        "target_areas_px": areas,
        "foreground_share": share,
        "stratum": stratum_of(share),
        "stain_matrix": None if estimate is None else estimate.matrix.ravel().tolist(),
        "stain_max_c": None if estimate is None else estimate.max_c.tolist(),
        "findings": [truth.in_words(finding) for finding in findings],
        "fingerprint": storage.fingerprint(image_data, annotation_data),
        "image_fingerprint": storage.fingerprint(image_data),
        "mask_fingerprint": mask_fingerprint(mask),
        "brightness": brightness,
        "sharpness": sharpness,
        "mpp": (mpp := images.read_mpp(image_data, name)),
        "mpp_source": None if mpp is None else "file",
        "annotation_format": annotation.format,
        "label_counts": json.dumps(annotation.count_labels(), ensure_ascii=False),
    }
    return Measurement(mask, values)


def mask_fingerprint(mask: Mask) -> str:
    """Return a digest of a mask's size and pixels, independent of its file format."""
    return storage.fingerprint(f"{mask.shape[0]}x{mask.shape[1]}", np.packbits(mask).tobytes())


def require_mask(mask: Mask, fingerprint: str, name: str) -> None:
    """Refuse a mask whose fingerprint is not the cohort's.

    Raises:
        ChangedInput: it is another.
    """
    if mask_fingerprint(mask) != fingerprint:
        raise ChangedInput(f"{name} is not the mask that the cohort was made with; run prepare_data again")


def target_areas(mask: Mask) -> list[int]:
    """Return the areas in px of a mask's 8-connected components, in raster order."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    return [int(area) for area in stats[1:, cv2.CC_STAT_AREA]]


@dataclass(frozen=True)
class Assignment:
    """The fold of each image (None: hold-out), and the largest deviation of a stratum from an even share."""

    folds: list[int | None]
    max_deviation: float
    """Largest |images of a stratum in a part - its even share|, over strata and parts."""


def draw_split(strata: Sequence[int], groups: Sequence[str] | None, config: SplitConfig) -> Assignment:
    """Draw a hold-out and folds: stratified, seeded, no image left out; whole groups where they are given.

    Ungrouped, each stratum's counts differ by at most one between folds, and so do the fold sizes. Grouped, whole
    groups are dealt, largest first, to the part that they bring closest to its even share of each stratum.

    Example:
        >>> drawn = draw_split([0, 0, 0, 0, 1, 1, 1, 1], None, SplitConfig(num_folds=2, hold_out_fraction=0.25))
        >>> sorted(drawn.folds, key=str)  # None: the hold-out
        [0, 0, 0, 1, 1, 1, None, None]
    """
    rng = np.random.default_rng(config.seed)
    if groups is None:
        folds = _deal_images(np.asarray(strata), config, rng)
    else:
        folds = _deal_groups(np.asarray(strata), groups, config, rng)
    empty = sorted(set(range(config.num_folds)) - set(folds))
    if empty:
        units = "images" if groups is None else "groups"
        count = len(strata) if groups is None else len(set(groups))
        raise ConfigError(
            f"split.num_folds = {config.num_folds}: {count} {units} leave fold(s) {empty} empty; "
            f"ask for fewer folds or a smaller split.hold_out_fraction (now {config.hold_out_fraction})"
        )
    return Assignment(folds, _max_deviation(strata, folds, config))


def _deal_images(strata: np.ndarray, config: SplitConfig, rng: np.random.Generator) -> list[int | None]:
    folds: list[int | None] = [None] * len(strata)
    held_out = _hold_out_counts(Counter(strata.tolist()), config.hold_out_fraction)
    next_fold = 0
    for stratum in sorted(held_out):
        members = rng.permutation(np.flatnonzero(strata == stratum))
        for index in members[held_out[stratum] :]:
            folds[index] = next_fold  # going on where the last stratum stopped evens out the fold sizes too
            next_fold = (next_fold + 1) % config.num_folds
    return folds


def _hold_out_counts(sizes: Mapping[int, int], fraction: float) -> dict[int, int]:
    """Distribute round(total * fraction) over the strata by largest remainder."""
    exact = {stratum: size * fraction for stratum, size in sizes.items()}
    counts = {stratum: int(value) for stratum, value in exact.items()}
    missing = round(sum(sizes.values()) * fraction) - sum(counts.values())
    by_remainder = sorted(exact, key=lambda stratum: (counts[stratum] - exact[stratum], stratum))
    for stratum in by_remainder[:missing]:
        counts[stratum] += 1
    return counts


def _deal_groups(
    strata: np.ndarray, groups: Sequence[str], config: SplitConfig, rng: np.random.Generator
) -> list[int | None]:
    names = sorted(set(groups))
    group_of = np.searchsorted(names, list(groups))
    table = np.zeros((len(names), len(STRATUM_EDGES)))
    np.add.at(table, (group_of, strata), 1)
    wanted = _even_shares(table.sum(axis=0), config)
    filled = np.zeros_like(wanted)
    part_of = np.zeros(len(names), dtype=int)
    # Largest first: what is dealt last is small and can still even things out. Ties fall by a seeded draw.
    order = np.lexsort((rng.permutation(len(names)), -table.sum(axis=1)))
    for group in order:
        # Strata are weighed by their rarity, and total size counts as one more stratum.
        after = filled[None] + np.eye(len(wanted))[:, :, None] * table[group]
        scale = np.maximum(table.sum(axis=0), 1)
        misfit = (((after - wanted) / scale) ** 2).sum(axis=(1, 2))
        misfit += (((after.sum(axis=2) - wanted.sum(axis=1)) / len(strata)) ** 2).sum(axis=1)
        part = int(np.argmin(misfit))
        filled[part] += table[group]
        part_of[group] = part
    return [None if part == config.num_folds else int(part) for part in part_of[group_of]]


def _even_shares(totals: np.ndarray, config: SplitConfig) -> np.ndarray:
    """Return the wanted count of each stratum in each part: the folds, then the hold-out."""
    fold = totals * (1 - config.hold_out_fraction) / config.num_folds
    parts = [fold] * config.num_folds
    return np.stack([*parts, totals * config.hold_out_fraction] if config.hold_out_fraction else parts)


def _max_deviation(strata: Sequence[int], folds: Sequence[int | None], config: SplitConfig) -> float:
    totals = np.bincount(strata, minlength=len(STRATUM_EDGES)).astype(float)
    wanted = _even_shares(totals, config)
    counts = np.zeros_like(wanted)
    for stratum, fold in zip(strata, folds, strict=True):
        counts[config.num_folds if fold is None else fold, stratum] += 1
    return float(np.abs(counts - wanted).max())


def read_groups(data: bytes, config: SplitConfig) -> IdTable[str]:
    """Read the group (patient, slide) of each image.

    Raises:
        ConfigError: the CSV is no such table, or contradicts itself.
    """
    source = f"split.groups_csv = {config.groups_csv}"
    return read_id_table(data, "group", source, parse=str, suffixes=images.IMAGE_SUFFIXES)


def read_published_split(data: bytes, config: SplitConfig) -> IdTable[int | None]:
    """Read the fold of each image of a published split; None: hold-out.

    Raises:
        ConfigError: the CSV is no such table, contradicts itself, lacks the hold-out, or has one fold to train on.
    """
    source = f"split.published_csv = {config.published_csv}"
    hold_out = config.hold_out_fold

    def parse(cell: str) -> int | None:
        fold = whole_number(cell)
        if fold == hold_out:
            return None
        if fold < 0:
            raise ValueError(f"{fold} is no fold; expected 0 or more (a hold-out? set split.hold_out_fold={fold})")
        return fold

    table = read_id_table(data, "fold", source, parse=parse, suffixes=images.IMAGE_SUFFIXES)
    folds = sorted({fold for fold in table.values if fold is not None})
    if hold_out is not None and None not in table.values:
        raise ConfigError(f"split.hold_out_fold = {hold_out}: {source} has no such fold, but {folds}; choose one")
    if len(folds) == 1:
        raise ConfigError(
            f"{source} has one fold to train on, {folds[0]}, and a fold is validated by models of others; give "
            f"two or more, or hold all out: split.hold_out_fold={folds[0]}"
        )
    return table


@dataclass(frozen=True)
class GivenSplit:
    """Groups and folds from the CSVs of a `SplitConfig`; None where none is given."""

    groups: IdTable[str] | None
    folds: IdTable[int | None] | None
    fingerprints: tuple[str, ...]
    """Of the files' bytes: another content is another split."""

    def check(self, ids: Sequence[str]) -> list[str]:
        """Compare the CSVs with these images; return what is odd, in words.

        Raises:
            ConfigError: an image has no row.
        """
        notes = []
        for table in (self.groups, self.folds):
            if table is not None:
                table.values_of(ids)
                if unused := table.unused(ids):
                    notes.append(f"{table.source}: {len(unused)} row(s) name no image to prepare, first {unused[0]}")
        if self.groups is not None and self.folds is not None:
            folds: dict[str, set[int | None]] = {}
            for group, fold in zip(self.groups.values_of(ids), self.folds.values_of(ids), strict=True):
                folds.setdefault(group, set()).add(fold)
            split = [group for group, parts in folds.items() if len(parts) > 1]
            if split:
                notes.append(
                    f"{self.folds.source} divides {len(split)} group(s) of {self.groups.source} between folds, first "
                    f"{split[0]}: scores of one fold are flattered by its images in another"
                )
        return notes


def read_given_split(config: SplitConfig) -> GivenSplit:
    """Read the CSVs that a `SplitConfig` names.

    Raises:
        ConfigError: one is no such table, or contradicts itself.
        StorageError: one cannot be read.
    """
    groups = None if config.groups_csv is None else storage.read_bytes(config.groups_csv)
    folds = None if config.published_csv is None else storage.read_bytes(config.published_csv)
    return GivenSplit(
        None if groups is None else read_groups(groups, config),
        None if folds is None else read_published_split(folds, config),
        tuple(storage.fingerprint(data) for data in (groups, folds) if data is not None),
    )


def write_cohort(uri: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the cohort table, sorted by id."""
    ordered = sorted(rows, key=lambda row: row["id"])
    tables.write_table(uri, pa.Table.from_pylist([dict(row) for row in ordered], schema=SCHEMA))


_Rule = tuple[str, Callable[[CohortRow], bool], str]
_RULES: tuple[_Rule, ...] = (
    ("id", lambda row: ids.objection(row.id) is None, f"1 to {ids.MAX_ID_BYTES} bytes that can name a file"),
    ("height", lambda row: row.height >= 1, "1 px or more"),
    ("width", lambda row: 1 <= row.width <= images.MAX_PIXELS // row.height, f"1 to {images.MAX_PIXELS} px in all"),
    ("num_polygons", lambda row: row.num_polygons >= 0, "0 or more"),
    (
        "target_areas_px",
        lambda row: all(area is not None and area >= 1 for area in row.target_areas_px),
        "1 px or more",
    ),
    ("target_areas_px", lambda row: sum(row.target_areas_px) <= row.height * row.width, "no more than the image has"),
    ("num_targets", lambda row: row.num_targets == len(row.target_areas_px), "as many as target_areas_px has"),
    ("foreground_share", lambda row: 0 <= row.foreground_share <= 1, "0 to 1"),
    ("stratum", lambda row: 0 <= row.stratum < len(STRATUM_EDGES), f"0 to {len(STRATUM_EDGES) - 1}"),
    ("split", lambda row: row.split in (TRAIN, HOLD_OUT), f"{TRAIN} or {HOLD_OUT}"),
    ("fold", lambda row: row.fold is None or row.fold >= 0, "0 or more, or null"),
    (
        "fold",
        lambda row: (row.fold is None) == (row.split == HOLD_OUT),
        f"null where split is {HOLD_OUT}, and only there",
    ),
    ("stain_matrix", lambda row: _all_finite(row.stain_matrix), "finite numbers"),
    ("stain_max_c", lambda row: _all_finite(row.stain_max_c), "finite numbers"),
    ("stain_max_c", lambda row: (row.stain_max_c is None) == (row.stain_matrix is None), "null where stain_matrix is"),
    ("findings", lambda row: None not in row.findings, "texts"),
)
"""(column, what holds of it, the same in words), in an order in which later rules may rely on earlier ones."""


def _all_finite(numbers: Sequence[float | None] | None) -> bool:
    return all(number is not None and math.isfinite(number) for number in numbers or ())


def read_cohort(uri: str) -> list[CohortRow]:
    """Read the cohort table. Relative URIs in it lie below its folder; columns that `CohortRow` lacks are left alone.

    Raises:
        StorageError: the table lacks a column, or a row has a value that no cohort has.
    """
    folder = uri.rsplit("/", 1)[0] if "/" in uri else "."
    try:
        table = tables.read_table(uri, SCHEMA, optional=("brightness", "sharpness", "mpp", "mpp_source"))
    except NotAFile as error:
        raise NotAFile(f"{uri} is a folder; give its table: {storage.join(uri, 'cohort.parquet')}") from error
    except WrongColumns as error:
        raise WrongColumns(f"{error}; a cohort of an earlier version is made again with prepare_data") from error
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        command = f"python workflows/prepare_data.py data.images=... data.annotations=... out={folder}"
        raise StorageError(f"there is no cohort table {uri}; make it first: {command}") from error
    rows: dict[str, CohortRow] = {}
    for number, values in enumerate(table.to_pylist()):
        where = f"{uri}: row {number} ({values['id']!r:.60})"
        for column in ("image_uri", "annotation_uri", "mask_uri"):
            values[column] = storage.resolve(values[column], folder, where=f"{where}, column {column}")
        row = CohortRow(**values)
        for column, holds, expected in _RULES:
            if not holds(row):
                raise StorageError(
                    f"{where}, column {column}: {getattr(row, column)!r:.200}, expected {expected}; make the cohort "
                    "again with prepare_data"
                )
        if row.id in rows:
            raise StorageError(f"{where}: another row has this id; ids must be unique, drop one")
        rows[row.id] = row
    return list(rows.values())


Part = Literal["train", "validation"]


def rows_of(rows: Sequence[CohortRow], fold: int, part: Part) -> list[CohortRow]:
    """Return a fold's training rows (the other folds) or its validation rows; the hold-out is in neither."""
    if part == "validation":
        return [row for row in rows if row.fold == fold]
    return [row for row in rows if row.fold is not None and row.fold != fold]


def folds_of(rows: Sequence[CohortRow]) -> list[int]:
    """Return the fold numbers a cohort has."""
    return sorted({row.fold for row in rows if row.fold is not None})


def typical_px(rows: Iterable[CohortRow]) -> float:
    """Return the area of a typical target, as `review.compare` takes it: the median of the images' means."""
    return review.typical_px(
        round(row.foreground_share * row.height * row.width / row.num_targets) for row in rows if row.num_targets
    )


def stratum_name(stratum: int, edges: Sequence[float]) -> str:
    """Name a foreground-share stratum by its bounds in percent; `edges` are the lower edges of all strata."""
    low, *above = (f"{edge * 100:g}" for edge in edges[stratum : stratum + 2])
    if not above:
        return f"≥{low} %"
    return f"{low}\u2013{above[0]} %" if edges[stratum] > 0 else f"<{above[0]} %"
