"""How long scoring takes, from a few images, or tiles of slides, that are scored here."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, median
from typing import cast

import pyarrow as pa

from stas_core import local_files, storage, tables
from stas_core.data import images
from stas_core.failures import Failure
from stas_core.predict import exports
from stas_core.scored_runs import MASKS, ImageRecord, ScoredImage, ScoredRun, ScoredTarget
from stas_core.slides.layers import small_size
from stas_core.slides.run import SURVEYS, TISSUE
from workflows.cluster import Node
from workflows.forecast import (
    START_S,
    Failing,
    Forecast,
    Sheet,
    bytes_there,
    doubled,
    forget_peak,
    num_cpus,
    peak_bytes,
    shown_bytes,
    spread,
    table_bytes,
    try_out,
)
from workflows.scoring.image_results import SHEET_IMAGES, SHEET_WIDTH_PX
from workflows.scoring.plan import Ensemble, ScorePlan, Work
from workflows.scoring.slide_plan import BlockItem, SlideItem, SlideSaveConfig, SlideTask
from workflows.scoring.tasks import FinishedRow, Item, ScoreTask, decode, finish, read_maps

TRIED = 4
TRIED_SLIDES = 3
TRIED_TILES = 2
NO_GPU = "actors predict on GPUs, and this machine has none: plan where there is one"


@dataclass(frozen=True)
class Cluster:
    """What scoring is laid on."""

    nodes: Sequence[Node]
    plan: ScorePlan

    def seconds(self, predict_s: float, other_s: float, threads: int, num_items: float) -> float:
        """Return how long items take that one process would do in so many seconds: predicting, and all else."""
        cpus, actors = num_cpus(self.nodes), max(1.0, min(self.plan.actors, num_items))
        if not self.plan.gpus_per_actor:  # both want the same cores
            return START_S + max((predict_s * threads + other_s) / cpus, predict_s / actors)
        others = max(1.0, cpus - actors * self.plan.cpus_per_actor)
        return START_S + max(predict_s / actors, other_s / others)


def of_images(
    base: Forecast, work: Work, fresh: Sequence[Item], from_maps: Sequence[Item], on: Cluster, failing: Failing
) -> Forecast:
    """Forecast the scoring of images.

    Args:
        base: what is known before any is tried.
        work: what is done to them.
        fresh: those to predict.
        from_maps: those that are finished from their saved maps.
        on: the cluster.
        failing: those that are known to fail.
    """
    import torch

    base = replace(base, num_gpus=on.plan.num_gpus if fresh else 0.0, may_use_gpus=on.plan.num_gpus > 0)
    base = replace(base, notes=failing.notes())
    if not fresh and not from_maps:
        return replace(base, seconds=0.0, disk_bytes=0.0)
    if fresh and work.ensemble.use_gpu and not torch.cuda.is_available():
        return replace(base, basis=NO_GPU)
    from workflows.scoring.actor import ScoreActor

    actor = ScoreActor(work.ensemble, work.task.save) if fresh else None
    predict_s, written, scored = list[float](), list[str](), _Scored()

    def score(item: Item, folder: str) -> None:
        task, table = replace(work.task, out=folder), tables.to_table(Item, [item])
        if actor is None:
            row = read_maps(work.task, table)
        else:
            row = decode(task, table)
            start = time.perf_counter()
            row = actor(row)
            predict_s.append(time.perf_counter() - start)
        row = row.set_column(row.schema.get_field_index("part"), "part", pa.nulls(1, pa.string()))  # none lies here
        written.extend(work.task.file(kind, item["id"]) for kind in work.task.save.folders())
        for done in tables.from_table(FinishedRow, finish(task, row)):
            scored.add(task, done)

    items, num = spread(fresh or from_maps, TRIED), len(fresh) + len(from_maps)
    tried = try_out(score, items)
    predict = median(predict_s[1:] or predict_s) if fresh else 0.0
    other_s = max(0.0, tried.seconds - predict) * num
    memory_bytes = peak_bytes()
    uris = [item["image_uri"] for item in items]
    sheet = Sheet(uris, min(num, SHEET_IMAGES), SHEET_WIDTH_PX, work.task.limits.max_pixels)
    there = bytes_there(written)
    return replace(
        base.in_place_of(replace(there, num_bytes=round(there.num_bytes / tried.num_items * num))),
        seconds=on.seconds(predict * len(fresh), other_s, work.ensemble.threads, len(fresh)),
        basis=tried.basis("images" if fresh else "saved maps"),
        memory_bytes=memory_bytes,
        disk_bytes=tried.num_bytes * num + scored.bytes_of_all(work.task, num) + shown_bytes(0, sheet),
        faster=doubled(on.nodes),
        notes=failing.notes(scored.refused),
    )


@dataclass
class _Scored:
    """What came of the images that were tried."""

    records: list[ImageRecord] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    """Bytes of each."""
    refused: list[Failure] = field(default_factory=list)

    def add(self, task: ScoreTask, done: FinishedRow) -> None:
        """Take an image in."""
        record = task.run.record(done["id"])
        if done["reason"] is not None:
            self.refused.append(Failure(done["id"], ScoredRun.STAGE, done["reason"], record.message if record else ""))
        elif record is not None:
            self.records.append(record)
            self.masks.append(storage.size(task.file(MASKS, done["id"])))

    def bytes_of_all(self, task: ScoreTask, num: float) -> float:
        """Return about what tables, detections and archive of so many images take."""
        if not self.records:
            return 0.0
        found = [one.found for one in self.records if one.found is not None]
        targets = [target for one in self.records for target in one.targets]
        boxes = ((one.id, [(t.x0, t.y0, t.x1, t.y1, t.mean_prob) for t in one.targets]) for one in self.records)
        share = num / len(self.records)
        written = table_bytes(tables.to_table(ScoredImage, found), num)
        written += table_bytes(tables.to_table(ScoredTarget, targets), share * len(targets))
        written += share * sum(map(len, exports.detection_lines(boxes)))
        return written + num * mean(self.masks) * task.save.archive


def of_slides(
    base: Forecast, ensemble: Ensemble, task: SlideTask, items: Sequence[SlideItem], on: Cluster, failing: Failing
) -> Forecast:
    """Forecast the scoring of slides: their tissue is found on a few of them, and a few tiles of one are predicted."""
    import torch

    base = replace(base, notes=failing.notes())
    if not items:
        return replace(base, seconds=0.0)
    if ensemble.use_gpu and not torch.cuda.is_available():
        return replace(base, basis=NO_GPU)
    from workflows.scoring import slide_tasks

    forget_peak()
    survey_s, num_tiles, refused = list[float](), dict[str, int](), list[Failure]()
    with local_files.temporary_folder() as folder:
        here = replace(task, out=folder)
        begun = time.monotonic()
        for item in spread(items, TRIED_SLIDES):
            if survey_s and time.monotonic() - begun > 20:
                break
            (row,) = slide_tasks.survey(here, tables.to_table(SlideItem, [item])).to_pylist()
            survey_s.append(row["survey_s"])
            if row["reason"] is None:
                num_tiles[item["id"]] = len(slide_tasks.Layout.of(here, item["id"]).predicted())
            else:
                refused.append(Failure(item["id"], base.stage, row["reason"], row["message"]))
        notes = failing.notes(refused)
        largest = max(num_tiles, key=lambda name: num_tiles[name], default=None)
        if largest is None or not num_tiles[largest]:
            return replace(base, basis="no tissue in the slides tried", notes=notes)
        (item,) = (item for item in items if item["id"] == largest)
        tile = _try_tiles(ensemble, here, item)
        page_bytes = _page_bytes(here, item)
    tiles = mean(num_tiles.values()) * len(items)
    other_s = tile.read_s * tiles + mean(survey_s) * len(items)
    seconds = on.seconds(tile.predict_s * tiles, other_s, ensemble.threads, tiles)
    return replace(
        base,
        work=f"{base.work}, about {tiles:.0f} tiles with tissue",
        seconds=seconds,
        basis=f"from {len(survey_s)} slides and {TRIED_TILES} tiles tried here; without the finishing of each slide",
        memory_bytes=peak_bytes(),
        disk_bytes=tile.num_bytes(task.save) * tiles + page_bytes * len(items) + shown_bytes(0),
        faster=doubled(on.nodes),
        notes=notes,
    )


@dataclass(frozen=True)
class _Tile:
    """What a tile of a slide takes."""

    predict_s: float
    read_s: float
    block_bytes: float
    """Its share of the file of its block."""
    num_planes: int
    """In that file: map, disagreement, and the map of each member."""
    layer_share: float
    """How many pixels the layers of a page have for each of its own."""

    def num_bytes(self, save: SlideSaveConfig) -> float:
        """Return what is kept of it; masks and outlines are small beside."""
        plane = self.block_bytes / self.num_planes
        pyramid = plane * 4 / 3  # with all smaller levels
        layers = plane * self.layer_share * (2 if self.num_planes > 1 else 1)
        return self.block_bytes * save.blocks + pyramid * save.maps + layers * save.overviews


def _page_bytes(task: SlideTask, item: SlideItem) -> float:
    """Return what the pages of a surveyed slide take, by how its thumbnail is compressed, and what its survey does."""
    from stas_core.figures.slide_pages import small_picture
    from stas_core.figures.slides import MOST_PX
    from stas_core.slides.gallery import CROP_PX, MOST_SHOWN
    from workflows.scoring import slide_tasks

    layout = slide_tasks.Layout.of(task, item["id"])
    thumbnail = slide_tasks.Pixels(task, item["slide_uri"], layout.survey).thumbnail(MOST_PX)
    overview = len(images.encode_png(thumbnail))
    gallery: float = overview * MOST_SHOWN * CROP_PX * CROP_PX / (thumbnail.shape[0] * thumbnail.shape[1])
    layers = len(small_picture(thumbnail, layout.survey))
    surveyed = sum(storage.size(task.run.file(kind, item["id"])) for kind in (SURVEYS, TISSUE))
    return (overview + layers) * task.save.overviews + gallery * task.save.galleries + surveyed


def _try_tiles(ensemble: Ensemble, task: SlideTask, item: SlideItem) -> _Tile:
    """Return what a tile of a surveyed slide takes."""
    from workflows.scoring import slide_tasks
    from workflows.scoring.slide_actor import SlideActor

    actor = SlideActor(ensemble, task)
    blocks = slide_tasks.blocks_of(task, item, slide_tasks.Layout.of(task, item["id"]))
    block = blocks[len(blocks) // 2]  # amid the tissue
    (row,) = cast(list[slide_tasks.ReadRow], slide_tasks.read(task, tables.to_table(BlockItem, [block])).to_pylist())
    read_s = row["decode_s"] / max(1, len(row["tile_rows"]))
    row["tile_rows"], row["tile_cols"] = row["tile_rows"][:TRIED_TILES], row["tile_cols"][:TRIED_TILES]
    num_tiles = len(row["tile_rows"])
    for _ in range(2):  # the first starts up what the second finds running
        start = time.perf_counter()
        predicted = actor(tables.to_table(slide_tasks.ReadRow, [row]))
        predict_s = (time.perf_counter() - start) / num_tiles
    file = predicted.column("file")[0].as_py() or b""  # none: it was refused
    with_members = task.save.members and task.num_members > 1
    survey = slide_tasks.Layout.of(task, item["id"]).survey
    height, width = small_size((survey.height_px, survey.width_px))
    layer_share = min(1.0, height * width / (survey.frame_height * survey.frame_width))
    num_planes = 2 + task.num_members if with_members else 1
    return _Tile(predict_s, read_s, len(file) / num_tiles, num_planes, layer_share)
