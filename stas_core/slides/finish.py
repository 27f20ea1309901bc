"""From the maps of a slide to everything that is written of it: targets, figures, files.

Memory is a few rows of tiles beside the tables of targets, whatever the slide's size. A thread makes heat map and
map beside the post-processing, and encodes the mask beside the outlines; no byte depends on which is first.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely
from shapely.geometry import MultiPolygon, Polygon

from stas_core import tables
from stas_core.arrays import ResizedMask, RgbImage
from stas_core.errors import MissingShapes, WrongCoordinates
from stas_core.predict.geojson import GeoJsonWriter
from stas_core.predict.geoparquet import GeoParquetWriter
from stas_core.predict.placement import Placement, TargetFacts
from stas_core.predict.polygons import TargetShapes
from stas_core.predict.postprocess import PostprocessConfig
from stas_core.scored_runs import GEOJSON, GEOJSON_GZ, MAPS, MASKS
from stas_core.slides import quality, scores
from stas_core.slides.blocks import PROB, STD, PlaneMap, SlideMaps, member_plane
from stas_core.slides.gallery import Chosen, FramePixels, choose_targets
from stas_core.slides.layers import LAYER_PX, SmallMask, small_size
from stas_core.slides.outlines import polygons_of
from stas_core.slides.polygons import Tracer
from stas_core.slides.pyramid import MASK, write_pyramid
from stas_core.slides.run import OVERVIEWS, SMALL_MASKS, SMALL_STDS, TARGETS
from stas_core.slides.scores import PlacedTargets, SlideScores
from stas_core.slides.section import Frame, Section, Tumour
from stas_core.slides.stitching import StitchedMask, postprocess_slide
from stas_core.slides.survey import Survey
from stas_core.slides.tissue import Tissue
from stas_core.tables import Int32

STRIP_PX = 2048
HEAT_PX = 2048
"""Longer side of the heat map that the overview shows, at most."""
T = TypeVar("T")


@runtime_checkable
class SlidePixels(FramePixels, Protocol):
    """The pixels of the slide that is finished."""

    def thumbnail(self, max_px: int) -> RgbImage:
        """Return the whole slide, its longer side at most `max_px`."""


@dataclass(frozen=True, kw_only=True)
class SlideFacts:
    """What a slide is and how it was scored: the first columns of `slides.parquet`."""

    slide_uri: str
    """Where the slide lies."""
    vendor: str
    """Scanner's format, as its reader calls it."""
    width_px: int
    """Width of level 0."""
    height_px: int
    """Height of level 0."""
    mpp: float
    """um per level-0 pixel."""
    mpp_source: str
    """Where that is known from: override, metadata or objective."""
    frame_mpp: float
    """um per pixel of maps and masks: what the models were trained at."""
    frame_width: int
    """Width of maps and masks."""
    frame_height: int
    """Height of maps and masks."""
    tissue_source: str
    """Where the tissue is known from: computed, GeoJSON or image."""
    num_tiles: Int32
    """Tiles that were predicted."""
    foreground_share: float
    """Share of the slide that the mask covers."""
    cascade_step: Int32
    """1; 0: the mask was emptied, as more was selected than `max_foreground_share` allows."""
    num_members: Int32
    """Models whose figures the ranges are over; 0: none was kept apart."""
    hematoxylin: float | None = None
    """99th percentile of its concentration in the tissue; null: the stains could not be told apart."""
    eosin: float | None = None
    """99th percentile of its concentration in the tissue."""
    hematoxylin_red: float | None = None
    """Optical density of the stain's colour in red, of 1 in all."""
    hematoxylin_blue: float | None = None
    """Optical density of the stain's colour in blue, of 1 in all."""
    eosin_red: float | None = None
    """Optical density of the stain's colour in red, of 1 in all."""
    eosin_blue: float | None = None
    """Optical density of the stain's colour in blue, of 1 in all."""
    drift: float | None = None
    """How far the stains lie from those of the training images, in half of their range: above 1 it is outside, in
    the figure `drift_of`. Null where nothing says what the models were trained on."""
    drift_of: str | None = None
    """The figure that lies farthest outside, a column of this table."""


@dataclass(frozen=True, kw_only=True)
class SlideToFinish:
    """A slide all of whose tiles are predicted."""

    id: str
    uri: str
    survey: Survey
    tissue: Tissue
    """What is scored."""
    whole: Tissue
    """Tissue beyond the region of interest too."""
    maps: SlideMaps
    num_predicted: int
    """Tiles."""
    num_members: int
    """Members whose maps were kept; 0: none."""
    config: PostprocessConfig
    tumour: Tumour | None
    pixels: SlidePixels

    @property
    def frame(self) -> Frame:
        """Return the frame of maps and masks."""
        survey = self.survey
        return Frame(survey.frame_height, survey.frame_width, survey.frame_mpp, survey.level0_px)

    def plane(self, name: str) -> PlaneMap:
        """Return one of the slide's maps."""
        return self.maps.plane(name)


@dataclass(frozen=True)
class FoundTargets:
    """What pages show of a slide's targets."""

    scores: SlideScores
    placed: PlacedTargets
    disagreement: npt.NDArray[np.float64] | None
    """The members' standard deviation, mean over each target; None: their maps were not kept."""
    chosen: Sequence[Chosen]
    """Those that are shown one by one."""
    outlines: Mapping[int, Polygon | MultiPolygon]
    """Of those, in pixels of the frame, by row in the table of targets."""
    heat: npt.NDArray[np.uint8] | None
    """The map, its longer side at most `HEAT_PX`; None: no overview is wanted."""
    small_mask: ResizedMask | None = None
    """The mask, as small as a page shows it; None: it is not wanted."""
    small_std: npt.NDArray[np.uint8] | None = None
    """The members' standard deviation as k / 510, about as small; None: it is not wanted, or not known."""


@dataclass
class FinishedSlide:
    """What was made of a slide."""

    row: dict[str, Any]
    """Of `slides.parquet`."""
    targets: FoundTargets
    files: dict[str, Path]
    """By kind, in the folder that was given."""


class Stopwatch:
    """Adds up the seconds of steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, step: str) -> Iterator[None]:
        """Add the seconds of a block to a step."""
        start = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start


def slides_schema() -> pa.Schema:
    """Return the columns of `slides.parquet`: id, facts, figures, and the range of each over the members."""
    facts, figures = tables.schema_of(SlideFacts), tables.schema_of(SlideScores)
    return pa.schema(
        [figures.field("id"), *facts, *(one for one in figures if one.name != "id"), *scores.RANGES_SCHEMA]
    )


def finish_slide(given: SlideToFinish, kinds: Sequence[str], folder: Path, watch: Stopwatch) -> FinishedSlide:
    """Post-process a slide, measure it, and write its maps and targets, as `kinds` says, into a folder."""
    section = Section.of(given.tissue, whole=given.whole)
    files: dict[str, Path] = {}
    with ThreadPoolExecutor(1) as pool:
        beside = _Beside(pool, watch)
        heat = beside.begin("heat_s", lambda: shrunk(given, PROB, HEAT_PX)) if OVERVIEWS in kinds else None
        std = None
        if SMALL_STDS in kinds and given.num_members:
            std = beside.begin("heat_s", lambda: shrunk(given, STD, LAYER_PX))
        if MAPS in kinds:
            files[MAPS] = folder / "map.tif"
            beside.begin("maps_s", lambda: _write_map(given, files[MAPS]))
        with watch.timing("postprocess_s"):
            stitched = postprocess_slide(given.plane(PROB), given.config)
        with watch.timing("scores_s"):
            disagreement = _disagreement(given, stitched)
            placed, figures = _measure(given, stitched, section)
            chosen = choose_targets(placed, disagreement)
        with watch.timing("targets_s"):
            facts = _facts(given, placed, disagreement)
            small = _small_mask(given.survey) if SMALL_MASKS in kinds else None
            paths = _target_files(kinds, folder, files)
            outlines = _write_targets(stitched, facts, chosen, paths, pool=pool, small=small)
        with watch.timing("members_s"):
            members = [
                _measure(given, postprocess_slide(given.plane(member_plane(number)), given.config), section)[1]
                for number in range(given.num_members)
            ]
        beside.wait()
        targets = FoundTargets(
            figures,
            placed,
            disagreement,
            chosen,
            outlines,
            heat=None if heat is None else heat.result(),
            small_mask=None if small is None else small.mask,
            small_std=None if std is None else std.result(),
        )
    return FinishedSlide(_row(given, stitched, figures, members), targets, files)


class _Beside:
    """What is made by threads beside; where one fails, the others are waited for."""

    def __init__(self, pool: ThreadPoolExecutor, watch: Stopwatch) -> None:
        self._pool, self._watch = pool, watch
        self._begun: list[Future[Any]] = []

    def begin(self, step: str, do: Callable[[], T]) -> "Future[T]":
        """Begin a step."""

        def timed() -> T:
            with self._watch.timing(step):
                return do()

        self._begun.append(self._pool.submit(timed))
        return self._begun[-1]

    def wait(self) -> None:
        """Wait for all; raise what one of them met."""
        for one in self._begun:
            one.result()


def read_tumour(data: bytes, name: str, survey: Survey) -> Tumour:
    """Return the tumour that a GeoJSON outlines, in level-0 px as QuPath exports it; polygons may overlap.

    Raises:
        UnreadableAnnotation, MissingShapes, WrongCoordinates: naming the file.
    """
    polygons = []
    for rings in polygons_of(data, name):
        outside, *holes = ((ring + survey.corner) / survey.level0_px for ring in rings)
        polygons.append(shapely.make_valid(shapely.Polygon(outside, holes)))
    frame = Frame(survey.frame_height, survey.frame_width, survey.frame_mpp, survey.level0_px)
    try:
        parts = shapely.get_parts(shapely.union_all(polygons))
        return Tumour(MultiPolygon([part for part in parts if isinstance(part, Polygon)]), frame)
    except (MissingShapes, WrongCoordinates) as error:
        raise type(error)(f"{name}: {error}") from error


def _measure(given: SlideToFinish, stitched: StitchedMask, section: Section) -> tuple[PlacedTargets, SlideScores]:
    placed = scores.place_targets(stitched.targets, frame=given.frame, section=section, tumour=given.tumour)
    warnings = quality.warnings_of(given.whole, sharpness=given.survey.sharpness)
    return placed, scores.score_slide(given.id, placed, section=section, tumour=given.tumour, warnings=warnings)


def _row(
    given: SlideToFinish, stitched: StitchedMask, figures: SlideScores, members: Sequence[SlideScores]
) -> dict[str, Any]:
    survey = given.survey
    facts = SlideFacts(
        slide_uri=given.uri,
        vendor=survey.vendor,
        width_px=survey.width_px,
        height_px=survey.height_px,
        mpp=survey.mpp,
        mpp_source=survey.mpp_source,
        frame_mpp=survey.frame_mpp,
        frame_width=survey.frame_width,
        frame_height=survey.frame_height,
        tissue_source=survey.tissue_source,
        num_tiles=given.num_predicted,
        foreground_share=float(stitched.targets.area_px.sum()) / (survey.frame_width * survey.frame_height),
        cascade_step=stitched.step,
        num_members=given.num_members,
    )
    return asdict(facts) | survey.stain_figures() | asdict(figures) | scores.ranges(members)


def _facts(given: SlideToFinish, placed: PlacedTargets, disagreement: npt.NDArray[np.float64] | None) -> TargetFacts:
    survey = given.survey
    corner = None if survey.bounds is None else survey.corner
    placement = Placement(survey.level0_px, corner, survey.frame_mpp)
    columns = {"edge_um": placed.edge_um, "tumour_um": placed.tumour_um, "disagreement": disagreement}
    return TargetFacts(given.id, placed.targets, placement, columns)


def _target_files(kinds: Sequence[str], folder: Path, files: dict[str, Path]) -> dict[str, Path]:
    """Return where the mask and the files of targets go, by kind, and note them."""
    names = {
        MASKS: "mask.tif",
        GEOJSON: "targets.geojson",
        GEOJSON_GZ: "targets.geojson.gz",
        TARGETS: "targets.parquet",
    }
    found = {kind: folder / name for kind, name in names.items() if kind in kinds}
    files.update(found)
    return found


def _small_mask(survey: Survey) -> SmallMask:
    return SmallMask((survey.frame_height, survey.frame_width), small_size((survey.height_px, survey.width_px)))


def _write_targets(
    stitched: StitchedMask,
    facts: TargetFacts,
    chosen: Sequence[Chosen],
    files: Mapping[str, Path],
    *,
    pool: Executor,
    small: SmallMask | None,
) -> dict[int, Polygon | MultiPolygon]:
    """Paint the mask once, for every file of it and its targets, and as `small`; the pool encodes what is painted.

    Returns the outlines of the targets chosen, by row in their table."""
    rows = np.array([row for group in chosen for row in group.rows], np.int64)
    found: dict[int, Polygon | MultiPolygon] = {}
    if not files and not len(rows) and small is None:
        return found
    with ExitStack() as stack:
        writers: list[GeoJsonWriter | GeoParquetWriter] = []
        for kind, path in files.items():
            if kind == TARGETS:
                writers.append(stack.enter_context(GeoParquetWriter(str(path), facts)))
            elif kind != MASKS:
                sink = stack.enter_context(path.open("wb"))
                writers.append(stack.enter_context(GeoJsonWriter(sink, facts, compress=kind == GEOJSON_GZ)))

        def take(shapes: TargetShapes) -> None:
            for writer in writers:
                writer.write(shapes)
            wanted = np.flatnonzero(np.isin(shapes.numbers - 1, rows))
            if len(wanted):
                geometry = shapes.geometry
                found.update({int(shapes.numbers[at]) - 1: geometry[at] for at in wanted})

        painted = _painted(stitched, take)
        strips = painted if small is None else small.watching(painted)
        if MASKS in files:
            size = stitched.grid.height, stitched.grid.width
            write_pyramid(files[MASKS], size, strips, mpp=facts.placement.mpp, layout=MASK, pool=pool)
        for _ in strips:  # all of them, if there is no file
            pass
    return found


def _painted(stitched: StitchedMask, take: Callable[[TargetShapes], None]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the mask in strips of full width, 0 and 255; give the outlines of the targets that end in them."""
    grid, tracer = stitched.grid, Tracer(stitched)
    strip = np.zeros((0, 0), np.uint8)
    for tile, labels in stitched.labels():
        if tile.col == 0:
            strip = np.zeros((tile.core.height, grid.width), np.uint8)
        np.not_equal(labels, 0, out=strip[:, tile.core.x0 : tile.core.x1].view(bool))
        for shapes in tracer.add(tile, labels):
            take(shapes)
        if tile.col == grid.num_cols - 1:
            strip *= 255
            yield strip
            del strip


def _disagreement(given: SlideToFinish, stitched: StitchedMask) -> npt.NDArray[np.float64] | None:
    """Return the members' standard deviation, mean over each target; None: their maps were not kept."""
    if not given.num_members:
        return None
    sums = np.zeros(len(stitched.targets) + 1)
    std = given.plane(STD)
    for tile, labels in stitched.labels():
        at = labels > 0
        if at.any():
            core, numbers = tile.core, labels[at]
            first = int(numbers.min())
            found = np.bincount(numbers - first, std.read(core.y0, core.x0, core.height, core.width)[at])
            sums[first : first + len(found)] += found
    return np.asarray(sums[1:] / stitched.targets.area_px / 510)


def _write_map(given: SlideToFinish, path: Path) -> None:
    plane = given.maps.for_thread().plane(PROB)
    height, width = plane.size

    def strips() -> Iterator[npt.NDArray[np.uint8]]:
        for y0 in range(0, height, STRIP_PX):
            rows = min(STRIP_PX, height - y0)
            blank = plane.is_blank(y0, 0, rows, width)
            yield np.zeros((rows, width), np.uint8) if blank else plane.read(y0, 0, rows, width)

    write_pyramid(path, (height, width), strips(), mpp=given.survey.frame_mpp)


def shrunk(given: SlideToFinish, name: str, max_px: int) -> npt.NDArray[np.uint8]:
    """Return one of the slide's maps as means over squares, its longer side at most `max_px`."""
    plane = given.maps.for_thread().plane(name)
    height, width = plane.size
    factor = -(-max(height, width) // max_px)
    rows, cols = -(-height // factor), -(-width // factor)
    small = np.zeros((rows, cols), np.uint8)
    side = factor * max(1, STRIP_PX // factor)
    for y0, x0 in product(range(0, height, side), range(0, width, side)):
        taken = min(side, height - y0), min(side, width - x0)
        if not plane.is_blank(y0, x0, *taken):
            levels = plane.read(y0, x0, *taken)
            padded = np.pad(levels, ((0, -taken[0] % factor), (0, -taken[1] % factor)), mode="edge")
            size = padded.shape[1] // factor, padded.shape[0] // factor
            to = np.s_[y0 // factor : y0 // factor + size[1], x0 // factor : x0 // factor + size[0]]
            small[to] = cv2.resize(padded, size, interpolation=cv2.INTER_AREA)
    return small
