"""The page of evaluate: how good a scored run is, image by image; of slides it is that of `evaluated_slides`."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TypeVar

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
from stas_core.pages import evaluated_slides
from stas_core.pages.agreement import FILES, detection_table, interval, score
from stas_core.pages.contents import Column, Contents, Item, PictureSource, Table
from stas_core.pages.finished import FinishedRun, failed_items, mpp_of, setting_of
from stas_core.pages.scores import TARGET_COLUMNS, Layers, targets_by_image, targets_of
from stas_core.scored_runs import MAPS, MASKS, STDS, ScoredRun, ScoredTarget
from stas_core.scores.evaluation import MASK_SUFFIXES, ImageScore, SubsetScore, read_truth

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
T = TypeVar("T")


def build(run: FinishedRun) -> Contents:
    """Return the contents of the page."""
    return evaluated_slides.build(run) if run.has("froc.parquet") else _of_images(run)


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
        tables=[_subset_table(summary), *detection_table(run)],
        items=[*failed_items(failures), *(sources.item(row) for row in rows)],
        item_notes=sources.notes,
        item_order="what has no score, then Dice, the lowest first",
        columns=[c for c in _COLUMNS if c.key != "group" or any(row.group != row.id for row in rows)],
        target_columns=TARGET_COLUMNS,
        files=run.files(FILES),
    )


class _Sources:
    """Where the layers of the images of a scored run are, and why some are not there (any more)."""

    def __init__(self, run: FinishedRun, wanted: Collection[str]):
        scored = ScoredRun(str(run.setting("run")))
        self._layers = Layers(scored)
        self._uris, no_images = _or_why(scored.image_uris)
        self._targets, no_targets = _or_why(lambda: _targets_of(scored, wanted))
        self._mpp = setting_of(scored.uri, "data.mpp")
        self._truth = _Truth(run, wanted, self._uris.values())
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

    def __init__(self, run: FinishedRun, wanted: Collection[str], image_uris: Collection[str]):
        values = run.setting("truth.annotation")
        self._config = configs.build(AnnotationConfig, values if isinstance(values, dict) else {})
        self._kept: dict[str, bytes] = {}
        self._wanted, self._images = wanted, image_uris
        cohort, masks, shapes = (run.setting(f"truth.{kind}") for kind in ("cohort", "masks", "annotations"))
        self.cohort: Mapping[str, CohortRow] = {}
        self._uris: Mapping[str, str] = {}
        self.why = ""
        """Why there is no truth of any image."""
        if isinstance(cohort, str):
            self.cohort, self.why = _or_why(lambda: {row.id: row for row in cohorts.read_cohort(cohort)})
        elif isinstance(masks, str):
            self._uris, self.why = _or_why(lambda: listing.find(masks, MASK_SUFFIXES).with_ids_of(wanted).uris)
        elif isinstance(shapes, str):
            self._uris, self.why = _or_why(lambda: self._find(shapes))

    def of(self, image_id: str) -> Callable[[Mask], Mask] | None:
        """Return what makes the truth of an image, given its predicted mask; None: no file is called by it."""
        uri = self._uris.get(image_id)
        return None if uri is None else functools.partial(self._read, uri, image_id)

    def _find(self, source: str) -> dict[str, str]:
        return find_annotations(source, self._wanted, image_uris=self._images, describe=self._describe).uris

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
        facts.append(("mean Dice", score(overall.dice_mean)))
        facts.append(("95 % interval", interval(overall.dice_low, overall.dice_high)))
        facts.append(("pooled Dice", score(overall.pooled_dice)))
        facts.append(("target F1", score(overall.object_f1)))
    negatives = [row for row in rows if not row.target_px]
    if negatives:
        facts.append(("false alarms", f"{sum(row.num_pred > 0 for row in negatives):,} of {len(negatives):,}"))
    return facts


def _subset_table(summary: Sequence[SubsetScore]) -> Table:
    rows = [asdict(one) | {"interval": interval(one.dice_low, one.dice_high)} for one in summary]
    for row in rows:
        row["name"] = row["name"] if row["subset"] == "overall" else f"{row['subset']}: {row['name']}"
    reading = "Means over images with targets, with intervals from resampled images; few images give none."
    return Table("Scores", reading, _SUBSET_COLUMNS, rows)
