"""The page of evaluate: how good a scored run is, image by image or slide by slide."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from stas_core import config as configs
from stas_core import storage, tables
from stas_core.arrays import Mask
from stas_core.data import annotations, listing
from stas_core.data import cohort as cohorts
from stas_core.data import truth as truths
from stas_core.data.annotation_listing import find_annotations
from stas_core.data.annotations import AnnotationConfig, Description
from stas_core.data.cohort import CohortRow
from stas_core.errors import ConfigError, InputError, StorageError, as_input_error
from stas_core.pages.contents import Chart, Column, Contents, Figure, Item, PictureSource, Series, Table
from stas_core.pages.finished import FinishedRun, failed_items, mpp_of, setting_of
from stas_core.pages.scores import TARGET_COLUMNS, Layers, targets_by_image, targets_of
from stas_core.scored_runs import MAPS, MASKS, STDS, ScoredRun, ScoredTarget
from stas_core.scores.detection import DetectionScore
from stas_core.scores.evaluation import MASK_SUFFIXES, ImageScore, SubsetScore, read_truth
from stas_core.slides.evaluated import EvaluatedSlide, FrocRow, SlideSummary
from stas_core.slides.run import OVERVIEWS, SlideRun

_FIGURES = (
    ("dice_histogram", "Dice of the images", "A second heap near 0 is images that were missed altogether."),
    ("dice_by_area", "Dice by target area", "Small targets are harder: a pixel at their rim weighs more."),
    (
        "calibration",
        "Are probabilities what they say",
        "On the diagonal, of the pixels with a probability of 0.8 eight in ten are target; below it maps promise too "
        "much.",
    ),
)
_COLUMNS = (
    Column("dice", "Dice", "of the mask against the truth, 0 to 1"),
    Column("precision", "precision", "share of what is predicted that is true", digits=2),
    Column("recall", "recall", "share of what is true that is predicted", digits=2),
    Column("raw_dice", "at 0.5", "Dice of the map cut at 0.5"),
    Column("num_truth", "true", "targets of the truth", kind="whole"),
    Column("num_pred", "found", "targets that are predicted", kind="whole"),
    Column("num_matched", "matched", "targets whose overlap (IoU) is at least 0.5", kind="whole"),
    Column("group", "group", kind="text"),
)
_SUBSET_COLUMNS = (
    Column("name", "images", kind="text"),
    Column("prediction", "prediction", kind="text"),
    Column("num_images", "number", kind="whole"),
    Column("dice_mean", "Dice"),
    Column("interval", "95 % interval", kind="text"),
    Column("precision_mean", "precision"),
    Column("recall_mean", "recall"),
    Column("pooled_dice", "pooled Dice", "of all pixels together"),
    Column("object_f1", "target F1", "of targets, matched at an IoU of at least 0.5"),
)
_DETECTION_COLUMNS = (
    Column("level", "of", kind="text"),
    Column("measure", "measure", kind="text"),
    Column("value", "value"),
    Column("interval", "95 % interval", kind="text"),
    Column("num_positive", "with targets", kind="whole"),
    Column("num_negative", "without", kind="whole"),
)
_FILES = (
    ("report.md", "the same as text, with all strata and groups"),
    ("scores.parquet", "a row per image or slide"),
    ("summary.parquet", "means, intervals, pooled scores"),
    ("detection.parquet", "sensitivity, specificity, AUC"),
    ("froc.parquet", "sensitivity against false targets per mm\u00b2"),
    ("failures.parquet", "what of the truth has no score, and why"),
)
T = TypeVar("T")


def build(run: FinishedRun) -> Contents:
    """Return the contents of the page."""
    return _of_slides(run) if run.has("froc.parquet") else _of_images(run)


def _of_images(run: FinishedRun) -> Contents:
    rows = tables.read_rows(run.path("scores.parquet"), ImageScore)
    summary = tables.read_rows(run.path("summary.parquet"), SubsetScore)
    failures = run.failures()
    rows.sort(key=lambda row: (row.target_px > 0 and row.dice, row.id))
    sources = _Sources(run, {row.id for row in rows})
    overall = next((one for one in summary if one.subset == "overall" and one.prediction != "raw 0.5"), None)
    return Contents(
        title=f"Evaluation of {len(rows):,} images",
        lead="The masks against the truth. The worst come first: what was missed, what is false, or is the truth "
        "wrong?",
        facts=_facts(rows, overall, len(failures)),
        figures=run.figures(_FIGURES),
        tables=[_subset_table(summary), *_detection_table(run)],
        items=[*failed_items(failures), *(sources.item(row) for row in rows)],
        item_notes=sources.notes,
        item_order="what has no score, then Dice, the lowest first",
        columns=[c for c in _COLUMNS if c.key != "group" or any(row.group != row.id for row in rows)],
        target_columns=TARGET_COLUMNS,
        files=run.files(_FILES),
    )


class _Sources:
    """Where the layers of the images of a scored run are, and why some are not there (any more)."""

    def __init__(self, run: FinishedRun, wanted: Collection[str]):
        scored = ScoredRun(str(run.setting("run")))
        self._layers = Layers(scored)
        self._uris, no_images = _or_why(scored.image_uris)
        self._targets, no_targets = _or_why(lambda: _targets_of(scored, wanted))
        self._mpp = setting_of(scored.uri, "data.mpp")
        self._truth = _Truth(run, wanted)
        whys = {"images": no_images, "targets": no_targets, "truth": self._truth.why}
        self.notes = [f"No {what} can be shown: {why}" for what, why in whys.items() if why]

    def item(self, row: ImageScore) -> Item:
        """Return an image."""
        known: CohortRow | None = self._truth.cohort.get(row.id)
        mpp, mpp_note = mpp_of(known, self._mpp)
        values = asdict(row)
        tags = ["with target" if row.target_px else "without target"]
        tags += ["Dice below 0.5"] if row.target_px and row.dice < 0.5 else []
        tags += ["false alarm"] if not row.target_px and row.num_pred else []
        tags += ["missed"] if row.target_px and not row.num_pred else []
        if not row.target_px:
            values |= {"dice": None, "raw_dice": None, "recall": None}
        truth = self._truth.of(row.id)
        source = PictureSource(
            self._uris.get(row.id, ""),
            mask_uri=self._layers.of(MASKS, row.id),
            map_uri=self._layers.of(MAPS, row.id),
            disagreement_uri=self._layers.of(STDS, row.id),
            truth_uri="" if known is None else known.mask_uri,
            truth_by=truth,
            mpp=mpp,
            mpp_note=mpp_note,
        )
        missing = {
            "image": not source.image_uri and bool(self._uris) and "the run that was evaluated lists it no longer",
            "found": not source.mask_uri and "the run that was evaluated has no masks (any more)",
            "map": not source.map_uri
            and row.raw_dice is not None
            and "the run that was evaluated has no maps any more",
            "truth": not source.truth_uri and truth is None and not self._truth.why and "it is not where it was",
        }
        source = replace(source, notes=[f"{layer}: {why}" for layer, why in missing.items() if why])
        return Item(row.id, values, source, targets_of(self._targets.get(row.id, ()), mpp), tuple(tags))


def _or_why(read: Callable[[], Mapping[str, T]]) -> tuple[Mapping[str, T], str]:
    """Return what is read, and ""; or, of a run or truth that is gone, or another one now, nothing and the reason."""
    try:
        return read(), ""
    except (ConfigError, StorageError, InputError) as error:
        return {}, str(error)


def _targets_of(scored: ScoredRun, wanted: Collection[str]) -> Mapping[str, Sequence[ScoredTarget]]:
    table = tables.read_table(scored.path(scored.TARGETS), tables.schema_of(ScoredTarget))
    return targets_by_image(table, list(wanted))


class _Truth:
    """The masks or annotations of the truth, found as the stage finds them; a file of several images is read once."""

    def __init__(self, run: FinishedRun, wanted: Collection[str]):
        values = run.setting("truth.annotation")
        self._config = configs.build(AnnotationConfig, values if isinstance(values, dict) else {})
        self._kept: dict[str, bytes] = {}
        self._wanted = wanted
        cohort, masks, shapes = (run.setting(f"truth.{kind}") for kind in ("cohort", "masks", "annotations"))
        self.cohort: Mapping[str, CohortRow] = {}
        self._uris: Mapping[str, str] = {}
        self.why = ""
        """Why there is no truth of any image."""
        if isinstance(cohort, str):
            self.cohort, self.why = _or_why(lambda: {row.id: row for row in cohorts.read_cohort(cohort)})
        elif isinstance(masks, str):
            self._uris, self.why = _or_why(lambda: listing.find(masks, MASK_SUFFIXES).uris)
        elif isinstance(shapes, str):
            self._uris, self.why = _or_why(lambda: self._find(shapes))

    def of(self, image_id: str) -> Callable[[Mask], Mask] | None:
        """Return what makes the truth of an image, given its predicted mask; None: no file is called by it."""
        uri = self._uris.get(image_id)
        return None if uri is None else functools.partial(self._read, uri, image_id)

    def _find(self, source: str) -> dict[str, str]:
        return find_annotations(source, self._wanted, image_uris=(), describe=self._describe).uris

    def _describe(self, uri: str) -> Description:
        try:
            data = truths.read_annotation_file(uri)
        except StorageError as error:  # it may be none of the images': the others are shown
            raise as_input_error(error, uri) from error
        found = annotations.describe(data, storage.name_of(uri), None, self._config)
        if found.images:
            self._kept[uri] = data
        return found

    def _read(self, uri: str, image_id: str, mask: Mask) -> Mask:
        return read_truth(uri, mask, self._config, image_id=image_id, fingerprint="", read=self._data)[0]

    def _data(self, uri: str) -> bytes:
        return self._kept[uri] if uri in self._kept else truths.read_annotation_file(uri)


def _facts(rows: Sequence[ImageScore], overall: SubsetScore | None, num_failed: int) -> list[tuple[str, str]]:
    facts = [("images", f"{len(rows):,}"), ("without a score", f"{num_failed:,}")]
    if overall is not None:
        facts.append(("mean Dice", _score(overall.dice_mean)))
        facts.append(("95 % interval", _interval(overall.dice_low, overall.dice_high)))
        facts.append(("pooled Dice", _score(overall.pooled_dice)))
        facts.append(("target F1", _score(overall.object_f1)))
    negatives = [row for row in rows if not row.target_px]
    if negatives:
        facts.append(("false alarms", f"{sum(row.num_pred > 0 for row in negatives):,} of {len(negatives):,}"))
    return facts


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _subset_table(summary: Sequence[SubsetScore]) -> Table:
    rows = [asdict(one) | {"interval": _interval(one.dice_low, one.dice_high)} for one in summary]
    for row in rows:
        row["name"] = row["name"] if row["subset"] == "overall" else f"{row['subset']}: {row['name']}"
    reading = "Means over images with targets, with intervals from resampled images; few images give none."
    return Table("Scores", reading, _SUBSET_COLUMNS, rows)


def _detection_table(run: FinishedRun) -> list[Table]:
    rows = tables.read_rows(run.path("detection.parquet"), DetectionScore)
    lines = [asdict(one) | {"interval": _interval(one.low, one.high)} for one in rows if one.value is not None]
    reading = "Sensitivity and specificity of a mask with any target; AUC: how often a positive ranks above a negative."
    return [Table("Found or not", reading, _DETECTION_COLUMNS, lines)] if lines else []


def _of_slides(run: FinishedRun) -> Contents:
    rows = tables.read_rows(run.path("scores.parquet"), EvaluatedSlide)
    summary = tables.read_rows(run.path("summary.parquet"), SlideSummary)
    scored, failures = SlideRun(str(run.setting("run"))), run.failures()
    rows.sort(key=lambda row: (row.dice, row.id))
    columns = (
        Column("dice", "Dice"),
        Column("target_f1", "target F1", "targets matched at an IoU of at least 0.5"),
        Column("target_precision", "precision", "of targets", digits=2),
        Column("target_recall", "recall", "of targets", digits=2),
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
    items = [Item(row.id, asdict(row), PictureSource(scored.file(OVERVIEWS, row.id), is_figure=True)) for row in rows]
    known = {one.score: one for one in summary}
    facts = [("slides", f"{len(rows):,}"), ("without a score", f"{len(failures):,}")]
    for name, title in (
        ("dice", "mean Dice"),
        ("target_f1", "target F1"),
        ("sensitivity_at_2", "found at 2 false per mm\u00b2"),
    ):
        if name in known:
            facts.append((title, _score(known[name].mean)))
    lines = [
        asdict(one) | {"score": one.score.replace("_", " "), "interval": _interval(one.low, one.high)}
        for one in summary
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
        lead="The masks against the truth, and how many false targets a sensitivity costs.",
        facts=facts,
        figures=_froc(run),
        tables=[
            Table("Scores", "Means over slides; pooled: of all slides together.", table_columns, lines),
            *_detection_table(run),
        ],
        items=[*failed_items(failures), *items],
        item_word="slide",
        is_stacked=True,
        item_order="what has no score, then Dice, the lowest first",
        columns=columns,
        files=run.files(_FILES),
        layer_names={"image": "overview"},
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
