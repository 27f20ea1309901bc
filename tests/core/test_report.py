import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stas_core import report
from stas_core.cohort import STRATUM_EDGES
from stas_core.errors import ConfigError

HISTORY = [
    {"epoch": 1, "train_loss": 1.0, "lr": 1e-3},
    {"epoch": 2, "train_loss": 0.5, "lr": 5e-4, "val_dice": 0.6, "val_precision": 0.7, "val_recall": 0.5},
]
TILE = report.Tile(np.full((60, 100, 3), 200, np.uint8), "a tile")
FIGURES: dict[str, tuple[Callable[[int], bytes], int, int]] = {
    "targets": (lambda n: report.targets_histogram([1, 2, n]), 3, 4),
    "areas": (lambda n: report.target_area_boxplot({"<1%": [100, 200, n], "1%-2%": [3000]}), 300, 900),
    "strata": (lambda n: report.strata_figure([0, 1, n], ["fold 0", "fold 1", "hold-out"], edges=STRATUM_EDGES), 2, 6),
    "sheet": (lambda n: report.contact_sheet([TILE] * n, columns=2, title="tiles"), 3, 5),
    "curves": (lambda n: report.learning_curves([*HISTORY, HISTORY[1] | {"epoch": n}], title="fold 1"), 3, 4),
    "folds": (lambda n: report.fold_curves({"fold 0": HISTORY, "fold 1": HISTORY[:n]}), 1, 2),
    "scores": (lambda n: report.fold_scores({"fold 0": [0.1, 0.9, n / 10]}), 3, 4),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_pngs_that_depend_on_the_data_alone(name: str) -> None:
    draw, one, two = FIGURES[name]
    data = draw(one)
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG" and min(picture.size) > 300
    assert data == draw(one) != draw(two)
    assert np.asarray(picture.convert("L")).std() > 5  # something is drawn


def test_strata_are_named_by_their_bounds() -> None:
    names = [report.stratum_name(i, STRATUM_EDGES) for i in range(7)]
    assert names == ["<1%", "1%-2%", "2%-3%", "3%-4%", "4%-5%", "5%-10%", "≥10%"]


def test_overlay_draws_outlines_on_a_copy() -> None:
    image = np.full((80, 90, 3), 128, np.uint8)
    truth, prediction = np.zeros((80, 90), bool), np.zeros((80, 90), bool)
    truth[10:30, 10:30] = prediction[40:60, 50:70] = True
    drawn = report.overlay(image, truth=truth, prediction=prediction)
    assert (image == 128).all()
    assert tuple(drawn[10, 20]) == report.TRUTH_RGB and tuple(drawn[40, 60]) == report.PREDICTION_RGB
    assert tuple(drawn[20, 20]) == tuple(drawn[75, 80]) == (128, 128, 128)
    assert np.array_equal(report.overlay(image, truth=None, prediction=None), image)


def test_thumbnails_keep_the_shape() -> None:
    assert report.thumbnail(np.zeros((300, 600, 3), np.uint8), width_px=200).shape == (100, 200, 3)
    assert report.thumbnail(np.zeros((30, 60, 3), np.uint8), width_px=200).shape == (30, 60, 3)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=30), st.integers(1, 5))
def test_examples_are_the_best_the_middle_and_the_worst(dice: list[float], num_each: int) -> None:
    ids = [f"{i:02d}" for i in range(len(dice))]
    score = dict(zip(ids, dice, strict=True))
    picked = report.pick_examples(ids, dice, num_each=num_each)
    chosen = [image_id for group in picked.values() for image_id in group]
    assert len(chosen) == len(set(chosen)) == 3 * min(num_each, len(dice) // 3)
    rest = [score[image_id] for image_id in ids if image_id not in chosen]
    assert min(score[i] for i in picked["best"]) >= max(rest + [score[i] for i in picked["worst"]])
    assert max(score[i] for i in picked["worst"]) <= min(rest + [score[i] for i in picked["best"]])


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ConfigError, match="targets per image is empty"):
        report.targets_histogram([])
