"""The tables of an evaluation, by hand and by properties."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stas_core import config, storage, tables
from stas_core.data import images
from stas_core.data.annotations import AnnotationConfig
from stas_core.errors import UnknownLabel
from stas_core.failures import Failure
from stas_core.scores import bootstrap, evaluation, metrics, report
from stas_core.scores.bootstrap import BootstrapConfig
from stas_core.scores.evaluation import Comparison, ImageScore, SubsetScore
from workflows.evaluate import EvaluateConfig

IMAGE, GROUP = BootstrapConfig(num_resamples=100), BootstrapConfig(num_resamples=100, by="group")
SHAPE = (6, 7)


def row(image_id: str, truth: Any, mask: Any, prob_map: Any = None, **values: Any) -> ImageScore:
    score = evaluation.score_image(image_id, image_id, np.array(truth, bool), np.array(mask, bool), prob_map)
    return replace(score, **values)


# Dice 1 and 2 / 3; the second map is at 0.5 what the first mask is; 50 % of each image is target.
ROWS = [
    row("a", [[1, 1, 0, 0]], [[1, 1, 0, 0]], np.array([[255, 255, 0, 0]], np.uint8), group="x", against_dice=0.5),
    row("b", [[0, 1, 1, 0]], [[0, 1, 0, 0]], np.array([[0, 255, 128, 0]], np.uint8), group="x"),
]


def test_an_image_is_scored_by_pixels_and_by_targets() -> None:
    first, second = ROWS
    assert (first.dice, first.tp, first.fp, first.fn, first.stratum) == (1, 2, 0, 0, 6)
    assert (second.dice, second.precision, second.recall) == pytest.approx((2 / 3, 1, 1 / 2))
    assert (second.num_truth, second.num_pred, second.num_matched) == (1, 1, 1)
    assert (second.raw_dice, second.raw_tp, second.raw_num_matched) == (1, 2, 1)
    assert (second.height, second.width, second.target_px) == (1, 4, 2)
    assert row("c", [[1]], [[1]]).raw_dice is None
    tables.to_table(ImageScore, ROWS).validate(full=True)


@pytest.mark.parametrize("column", ["truth_uri", "against_uri"])
def test_whatever_an_image_raises_is_its_own_failure(
    column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = {name: str(tmp_path / f"{name}.png") for name in ("truth", "mask", "odd")}
    for uri in masks.values():
        Path(uri).write_bytes(images.encode_mask(np.eye(4, dtype=bool)))
    item = {"id": "a", "group": "a", "truth_uri": masks["truth"], "mask_uri": masks["mask"], "truth_fingerprint": ""}
    item |= {"map_uri": "", "against_uri": "", "against_map_uri": "", column: masks["odd"]}

    def read(uri: str) -> bytes:
        if uri == masks["odd"]:
            raise ZeroDivisionError("an odd header")
        return Path(uri).read_bytes()

    monkeypatch.setattr(storage, "read_bytes", read)
    found = evaluation.score_files(evaluation.PairedFiles(**item), AnnotationConfig())
    failure = found.not_compared if column == "against_uri" else found.failure
    assert failure is not None and failure.reason == "internal_error"
    assert "ZeroDivisionError: an odd header" in failure.message
    assert (found.score is not None and found.score.dice == 1) is (column == "against_uri")


def test_summary_by_hand() -> None:
    table = evaluation.summarise_scores(ROWS, IMAGE)
    assert [(line.prediction, line.subset, line.name) for line in table] == [
        (prediction, *subset)
        for prediction in ("post-processed", "raw 0.5")
        for subset in (("overall", "all"), ("stratum", "≥10 %"), ("group", "x"))
    ]
    overall = table[0]
    assert overall.dice_mean == pytest.approx(5 / 6) and overall.dice_sd == pytest.approx(np.sqrt(1 / 18))
    assert (overall.tp, overall.fp, overall.fn) == (3, 0, 1)
    assert overall.pooled_dice == pytest.approx(6 / 7) and overall.pooled_recall == 0.75
    assert (overall.num_matched, overall.num_pred, overall.num_truth, overall.object_f1) == (2, 2, 2, 1)
    assert table[3].dice_mean == 1
    tables.to_table(SubsetScore, table).validate(full=True)


def many(num_images: int, num_groups: int | None = None) -> list[ImageScore]:
    """Return images of Dice 0, 0.5 and 1 in turn; the other run's masks and maps are the maps of this one."""
    masks = ([[0, 0, 1]], [[1, 0, 1]], [[1, 1, 0]])
    rows = []
    for index in range(num_images):
        prob_map = np.array([[200, 140, 10 * index]], np.uint8)
        image = row(f"{index:02d}", [[1, 1, 0]], masks[index % 3], prob_map, group=f"{index % (num_groups or 99):02d}")
        rows.append(replace(image, against_dice=image.raw_dice, against_raw_dice=image.raw_dice))
    return rows


MEANS = ("dice", "precision", "recall")
BOUNDED = (*MEANS, *(f"pooled_{score}" for score in MEANS), "object_f1", "object_precision", "object_recall")


def test_too_few_images_or_groups_give_no_interval() -> None:
    alone = evaluation.summarise_scores(ROWS[:1], IMAGE)[0]
    assert alone.dice_sd is None
    for rows, how, enough in (
        (many(7), IMAGE, False),
        (many(8), IMAGE, True),
        (many(16, 7), GROUP, False),
        (many(16, 7), IMAGE, True),
        (many(16, 8), GROUP, True),
    ):
        overall, compared = evaluation.summarise_scores(rows, how)[0], evaluation.compare_scores(rows, how)
        assert len(compared) == 3 and overall.dice_sd is not None
        bounds = [getattr(overall, f"{score}_{bound}") for score in BOUNDED for bound in ("low", "high")]
        bounds += [getattr(line, bound) for line in compared for bound in ("low", "high")]
        assert all((value is not None) == enough for value in bounds)
        text = report.summary_markdown([overall], how) + report.comparisons_markdown(compared, how)
        assert (text.count("(n/a)") == 0) if enough else (text.count("(n/a)") == 3 + 2 + 3)
        assert f"fewer than 8 {how.by}s give no interval" in text


@pytest.mark.parametrize(("rows", "how"), [(many(9), IMAGE), (many(16, 8), GROUP), (many(16, 8), IMAGE)])
def test_every_score_has_the_interval_of_the_same_resamples(rows: list[ImageScore], how: BootstrapConfig) -> None:
    plain: dict[str, Any] = {"num_resamples": 100, "groups": [r.group for r in rows] if how is GROUP else None}
    pixels = [metrics.Counts(r.tp, r.fp, r.fn) for r in rows]
    true = [(r.num_matched, r.num_pred, r.num_truth) for r in rows]
    targets = [metrics.Counts(matched, pred - matched, truth - matched) for matched, pred, truth in true]
    expected = {score: bootstrap.bootstrap_interval([getattr(r, score) for r in rows], **plain) for score in MEANS}
    expected |= {f"pooled_{score}": found for score, found in bootstrap.pooled_intervals(pixels, **plain).items()}
    expected |= {f"object_{score}": found for score, found in bootstrap.pooled_intervals(targets, **plain).items()}
    expected["object_f1"] = expected.pop("object_dice")
    overall = evaluation.summarise_scores(rows, how)[0]
    assert {
        score: (getattr(overall, f"{score}_low"), getattr(overall, f"{score}_high")) for score in BOUNDED
    } == expected
    for score in BOUNDED:
        value = getattr(overall, score if hasattr(overall, score) else f"{score}_mean")
        assert getattr(overall, f"{score}_low") < value < getattr(overall, f"{score}_high")
    shown = [
        f"{getattr(overall, f'{score}_low'):.4f} to {getattr(overall, f'{score}_high'):.4f}"
        for score in ("pooled_dice", "object_f1")
    ]
    text = report.summary_markdown([overall], how)
    assert all(text.count(interval) for interval in shown)


def test_intervals_over_images_of_fewer_groups_come_with_a_warning() -> None:
    def text(rows: list[ImageScore], how: BootstrapConfig) -> str:
        return report.summary_markdown(evaluation.summarise_scores(rows, how), how)

    warned = text(many(16, 8), IMAGE)
    assert "from only 8 groups" in warned and "bootstrap.by=group resamples whole groups" in warned
    assert "| Stratum | Images | Groups |" in warned and "| all | 16 | 8 |" in warned
    assert "bootstrap.by=group" not in text(many(16, 8), GROUP) and "| all | 16 | 8 |" in text(many(16, 8), GROUP)
    # Where no groups are known, each image is its own.
    assert "bootstrap.by=group" not in text(many(16), IMAGE) and "Groups" not in text(many(16), IMAGE)


def test_comparisons_by_hand() -> None:
    raw, against = evaluation.compare_scores(ROWS, IMAGE)
    assert (raw.first, raw.second, raw.num_images) == ("post-processed", "raw 0.5", 2)
    assert (raw.first_mean, raw.second_mean) == pytest.approx((5 / 6, 1))
    assert raw.difference == pytest.approx(-1 / 6)
    assert (raw.share_better, raw.share_equal, raw.share_worse) == (0, 0.5, 0.5)
    assert (against.num_images, against.difference, against.low) == (1, 0.5, None)
    tables.to_table(Comparison, [raw, against]).validate(full=True)


def test_maps_of_two_runs_are_compared_at_half() -> None:
    rows = [replace(image, against_raw_dice=score) for image, score in zip(many(9), [None, *[0.25] * 8], strict=True)]
    *_, maps = evaluation.compare_scores(rows, IMAGE)
    assert (maps.first, maps.second, maps.num_images) == ("run, raw 0.5", "against, raw 0.5", 8)
    ours = [image.raw_dice or 0.0 for image in rows[1:]]
    assert (maps.first_mean, maps.second_mean) == pytest.approx((np.mean(ours), 0.25))
    assert (maps.low, maps.high) == bootstrap.bootstrap_interval(np.array(ours) - 0.25, num_resamples=100)
    without_map = [replace(image, raw_dice=None) for image in rows]
    assert [line.first for line in evaluation.compare_scores(without_map, IMAGE)] == ["run"]


def test_without_maps_and_other_run_there_is_nothing_to_compare() -> None:
    rows = [row("a", [[1, 0]], [[1, 0]])]
    assert evaluation.compare_scores(rows, IMAGE) == []
    assert report.comparisons_markdown([], IMAGE) == ""
    assert {line.prediction for line in evaluation.summarise_scores(rows, IMAGE)} == {"post-processed"}


arrays = hnp.arrays(bool, SHAPE)


@settings(max_examples=25, deadline=None)
@given(pairs=st.lists(st.tuples(arrays, arrays, st.sampled_from("xyz")), min_size=1, max_size=6))
def test_pooled_scores_are_those_of_the_images_side_by_side(pairs: list[tuple[Any, Any, str]]) -> None:
    rows = [row(str(i), truth, mask, group=group) for i, (truth, mask, group) in enumerate(pairs)]
    overall, *parts = evaluation.summarise_scores(rows, IMAGE)
    joined = metrics.count(np.concatenate([mask for _, mask, _ in pairs]), np.concatenate([t for t, _, _ in pairs]))
    assert (overall.tp, overall.fp, overall.fn) == (joined.tp, joined.fp, joined.fn)
    assert overall.pooled_dice == joined.dice
    strata = [part for part in parts if part.subset == "stratum"]
    for name in ("num_images", "tp", "fp", "fn", "num_truth", "num_pred", "num_matched"):
        assert sum(getattr(part, name) for part in strata) == getattr(overall, name)
    assert all(part.num_images > 1 for part in parts if part.subset == "group")


def test_markdown_tables_have_one_cell_per_column() -> None:
    text = report.summary_markdown(evaluation.summarise_scores(ROWS, IMAGE), IMAGE)
    text += report.comparisons_markdown(evaluation.compare_scores(ROWS, IMAGE), IMAGE)
    failed = Failure("c", "score_images", "slow", "a | b\nc")
    text += report.failures_markdown([failed] * 60, [])
    parts = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(parts) == 10
    for lines in parts:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "## Missing: 60" in text and text.count("| c |") == 50 and "a \\| b c" in text
    assert "The first 50 are listed" in text


def test_the_remedy_for_a_label_of_the_truth_is_a_setting_of_this_stage(tmp_path: Path) -> None:
    ring = [[1, 1], [9, 1], [9, 9], [1, 1]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(feature | {"properties": {"classification": {"name": "grade=2"}}}))
    mask = np.zeros((20, 20), bool)
    with pytest.raises(UnknownLabel) as caught:
        evaluation.read_truth(str(path), mask, AnnotationConfig(), image_id="a", fingerprint="")
    words = shlex.split(str(caught.value).partition("say what each means: ")[2].partition(" (or ignore)")[0])
    loaded = config.load_config(EvaluateConfig, None, ["run=a", f"truth.annotations={tmp_path}", *words])
    found, _ = evaluation.read_truth(str(path), mask, loaded.truth.annotation, image_id="a", fingerprint="")
    assert found.any()
