"""What the output folder of score_slides is: where it keeps its files, and what its records say."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stas_core import storage
from stas_core.data import images
from stas_core.errors import InputError, StorageError
from stas_core.scored_runs import GEOJSON, GEOJSON_GZ, MAPS, MASKS, RECORDS, ItemRecord, ScoredFolder
from stas_core.slides.survey import Survey, TissueShades, digest_of
from stas_core.slides.truth_sources import OutlineSource

TARGETS, OVERVIEWS, GALLERIES, TISSUE, SURVEYS = "targets", "overviews", "galleries", "tissue", "surveys"
THUMBNAILS, SMALL_MASKS, SMALL_MAPS, SMALL_STDS = "thumbnails", "small masks", "small maps", "small disagreement"
"""What a page shows of a slide as layers, of one size."""
REGIONS = "regions"
"""Copies of the regions of interest: what is scored, and evaluated, stays what it was."""
BLOCKS = "blocks"
FAILED = "failed.json"
"""In the folder of a slide's blocks: why one of them could not be predicted; the others need not be."""


@dataclass(frozen=True, kw_only=True)
class SlideRecord(ItemRecord):
    """The record of a slide."""

    URI: ClassVar = "slide_uri"
    slide_uri: str
    found: Mapping[str, Any] | None = None
    """Its row of `slides.parquet`; None: it could not be scored."""
    files: Sequence[str] = ()
    """Kinds of files that were made of it; a gallery counts as made where there was no target to show, and the layer of
    disagreement where no member's map was kept."""

    def outcome(self) -> dict[str, Any]:
        """Return the result, as JSON values of the record."""
        return {"found": dict(self.found or {}), "files": list(self.files)}

    @classmethod
    def read_outcome(cls, values: Mapping[str, Any], uri: str) -> dict[str, Any]:
        """Return the result's fields, from a record's JSON values."""
        outcome = storage.read_record(uri, "found", "files")
        return {"found": outcome["found"], "files": outcome["files"]}


@dataclass(frozen=True)
class SlideRun(ScoredFolder[SlideRecord]):
    """The output folder of score_slides."""

    STAGE: ClassVar = "score_slides"
    ITEMS: ClassVar = "slides"
    TABLE: ClassVar = "slides.parquet"
    SEAMS: ClassVar = "seams.json"
    REPORT: ClassVar = "report.md"
    KINDS: ClassVar = {
        MAPS: ("maps", ".tif"),
        MASKS: ("masks", ".tif"),
        GEOJSON: ("geojson", ".geojson"),
        GEOJSON_GZ: ("geojson", ".geojson.gz"),
        TARGETS: ("targets", ".parquet"),
        OVERVIEWS: ("overviews", ".png"),
        GALLERIES: ("galleries", ".png"),
        THUMBNAILS: ("thumbnails", ".jpg"),
        SMALL_MASKS: ("thumbnails", ".mask.png"),
        SMALL_MAPS: ("thumbnails", ".map.png"),
        SMALL_STDS: ("thumbnails", ".disagreement.png"),
        TISSUE: ("tissue", ".png"),
        SURVEYS: ("surveys", ".json"),
        REGIONS: ("regions", ".geojson"),
        RECORDS: ("records", ".json"),
    }
    """All kinds of files; of one of them there is one for each slide, called by its id."""
    RESULTS: ClassVar = (TABLE, ScoredFolder.FAILURES, ScoredFolder.TIMINGS, REPORT)
    """What is written of all slides together, after the last of them."""
    PATTERNS: ClassVar = (
        *RESULTS,
        SEAMS,
        f"{BLOCKS}/{{id}}/*/*.tif",
        f"{BLOCKS}/{{id}}/*/{FAILED}",
        *(f"{folder}/{{id}}{suffix}" for folder, suffix in KINDS.values()),
    )
    """All its files; `{id}` stands for a slide's id."""

    read_record = staticmethod(SlideRecord.read)

    def blocks(self, slide_id: str, predict_key: str) -> str:
        """Return the folder of the blocks of a slide; other models or tiles have another one."""
        return storage.join(self.uri, BLOCKS, slide_id, predict_key[:16])

    def block_folders(self, slide_id: str) -> list[str]:
        """Return the folders of all blocks of a slide, under whatever key."""
        uri = storage.join(self.uri, BLOCKS, slide_id)
        names = storage.entries(uri) if storage.exists(uri) else []
        return [storage.join(uri, name) for name in names if re.fullmatch(r"[0-9a-f]{16}", name)]

    def write_survey(
        self, slide_id: str, key: str, *, survey: Survey, tissue: TissueShades, roi: bytes | None = None
    ) -> None:
        """Write what a survey found, and the GeoJSON of the region of interest; the survey goes last."""
        storage.write_bytes(self.file(TISSUE, slide_id), images.encode_map(tissue))
        if roi is None:
            storage.remove(self.file(REGIONS, slide_id))
        else:
            storage.write_bytes(self.file(REGIONS, slide_id), roi)
        storage.write_json(self.file(SURVEYS, slide_id), {"key": key, "survey": survey.to_json()})

    def survey_by(self, slide_id: str, key: str) -> tuple[Survey, TissueShades] | None:
        """Return what the survey of a slide found, and its tissue; None: there is none that is whole, by this key."""
        try:
            kept, survey, tissue = self._survey(slide_id)
            self.region(slide_id, survey)
        except (StorageError, InputError):
            return None
        return (survey, tissue) if kept == key else None

    def survey(self, slide_id: str) -> tuple[Survey, TissueShades]:
        """Return what the survey of a slide found, and its tissue.

        Raises:
            StorageError: it is not there, or damaged.
        """
        return self._survey(slide_id)[1:]

    def _survey(self, slide_id: str) -> tuple[str, Survey, TissueShades]:
        """Return what a survey follows from, too."""
        uri, tissue_uri = self.file(SURVEYS, slide_id), self.file(TISSUE, slide_id)
        values = storage.read_record(uri, "key", "survey")
        survey = Survey.from_json(values["survey"], uri)
        tissue = images.decode_map(storage.read_bytes(tissue_uri), tissue_uri)
        if digest_of(tissue) != survey.tissue_digest:
            raise StorageError(
                f"{tissue_uri} is not what {uri} was made with; delete both to survey the slide again, and give tissue "
                "that you drew as given.tissue"
            )
        return str(values["key"]), survey, tissue

    def region(self, slide_id: str, survey: Survey) -> OutlineSource | None:
        """Return the region of interest of a slide in the frame of its maps; None: it is scored as a whole.

        Raises:
            StorageError: it is not there, or not what the slide was surveyed with.
        """
        if survey.roi_digest is None:
            return None
        uri = self.file(REGIONS, slide_id)
        data = storage.read_bytes(uri)
        if storage.fingerprint(data) != survey.roi_digest:
            raise StorageError(f"{uri} is not what {self.file(SURVEYS, slide_id)} was made with; score the slide again")
        size = survey.frame_height, survey.frame_width
        return OutlineSource.of(data, uri, size=size, level0_px=survey.level0_px, corner=survey.corner)
