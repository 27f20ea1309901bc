"""The review queue of a training run: annotations that its out-of-fold maps contradict, the likeliest errors first."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from stas_core import review, storage, tables
from stas_core.arrays import Mask
from stas_core.data import images
from stas_core.data.cohort import CohortRow, typical_px
from stas_core.data.fields import load_mask
from stas_core.errors import InputError
from stas_core.predict.annotation_files import write_annotation
from stas_core.review import Finding, ReviewField, ReviewTarget
from stas_core.runs import OofScore, TrainingRun
from workflows.progress import at, doing, told

MOST_DRAWN = 100
"""Fields whose proposals are written; the queue has all."""
ANNOTATED = "annotated"
"""Class of what is annotated already, in files of proposals."""
_THREADS = 4


@doing("review queue")
def write_review(run: TrainingRun, folds: Sequence[int], rows: Sequence[CohortRow]) -> None:
    """Rank the out-of-fold images by how much a second look would pay, and draw the findings of the first of them."""
    by_id = {row.id: row for row in rows}
    scores = [(run.fold(fold).path(score.map_uri), score) for fold in folds for score in run.fold(fold).oof()]
    scores = [(uri, score) for uri, score in scores if score.id in by_id]
    typical = typical_px(by_id[score.id] for _, score in scores)

    def look(listed: tuple[str, OofScore]) -> tuple[ReviewField, list[ReviewTarget]] | None:
        uri, score = listed
        looked = _look(uri, score, by_id[score.id], typical)
        return None if looked is None else (looked[0], [one.row for one in looked[1]])  # their masks are large

    print(f"comparing {len(scores)} out-of-fold maps with their annotations, for the review queue", flush=True)
    with ThreadPoolExecutor(_THREADS) as pool:
        looked = dict[str, tuple[ReviewField, list[ReviewTarget]]]()
        for number, one in enumerate(pool.map(look, scores)):
            at(f"{number} of {len(scores)} maps")
            if one is not None:
                looked[one[0].id] = one
    fields = review.queue(field for field, _ in looked.values())
    listed = [target for field in fields for target in looked[field.id][1]]
    tables.write_rows(run.path(run.REVIEW), ReviewField, fields)
    tables.write_rows(run.path(run.REVIEW_TARGETS), ReviewTarget, listed)
    drawn = [field.id for field in fields[:MOST_DRAWN] if field.num_findings]
    maps = {score.id: (uri, score) for uri, score in scores}
    for image_id in told(drawn, "proposals"):
        again = _look(*maps[image_id], by_id[image_id], typical)
        if again is None:
            continue
        data = proposals(image_id, load_mask(by_id[image_id]), again[1])
        storage.write_bytes(run.path(f"review/{image_id}.geojson"), data)
    stale = {f"{image_id}.geojson" for image_id in by_id.keys() - set(drawn)}
    storage.remove_files(run.path("review"), sorted(stale & set(storage.entries(run.path("review")))))


def _look(uri: str, score: OofScore, row: CohortRow, typical: float) -> tuple[ReviewField, list[Finding]] | None:
    try:
        truth = load_mask(row)
    except InputError as error:  # it has changed since: the maps say nothing of it
        print(f"review: {row.id} is left out: {error}", flush=True)
        return None
    found = review.compare(row.id, images.decode_map(storage.read_bytes(uri), uri), truth, typical)
    targets = [one.row for one in found]
    priority = round(review.together(one.priority for one in targets), 4)
    reasons = review.reasons_of(targets)
    return ReviewField(0, row.id, row.image_uri, priority, reasons, len(found), score.dice), found


def proposals(image_id: str, truth: Mask, found: Sequence[Finding]) -> bytes:
    """Return GeoJSON of what is annotated, and of what is found in classes of their own, as QuPath reads it."""
    masks = dict.fromkeys(review.FINDINGS, np.zeros_like(truth))  # all of them: each has a colour of its own
    masks |= review.drawn(found, (truth.shape[0], truth.shape[1]))
    return write_annotation({ANNOTATED: truth, **masks}, "geojson", image_id=image_id, image_path="")
