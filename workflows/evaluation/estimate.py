"""How long an evaluation takes, and what it needs, from a few images, or the smallest slide, that are scored here."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from stas_core import tables
from stas_core.arrays import RgbImage
from stas_core.data import images, overlay
from stas_core.data.annotations import AnnotationConfig
from stas_core.errors import InputError, StorageError
from stas_core.scores import evaluation
from stas_core.scores.evaluation import ImageScore, Outcome, PairedFiles
from stas_core.slides import evaluated
from stas_core.slides.evaluated import EvaluatedSlide, FrocRow, SlideFiles, SlideOutcome
from stas_core.slides.run import SlideRun
from workflows.cluster import describe
from workflows.evaluation.outputs import EXAMPLE_WIDTH_PX, EXAMPLES_PER_KIND, FIGURES
from workflows.evaluation.pairing import ImagePairs
from workflows.evaluation.slides import SlidePairs
from workflows.forecast import (
    DRIVER_BYTES,
    FIGURE_BYTES,
    RECORDS_BYTES,
    START_S,
    Forecast,
    doubled,
    nodes_at_hand,
    num_cpus,
    peak_bytes,
    sheet_bytes,
    spread,
    table_bytes,
    try_out,
)

TRIED = 4
MOST_TRIED_PX = 1e9
"""Of the maps' frame of a slide: it is scored in less than a minute."""


@dataclass(frozen=True)
class _Size:
    """What is read of a row of `slides.parquet`."""

    id: str
    frame_height: int
    frame_width: int


def of_images(base: Forecast, pairs: ImagePairs, annotation: AnnotationConfig) -> Forecast:
    """Forecast the evaluation of images; `base` is what is known before any is scored."""
    outcomes = list[Outcome]()

    def score(item: PairedFiles, _: str) -> None:
        outcomes.append(evaluation.score_files(item, annotation))

    items = spread(pairs.items, TRIED)
    tried, num = try_out(score, items), len(pairs.items)
    rows = [one.score for one in outcomes if one.score is not None]
    examples = sheet_bytes(_pictures(pairs, items), min(num, 3 * EXAMPLES_PER_KIND))
    figures = FIGURE_BYTES * (len(FIGURES) - 1) + examples
    disk_bytes = table_bytes(tables.to_table(ImageScore, rows), num) + figures + RECORDS_BYTES
    return _on_nodes(replace(base, basis=tried.basis("images"), disk_bytes=disk_bytes), "an image", tried.seconds * num)


def _on_nodes(base: Forecast, item: str, seconds: float, longest_s: float = 0.0) -> Forecast:
    """Return the forecast of work that takes so long in all, and no less than its longest item.

    Memory comes first: to look for GPUs loads torch, as no process of the run does.
    """
    base = replace(base, memory_bytes=peak_bytes() + DRIVER_BYTES)
    nodes = nodes_at_hand()
    seconds = max(seconds / num_cpus(nodes), longest_s) + START_S
    return replace(base, layout=f"{describe(nodes)}, {item} per CPU", seconds=seconds, faster=doubled(nodes))


def _pictures(pairs: ImagePairs, items: Sequence[PairedFiles]) -> list[RgbImage]:
    """Return some of the images in the size of the examples, those that can be read."""
    found = list[RgbImage]()
    for item in items:
        with suppress(InputError, StorageError):  # the run draws it on white, and says so
            image = images.read_image(pairs.scored.image_uris[item.id])
            found.append(overlay.thumbnail(image, width_px=EXAMPLE_WIDTH_PX))
    return found


def of_slides(base: Forecast, pairs: SlidePairs) -> Forecast:
    """Forecast the evaluation of slides, by the pixels of their maps, from the smallest of them."""
    run, layout = SlideRun(pairs.run), "a CPU per slide"
    sizes = {row.id: row.frame_height * row.frame_width for row in tables.read_rows(run.path(run.TABLE), _Size)}
    sizes = {item.id: sizes[item.id] for item in pairs.items}
    if not sizes:
        return replace(base, layout=layout, basis="none of the slides has both a score and a truth")
    name = min(sizes, key=lambda one: sizes[one])
    if sizes[name] > MOST_TRIED_PX:
        return replace(base, layout=layout, basis=f"the smallest slide has {sizes[name] / 1e6:.0f} Mpx: none was tried")
    outcomes = list[SlideOutcome]()

    def score(item: SlideFiles, _: str) -> None:
        outcomes.append(evaluated.evaluate_files(item))

    tried = try_out(score, [item for item in pairs.items if item.id == name])
    share = sum(sizes.values()) / sizes[name]
    longest = max(sizes.values()) / sizes[name]  # a slide is one task
    points = [row for one in outcomes for row in evaluated.froc_rows(one.id, one.froc())]
    rows = [one.score for one in outcomes if one.score is not None]
    # The curve of all slides together has as many points as theirs.
    froc = table_bytes(tables.to_table(FrocRow, points), 2 * len(points) * share)
    scores = table_bytes(tables.to_table(EvaluatedSlide, rows), len(sizes))
    basis = "from the smallest slide, tried here, by the pixels of all"
    base = replace(base, basis=basis, disk_bytes=scores + froc + FIGURE_BYTES + RECORDS_BYTES)
    return _on_nodes(base, "a slide", tried.seconds * share, tried.seconds * longest)
