"""What folders of scored images and slides are: files called by ids, and records that say what they follow from."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Generic, TypeVar

import pyarrow as pa

from stas_core import storage, tables
from stas_core.data.appearance import Look
from stas_core.errors import ConfigError, OccupiedOutputError, StorageError
from stas_core.failures import Failure
from stas_core.runs import RunFolder
from stas_core.tables import Int32

MASKS, MAPS, STDS, OVERLAYS, GEOJSON, RECORDS = "masks", "maps", "disagreement", "overlays", "geojson", "records"
GEOJSON_GZ = "geojson_gz"
"""Kinds of files, which are called by their folder unless that has several."""
_KEYS = ("predict_key", "finish_key", "limits_key")
_READ_THREADS = 16

R = TypeVar("R", bound="ItemRecord")
F = TypeVar("F", bound="ScoredFolder[Any]")


@dataclass(frozen=True, kw_only=True)
class ItemRecord:
    """What `records/<id>.json` says of an image or slide that is done: what its files follow from, what was found."""

    URI: ClassVar[str]
    """Name of the field that holds its path."""
    id: str
    stamp: str
    """Marks its version, and that of what was given with it."""
    reason: str | None = None
    """Why it could not be scored: one of `errors.py`."""
    message: str = ""
    predict_key: str
    """What its map follows from, beside its version; empty: the record is taken back, and says nothing any more."""
    finish_key: str
    """What its other files follow from; empty while they are written anew."""
    limits_key: str
    """Under which limits it failed."""
    seconds: Mapping[str, float | None] = field(default_factory=dict)
    """Of each step; None: its process died over it."""

    @abstractmethod
    def outcome(self) -> dict[str, Any]:
        """Return the result, as JSON values of the record."""

    @classmethod
    @abstractmethod
    def read_outcome(cls, values: Mapping[str, Any], uri: str) -> dict[str, Any]:
        """Return the result's fields, from a record's JSON values.

        Raises:
            StorageError: it says neither that nor a reason.
        """

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        failure = {"reason": self.reason, "message": self.message}
        return {
            **{name: getattr(self, name) for name in ("id", self.URI, "stamp")},
            **(self.outcome() if self.reason is None else failure),
            **{name: getattr(self, name) for name in _KEYS},
            "seconds": dict(self.seconds),
        }

    def taken_back(self: R) -> R:
        """Return what hides the record, and older ones, while the files that it vouched for are overwritten."""
        return replace(self, predict_key="", finish_key="")

    @classmethod
    def read(cls: type[R], uri: str) -> R:
        """Read a record.

        Raises:
            StorageError: the file is no record.
        """
        return cls.from_json(storage.read_record(uri, *cls._required()), uri)

    @classmethod
    def _required(cls) -> tuple[str, ...]:
        return ("id", cls.URI, "stamp", *_KEYS, "seconds")

    @classmethod
    def from_json(cls: type[R], values: Mapping[str, Any], uri: str) -> R:
        """Return the record that `to_json` gave these values; `uri` is where they are from, for messages.

        Raises:
            StorageError: they say neither what was found nor why nothing was.
        """
        if "reason" in values:
            outcome = {"reason": values["reason"], "message": values.get("message", "")}
        else:
            outcome = cls.read_outcome(values, uri)
        return cls(**{name: values[name] for name in cls._required()}, **outcome)


@dataclass(frozen=True)
class ScoredFolder(RunFolder, Generic[R]):
    """The output folder of a stage that scores: a file of each kind for each image or slide, its record the last."""

    STAGE: ClassVar[str]
    ITEMS: ClassVar[str]
    """What is scored."""
    TABLE: ClassVar[str]
    """What was found, a row each; it is there once a run has ended."""
    FAILURES: ClassVar = "failures.parquet"
    TIMINGS: ClassVar = "timings.parquet"
    KINDS: ClassVar[Mapping[str, tuple[str, str]]]
    """Folder and suffix of the files of each kind."""

    @classmethod
    def open(cls: type[F], key: str, uri: str) -> F:
        """Return the finished run in a folder; `key` is the setting that names it.

        Raises:
            ConfigError: it holds none.
        """
        run = cls(uri)
        if not storage.exists(run.path(cls.TABLE)):
            raise ConfigError(
                f"{key} = {uri} holds no {cls.TABLE}; give the output folder of {cls.STAGE}, whose run has ended"
            )
        return run

    @staticmethod
    @abstractmethod
    def read_record(uri: str) -> R:
        """Read a record.

        Raises:
            StorageError: the file is no record.
        """

    def file(self, kind: str, item_id: str) -> str:
        """Return the path of the file of a kind, of an image or slide."""
        folder, suffix = self.KINDS[kind]
        return storage.join(self.uri, folder, item_id + suffix)

    def files(self, kind: str) -> dict[str, str]:
        """Return the files of a kind, by id."""
        _, suffix = self.KINDS[kind]
        return {storage.name_of(file)[: -len(suffix)]: file for file in self._listed(kind)}

    def ids_of(self, kind: str) -> Iterator[str]:
        """Yield the ids of which there is a file of a kind."""
        _, suffix = self.KINDS[kind]
        return (storage.name_of(file)[: -len(suffix)] for file in self._listed(kind))

    def _listed(self, kind: str) -> list[str]:
        folder, suffix = self.KINDS[kind]
        uri = self.path(folder)
        return storage.list_files(uri, (suffix,)) if storage.exists(uri) else []

    def record(self, item_id: str) -> R | None:
        """Return the record of an image or slide, if there is one."""
        uri = self.file(RECORDS, item_id)
        return self.read_record(uri) if storage.exists(uri) else None

    def write_record(self, record: R) -> None:
        """Write a record, after all files of its image or slide: it vouches for them."""
        storage.write_json(self.file(RECORDS, record.id), record.to_json())

    def records(self) -> list[R]:
        """Return the record of each that is done, sorted by id.

        Raises:
            StorageError: a file among them is no record.
        """
        uris = [uri for _, uri in sorted(self.files(RECORDS).items())]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            return list(pool.map(self.read_record, uris))

    def records_of(self, ids: Collection[str], holds: Callable[[R], bool]) -> list[R]:
        """Return the record of each id, sorted; `holds` tells whether one is of this run.

        Raises:
            ConfigError: an id has none.
            OccupiedOutputError: a record is not this run's: what it says, and its files, follow from other settings.
        """
        found = [record for record in self.records() if record.id in ids]
        if lost := set(ids) - {record.id for record in found}:
            raise ConfigError(
                f"{len(lost)} {self.ITEMS} have no record in {self.path(RECORDS)}, e.g. {min(lost)}; run again"
            )
        if strange := [record.id for record in found if not holds(record)]:
            raise OccupiedOutputError(
                f"{len(strange)} of {len(found)} records in {self.path(RECORDS)} are of other settings or "
                f"{self.ITEMS}, e.g. {strange[0]}: another run has worked there in the meantime; run again when none "
                "does"
            )
        return found

    def failures(self) -> list[Failure]:
        """Return what could not be scored."""
        uri = self.path(self.FAILURES)
        return tables.read_rows(uri, Failure) if storage.exists(uri) else []


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
    """Step of the threshold cascade, from 1; 0: emptied, as the selection was too large."""
    mean_disagreement: float
    """Standard deviation of the members' probabilities, mean over pixels."""
    num_passes: Int32
    """Forward passes through each member."""
    look: Look | None = None
    """How it looks; null where an earlier version scored it."""
    drift: float | None = None
    """How far its look lies from the middle of the training cohort's range, in half ranges: above 1 it is outside; of
    the figure `drift_of`. Null where the ensemble does not say what it was trained on."""
    drift_of: str | None = None


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
    """The first column inside."""
    y0: Int32
    """The first row inside."""
    x1: Int32
    """The first column outside."""
    y1: Int32
    """The first row outside."""
    mean_prob: float
    peak_prob: float
    touches_border: bool


@dataclass(frozen=True, kw_only=True)
class ImageRecord(ItemRecord):
    """The record of an image."""

    URI: ClassVar = "image_uri"
    image_uri: str
    found: ScoredImage | None = None
    """None: it could not be scored."""
    targets: Sequence[ScoredTarget] = ()
    folders: Sequence[str] = ()
    """Kinds of files that it has."""

    def outcome(self) -> dict[str, Any]:
        """Return the result, as JSON values of the record."""
        found = {} if self.found is None else asdict(self.found)
        row = {name: value for name, value in found.items() if name not in ("id", "image_uri", "drift", "drift_of")}
        if row.get("look") is None:
            row.pop("look", None)
        return row | {"targets": [asdict(target) for target in self.targets], "folders": list(self.folders)}

    @classmethod
    def read_outcome(cls, values: Mapping[str, Any], uri: str) -> dict[str, Any]:
        """Return the result's fields, from a record's JSON values."""
        try:
            known = {one.name: values[one.name] for one in fields(ScoredImage) if one.default is MISSING}
            look = values.get("look")
            found = ScoredImage(**known, look=None if look is None else Look(**look))
            targets = [ScoredTarget(**target) for target in values["targets"]]
        except (KeyError, TypeError) as error:
            raise StorageError(
                f"{uri} says neither what was found nor why nothing was ({error}); restore it, or start over by --force"
            ) from error
        return {"found": found, "targets": targets, "folders": values.get("folders", ())}


_LISTED = pa.schema([tables.schema_of(ScoredImage).field(name) for name in ("id", "image_uri")])


@dataclass(frozen=True)
class ScoredRun(ScoredFolder[ImageRecord]):
    """The output folder of score_images."""

    STAGE: ClassVar = "score_images"
    ITEMS: ClassVar = "images"
    TABLE: ClassVar = "images.parquet"
    TARGETS: ClassVar = "targets.parquet"
    SEGMENTATION: ClassVar = "segmentation.zip"
    DETECTION: ClassVar = "detection.json"
    CONTACT_SHEET: ClassVar = "contact_sheet.png"
    REVIEW: ClassVar = "review.parquet"
    KINDS: ClassVar = {
        MASKS: ("masks", ".png"),
        MAPS: ("maps", ".png"),
        STDS: ("disagreement", ".png"),
        OVERLAYS: ("overlays", ".jpg"),
        GEOJSON: ("geojson", ".geojson"),
        GEOJSON_GZ: ("geojson", ".geojson.gz"),
        RECORDS: ("records", ".json"),
    }
    """All kinds of files; of one of them there is one for each image, called by its id."""
    RESULTS: ClassVar = (
        TABLE,
        TARGETS,
        ScoredFolder.FAILURES,
        ScoredFolder.TIMINGS,
        SEGMENTATION,
        DETECTION,
        CONTACT_SHEET,
        REVIEW,
    )
    """What is written of all images together, after the last of them."""
    PATTERNS: ClassVar = (
        *RESULTS,
        *(f"{folder}/{{id}}{suffix}" for folder, suffix in KINDS.values()),
        "records/part-*.parquet",
    )
    """All its files; `{id}` stands for an image's id."""

    read_record = staticmethod(ImageRecord.read)

    def image_uris(self) -> dict[str, str]:
        """Return the path of each image that was scored, by id."""
        rows = tables.read_table(self.path(self.TABLE), _LISTED).to_pylist()
        return {row["id"]: row["image_uri"] for row in rows}
