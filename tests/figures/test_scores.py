import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from stas_core.errors import ConfigError
from stas_core.figures import scores
from stas_core.scores import metrics

LEVELS = np.stack([np.arange(256, 0, -1) * 4, np.arange(256)], axis=1)
LEVELS[:, 1] = np.minimum(LEVELS[:, 1], LEVELS[:, 0])

FIGURES: dict[str, tuple[Callable[[], bytes], Callable[[], bytes]]] = {
    "dice_histogram": (
        lambda: scores.dice_histogram([0.5, 0.9], [0.4, 0.9]),
        lambda: scores.dice_histogram([0.5, 0.9], []),
    ),
    "dice_by_area": (
        lambda: scores.dice_by_area([10, 1000, 0], [0.5, 0.9, 0.0]),
        lambda: scores.dice_by_area([10, 1000], [0.5, 0.9]),
    ),
    "dice_by_area without targets": (
        lambda: scores.dice_by_area([0], [1.0]),
        lambda: scores.dice_by_area([0, 0], [1.0, 0.0]),
    ),
    "dice_by_area of one size": (
        lambda: scores.dice_by_area([7] * 6, [0.5] * 6),
        lambda: scores.dice_by_area([7] * 6, [0.6] * 6),
    ),
    "reliability_diagram": (
        lambda: scores.reliability_diagram(LEVELS),
        lambda: scores.reliability_diagram(LEVELS * 2),
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_depends_on_its_data_and_on_nothing_else(name: str) -> None:
    draw, draw_other = FIGURES[name]
    data = draw()
    assert Image.open(io.BytesIO(data)).format == "PNG"
    assert data == draw() and data != draw_other()


@pytest.mark.parametrize(
    ("draw", "what"),
    [
        (lambda: scores.dice_histogram([], []), "Dice per image"),
        (lambda: scores.dice_by_area([], []), "Dice per image"),
        (lambda: scores.reliability_diagram(np.zeros((256, 2), np.int64)), "calibration"),
    ],
)
def test_nothing_to_draw_is_an_error(draw: Callable[[], bytes], what: str) -> None:
    with pytest.raises(ConfigError, match=f"{what} is empty; give at least one value"):
        draw()


def test_the_calibration_error_is_also_given_without_the_background() -> None:
    levels = np.zeros((256, 2), np.int64)
    levels[0], levels[15] = (9_000, 0), (1_000, 0)  # the lowest bin: probabilities below 1/16
    levels[16], levels[255] = (3, 0), (1, 0)  # levels[16] is the first of the next
    text = scores._errors_in_words(metrics.reliability_bins(levels)).splitlines()
    whole, above = (15 * 1_000 + 16 * 3 + 255) / 255, (16 * 3 + 255) / 255
    assert text == [
        f"Expected calibration error {whole / 10_004:.4f} over 10,004 pixels",
        f"Where the map says at least 1/16: {above / 4:.4f} over 4 pixels",
    ]
    levels[16:] = 0
    assert "at least 1/16: no pixel" in scores._errors_in_words(metrics.reliability_bins(levels))
    assert Image.open(io.BytesIO(scores.reliability_diagram(levels))).format == "PNG"
