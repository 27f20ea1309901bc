"""What score_slides does to slides: settings, items, and the keys that say what files follow from. Loads no torch."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

from pydantic import Field

from stas_core import storage
from stas_core.config import Config, Uri
from stas_core.errors import TRY_AGAIN, StorageError
from stas_core.predict import geojson
from stas_core.scored_runs import GEOJSON, GEOJSON_GZ, MAPS, MASKS
from stas_core.slides.blocks import TileConfig
from stas_core.slides.run import (
    GALLERIES,
    OVERVIEWS,
    SMALL_MAPS,
    SMALL_MASKS,
    SMALL_STDS,
    TARGETS,
    THUMBNAILS,
    SlideRecord,
    SlideRun,
)
from stas_core.slides.thresholds import SlidePostprocessConfig
from stas_core.slides.tissue import TissueConfig
from stas_core.tables import Int32
from workflows.scoring.guarded_reader import LimitsConfig

MOST_SLIDES = 256
REQUESTS_AT_ONCE = 16
T = TypeVar("T")
R = TypeVar("R")


class SlideItem(TypedDict):
    """A slide to score."""

    id: str
    slide_uri: str
    slide_stamp: str
    """Marks its version."""
    stamp: str
    """The same, and that of what was given with it to be predicted."""
    mpp: float | None
    """um per level-0 pixel, where the user gives it."""
    tissue_uri: str | None
    roi_uri: str | None
    tumour_uri: str | None
    tumour_stamp: str
    """Marks the version of the tumour's outline; it changes figures, and no map."""


class BlockItem(TypedDict):
    """A block to predict."""

    id: str
    """`<slide> <row> <col>`."""
    slide: str
    slide_uri: str
    slide_stamp: str
    predict_key: str
    row: Int32
    col: Int32


class SlideSaveConfig(Config):
    """Which files are written for each slide beside its record."""

    maps: bool = True
    """The probability map as a pyramidal TIFF."""
    masks: bool = True
    """The mask as a pyramidal TIFF (0 / 255)."""
    geojson: bool = True
    """Targets as QuPath objects, in level-0 px."""
    geojson_gz: bool = False
    """The same, compressed."""
    targets: bool = True
    """Targets as GeoParquet, for geopandas and QGIS."""
    overviews: bool = True
    """The whole slide on one page: tissue, heat map, targets, densest field; and its layers for report.html."""
    galleries: bool = True
    """The largest, farthest and most disputed targets at native scale."""
    members: bool = True
    """Keep the map of each member: for the range of each figure over them, and the most disputed targets."""
    blocks: bool = True
    """Keep the blocks of a slide that is done: with them, other post-processing later takes no inference."""

    def kinds(self) -> list[str]:
        """Return the kinds of files that are written for every slide."""
        chosen = {
            MAPS: self.maps,
            MASKS: self.masks,
            GEOJSON: self.geojson,
            GEOJSON_GZ: self.geojson_gz,
            TARGETS: self.targets,
            OVERVIEWS: self.overviews,
            GALLERIES: self.galleries,
            THUMBNAILS: self.overviews,
            SMALL_MASKS: self.overviews,
            SMALL_MAPS: self.overviews,
            SMALL_STDS: self.overviews,
        }
        return [kind for kind, wanted in chosen.items() if wanted]


class SlideLimits(LimitsConfig):
    """Limits beyond which a slide is given up; `timeout_s` is that of a block."""

    survey_timeout_s: float = Field(600.0, gt=0)
    """Seconds that a slide may take to be opened, and to be looked at as a whole: a file without small levels is read
    whole."""

    def of_survey(self) -> LimitsConfig:
        """Return the limits of what looks at a whole slide."""
        return LimitsConfig(max_pixels=self.max_pixels, timeout_s=self.survey_timeout_s, retries=self.retries)


class CacheConfig(Config):
    """Where slides of object stores are kept while they are read."""

    folder: Uri | None = None
    """Folder of each node's own disk; null: in its folder for temporary files."""
    max_gb: float = Field(50.0, gt=0)
    """Slides that were not read for longest are deleted beyond this."""


@dataclass(frozen=True)
class SlideTask:
    """What the tasks need to know of a run; `out` is absolute."""

    out: str
    ensemble_key: str
    """Weights, inference settings, device, threads."""
    num_members: int
    frame_mpp: float
    """um per pixel that the models were trained at."""
    tile: TileConfig
    tissue: TissueConfig
    postprocess: SlidePostprocessConfig
    save: SlideSaveConfig
    limits: SlideLimits
    cache: CacheConfig

    @property
    def run(self) -> SlideRun:
        """Where the files go."""
        return SlideRun(self.out)

    def survey_key(self, item: SlideItem) -> str:
        """Return what a slide's survey follows from."""
        return storage.fingerprint(item["stamp"], str(item["mpp"]), str(self.frame_mpp), self.tissue.model_dump_json())

    def predict_key(self, item: SlideItem) -> str:
        """Return what a slide's maps follow from."""
        with_members = self.save.members and self.num_members > 1
        tile = self.tile.model_dump_json(exclude={"measure"})
        return storage.fingerprint(self.survey_key(item), self.ensemble_key, tile, str(with_members))

    def finish_key(self, item: SlideItem) -> str:
        """Return what a slide's other files follow from."""
        cascade = self.postprocess.model_dump_json()
        return storage.fingerprint(self.predict_key(item), cascade, item["tumour_stamp"], geojson.FORMAT)

    @property
    def seams_key(self) -> str:
        """Return what the seam table follows from; on which slide it is measured is no part of it."""
        return storage.fingerprint(
            self.ensemble_key, self.tile.model_dump_json(), self.postprocess.step.model_dump_json()
        )

    def blocks(self, item: SlideItem) -> str:
        """Return the folder of a slide's blocks."""
        return self.run.blocks(item["id"], self.predict_key(item))


def at_once(do: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return what requests to a store give for each item, in their order."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(do, items))


def windows(items: Sequence[SlideItem], cache_bytes: int) -> Iterator[list[SlideItem]]:
    """Yield slides that are surveyed, and then predicted, together.

    The first block is then predicted soon, however many slides there are; and slides of an object store are still in
    the cache when their blocks are read.
    """
    remote = [item["slide_uri"] for item in items if not storage.is_local(item["slide_uri"])]
    num_bytes = dict(zip(remote, at_once(_size_or_0, remote), strict=True))
    window: list[SlideItem] = []
    held = 0
    for item in items:
        size = num_bytes.get(item["slide_uri"], 0)
        if window and (len(window) >= MOST_SLIDES or held + size > cache_bytes // 2):
            yield window
            window, held = [], 0
        window.append(item)
        held += size
    if window:
        yield window


def _size_or_0(uri: str) -> int:
    try:
        return storage.size(uri)
    except StorageError:  # its survey will tell
        return 0


def must_score(
    task: SlideTask, item: SlideItem, record: SlideRecord | None, there: Mapping[str, Collection[str]]
) -> bool:
    """Tell whether a slide must be scored: no record holds for this input, these models and settings.

    Args:
        task: the run.
        item: the slide.
        record: what is known of it.
        there: the ids of the slides that have a file, by kind.
    """
    if record is None or (record.stamp, record.predict_key) != (item["stamp"], task.predict_key(item)):
        return True
    if record.found is None:
        return record.reason in TRY_AGAIN or record.limits_key != task.limits.key
    if record.finish_key != task.finish_key(item) or not set(task.save.kinds()) <= set(record.files):
        return True
    return not all(item["id"] in there[kind] for kind in kinds_of(task.save.kinds(), record.found))


def kinds_of(kinds: Sequence[str], found: Mapping[str, Any]) -> list[str]:
    """Return those kinds of files that there are of a slide, given its row of `slides.parquet`."""
    without = {GALLERIES} if not found["num_targets"] else set()
    without |= {SMALL_STDS} if not found["num_members"] else set()
    return [kind for kind in kinds if kind not in without]
