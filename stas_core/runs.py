"""What a run folder is: where a training run keeps what, and how the next stage opens it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from stas_core import config as configs
from stas_core import storage, tables
from stas_core.data import cohort as cohorts
from stas_core.data.cohort import CohortRow
from stas_core.errors import ConfigError
from stas_core.failures import Failure
from stas_core.tables import Int32


@dataclass(frozen=True)
class OofMap:
    """An out-of-fold map and where its truth is found."""

    uri: str
    fold: int
    row: CohortRow


def find_maps(run_uri: str, cohort_uri: str | None) -> list[OofMap]:
    """Return the out-of-fold maps of a training run with the rows of its cohort, sorted by fold and id.

    Raises:
        ConfigError: the run has fewer than two folds with maps, or images that the cohort does not know.
    """
    if cohort_uri is None:
        resolved = storage.join(run_uri, "config.resolved.yaml")
        if not storage.exists(resolved):
            raise ConfigError(f"run = {run_uri}: no config.resolved.yaml there; give the out= of a train_folds run")
        cohort_uri = _trained_on(resolved)
    rows = {row.id: row for row in cohorts.read_cohort(cohort_uri)}
    found = []
    for fold in cohorts.folds_of(list(rows.values())):
        folder = storage.join(run_uri, f"fold_{fold}")
        if not storage.exists(storage.join(folder, "fold.json")):
            continue
        index = storage.join(folder, "oof.parquet")
        listed: set[str] = set()
        for number, oof in enumerate(tables.read_table(index, OOF_SCHEMA).to_pylist()):
            where = f"{index}: row {number} ({oof['id']!r:.60})"
            if oof["id"] not in rows:
                raise ConfigError(f"{where}: {cohort_uri} does not know this image; set cohort=")
            if oof["id"] in listed:
                raise ConfigError(f"{where}: an earlier row has this image; train the fold again")
            listed.add(oof["id"])
            uri = storage.resolve(oof["map_uri"], folder, where=f"{where}, column map_uri")
            found.append(OofMap(uri, fold, rows[oof["id"]]))
    if len({oof.fold for oof in found}) < 2:
        raise ConfigError(
            f"run = {run_uri}: {len({oof.fold for oof in found})} finished fold(s); a setting is chosen on some folds "
            "and judged on another, so train at least two"
        )
    return sorted(found, key=lambda oof: (oof.fold, oof.row.id))


def _trained_on(resolved: str) -> str:
    """Return the cohort that the config of a training run names."""
    values = configs.parse_yaml(storage.read_bytes(resolved).decode(), resolved)
    data = values.get("data") if isinstance(values, dict) else None
    cohort_uri = data.get("cohort") if isinstance(data, dict) else None
    if not isinstance(cohort_uri, str):
        raise ConfigError(f"{resolved} names no data.cohort; give the out= of a train_folds run, or set cohort=")
    return cohort_uri


OOF_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("fold", pa.int32(), nullable=False),
        pa.field("map_uri", pa.string(), nullable=False),
        pa.field("dice", pa.float64(), nullable=False),
        pa.field("precision", pa.float64(), nullable=False),
        pa.field("recall", pa.float64(), nullable=False),
        pa.field("tp", pa.int64(), nullable=False),
        pa.field("fp", pa.int64(), nullable=False),
        pa.field("fn", pa.int64(), nullable=False),
    ]
)
"""One row per out-of-fold image: where its 8-bit map is (relative to the table's folder) and how it scores at 0.5."""


def write_oof_index(uri: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the index of out-of-fold maps, sorted by id."""
    ordered = sorted((dict(row) for row in rows), key=lambda row: row["id"])
    tables.write_table(uri, pa.Table.from_pylist(ordered, schema=OOF_SCHEMA))


MASKS, MAPS, STDS, OVERLAYS, GEOJSON, RECORDS = "masks", "maps", "disagreement", "overlays", "geojson", "records"
SUFFIX = {MASKS: ".png", MAPS: ".png", STDS: ".png", OVERLAYS: ".jpg", GEOJSON: ".geojson", RECORDS: ".json"}
"""Of the files of each folder of a scored run; there is one for each image, called by its id."""


@dataclass(frozen=True)
class ScoredImage:
    """A row of `images.parquet`: what was found in an image."""

    id: str
    image_uri: str
    height: Int32
    """In px, like `width`."""
    width: Int32
    foreground_share: float
    """Share of the image's pixels that its mask covers, 0 to 1."""
    num_targets: Int32
    stage: Int32
    """Of the threshold cascade, from 1; 0: emptied, as the selection was too large."""
    mean_disagreement: float
    """Standard deviation of the members' probabilities, mean over pixels."""
    num_passes: Int32
    """Forward passes through each member."""


@dataclass(frozen=True)
class ScoredTarget:
    """A row of `targets.parquet`: one target of an image's mask, at its native size."""

    id: str
    """Of the image."""
    target: Int32
    """Its number within the image, from 1."""
    area_px: int
    centroid_x: float
    """In px, like all that follows but the probabilities."""
    centroid_y: float
    x0: Int32
    y0: Int32
    x1: Int32
    """The first column outside."""
    y1: Int32
    """The first row outside."""
    mean_prob: float
    peak_prob: float
    touches_border: bool


_LISTED = pa.schema([field for field in tables.schema_of(ScoredImage) if field.name in ("id", "image_uri")])


@dataclass(frozen=True)
class ScoredRun:
    """The output folder of score_images."""

    uri: str

    IMAGES: ClassVar = "images.parquet"
    TARGETS: ClassVar = "targets.parquet"
    FAILURES: ClassVar = "failures.parquet"
    TIMINGS: ClassVar = "timings.parquet"
    SEGMENTATION: ClassVar = "segmentation.zip"
    DETECTION: ClassVar = "detection.json"
    CONTACT_SHEET: ClassVar = "contact_sheet.png"
    RESULTS: ClassVar = (IMAGES, TARGETS, FAILURES, TIMINGS, SEGMENTATION, DETECTION, CONTACT_SHEET)
    """What is written of all images together, after the last of them."""
    PATTERNS: ClassVar = (*RESULTS, *(f"{folder}/{{id}}{suffix}" for folder, suffix in SUFFIX.items()))
    """All its files; `{id}` stands for an image's id."""

    @classmethod
    def open(cls, key: str, uri: str) -> "ScoredRun":
        """Return the finished run in a folder; `key` is the setting that names it.

        Raises:
            ConfigError: it holds none.
        """
        run = cls(uri)
        if not storage.exists(run.path(cls.IMAGES)):
            raise ConfigError(
                f"{key} = {uri} holds no {cls.IMAGES}; give the output folder of score_images, whose run has ended"
            )
        return run

    def path(self, name: str) -> str:
        """Return where a file or folder of the run is."""
        return storage.join(self.uri, name)

    def file(self, folder: str, image_id: str) -> str:
        """Return where an image's file of a folder is."""
        return storage.join(self.uri, folder, image_id + SUFFIX[folder])

    def files(self, folder: str) -> dict[str, str]:
        """Return the files of a folder, by the id of their image."""
        uri = self.path(folder)
        found = storage.list_files(uri, (SUFFIX[folder],)) if storage.exists(uri) else []
        return {storage.stem_of(file): file for file in found}

    def image_uris(self) -> dict[str, str]:
        """Return where each image lies that was scored, by id."""
        rows = tables.read_table(self.path(self.IMAGES), _LISTED).to_pylist()
        return {row["id"]: row["image_uri"] for row in rows}

    def failures(self) -> list[Failure]:
        """Return the images that could not be scored."""
        uri = self.path(self.FAILURES)
        return tables.read_rows(uri, Failure) if storage.exists(uri) else []
