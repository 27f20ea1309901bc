"""The page of an evaluation of slides: truth and prediction over each, what is missed and what is false told apart."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from stas_core import storage, tables
from stas_core.errors import StorageError
from stas_core.pages.agreement import FILES, detection_table, interval, score
from stas_core.pages.contents import Chart, Column, Contents, Figure, Item, PictureSource, Series, Table
from stas_core.pages.finished import FinishedRun, failed_items
from stas_core.slides.evaluated import EvaluatedSlide, FrocRow, SlideSummary
from stas_core.slides.layers import COMPARED, FALSE, MISSED, TRUE, compared_uri
from stas_core.slides.run import GALLERIES, OVERVIEWS, SMALL_MAPS, SMALL_MASKS, SMALL_STDS, THUMBNAILS, SlideRun

_MATCH = "an overlap (IoU) of at least 0.5"
_COLUMNS = (
    Column("dice", "Dice"),
    Column("target_f1", "target F1", f"targets matched at {_MATCH}"),
    Column("target_precision", "precision", "of targets", digits=2),
    Column("target_recall", "recall", "of targets", digits=2),
    Column("target_tp", "matched", f"found targets that match a true one, with {_MATCH}", kind="whole"),
    Column("target_fn", "missed", "true targets that no found one matches", kind="whole"),
    Column("target_fp", "false", "found targets that match no true one", kind="whole"),
    Column(
        "sensitivity_at_2",
        "at 2/mm\u00b2",
        "share of the true targets that is found at 2 false ones per mm\u00b2",
        digits=2,
    ),
    Column("true_per_mm2", "true per mm\u00b2", digits=1),
    Column("found_per_mm2", "found per mm\u00b2", digits=1),
    Column("tissue_mm2", "tissue mm\u00b2", digits=1),
)
_REGION_COLUMNS = (
    Column("num_outside", "outside", "true targets outside of the region that was scored: left out", kind="whole"),
    Column("num_cut", "cut", "true targets that the edge of the region cuts: the part inside counts", kind="whole"),
)
_PICTURES = (OVERVIEWS, GALLERIES, THUMBNAILS, SMALL_MASKS, SMALL_MAPS, SMALL_STDS)
_AGAIN = "evaluate again with --force"


def build(run: FinishedRun) -> Contents:
    """Return the contents of the page."""
    rows = tables.read_rows(run.path("scores.parquet"), EvaluatedSlide)
    summary = tables.read_rows(run.path("summary.parquet"), SlideSummary)
    failures = run.failures()
    rows.sort(key=lambda row: (row.dice, row.id))
    slides = _Slides(run)
    items = [slides.item(row) for row in rows]
    columns = [*_COLUMNS, *(_REGION_COLUMNS if any(row.has_region for row in rows) else ())]
    known = {one.score: one for one in summary}
    facts = [("slides", f"{len(rows):,}"), ("without a score", f"{len(failures):,}")]
    for name, title in (
        ("dice", "mean Dice"),
        ("target_f1", "target F1"),
        ("sensitivity_at_2", "found at 2 false per mm\u00b2"),
    ):
        if name in known:
            facts.append((title, score(known[name].mean)))
    lines = [
        asdict(one) | {"score": one.score.replace("_", " "), "interval": interval(one.low, one.high)} for one in summary
    ]
    table_columns = (
        Column("score", "score", kind="text"),
        Column("num_slides", "slides", kind="whole"),
        Column("mean", "mean"),
        Column("interval", "95 % interval", kind="text"),
        Column("sd", "sd"),
        Column("pooled", "pooled", "of the summed counts"),
    )
    return Contents(
        title=f"Evaluation of {len(rows):,} slide{'' if len(rows) == 1 else 's'}",
        lead="The masks against the truth, and how many false targets a sensitivity costs. Red are missed targets: "
        "true ones that no found one matches. Blue are false ones: found ones that match no true one.",
        facts=facts,
        figures=_froc(run),
        tables=[
            Table("Scores", "Means over slides; pooled: of all slides together.", table_columns, lines),
            *detection_table(run),
        ],
        items=[*failed_items(failures), *items],
        item_word="slide",
        is_stacked=True,
        item_order="what has no score, then Dice, the lowest first",
        columns=columns,
        files=run.files(FILES),
        item_notes=slides.notes,
        layer_names={} if slides.have_layers else {"image": "overview"},
    )


@dataclass(frozen=True)
class _Width:
    """What is read of a row of `slides.parquet`."""

    id: str
    width_px: int
    mpp: float


class _Slides:
    """Where the layers of the slides are: those of the scored run, and those of the evaluation."""

    def __init__(self, run: FinishedRun):
        scored = SlideRun(str(run.setting("run")))
        self._run, self.notes = run, list[str]()
        self._pictures: Mapping[str, Mapping[str, str]] = {kind: {} for kind in _PICTURES}
        self._widths: Mapping[str, float] = {}
        try:
            self._pictures = {kind: scored.files(kind) for kind in _PICTURES}
            rows = tables.read_rows(scored.path(scored.TABLE), _Width)
            self._widths = {row.id: row.width_px * row.mpp for row in rows}
        except StorageError as error:  # the run that was evaluated is gone, or another
            self.notes.append(f"Of the slides no scale can be shown: {error}")
        self.have_layers = bool(self._pictures[THUMBNAILS])
        folder = compared_uri(run.uri, "", TRUE).rpartition("/")[0]
        self._compared = set(storage.entries(folder)) if storage.exists(folder) else set()

    def item(self, row: EvaluatedSlide) -> Item:
        """Return a slide."""
        tags = ["with missed targets"] if row.target_fn else []
        tags += ["with false targets"] if row.target_fp else []
        return Item(row.id, asdict(row), self._source(row), tags=tuple(tags))

    def _source(self, row: EvaluatedSlide) -> PictureSource:
        found = {kind: self._pictures[kind].get(row.id, "") for kind in _PICTURES}
        beside = [("Targets one by one", found[GALLERIES])] if found[GALLERIES] else []
        if not found[THUMBNAILS]:
            why = "image: the run that was evaluated keeps no layers of it (any more); score it again"
            return PictureSource(found[OVERVIEWS], is_figure=True, beside=beside, notes=[why])
        compared = {kind: compared_uri(self._run.uri, row.id, kind) for kind in COMPARED}
        there = {kind: uri for kind, uri in compared.items() if storage.name_of(uri) in self._compared}
        missing = {
            "truth": len(there) < len(COMPARED) and f"the evaluation keeps no layers of it (any more); {_AGAIN}",
            "map": not found[SMALL_MAPS] and "the run that was evaluated has none (any more)",
            "found": not found[SMALL_MASKS] and "the run that was evaluated has none (any more)",
        }
        return PictureSource(
            found[THUMBNAILS],
            mask_uri=found[SMALL_MASKS],
            map_uri=found[SMALL_MAPS],
            disagreement_uri=found[SMALL_STDS],
            truth_uri=there.get(TRUE, ""),
            missed_uri=there.get(MISSED, ""),
            false_uri=there.get(FALSE, ""),
            width_um=self._widths.get(row.id),
            beside=[*([("Overview", found[OVERVIEWS])] if found[OVERVIEWS] else []), *beside],
            notes=[f"{layer}: {why}" for layer, why in missing.items() if why],
        )


def _froc(run: FinishedRun) -> list[Figure]:
    rows = [row for row in tables.read_rows(run.path("froc.parquet"), FrocRow) if row.id is None]
    rows.sort(key=lambda row: row.threshold)
    known: list[Mapping[str, Any]] = [asdict(row) for row in rows if row.sensitivity is not None]
    if len(known) < 2:
        return []
    found = Series("share of true targets found", [(row["threshold"], row["sensitivity"]) for row in known])
    false = Series("false targets per mm\u00b2", [(row["threshold"], row["false_per_mm2"]) for row in known])
    reading = (
        "Targets count from this mean probability on; a higher one leaves out false targets first, true ones later."
    )
    return [
        Figure(
            "What a threshold finds",
            reading,
            chart=Chart("threshold of a target's mean probability", "share", [found], y_range=(0, 1), start=0.5),
        ),
        Figure(
            "What it costs",
            reading,
            chart=Chart("threshold of a target's mean probability", "per mm\u00b2 of tissue", [false], start=0.5),
        ),
    ]
