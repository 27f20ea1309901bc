"""How long an evaluation takes, and what it needs, from a few images, or a slide, that are scored here."""

from dataclasses import dataclass, replace

from stas_core import tables
from stas_core.data.annotations import AnnotationConfig
from stas_core.scores import evaluation
from stas_core.scores.evaluation import ImageScore, Outcome, PairedFiles
from stas_core.slides import evaluated
from stas_core.slides.evaluated import EvaluatedSlide, FrocRow, SlideFiles, SlideOutcome
from stas_core.slides.run import SlideRun
from workflows.evaluation.outputs import EXAMPLE_WIDTH_PX, EXAMPLES_PER_KIND, FIGURES
from workflows.evaluation.pairing import ImagePairs
from workflows.evaluation.slides import SlidePairs
from workflows.forecast import (
    DRIVER_BYTES,
    Failing,
    Forecast,
    Sheet,
    nodes_at_hand,
    on_all_cpus,
    peak_bytes,
    shown_bytes,
    spread,
    table_bytes,
    try_out,
)

TRIED = 4
MOST_TRIED_PX = 1e9
"""Of the maps' frame of a slide: they are scored in less than a minute. Of a larger slide its middle is tried."""


@dataclass(frozen=True)
class _Size:
    """What is read of a row of `slides.parquet`."""

    id: str
    frame_height: int
    frame_width: int


def of_images(base: Forecast, pairs: ImagePairs, annotation: AnnotationConfig, failing: Failing) -> Forecast:
    """Forecast the evaluation of images; `base` is what is known before any is scored.

    Raises:
        ConfigError: none has a score.
    """
    failing.notes()
    outcomes = list[Outcome]()

    def score(item: PairedFiles, _: str) -> None:
        outcomes.append(evaluation.score_files(item, annotation))

    items = spread(pairs.items, TRIED)
    tried, num = try_out(score, items), len(pairs.items)
    rows = [one.score for one in outcomes if one.score is not None]
    notes = failing.notes([one.failure for one in outcomes if one.failure is not None])
    base = replace(base, memory_bytes=peak_bytes() + DRIVER_BYTES, notes=notes)
    uris = [pairs.scored.image_uris[item.id] for item in items]
    examples = Sheet(uris, min(num, 3 * EXAMPLES_PER_KIND), EXAMPLE_WIDTH_PX)
    disk_bytes = table_bytes(tables.to_table(ImageScore, rows), num) + shown_bytes(len(FIGURES) - 1, examples)
    base = replace(base, basis=tried.basis("images"), disk_bytes=disk_bytes)
    return on_all_cpus(base, nodes_at_hand(), "an image per CPU", tried.seconds * num)


def of_slides(base: Forecast, pairs: SlidePairs, annotation: AnnotationConfig, failing: Failing) -> Forecast:
    """Forecast the evaluation of slides, by the pixels of their maps, from the largest, or rows in its middle.

    Raises:
        ConfigError: none has a score.
    """
    run, base = SlideRun(pairs.run), replace(base, layout="a CPU per slide", notes=failing.notes())
    sizes = {row.id: row.frame_height * row.frame_width for row in tables.read_rows(run.path(run.TABLE), _Size)}
    sizes = {item.id: sizes[item.id] for item in pairs.items}
    name = max(sizes, key=lambda one: sizes[one])
    tried_px = min(MOST_TRIED_PX, sizes[name])
    outcomes = list[SlideOutcome]()

    def score(item: SlideFiles, folder: str) -> None:
        item = replace(item, layers_uri=folder)
        outcomes.append(evaluated.evaluate_files(item, annotation, most_px=MOST_TRIED_PX))

    # The second time counts: the first starts up what the others find running. What takes some 20 s is tried once.
    tried = try_out(score, 2 * [item for item in pairs.items if item.id == name])
    last = outcomes[-1]
    if last.score is None:
        failed = [] if last.failure is None else [last.failure]
        why = "".join(f": {one.message}" for one in failed)
        return replace(base, basis=f"{name}, which was tried, has no score{why}", notes=failing.notes(failed))
    share = sum(sizes.values()) / tried_px
    longest = sizes[name] / tried_px  # a slide is one task
    points = evaluated.froc_rows(last.id, last.froc())
    # The curve of all slides together has as many points as theirs.
    froc = table_bytes(tables.to_table(FrocRow, points), 2 * len(points) * share)
    scores = table_bytes(tables.to_table(EvaluatedSlide, [last.score]), len(sizes))
    of_it = "" if tried_px == sizes[name] else f"{tried_px / 1e6:g} Mpx in the middle of "
    basis = f"from {of_it}{name} of {sizes[name] / 1e6:.1f} Mpx, tried here, by the pixels of all"
    layers = tried.num_bytes * tried.num_items * len(sizes)  # the second try wrote over those of the first
    base = replace(base, basis=basis, disk_bytes=scores + froc + layers + shown_bytes(1))
    base = replace(base, memory_bytes=peak_bytes() + DRIVER_BYTES)
    seconds, longest_s = tried.seconds * share, tried.seconds * longest
    return on_all_cpus(base, nodes_at_hand(), "a slide per CPU", seconds, longest_s=longest_s)
