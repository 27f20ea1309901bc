"""Masks as small as a page shows them lose no target, whatever the strips or tiles they come in."""

import numpy as np
import pytest

from stas_core.slides.layers import LAYER_PX, SmallMask, small_size


@pytest.mark.parametrize("size", [(97, 53), (64, 64), (9, 7), (200, 13)])
@pytest.mark.parametrize("to", [(13, 7), (32, 64), (9, 7)])
@pytest.mark.parametrize("strip_px", [1, 16, 300])
def test_a_pixel_is_set_where_any_under_it_is(size: tuple[int, int], to: tuple[int, int], strip_px: int) -> None:
    mask = np.random.default_rng(0).random(size) > 0.97
    small = SmallMask(size, to)
    strips = [mask[top : top + strip_px] * np.uint8(255) for top in range(0, size[0], strip_px)]
    assert all(given is strip for given, strip in zip(small.watching(strips), strips, strict=True))
    in_tiles = SmallMask(size, to)
    for y0 in range(0, size[0], strip_px):
        for x0 in range(0, size[1], strip_px + 2):
            in_tiles.add(y0, x0, mask[y0 : y0 + strip_px, x0 : x0 + strip_px + 2] * np.uint8(255))
    expected = np.zeros(to, bool)
    for row, column in np.ndindex(to):
        y0, x0 = row * size[0] // to[0], column * size[1] // to[1]
        y1, x1 = max((row + 1) * size[0] // to[0], y0 + 1), max((column + 1) * size[1] // to[1], x0 + 1)
        expected[row, column] = mask[y0:y1, x0:x1].any()
    assert np.array_equal(small.mask, expected) and np.array_equal(in_tiles.mask, expected)


def test_layers_keep_the_shape_of_their_slide_and_are_never_enlarged() -> None:
    assert small_size((100_000, 100_000)) == (LAYER_PX, LAYER_PX)
    assert small_size((300, 200)) == (300, 200) and small_size((1, 90_000)) == (1, LAYER_PX)
