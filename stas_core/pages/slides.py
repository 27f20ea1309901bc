"""The page of score_slides: what was found on each slide."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from stas_core import storage, tables
from stas_core.pages.contents import MOST_WITH_PICTURES, Column, Contents, Item, PictureSource, Table
from stas_core.pages.finished import FinishedRun, failed_items
from stas_core.pages.slide_targets import COLUMNS as TARGET_COLUMNS
from stas_core.pages.slide_targets import ListedTargets, largest_targets
from stas_core.slides.run import (
    GALLERIES,
    OVERVIEWS,
    SMALL_MAPS,
    SMALL_MASKS,
    SMALL_STDS,
    TARGETS,
    THUMBNAILS,
    SlideRun,
)

_COLUMNS = (
    Column("num_targets", "targets", "wherever they lie on the slide", kind="whole"),
    Column("range", "members", "least and largest over the ensemble's members", kind="text"),
    Column("targets_per_mm2", "per mm\u00b2", "targets per mm\u00b2 of tissue", digits=1),
    Column("stas_mm2", "target mm\u00b2", "area of all targets", digits=3),
    Column("tissue_mm2", "tissue mm\u00b2", "area that was scored, without large air spaces", digits=1),
    Column("densest_class", "densest field", "targets in the densest 20x field, as a class", kind="text"),
    Column("num_outside", "outside", "targets beyond the tumour's outline; a dash: no outline is known", kind="whole"),
    Column("outside_max_um", "farthest \u00b5m", "largest distance from the tumour's edge", kind="whole"),
    Column(
        "edge_share",
        "at edge",
        "share of targets near the section's edge: many are a sign of artefact",
        kind="share",
        digits=0,
    ),
    Column(
        "drift", "drift", "how far its stains are from the training images': beyond 1 lie 2 % on either side", digits=2
    ),
    Column("mpp", "\u00b5m/px", "of level 0", digits=3),
    Column("mpp_source", "known from", kind="text"),
    Column("warning", "note", "what may make these figures wrong", kind="text"),
)
_HALO_COLUMNS = (
    Column("halo_px", "halo px", kind="whole"),
    Column("off_share", "off", "share of pixels that are off by more than 1/255", kind="share", digits=1),
    Column("largest_off", "at most", "in probability"),
    Column("flipped_share", "flipped", "share of pixels on the other side of 0.5", kind="share", digits=2),
    Column("cost", "cost", "of inference, in times that without a halo", digits=2),
)
_THREADS = 8
_PICTURES = (OVERVIEWS, GALLERIES, THUMBNAILS, SMALL_MASKS, SMALL_MAPS, SMALL_STDS)
_FILES = (
    ("slides.parquet", "a row per slide, all figures with their ranges"),
    ("report.md", "the same as text, and what each figure is"),
    ("masks/", "targets as pyramids, for QuPath"),
    ("maps/", "probabilities as pyramids"),
    ("geojson/", "outlines for QuPath"),
    ("targets/", "a row per target, as GeoParquet"),
    ("overviews/", "the whole slide with all that was found, in full size"),
    ("thumbnails/", "the layers of this page"),
    ("galleries/", "targets one by one, in full size"),
    ("seams.json", "what a tile's halo is worth to these networks"),
    ("failures.parquet", "what could not be scored, and why"),
)


def build(run: FinishedRun) -> Contents:
    """Return the contents of the page."""
    scored = SlideRun(run.uri)
    rows = tables.read_table(scored.path(scored.TABLE)).to_pylist()
    failures = scored.failures()
    rows.sort(key=lambda row: (not row["warnings"], -(row["targets_per_mm2"] or 0), row["id"]))
    pictures = {kind: scored.files(kind) for kind in _PICTURES}
    items = [
        _item(row, {kind: files.get(row["id"], "") for kind, files in pictures.items()}, found)
        for row, found in zip(rows, _listed(scored, rows), strict=True)
    ]
    return Contents(
        title=f"Scores of {len(rows):,} slide{'' if len(rows) == 1 else 's'}",
        lead="What the ensemble found on each slide. A research tool, not for diagnosis.",
        facts=_facts(rows, len(failures)),
        tables=_halo_table(run),
        items=[*failed_items(failures), *items],
        item_word="slide",
        is_stacked=True,
        item_order="what failed, what has a note, then targets per mm\u00b2",
        columns=[column for column in _COLUMNS if any(item.values.get(column.key) is not None for item in items)],
        target_columns=_known(TARGET_COLUMNS, [target for item in items for target in item.targets]),
        files=run.files(_FILES),
        layer_names={} if pictures[THUMBNAILS] else {"image": "overview"},
    )


def _listed(scored: SlideRun, rows: Sequence[Mapping[str, Any]]) -> list[ListedTargets]:
    """Return the largest targets of each slide that may have a picture."""
    files, shown = scored.files(TARGETS), rows[:MOST_WITH_PICTURES]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda row: largest_targets(files.get(row["id"], ""), row), shown))
    return [*found, *[ListedTargets()] * (len(rows) - len(shown))]


def _known(columns: Sequence[Column], targets: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return the columns that any target has a value of."""
    return [column for column in columns if any(target[column.key] is not None for target in targets)]


def _item(row: Mapping[str, Any], pictures: Mapping[str, str], listed: ListedTargets) -> Item:
    """Return a slide with its pictures: paths by kind, empty where there is none."""
    low, high = row.get("num_targets_min"), row.get("num_targets_max")
    values = dict(row) | {
        "range": None if low is None else f"{low:,} to {high:,}",
        "warning": "; ".join(row["warnings"]) or None,
    }
    tags = ["with target" if row["num_targets"] else "without target", *(["noted"] if row["warnings"] else [])]
    source, targets = _source(row, pictures), listed.targets
    if source is not None and listed.missing:
        source = replace(source, notes=[f"targets: {listed.missing}"])
    if not pictures[THUMBNAILS]:  # an overview has other pixels
        targets = [{**target, "box": None} for target in targets]
    return Item(row["id"], values, source, targets, tuple(tags), targets_note=listed.note)


def _source(row: Mapping[str, Any], pictures: Mapping[str, str]) -> PictureSource | None:
    """Return the layers of a slide, with its figures below; of a run of before, that has none, the overview."""
    overview, gallery = pictures[OVERVIEWS], pictures[GALLERIES]
    one_by_one = [("Targets one by one", gallery)] if gallery else []
    if not pictures[THUMBNAILS]:
        return PictureSource(overview, is_figure=True, beside=one_by_one) if overview or gallery else None
    return PictureSource(
        pictures[THUMBNAILS],
        mask_uri=pictures[SMALL_MASKS],
        map_uri=pictures[SMALL_MAPS],
        disagreement_uri=pictures[SMALL_STDS],
        width_um=row["width_px"] * row["mpp"],
        full_width_px=row["width_px"],
        beside=[*([("Overview", overview)] if overview else []), *one_by_one],
    )


def _facts(rows: Sequence[Mapping[str, Any]], num_failed: int) -> list[tuple[str, str]]:
    return [
        ("slides", f"{len(rows):,}"),
        ("failed", f"{num_failed:,}"),
        ("targets", f"{sum(row['num_targets'] for row in rows):,}"),
        ("tissue", f"{sum(row['tissue_mm2'] for row in rows):,.1f} mm\u00b2"),
        ("noted", f"{sum(bool(row['warnings']) for row in rows):,}"),
    ]


def _halo_table(run: FinishedRun) -> list[Table]:
    """Return what the halo of tiles is worth, where the run measured it."""
    uri = run.path(SlideRun.SEAMS)
    found = storage.read_json(uri) if storage.exists(uri) else {}
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return []
    reading = f"How much of the map depends on where tiles are cut, by their halo; measured on {found.get('slide')}."
    return [Table("Seams", reading, _HALO_COLUMNS, rows)]
