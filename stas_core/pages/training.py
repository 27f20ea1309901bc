"""The page of train_folds: curves of the folds, and every out-of-fold image beside its annotation."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stas_core import storage, tables
from stas_core.data.cohort import CohortRow
from stas_core.pages.contents import Chart, Column, Contents, Figure, Item, PictureSource, Series, Table
from stas_core.pages.curves import cut_figure
from stas_core.pages.finished import RANK, FinishedRun, cohort_of, duration, mpp_of
from stas_core.pages.strips import over_epochs
from stas_core.review import NO_RESPONSE, OUTLINE_DIFFERS, UNANNOTATED, ReviewField, ReviewTarget
from stas_core.runs import EpochMetrics, FoldScores, OofScore, TrainingRun
from stas_core.scores import bootstrap
from stas_core.scores.bootstrap import MIN_RESAMPLED
from stas_core.scores.metrics import is_target

_COLUMNS = (
    RANK,
    Column("dice", "Dice", "of the map at 0.5 against the annotation, 0 to 1"),
    Column("precision", "precision", "share of what is predicted that is annotated"),
    Column("recall", "recall", "share of what is annotated that is predicted"),
    Column("fold", "fold", "whose training did not see it", kind="whole"),
    Column("truth", "target", "share of the image that is annotated", kind="share", digits=2),
    Column("found", "predicted", "share of the image that is predicted", kind="share", digits=2),
)
_FINDING_COLUMNS = (
    Column("kind", "to check", kind="text"),
    Column("priority", "weight", "how sure the model is, and how large the place is, 0 to 1", digits=2),
    Column("probability", "mean prob.", digits=2),
    Column("area_px", "area px", kind="whole"),
)
_KINDS = {UNANNOTATED: "not annotated", NO_RESPONSE: "not predicted", OUTLINE_DIFFERS: "outline differs"}
_INTERVAL = f"of the mean, from resampled images, or groups where these have several; n/a: fewer than {MIN_RESAMPLED}"
_FOLD_COLUMNS = (
    Column("fold", "fold", kind="whole"),
    Column("num_images", "images", kind="whole"),
    Column("dice_mean", "Dice"),
    Column("interval", "95 % interval", _INTERVAL, kind="text"),
    Column("precision_mean", "precision"),
    Column("recall_mean", "recall"),
    Column("best_epoch", "best epoch", kind="whole"),
    Column("optimism", "best - last", "what choosing the epoch on these same images would seem to gain"),
)
_FIGURES = (
    (
        "fold_scores",
        "Dice of each image, by fold",
        "A box far below the others is a fold whose images differ, or a training that went wrong.",
    ),
)
_FILES = (
    ("ensemble.json", "the trained members: what score_images and score_slides are given"),
    ("folds.parquet", "a row per fold: its scores and their intervals"),
    ("review.parquet", "fields whose annotation deserves a second look, in order; review_targets.parquet: the places"),
    ("review/", "these places as GeoJSON, for QuPath"),
    ("figures/", "curves and examples in full size"),
    ("config.resolved.yaml", "all settings: gives the same run again"),
)
_WEAK = 0.5


def build(run: FinishedRun) -> Contents:
    """Return the contents of the page."""
    trained = TrainingRun(run.uri)
    rows = trained.folds()
    histories = {row.fold: trained.fold(row.fold).metrics() for row in rows}
    cohort, no_cohort = cohort_of(run.setting("data.cohort"))
    scores = [score for row in rows for score in trained.fold(row.fold).oof()]
    queue = run.review_queue()
    scores.sort(key=lambda score: (queue[score.id].rank if score.id in queue else math.inf, score.dice, score.id))
    maps = {score.id: oof_map(trained, score) for score in scores}
    pairs = [(maps[name], cohort[name].mask_uri) for name in sorted(maps) if name in cohort]
    cut = cut_figure(pairs)
    items = [oof_item(score, cohort.get(score.id), maps[score.id], run.setting("data.mpp")) for score in scores]
    return Contents(
        title=f"Training of {len(rows)} folds",
        lead="Every image is predicted by the fold that did not see it. Those come first where a sure model and the "
        "annotation differ: is the image hard, or the annotation wrong?",
        facts=_facts(run, rows, scores, histories),
        figures=[
            *curves(histories),
            *run.figures(_FIGURES),
            *([] if cut is None else [cut]),
            *over_epochs(trained, [row.fold for row in rows], cohort),
        ],
        tables=[_table(rows)],
        items=_with_findings(items, queue, trained),
        item_order="how much a second look would pay, then Dice, the lowest first"
        if queue
        else "Dice, the lowest first",
        item_notes=[f"No image and no annotation can be shown: {no_cohort}"] if no_cohort else (),
        columns=_COLUMNS if queue else _COLUMNS[1:],
        target_columns=_FINDING_COLUMNS,
        files=run.files(_FILES),
        layer_names={"truth": "annotation", "found": "prediction at 0.5"},
    )


def _with_findings(items: Sequence[Item], queue: Mapping[str, ReviewField], trained: TrainingRun) -> list[Item]:
    """Return the images with their places in the queue, and what is to be checked there."""
    places: dict[str, list[ReviewTarget]] = {}
    for place in tables.read_rows(trained.path(trained.REVIEW_TARGETS), ReviewTarget) if queue else ():
        places.setdefault(place.id, []).append(place)
    found = []
    for item in items:
        if (field := queue.get(item.id)) is not None:
            tags = (*item.tags, *(_KINDS[reason] for reason in field.reasons))
            targets = [_place(number, one) for number, one in enumerate(places.get(item.id, ()), start=1)]
            item = replace(item, values={**item.values, "rank": field.rank}, tags=tags, targets=targets)
        found.append(item)
    return found


def _place(number: int, place: ReviewTarget) -> dict[str, object]:
    return {
        "number": number,
        "box": (place.x0, place.y0, place.x1, place.y1),
        "kind": _KINDS[place.kind],
        "priority": place.priority,
        "probability": place.probability,
        "area_px": place.area_px,
    }


def oof_map(trained: TrainingRun, score: OofScore) -> str:
    """Return the path of an out-of-fold map."""
    fold = trained.fold(score.fold)
    return storage.resolve(score.map_uri, fold.uri, where=fold.path(fold.OOF))


def oof_item(score: OofScore, row: CohortRow | None, map_uri: str, given_mpp: object) -> Item:
    """Return an out-of-fold image."""
    mpp, mpp_note = mpp_of(row, given_mpp)
    area = None if row is None else row.height * row.width
    tags = [f"fold {score.fold}", "with target" if score.tp + score.fn else "without target"]
    tags += [f"Dice below {_WEAK:g}"] if score.dice < _WEAK else []
    values = {
        "dice": score.dice,
        "precision": score.precision,
        "recall": score.recall,
        "fold": score.fold,
        "truth": None if area is None else (score.tp + score.fn) / area,
        "found": None if area is None else (score.tp + score.fp) / area,
    }
    source = PictureSource(
        "" if row is None else row.image_uri,
        map_uri=map_uri,
        truth_uri="" if row is None else row.mask_uri,
        found_by=functools.partial(is_target, threshold=0.5),
        mpp=mpp,
        mpp_note=mpp_note,
    )
    return Item(score.id, values, source, tags=tuple(tags))


def curves(histories: Mapping[int, Sequence[EpochMetrics]]) -> list[Figure]:
    """Return the curves of all folds over epochs."""

    def lines(value: str) -> list[Series]:
        found = []
        for number, (fold, history) in enumerate(histories.items()):
            points = [(float(one.epoch), getattr(one, value)) for one in history]
            known = [(x, float(y)) for x, y in points if y is not None]
            found.append(Series(f"fold {fold}", known, colour=number))
        return found

    def figure(title: str, value: str, label: str, reading: str, y_range: tuple[float, float] | None = None) -> Figure:
        chart = Chart("epoch", label, lines(value), y_range=y_range, whole_x=True, start=1e9)
        return Figure(title, reading, chart=chart)

    rates = [[(one.epoch, one.lr) for one in history] for history in histories.values()]
    rate = figure("Learning rate", "lr", "learning rate", "At the last step of each epoch.")
    if rates and all(one == rates[0] for one in rates):
        same = Series("all folds", [(float(x), y) for x, y in rates[0]])
        rate = Figure(
            rate.title,
            f"{rate.reading} All folds have the same.",
            chart=Chart("epoch", "learning rate", [same], whole_x=True, start=1e9),
        )
    return [
        figure(
            "Dice on the images a fold does not see",
            "val_dice",
            "validation Dice",
            "Curves that still rise at the end call for more epochs; one that falls while its loss falls has learned "
            "its own images by heart.",
            (0, 1),
        ),
        figure(
            "Training loss",
            "train_loss",
            "loss",
            "It should fall, and level off; a jump is a learning rate that is too high.",
        ),
        rate,
        figure(
            "Norm of the gradient",
            "grad_norm",
            "norm, before clipping",
            "Mean over the steps of an epoch; spikes go before a training that falls apart.",
        ),
    ]


def _facts(
    run: FinishedRun,
    rows: Sequence[FoldScores],
    scores: Sequence[OofScore],
    histories: Mapping[int, Sequence[EpochMetrics]],
) -> list[tuple[str, str]]:
    dice = np.array([score.dice for score in scores])
    seconds = [one.get("seconds", 0) for one in _fold_facts(run).values()]
    facts = [
        ("folds", str(len(rows))),
        ("images", f"{len(scores):,}"),
        ("mean Dice", f"{dice.mean():.3f}" if len(dice) else "-"),
        ("between folds", _spread([row.dice_mean for row in rows])),
        (f"Dice below {_WEAK:g}", f"{int((dice < _WEAK).sum()):,}"),
        ("epochs", str(max((history[-1].epoch for history in histories.values() if history), default=0))),
    ]
    return [*facts, *([("time of folds", duration(sum(seconds)))] if any(seconds) else [])]


def _fold_facts(run: FinishedRun) -> Mapping[str, Mapping[str, Any]]:
    folds = run.record.get("folds")
    return {key: one for key, one in folds.items() if isinstance(one, Mapping)} if isinstance(folds, Mapping) else {}


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}" if values else "-"


def _table(rows: Sequence[FoldScores]) -> Table:
    lines = [
        {column.key: getattr(row, column.key, None) for column in _FOLD_COLUMNS}
        | {
            "interval": bootstrap.in_words(row.dice_low, row.dice_high, digits=3),
            "optimism": row.best_val_dice - row.last_val_dice,
        }
        for row in rows
    ]
    reading = "Scores of the last weights on the images that a fold does not see; maps come from these, too."
    return Table("Folds", reading, _FOLD_COLUMNS, lines)
