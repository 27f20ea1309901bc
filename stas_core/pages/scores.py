"""The page of score_images: what the ensemble found in each image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stas_core import storage, tables
from stas_core.data.cohort import CohortRow
from stas_core.pages.contents import MOST_LISTED, MOST_WITH_PICTURES, Column, Contents, Item, PictureSource
from stas_core.pages.finished import RANK, FinishedRun, cohort_of, failed_items, mpp_of
from stas_core.review import DISAGREEMENT, DRIFT, UNCERTAIN, ReviewField
from stas_core.scored_runs import MAPS, MASKS, STDS, ScoredImage, ScoredRun, ScoredTarget

_COLUMNS = (
    RANK,
    Column("dice", "Dice", "agreement with the truth, 0 to 1; a dash: none is known, or it has no target"),
    Column("targets", "targets", "separate areas of the mask", kind="whole"),
    Column("share", "target", "share of the image that the mask covers", kind="share", digits=2),
    Column("largest", "largest px", "area of the largest target", kind="whole"),
    Column("peak", "peak", "highest mean probability of a target", kind="number", digits=2),
    Column("disagreement", "disagree", "standard deviation of the members' probabilities, mean over pixels", digits=4),
    Column(
        "drift", "drift", "how far its look is from the training images': beyond 1 lie 2 % on either side", digits=2
    ),
    Column("drift_of", "of", "the figure that is furthest off", kind="text"),
)
_REASONS = {DRIFT: "unlike training", DISAGREEMENT: "members disagree", UNCERTAIN: "doubtful targets"}
_READ = pa.schema([field for field in tables.schema_of(ScoredImage) if field.name != "look"])
TARGET_COLUMNS = (
    Column("area_px", "area px", kind="whole"),
    Column("area_um2", "area \u00b5m\u00b2", kind="whole"),
    Column("mean_prob", "mean prob.", kind="number", digits=2),
    Column("peak_prob", "peak prob.", kind="number", digits=2),
    Column("border", "at border", kind="flag"),
)
_FILES = (
    ("images.parquet", "a row per image: targets, share, disagreement, drift"),
    ("targets.parquet", "a row per target: area, place, probabilities"),
    ("masks/", "the targets of each image, black and white"),
    ("maps/", "the probability of each pixel, 0 to 255"),
    ("disagreement/", "how much members differ at each pixel"),
    ("overlays/", "outlines on the images in full size"),
    ("geojson/", "outlines for QuPath"),
    ("review.parquet", "images that deserve a second look, in order, and why"),
    ("failures.parquet", "what could not be scored, and why"),
    ("segmentation.zip", "masks for submission"),
    ("detection.json", "targets for submission"),
)


def build(run: FinishedRun) -> Contents:
    """Return the contents of the page; of very many images, those that are listed."""
    scored = ScoredRun(run.uri)
    queue = run.review_queue()
    table = _by_interest(tables.read_table(scored.path(scored.TABLE), _READ, optional=("drift", "drift_of")), queue)
    rows = table.slice(0, MOST_LISTED).to_pylist()
    targets = tables.read_table(scored.path(scored.TARGETS), tables.schema_of(ScoredTarget))
    shown = targets_by_image(targets, [row["id"] for row in rows[:MOST_WITH_PICTURES]])
    largest = _largest(targets, [row["id"] for row in rows])
    (cohort, no_cohort), failures = cohort_of(run.setting("data.images"), or_list=True), scored.failures()
    layers = Layers(scored)
    given_mpp = run.setting("data.mpp")
    items = [
        _item(
            row | largest.get(row["id"], {}),
            shown.get(row["id"], ()),
            cohort.get(row["id"]),
            layers,
            given_mpp,
            queued=queue.get(row["id"]),
        )
        for row in rows
    ]
    unknown = {name for name, known in (("dice", cohort), ("rank", queue)) if not known}
    unknown |= {key for key in ("drift", "drift_of") if table[key].null_count == table.num_rows}
    has_mpp = any(item.source is not None and item.source.mpp is not None for item in items)
    return Contents(
        title=f"Scores of {table.num_rows:,} images",
        lead="What the ensemble found. Images come first that are unlike those it was trained on, on which its members "
        "disagree, or whose targets are doubtful.",
        facts=_facts(table, len(failures)),
        items=[*failed_items(failures[:MOST_LISTED]), *items],
        num_items=table.num_rows + len(failures),
        item_notes=[f"No truth can be shown: {no_cohort}"] if no_cohort else (),
        item_order="what failed, then by how much a second look would pay",
        columns=[column for column in _COLUMNS if column.key not in unknown],
        target_columns=[column for column in TARGET_COLUMNS if has_mpp or column.key != "area_um2"],
        files=run.files(_FILES),
    )


def _by_interest(table: pa.Table, queue: Mapping[str, ReviewField]) -> pa.Table:
    """Sort images by their place in the queue; then, as without one, by drift, disagreement, and id."""
    outside = np.nan_to_num(table["drift"].to_numpy().astype(np.float64))
    outside[outside <= 1] = 0
    rank_of = {name: field.rank for name, field in queue.items()}
    ranks = np.array([rank_of.get(name, len(queue) + 1) for name in map(str, table["id"].to_pylist())])
    order = np.lexsort((np.arange(len(outside)), -table["mean_disagreement"].to_numpy(), -outside, ranks))
    return table.append_column("outside", pa.array(outside)).take(order)


def targets_by_image(targets: pa.Table, ids: Sequence[str]) -> Mapping[str, Sequence[ScoredTarget]]:
    """Return the targets of those of the images that have any."""
    found: dict[str, list[ScoredTarget]] = {}
    for target in tables.from_table(ScoredTarget, _of(targets, ids)):
        found.setdefault(target.id, []).append(target)
    return found


def _of(targets: pa.Table, ids: Sequence[str]) -> pa.Table:
    return targets.filter(pc.is_in(targets["id"], pa.array(ids, pa.string())))


def _largest(targets: pa.Table, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the largest area and the highest mean probability among the targets of each image that has any."""
    found = _of(targets, ids).group_by("id").aggregate([("area_px", "max"), ("mean_prob", "max")])
    return {row["id"]: {"largest": row["area_px_max"], "peak": row["mean_prob_max"]} for row in found.to_pylist()}


class Layers:
    """Where the layers of the images of a scored run are."""

    def __init__(self, scored: ScoredRun):
        self._scored, self._there = scored, set(storage.entries(scored.uri))

    def of(self, kind: str, image_id: str) -> str:
        """Return the path of a layer of an image; empty: the run has none of this kind."""
        uri = self._scored.file(kind, image_id)
        return uri if uri.split("/")[-2] in self._there else ""


def _item(
    row: Mapping[str, Any],
    targets: Sequence[ScoredTarget],
    known: CohortRow | None,
    layers: Layers,
    given_mpp: object,
    *,
    queued: ReviewField | None,
) -> Item:
    mpp, mpp_note = mpp_of(known, given_mpp)
    tags = ["with target" if row["num_targets"] else "without target"]
    reasons = [DRIFT] if row["outside"] else []
    tags += [_REASONS[reason] for reason in dict.fromkeys([*reasons, *(queued.reasons if queued else ())])]
    values = {
        "rank": queued and queued.rank,
        "targets": row["num_targets"],
        "share": row["foreground_share"],
        "largest": row.get("largest"),
        "peak": row.get("peak"),
        "disagreement": row["mean_disagreement"],
        "drift": row["drift"],
        "drift_of": row["drift_of"],
        "dice": None,
    }
    source = PictureSource(
        row["image_uri"],
        mask_uri=layers.of(MASKS, row["id"]),
        map_uri=layers.of(MAPS, row["id"]),
        disagreement_uri=layers.of(STDS, row["id"]),
        truth_uri="" if known is None else known.mask_uri,
        mpp=mpp,
        mpp_note=mpp_note,
    )
    return Item(row["id"], values, source, targets_of(targets, mpp), tuple(tags))


def targets_of(targets: Sequence[ScoredTarget], mpp: float | None) -> list[dict[str, object]]:
    """Return the targets of an image as a page lists them, largest first."""
    return [
        {
            "number": one.target,
            "box": (one.x0, one.y0, one.x1, one.y1),
            "area_px": one.area_px,
            "area_um2": None if mpp is None else one.area_px * mpp**2,
            "mean_prob": one.mean_prob,
            "peak_prob": one.peak_prob,
            "border": one.touches_border,
        }
        for one in sorted(targets, key=lambda one: -one.area_px)
    ]


def _facts(table: pa.Table, num_failed: int) -> list[tuple[str, str]]:
    shares = table["foreground_share"].to_numpy()
    facts = [
        ("images", f"{table.num_rows:,}"),
        ("failed", f"{num_failed:,}"),
        ("targets", f"{int(table['num_targets'].to_numpy().sum()):,}"),
        ("without a target", f"{int((table['num_targets'].to_numpy() == 0).sum()):,}"),
        ("median target", f"{100 * float(np.median(shares)):.1f} %" if len(shares) else "-"),
    ]
    if table["drift"].null_count < table.num_rows:
        facts.append(("unlike training", f"{int((table['outside'].to_numpy() > 0).sum()):,}"))
    return facts
