"""What the output folder of score_slides is: where it keeps its files, and what its records say."""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

from stas_core import storage, tables
from stas_core.data import images
from stas_core.errors import ConfigError, InputError, StorageError
from stas_core.failures import Failure
from stas_core.runs import RunFolder
from stas_core.slides.survey import Survey, TissueShades, digest_of

MAPS, MASKS, GEOJSON, GEOJSON_GZ, TARGETS = "maps", "masks", "geojson", "geojson_gz", "targets"
OVERVIEWS, GALLERIES, TISSUE, SURVEYS, RECORDS = "overviews", "galleries", "tissue", "surveys", "records"
FOLDERS: Mapping[str, tuple[str, str]] = {
    MAPS: ("maps", ".tif"),
    MASKS: ("masks", ".tif"),
    GEOJSON: ("geojson", ".geojson"),
    GEOJSON_GZ: ("geojson", ".geojson.gz"),
    TARGETS: ("targets", ".parquet"),
    OVERVIEWS: ("overviews", ".png"),
    GALLERIES: ("galleries", ".png"),
    TISSUE: ("tissue", ".png"),
    SURVEYS: ("surveys", ".json"),
    RECORDS: ("records", ".json"),
}
"""Folder and suffix of each kind of file; there is one for each slide, called by its id."""
BLOCKS = "blocks"
FAILED = "failed.json"
"""In the folder of a slide's blocks: why one of them could not be predicted; the others need not be."""
_READ_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class SlideRecord:
    """What `records/<id>.json` says of a slide that is done: what its files follow from, and what was found."""

    id: str
    slide_uri: str
    stamp: str
    """Marks the version of the slide, and of what was given with it."""
    found: Mapping[str, Any] | None = None
    """Its row of `slides.parquet`; None: it could not be scored."""
    files: Sequence[str] = ()
    """Kinds of files that were made of it; a gallery counts as made where there was no target to show."""
    reason: str | None = None
    """Why it could not be scored: one of `errors.py`."""
    message: str = ""
    predict_key: str
    """What its maps follow from."""
    finish_key: str
    """What its other files follow from."""
    limits_key: str
    """Under which limits it failed."""
    seconds: Mapping[str, float | None] = field(default_factory=dict)
    """Of each step of finishing."""

    def to_json(self) -> dict[str, Any]:
        """Return it as it is written."""
        outcome: dict[str, Any] = {"reason": self.reason, "message": self.message}
        if self.found is not None:
            outcome = {"found": dict(self.found), "files": list(self.files)}
        keys = {"predict_key": self.predict_key, "finish_key": self.finish_key, "limits_key": self.limits_key}
        own = {"id": self.id, "slide_uri": self.slide_uri, "stamp": self.stamp}
        return own | outcome | keys | {"seconds": dict(self.seconds)}

    @classmethod
    def read(cls, uri: str) -> "SlideRecord":
        """Read a record.

        Raises:
            StorageError: it is none.
        """
        own = ("id", "slide_uri", "stamp", "predict_key", "finish_key", "limits_key", "seconds")
        values = storage.read_record(uri, *own)
        shared = {name: values[name] for name in own}
        if "reason" in values:
            return cls(**shared, reason=values["reason"], message=values.get("message", ""))
        outcome = storage.read_record(uri, "found", "files")
        return cls(**shared, found=outcome["found"], files=outcome["files"])


@dataclass(frozen=True)
class SlideRun(RunFolder):
    """The output folder of score_slides."""

    SLIDES: ClassVar = "slides.parquet"
    FAILURES: ClassVar = "failures.parquet"
    TIMINGS: ClassVar = "timings.parquet"
    SEAMS: ClassVar = "seams.json"
    REPORT: ClassVar = "report.md"
    RESULTS: ClassVar = (SLIDES, FAILURES, TIMINGS, REPORT)
    """What is written of all slides together, after the last of them."""
    PATTERNS: ClassVar = (
        *RESULTS,
        SEAMS,
        f"{BLOCKS}/{{id}}/*/*.tif",
        f"{BLOCKS}/{{id}}/*/{FAILED}",
        *(f"{folder}/{{id}}{suffix}" for folder, suffix in FOLDERS.values()),
    )
    """All its files; `{id}` stands for a slide's id."""

    @classmethod
    def open(cls, key: str, uri: str) -> "SlideRun":
        """Return the finished run in a folder; `key` is the setting that names it.

        Raises:
            ConfigError: it holds none.
        """
        run = cls(uri)
        if not storage.exists(run.path(cls.SLIDES)):
            raise ConfigError(
                f"{key} = {uri} holds no {cls.SLIDES}; give the output folder of score_slides, whose run has ended"
            )
        return run

    def file(self, kind: str, slide_id: str) -> str:
        """Return where a slide's file of a kind is."""
        folder, suffix = FOLDERS[kind]
        return storage.join(self.uri, folder, slide_id + suffix)

    def files(self, kind: str) -> set[str]:
        """Return the ids of the slides that have a file of a kind."""
        folder, suffix = FOLDERS[kind]
        uri = self.path(folder)
        found = storage.list_files(uri, (suffix,)) if storage.exists(uri) else []
        return {storage.name_of(file)[: -len(suffix)] for file in found}

    def blocks(self, slide_id: str, predict_key: str) -> str:
        """Return the folder of the blocks of a slide; other models or tiles have another one."""
        return storage.join(self.uri, BLOCKS, slide_id, predict_key[:16])

    def block_folders(self, slide_id: str) -> list[str]:
        """Return the folders of all blocks of a slide, under whatever key."""
        uri = storage.join(self.uri, BLOCKS, slide_id)
        names = storage.entries(uri) if storage.exists(uri) else []
        return [storage.join(uri, name) for name in names if re.fullmatch(r"[0-9a-f]{16}", name)]

    def write_survey(self, slide_id: str, key: str, survey: Survey, tissue: TissueShades) -> None:
        """Write what a survey found; the tissue goes first."""
        storage.write_bytes(self.file(TISSUE, slide_id), images.encode_map(tissue))
        storage.write_json(self.file(SURVEYS, slide_id), {"key": key, "survey": survey.to_json()})

    def survey_key(self, slide_id: str) -> str | None:
        """Return what the survey of a slide follows from; None: there is none that is whole."""
        try:
            self.survey(slide_id)
        except (StorageError, InputError):
            return None
        return str(storage.read_record(self.file(SURVEYS, slide_id), "key")["key"])

    def survey(self, slide_id: str) -> tuple[Survey, TissueShades]:
        """Return what the survey of a slide found, and its tissue.

        Raises:
            StorageError: it is not there, or damaged.
        """
        uri, tissue_uri = self.file(SURVEYS, slide_id), self.file(TISSUE, slide_id)
        survey = Survey.from_json(storage.read_record(uri, "key", "survey")["survey"], uri)
        tissue = images.decode_map(storage.read_bytes(tissue_uri), tissue_uri)
        if digest_of(tissue) != survey.tissue_digest:
            raise StorageError(
                f"{tissue_uri} is not what {uri} was made with; delete both to survey the slide again, and give tissue "
                "that you drew as given.tissue"
            )
        return survey, tissue

    def record(self, slide_id: str) -> SlideRecord | None:
        """Return the record of a slide, if there is one."""
        uri = self.file(RECORDS, slide_id)
        return SlideRecord.read(uri) if storage.exists(uri) else None

    def write_record(self, record: SlideRecord) -> None:
        """Write the record of a slide, after all its files: it vouches for them."""
        storage.write_json(self.file(RECORDS, record.id), record.to_json())

    def records(self) -> list[SlideRecord]:
        """Return the record of every slide that is done, sorted by id.

        Raises:
            StorageError: a file among them is no record.
        """
        uris = [self.file(RECORDS, slide_id) for slide_id in sorted(self.files(RECORDS))]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            return list(pool.map(SlideRecord.read, uris))

    def failures(self) -> list[Failure]:
        """Return the slides that could not be scored."""
        uri = self.path(self.FAILURES)
        return tables.read_rows(uri, Failure) if storage.exists(uri) else []
