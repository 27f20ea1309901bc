import io
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stas_core.arrays import Mask, RgbImage
from stas_core.data import cohort, images, overlay
from stas_core.data.cohort import STRATUM_EDGES
from stas_core.data.overlay import PREDICTION_RGB, TRUTH_RGB
from stas_core.errors import ConfigError
from stas_core.figures import cohort as cohort_figures
from stas_core.figures import contact_sheet, training
from stas_core.figures.contact_sheet import Tile

HISTORY: list[dict[str, float | None]] = [
    {"epoch": epoch, "train_loss": 1 / epoch, "lr": 1e-3, "images_per_s": 4.0} for epoch in range(1, 7)
]
VALIDATED = [
    row | ({"val_dice": 0.7, "val_precision": 0.6, "val_recall": 0.8} if row["epoch"] == 3 else {"val_dice": None})
    for row in HISTORY
]
RED: RgbImage = np.full((30, 40, 3), (255, 0, 0), np.uint8)
BLUE: RgbImage = np.full((20, 50, 3), (0, 0, 255), np.uint8)
TILES = [Tile(RED, "a"), Tile(BLUE, "b"), Tile(RED, "c")]

FIGURES: dict[str, tuple[Callable[[], bytes], Callable[[], bytes]]] = {
    "targets_histogram": (
        lambda: cohort_figures.targets_histogram([1, 1, 2, 5]),
        lambda: cohort_figures.targets_histogram([1, 1, 2, 6]),
    ),
    "target_area_boxplot": (
        lambda: cohort_figures.target_area_boxplot({"<1 %": [1, 30, 4000], "≥10 %": []}),
        lambda: cohort_figures.target_area_boxplot({"<1 %": [1, 30, 5000], "≥10 %": []}),
    ),
    "strata_figure": (
        lambda: cohort_figures.strata_figure([0, 0, 6], ["fold 0", "fold 1", "hold-out"], edges=STRATUM_EDGES),
        lambda: cohort_figures.strata_figure([0, 1, 6], ["fold 0", "fold 1", "hold-out"], edges=STRATUM_EDGES),
    ),
    "contact_sheet": (
        lambda: contact_sheet.contact_sheet(TILES, columns=2, title="sheet"),
        lambda: contact_sheet.contact_sheet([*TILES[:2], Tile(RED, "d")], columns=2, title="sheet"),
    ),
    "learning_curves": (
        lambda: training.learning_curves(HISTORY, title="fold 0"),
        lambda: training.learning_curves(VALIDATED, title="fold 0"),
    ),
    "learning_curves with validation loss": (
        lambda: training.learning_curves([row | {"val_loss": 0.5} for row in VALIDATED], title="fold 0"),
        lambda: training.learning_curves([row | {"val_loss": 0.6} for row in VALIDATED], title="fold 0"),
    ),
    "fold_curves": (
        lambda: training.fold_curves({"fold 0": VALIDATED, "fold 1": VALIDATED[:4]}),
        lambda: training.fold_curves({"fold 0": VALIDATED, "fold 1": HISTORY}),
    ),
    "fold_scores": (
        lambda: training.fold_scores({"fold 0": [0.1, 0.8, 0.9], "fold 1": [0.7]}),
        lambda: training.fold_scores({"fold 0": [0.1, 0.8, 0.9], "fold 1": [0.6]}),
    ),
}


@cache
def drawn_once(name: str) -> bytes:
    return FIGURES[name][0]()


def pixels(png: bytes) -> RgbImage:
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))


def disc(height: int, width: int, centre: tuple[int, int], radius: int) -> Mask:
    y, x = np.ogrid[:height, :width]
    return np.asarray((y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2)


def where(image: RgbImage, rgb: tuple[int, int, int]) -> Mask:
    return np.asarray((image == rgb).all(axis=2))


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_depends_on_its_data_and_on_nothing_else(name: str) -> None:
    draw, draw_other = FIGURES[name]
    png = drawn_once(name)
    with matplotlib.rc_context({"font.size": 20, "figure.dpi": 40, "lines.linewidth": 9, "axes.facecolor": "red"}):
        assert draw() == png  # whatever the user's matplotlibrc says
    assert draw_other() != png


@pytest.mark.parametrize("name", sorted(FIGURES.keys() - {"contact_sheet"}))
def test_a_figure_is_a_legible_picture_on_white(name: str) -> None:
    image = pixels(drawn_once(name))
    height, width, _ = image.shape
    assert 500 <= height <= 1500 and 900 <= width <= 2400
    ink = np.asarray((image < 250).any(axis=2))
    assert 0.005 < ink.mean() < 0.5
    assert not ink[[0, -1]].any() and not ink[:, [0, -1]].any(), "something is cut off at the picture's border"


def test_drawing_leaves_the_settings_of_the_process_alone() -> None:
    with matplotlib.rc_context({"font.size": 33, "axes.grid.axis": "x"}):
        before = dict(matplotlib.rcParams)
        cohort_figures.targets_histogram([1, 2])
        with pytest.raises(ConfigError):
            cohort_figures.targets_histogram([])
        assert dict(matplotlib.rcParams) == before


def test_figures_need_no_main_thread() -> None:
    drawn: list[bytes] = []
    thread = threading.Thread(target=lambda: drawn.append(cohort_figures.targets_histogram([1, 2])))
    thread.start()
    thread.join()
    assert drawn == [cohort_figures.targets_histogram([1, 2])]


@pytest.mark.parametrize(
    ("draw", "what"),
    [
        (lambda: cohort_figures.targets_histogram([]), "targets per image"),
        (lambda: cohort_figures.target_area_boxplot({}), "target areas"),
        (lambda: cohort_figures.target_area_boxplot({"<1 %": []}), "target areas"),
        (lambda: cohort_figures.strata_figure([], [], edges=STRATUM_EDGES), "strata"),
        (lambda: contact_sheet.contact_sheet([], columns=2, title=""), "contact sheet"),
        (lambda: training.learning_curves([], title=""), "learning curves"),
        (lambda: training.fold_curves({}), "fold curves"),
        (lambda: training.fold_scores({}), "fold scores"),
        (lambda: training.fold_scores({"fold 0": [0.5], "fold 1": []}), "scores of fold 1"),
        (lambda: training.pick_examples([], [], num_each=1), "images to choose examples from"),
    ],
)
def test_nothing_to_draw_is_an_error_that_says_what_is_missing(draw: Callable[[], object], what: str) -> None:
    with pytest.raises(ConfigError, match=f"^nothing to draw: {what} is empty; give at least one value$"):
        draw()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: cohort_figures.target_area_boxplot({"a": [5, 0]}), "a target area is 0 px, expected at least 1"),
        (
            lambda: cohort_figures.strata_figure([7], ["fold 0"], edges=STRATUM_EDGES),
            "strata span 7 to 7, but edges name 0 to 6",
        ),
        (lambda: cohort_figures.strata_figure([-1], ["fold 0"], edges=STRATUM_EDGES), "strata span -1 to -1"),
        (lambda: contact_sheet.contact_sheet(TILES, columns=0, title=""), "columns = 0, expected at least 1"),
        (lambda: training.pick_examples(["a"], [0.5], num_each=0), "num_each = 0, expected at least 1"),
    ],
)
def test_wrong_values_are_named(draw: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw()


def test_strata_are_named_by_their_bounds_in_percent() -> None:
    names = [cohort.stratum_name(i, STRATUM_EDGES) for i in range(len(STRATUM_EDGES))]
    ranges = [f"{low}\N{EN DASH}{high} %" for low, high in [(1, 2), (2, 3), (3, 4), (4, 5), (5, 10)]]
    assert names == ["<1 %", *ranges, "≥10 %"]
    assert cohort.stratum_name(1, (0.0, 0.005, 0.02)) == "0.5\N{EN DASH}2 %"


def test_the_order_of_images_does_not_change_the_strata() -> None:
    stratum, part = [0, 1, 6, 0], ["fold 10", "fold 2", "hold-out", "fold 2"]
    turned = cohort_figures.strata_figure(stratum[::-1], part[::-1], edges=STRATUM_EDGES)
    assert turned == cohort_figures.strata_figure(stratum, part, edges=STRATUM_EDGES)


def test_a_missing_validation_value_and_none_draw_alike() -> None:
    without_none = [{key: value for key, value in row.items() if value is not None} for row in VALIDATED]
    assert training.learning_curves(without_none, title="") == training.learning_curves(VALIDATED, title="")


def test_every_fold_of_many_is_drawn() -> None:
    folds = {f"fold {i}": HISTORY for i in range(22)}
    lower = [row | {"train_loss": -1.0} for row in HISTORY]
    assert training.fold_curves(folds | {"fold 21": lower}) != training.fold_curves(folds)


def test_tiles_stand_in_the_sheet_pixel_for_pixel() -> None:
    noise: RgbImage = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    sheet = pixels(contact_sheet.contact_sheet([Tile(RED, "$a_1$"), Tile(noise, "b")], columns=2, title="t"))
    y, x = np.argwhere(where(sheet, (255, 0, 0))).min(axis=0)
    assert (sheet[y : y + 30, x : x + 40] == RED).all()
    assert where(sheet, (255, 0, 0)).sum() == 30 * 40, "nothing may cover a tile or stretch it"
    found = cv2.matchTemplate(sheet, noise, cv2.TM_SQDIFF)
    assert found.min() == 0


@pytest.mark.parametrize("width", [35, 36, 40, 91, 92])
def test_a_sheet_has_equal_margins_whatever_its_size(width: int) -> None:
    tile: RgbImage = np.full((30, width, 3), (255, 0, 0), np.uint8)
    sheet = pixels(contact_sheet.contact_sheet([Tile(tile, "a")], columns=1, title="t"))
    x = np.flatnonzero(where(sheet, (255, 0, 0)).any(axis=0))
    assert len(x) == width and x[0] == sheet.shape[1] - 1 - x[-1]


@pytest.mark.parametrize(("columns", "same_row"), [(1, False), (2, True), (9, True)])
def test_tiles_go_row_by_row_with_room_for_their_captions(columns: int, same_row: bool) -> None:
    caption = "a caption that is much too long for one line under a tile of forty pixels"
    sheet = pixels(contact_sheet.contact_sheet([Tile(RED, caption), Tile(BLUE, "b")], columns=columns, title="t"))
    red, blue = (np.argwhere(where(sheet, rgb)) for rgb in ((255, 0, 0), (0, 0, 255)))
    assert (len(red), len(blue)) == (RED[..., 0].size, BLUE[..., 0].size)
    if same_row:
        assert red[:, 1].max() < blue[:, 1].min() and red[:, 0].min() == blue[:, 0].min()
        assert blue[:, 1].max() > sheet.shape[1] - 30, "no empty columns"
    else:
        assert red[:, 0].max() + 60 < blue[:, 0].min()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_outlines_hug_their_masks_and_leave_the_rest_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image: RgbImage = rng.integers(100, 120, (60, 90, 3), dtype=np.uint8)
    (y, x), (v, u) = rng.integers((60, 90), size=(2, 2)).tolist()
    truth, prediction = (disc(60, 90, at, int(rng.integers(1, 25))) for at in ((y, x), (v, u)))
    before = image.copy()
    drawn = overlay.draw(image, truth=truth, prediction=prediction)
    assert (image == before).all(), "the input is not drawn on"
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
    just_inside = prediction & (cv2.erode(prediction.astype(np.uint8), cross) == 0)
    just_outside = ~truth & (cv2.dilate(truth.astype(np.uint8), cross) > 0)
    assert where(drawn, PREDICTION_RGB)[just_inside].all()
    assert where(drawn, TRUTH_RGB)[just_outside & ~just_inside].all()
    near = cv2.dilate(truth.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert (drawn == image)[~near & ~prediction].all()
    assert not where(drawn, TRUTH_RGB)[truth].any(), "the truth's line covers no target pixel"


def test_equal_masks_show_both_outlines() -> None:
    mask = disc(200, 400, (100, 200), 50)
    image: RgbImage = np.full((200, 400, 3), 200, np.uint8)
    drawn = overlay.draw(image, truth=mask, prediction=mask)
    assert where(drawn, TRUTH_RGB)[~mask].sum() > 0.85 * 2 * np.pi * 50
    assert where(drawn, PREDICTION_RGB)[mask].sum() > 0.85 * 2 * np.pi * 50


@pytest.mark.parametrize("width", [100, 720, 1716])
def test_lines_grow_with_the_image(width: int) -> None:
    mask = np.zeros((20, width), bool)
    mask[:, : width // 2] = True
    drawn = overlay.draw(np.zeros((20, width, 3), np.uint8), truth=mask, prediction=None)
    assert where(drawn, TRUTH_RGB)[10].sum() == max(1, round(width / 360))


def test_no_mask_or_one_without_border_changes_nothing() -> None:
    full, empty = np.ones((20, 30), bool), np.zeros((20, 30), bool)
    image: RgbImage = np.full((20, 30, 3), 90, np.uint8)
    assert (overlay.draw(image, truth=None, prediction=None) == image).all()
    assert (overlay.draw(image, truth=full, prediction=full) == image).all()
    assert (overlay.draw(image, truth=empty, prediction=empty, tint_errors=True) == image).all()


def test_tint_marks_missed_and_false_areas_only() -> None:
    truth, prediction = disc(100, 300, (50, 100), 40), disc(100, 300, (50, 150), 40)
    image: RgbImage = np.full((100, 300, 3), 100, np.uint8)
    drawn = overlay.draw(image, truth=truth, prediction=prediction, tint_errors=True)
    missed, false, hit, nothing = drawn[50, 70], drawn[50, 180], drawn[50, 125], drawn[50, 250]
    assert tuple(missed) == tuple(round(60 + 0.4 * value) for value in TRUTH_RGB)
    assert tuple(false) == tuple(round(60 + 0.4 * value) for value in PREDICTION_RGB)
    assert (hit == 100).all() and (nothing == 100).all()
    with pytest.raises(ConfigError, match="tint_errors needs both truth and prediction"):
        overlay.draw(image, truth=truth, prediction=None, tint_errors=True)


def test_a_thumbnail_averages_areas_and_keeps_proportions() -> None:
    image: RgbImage = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    small = overlay.thumbnail(image, width_px=20)
    mean = image.reshape(15, 4, 20, 4, 3).mean(axis=(1, 3))
    assert small.shape == (15, 20, 3) and np.abs(small - mean).max() <= 0.5
    assert (overlay.thumbnail(image, width_px=80) == image).all()
    assert overlay.thumbnail(image[:1], width_px=10).shape == (1, 10, 3)


@given(st.lists(st.integers(0, 20).map(lambda k: k / 20), min_size=1, max_size=40), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_examples_are_the_extremes_and_the_middle(dice: list[float], num_each: int) -> None:
    ids = [f"{i:03}" for i in range(len(dice))]
    score = dict(zip(ids, dice, strict=True))
    picked = training.pick_examples(ids, dice, num_each=num_each)
    best, median, worst = ([score[name] for name in picked[kind]] for kind in ("best", "median", "worst"))
    chosen = [name for names in picked.values() for name in names]
    assert len(set(chosen)) == len(chosen), "no image stands twice"
    assert best == sorted(dice, reverse=True)[: len(best)]
    assert worst == sorted(dice)[: len(worst)]
    assert all(min(best) >= score >= max(worst) for score in median if worst)
    if len(dice) >= 3 * num_each:
        assert len(best) == len(median) == len(worst) == num_each
        above = sum(score > max(median) for score in dice)
        below = sum(score < min(median) for score in dice)
        assert max(above, below) <= (len(dice) - num_each + 1) // 2
    order = np.random.default_rng(0).permutation(len(ids))
    assert training.pick_examples([ids[i] for i in order], [dice[i] for i in order], num_each=num_each) == picked


def test_examples_of_few_images() -> None:
    assert training.pick_examples(["a"], [0.1], num_each=4) == {"best": ["a"], "median": [], "worst": []}
    assert training.pick_examples(["a", "b"], [0.1, 0.2], num_each=4) == {"best": ["b"], "median": [], "worst": ["a"]}
    five = training.pick_examples(list("abcde"), [0.5, 0.4, 0.3, 0.2, 0.1], num_each=1)
    assert five == {"best": ["a"], "median": ["c"], "worst": ["e"]}


@pytest.mark.real_data
def test_outlines_show_on_a_real_image(shared: Path) -> None:
    path = sorted((shared / "data/stas/Train_Images").glob("*.jpg"))[0]
    image = images.decode_image(path.read_bytes(), path.name)
    assert not where(image, TRUTH_RGB).any() and not where(image, PREDICTION_RGB).any()
    mask = disc(image.shape[0], image.shape[1], (400, 800), 100)
    small = overlay.thumbnail(overlay.draw(image, truth=mask, prediction=None), width_px=480)
    plain = overlay.thumbnail(image, width_px=480)
    changed = (np.abs(small.astype(int) - plain).max(axis=2) > 40).sum()
    assert changed > 0.8 * 2 * np.pi * 100 * 480 / image.shape[1], "the line survives shrinking"
