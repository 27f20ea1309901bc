"""The pages of a training and of its thresholds: which images come first, what curves and tables say."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stas_core import storage, tables
from stas_core.data import images
from stas_core.data.cohort import CohortRow
from stas_core.pages import charts, curves, search, training
from stas_core.pages.contents import Chart, Contents, Series
from stas_core.pages.finished import FinishedRun, cohort_of
from stas_core.pages.pictures import make_pictures
from stas_core.pages.strips import MOST_FOLDS, over_epochs
from stas_core.review import ReviewField, ReviewTarget
from stas_core.runs import EpochMetrics, FoldResult, FoldScores, OofScore, TrainingRun
from stas_core.scores import metrics
from stas_core.train.examples import small

EPOCHS = 3


def train(folder: Path, rows: list[CohortRow], cohort_uri: str) -> TrainingRun:
    """Write what train_folds leaves of two folds, whose maps are blurred masks; those of fold 1 are empty."""
    run = TrainingRun(str(folder))
    storage.write_bytes(run.path(run.CONFIG), f"data:\n  cohort: {cohort_uri}\n".encode())
    scores = []
    for number in (0, 1):
        fold, oof = run.fold(number), []
        for row in (row for row in rows if row.fold == number):
            truth = images.decode_mask(Path(row.mask_uri).read_bytes(), row.id)
            prob = (truth * (200 if number == 0 else 20)).astype(np.uint8)
            count = metrics.count(metrics.is_target(prob), truth)
            uri = fold.write_map(row.id, images.encode_map(prob))
            one = count.dice, count.precision, count.recall, count.tp, count.fp, count.fn
            oof.append(OofScore(row.id, number, uri, *one))
            if len(oof) < 3:
                for epoch in (1, EPOCHS):
                    fold.write_example(epoch, row.id, images.encode_map(small(prob)))
        fold.write_oof(oof)
        history = [
            EpochMetrics(
                fold=number,
                epoch=epoch,
                train_loss=1 / epoch,
                lr=1e-3,
                grad_norm=1.0,
                images_per_s=5,
                val_dice=0.3 * epoch if epoch > 1 else None,
                unix_time_s=0,
            )
            for epoch in range(1, EPOCHS + 1)
        ]
        fold.write_metrics(history)
        fold.finish(FoldResult(number, EPOCHS, 0.9, 0.9, 0.9, 0.9, 0.9, 3, 1.0, 5.0, ("cpu",)), {})
        given: dict[str, Any] = {name: 0.5 for name in FoldScores.__dataclass_fields__}
        scores.append(FoldScores(**given | {"fold": number, "num_images": len(oof), "best_epoch": 3}))
    run.write_folds(scores)
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cohort_rows: list[CohortRow], cohort_uri: str) -> Contents:
    folder = tmp_path_factory.mktemp("folds")
    run = train(folder, cohort_rows, cohort_uri)
    return training.build(FinishedRun.of(run.uri, {"stage": "train_folds", "config": {"data": {"mpp": 0.5}}}))


def test_the_worst_images_come_first_with_all_their_layers(made: Contents, cohort_rows: list[CohortRow]) -> None:
    assert [item.values["fold"] for item in made.items] == [1] * 4 + [0] * 4
    assert all(("Dice below 0.5" in item.tags) == (item.values["fold"] == 1) for item in made.items)
    assert {item.id for item in made.items} == {row.id for row in cohort_rows}
    pictures = list(make_pictures([item.source for item in made.items]))
    assert all(set(one.layers) == {"image", "map", "truth", "found"} and not one.notes for one in pictures)
    assert [bool(one.layers["found"]) for one in pictures] == [False] * 4 + [True] * 4
    assert [one.dice for one in pictures] == pytest.approx([item.values["dice"] for item in made.items])


def test_the_review_queue_is_the_order_and_its_findings_are_listed(
    tmp_path: Path, cohort_rows: list[CohortRow], cohort_uri: str
) -> None:
    run = train(tmp_path, cohort_rows, cohort_uri)
    first, second = cohort_rows[3].id, cohort_rows[0].id
    queue = [
        ReviewField(1, first, "a.png", 0.9, ["unannotated", "outline_differs"], 2, 0.4),
        ReviewField(2, second, "b.png", 0.1, [], 0, 0.9),
    ]
    places = [
        ReviewTarget(first, "unannotated", 0.9, 0.95, 400, 5, 6, 25, 26),
        ReviewTarget(first, "outline_differs", 0.2, 0.5, 40, 50, 60, 55, 68),
    ]
    tables.write_rows(run.path(run.REVIEW), ReviewField, queue)
    tables.write_rows(run.path(run.REVIEW_TARGETS), ReviewTarget, places)
    page = training.build(FinishedRun.of(run.uri, {"stage": "train_folds", "config": {}}))
    assert [item.id for item in page.items[:2]] == [first, second] and len(page.items) == len(cohort_rows)
    assert [item.values.get("rank") for item in page.items[:3]] == [1, 2, None]
    assert {"not annotated", "outline differs"} <= set(page.items[0].tags) and not page.items[1].targets
    assert [(one["number"], one["box"], one["kind"]) for one in page.items[0].targets] == [
        (1, (5, 6, 25, 26), "not annotated"),
        (2, (50, 60, 55, 68), "outline differs"),
    ]
    assert page.columns[0].key == "rank" and page.item_order.startswith("how much a second look")


def test_curves_are_those_of_all_folds(made: Contents) -> None:
    lines = {figure.title: figure.chart for figure in made.figures if figure.chart is not None}
    dice, rate = lines["Dice on the images a fold does not see"], lines["Learning rate"]
    assert [one.name for one in dice.series] == ["fold 0", "fold 1"]
    assert [x for x, _ in dice.series[0].points] == [2, 3]  # the first epoch was not validated
    assert [one.name for one in rate.series] == ["all folds"]


def test_examples_stand_in_a_row_of_epochs_for_each_field(made: Contents, cohort_rows: list[CohortRow]) -> None:
    figures = [figure for figure in made.figures if figure.strips]
    assert [figure.title for figure in figures] == [f"Examples over epochs, fold {fold}" for fold in (0, 1)]
    for fold, figure in enumerate(figures):
        ids = [row.id for row in cohort_rows if row.fold == fold]
        assert [strip.title for strip in figure.strips] == ids[:2]
        for strip in figure.strips:
            assert [caption for caption, _ in strip.tiles] == ["the image", "epoch 1", f"epoch {EPOCHS}"]
            assert len({picture for _, picture in strip.tiles[1:]}) == 1  # their maps are the same


def test_examples_of_images_that_are_gone_are_left_white(
    tmp_path: Path, cohort_rows: list[CohortRow], cohort_uri: str
) -> None:
    run = train(tmp_path, cohort_rows, cohort_uri)
    (figure, _) = over_epochs(run, [0, 1], {})
    assert [caption for caption, _ in figure.strips[0].tiles] == ["epoch 1", f"epoch {EPOCHS}"]
    figures = over_epochs(run, range(1, 9), {})
    assert len(figures) == 1 and figures[0].reading.endswith(f"Of the first {MOST_FOLDS} of 8 folds.")


def test_a_cohort_that_is_gone_is_named(tmp_path: Path, cohort_rows: list[CohortRow]) -> None:
    run = train(tmp_path, cohort_rows, f"{tmp_path}/gone/cohort.parquet")
    record = {"stage": "train_folds", "config": {}}
    page = training.build(FinishedRun.of(run.uri, record))
    (note,) = page.item_notes
    assert "No image and no annotation can be shown: there is no cohort table" in note and "gone/cohort.parquet" in note
    assert len(page.items) == len(cohort_rows)


def test_a_damaged_cohort_is_named(tmp_path: Path, cohort_rows: list[CohortRow]) -> None:
    """Only scoring may be given a list in its place, which lacks a cohort's columns, too."""
    damaged = str(tmp_path / "cohort.parquet")
    tables.write_table(damaged, pa.table({"id": ["a"], "image_uri": ["a.png"]}))
    run = train(tmp_path / "folds", cohort_rows, damaged)
    found = FinishedRun.of(run.uri, {"stage": "train_folds", "config": {}})
    (note,) = training.build(found).item_notes
    assert "No image and no annotation can be shown" in note and f"{damaged} has no column" in note
    for config in ({"cohort": damaged, "run": "/nowhere"}, {"run": run.uri}):
        rows, why = search._cohort(FinishedRun(str(tmp_path), {}, config))
        assert not rows and f"{damaged} has no column" in why
    assert cohort_of(damaged, or_list=True) == ({}, "")


def test_what_a_threshold_costs_is_what_cutting_the_maps_gives() -> None:
    rng = np.random.default_rng(0)
    maps = [rng.integers(0, 256, (12, 15), np.uint8) for _ in range(3)]
    truths = [rng.random((12, 15)) < 0.3 for _ in range(3)]
    pairs = list(zip(maps, truths, strict=True))
    levels = np.stack([metrics.count_grey_levels(*pair) for pair in pairs])
    dice, precision, recall = curves.curves_of(levels.astype(np.float64))
    for cut in (1, 128, 240):
        counts = [metrics.count(prob >= cut, truth) for prob, truth in pairs]
        assert dice[cut] == pytest.approx(np.mean([one.dice for one in counts]))
        assert precision[cut] == pytest.approx(np.mean([one.precision for one in counts]))
        assert recall[cut] == pytest.approx(np.mean([one.recall for one in counts]))


def test_maps_that_are_gone_give_no_curve(tmp_path: Path) -> None:
    assert curves.cut_figure([(f"{tmp_path}/a.png", f"{tmp_path}/b.png")]) is None
    assert curves.cut_figure([]) is None


def test_the_best_of_many_values_is_kept_in_each_bin() -> None:
    trials = [(float(value), np.sin(value / 50)) for value in range(200)]
    points = search.best_by_value(trials)
    assert len(points) <= 16 and max(y for _, y in points) == max(y for _, y in trials)
    assert points == sorted(points)


@pytest.mark.parametrize("points", [[], [(1.0, 0.5)], [(1.0, 0.5), (2.0, 0.5)], [(0.0, float("nan")), (1.0, 2.0)]])
def test_a_chart_of_little_is_a_chart(points: Any) -> None:
    chart = Chart("<x>", "y", [Series("a & b", points)], marks=[(1.0, "<m>")])
    drawn = str(charts.draw(chart, '"title"'))
    assert "&lt;x&gt;" in drawn and "nan" not in drawn and drawn.count("<svg") == 1
    assert "NaN" not in str(charts.to_json(chart))
