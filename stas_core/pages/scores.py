"""The page of score_images: what the ensemble found in each image."""

from collections.abc import Mapping, Sequence

import numpy as np

from stas_core import tables
from stas_core.data.cohort import CohortRow
from stas_core.pages.contents import Column, Contents, Item, PictureSource
from stas_core.pages.finished import FinishedRun, cohort_of, failed_items, mpp_of
from stas_core.scored_runs import MAPS, MASKS, STDS, ScoredImage, ScoredRun, ScoredTarget

_COLUMNS = (
    Column("dice", "Dice", "agreement with the truth, 0 to 1; a dash: none is known, or it has no target"),
    Column("targets", "targets", "separate areas of the mask", kind="whole"),
    Column("share", "target", "share of the image that the mask covers", kind="share", digits=2),
    Column("largest", "largest px", "area of the largest target", kind="whole"),
    Column("peak", "peak", "highest mean probability of a target", kind="number", digits=2),
    Column("disagreement", "disagree", "standard deviation of the members' probabilities, mean over pixels", digits=4),
    Column("drift", "drift", "how far its look is from the training images': above 1 it is unlike all", digits=2),
    Column("drift_of", "of", "the figure that is furthest off", kind="text"),
)
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
    ("failures.parquet", "what could not be scored, and why"),
    ("segmentation.zip", "masks for submission"),
    ("detection.json", "targets for submission"),
)


def build(run: FinishedRun) -> Contents:
    """Return the contents of the page."""
    scored = ScoredRun(run.uri)
    rows = tables.read_rows(scored.path(scored.TABLE), ScoredImage, optional=("look", "drift", "drift_of"))
    by_image = targets_by_image(scored)
    cohort, failures = cohort_of(run.setting("data.images")), scored.failures()
    files = Files.of(scored)
    rows.sort(key=lambda row: (-(row.drift or 0) if (row.drift or 0) > 1 else 0, -row.mean_disagreement, row.id))
    items = [_item(row, by_image.get(row.id, ()), cohort.get(row.id), files, run.setting("data.mpp")) for row in rows]
    unknown = set() if cohort else {"dice"}
    unknown |= {key for key in ("drift", "drift_of") if all(item.values[key] is None for item in items)}
    has_mpp = any(item.source is not None and item.source.mpp is not None for item in items)
    return Contents(
        title=f"Scores of {len(rows):,} images",
        lead="What the ensemble found. Images come first that are unlike those it was trained on, or on which its "
        "members disagree.",
        facts=_facts(rows, len(failures)),
        items=[*failed_items(failures), *items],
        item_order="what failed, what is unlike the training images, then by how much members disagree",
        columns=[column for column in _COLUMNS if column.key not in unknown],
        target_columns=[column for column in TARGET_COLUMNS if has_mpp or column.key != "area_um2"],
        files=run.files(_FILES),
    )


def targets_by_image(scored: ScoredRun) -> Mapping[str, Sequence[ScoredTarget]]:
    """Return the targets of each image that has any."""
    found: dict[str, list[ScoredTarget]] = {}
    for target in tables.read_rows(scored.path(scored.TARGETS), ScoredTarget):
        found.setdefault(target.id, []).append(target)
    return found


class Files:
    """Which layers of which images a scored run has."""

    def __init__(self, masks: Mapping[str, str], maps: Mapping[str, str], stds: Mapping[str, str]):
        self.masks, self.maps, self.stds = masks, maps, stds

    @classmethod
    def of(cls, scored: ScoredRun) -> "Files":
        """List the files of a run."""
        return cls(scored.files(MASKS), scored.files(MAPS), scored.files(STDS))


def _item(
    row: ScoredImage, targets: Sequence[ScoredTarget], known: CohortRow | None, files: Files, given_mpp: object
) -> Item:
    mpp, mpp_note = mpp_of(known, given_mpp)
    drift = row.drift or 0
    tags = ["with target" if row.num_targets else "without target"]
    tags += ["unlike training"] if drift > 1 else []
    values = {
        "targets": row.num_targets,
        "share": row.foreground_share,
        "largest": max((one.area_px for one in targets), default=None),
        "peak": max((one.mean_prob for one in targets), default=None),
        "disagreement": row.mean_disagreement,
        "drift": row.drift,
        "drift_of": row.drift_of,
        "dice": None,
    }
    source = PictureSource(
        row.image_uri,
        mask_uri=files.masks.get(row.id, ""),
        map_uri=files.maps.get(row.id, ""),
        disagreement_uri=files.stds.get(row.id, ""),
        truth_uri="" if known is None else known.mask_uri,
        mpp=mpp,
        mpp_note=mpp_note,
    )
    return Item(row.id, values, source, targets_of(targets, mpp), tuple(tags))


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


def _facts(rows: Sequence[ScoredImage], num_failed: int) -> list[tuple[str, str]]:
    shares = [row.foreground_share for row in rows]
    facts = [
        ("images", f"{len(rows):,}"),
        ("failed", f"{num_failed:,}"),
        ("targets", f"{sum(row.num_targets for row in rows):,}"),
        ("without a target", f"{sum(row.num_targets == 0 for row in rows):,}"),
        ("median target", f"{100 * float(np.median(shares)):.1f} %" if shares else "-"),
    ]
    if any(row.drift is not None for row in rows):
        facts.append(("unlike training", f"{sum((row.drift or 0) > 1 for row in rows):,}"))
    return facts
