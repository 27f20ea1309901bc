"""How long an evaluation takes, and what it needs, from a few images, or a slide, that are scored here."""

from dataclasses import dataclass, replace

from stas_core import tables
from stas_core.data.annotations import AnnotationConfig
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
    thumbnails,
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
    base = replace(base, memory_bytes=peak_bytes() + DRIVER_BYTES)
    pictures = thumbnails([pairs.scored.image_uris[item.id] for item in items], width_px=EXAMPLE_WIDTH_PX)
    examples = sheet_bytes(pictures, min(num, 3 * EXAMPLES_PER_KIND))
    figures = FIGURE_BYTES * (len(FIGURES) - 1) + examples
    disk_bytes = table_bytes(tables.to_table(ImageScore, rows), num) + figures + RECORDS_BYTES
    return _on_nodes(replace(base, basis=tried.basis("images"), disk_bytes=disk_bytes), "an image", tried.seconds * num)


def _on_nodes(base: Forecast, item: str, seconds: float, longest_s: float = 0.0) -> Forecast:
    """Return the forecast of work that takes so long in all, and no less than its longest item.

    `base` has the memory already: to look for GPUs loads torch, as no process of the run does.
    """
    nodes = nodes_at_hand()
    seconds = max(seconds / num_cpus(nodes), longest_s) + START_S
    return replace(base, layout=f"{describe(nodes)}, {item} per CPU", seconds=seconds, faster=doubled(nodes))


def of_slides(base: Forecast, pairs: SlidePairs) -> Forecast:
    """Forecast the evaluation of slides, by the pixels of their maps, from the largest that is soon scored."""
    run, base = SlideRun(pairs.run), replace(base, layout="a CPU per slide")
    sizes = {row.id: row.frame_height * row.frame_width for row in tables.read_rows(run.path(run.TABLE), _Size)}
    sizes = {item.id: sizes[item.id] for item in pairs.items}
    if not sizes:
        return replace(base, basis="none of the slides has both a score and a truth")
    small = [name for name, size in sizes.items() if size <= MOST_TRIED_PX]
    if not small:
        least = f"{min(sizes.values()) / 1e6:.1f} Mpx"
        return replace(base, basis=f"none was tried: the smallest slide has {least}, over {MOST_TRIED_PX / 1e6:g} Mpx")
    name = max(small, key=lambda one: sizes[one])
    outcomes = list[SlideOutcome]()

    def score(item: SlideFiles, _: str) -> None:
        outcomes.append(evaluated.evaluate_files(item))

    # The second time counts: the first starts up what the others find running. A slide of some 20 s is tried once.
    tried = try_out(score, 2 * [item for item in pairs.items if item.id == name])
    last = outcomes[-1]
    if last.score is None:
        why = "" if last.failure is None else f": {last.failure.message}"
        return replace(base, basis=f"{name}, which was tried, has no score{why}")
    share = sum(sizes.values()) / sizes[name]
    longest = max(sizes.values()) / sizes[name]  # a slide is one task
    points = evaluated.froc_rows(last.id, last.froc())
    # The curve of all slides together has as many points as theirs.
    froc = table_bytes(tables.to_table(FrocRow, points), 2 * len(points) * share)
    scores = table_bytes(tables.to_table(EvaluatedSlide, [last.score]), len(sizes))
    basis = f"from {name} of {sizes[name] / 1e6:.1f} Mpx, tried here, by the pixels of all"
    base = replace(base, basis=basis, disk_bytes=scores + froc + FIGURE_BYTES + RECORDS_BYTES)
    base = replace(base, memory_bytes=peak_bytes() + DRIVER_BYTES)
    return _on_nodes(base, "a slide", tried.seconds * share, tried.seconds * longest)
