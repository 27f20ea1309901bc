"""Tiles cover a slide once, and what they give is the slide again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core.slides.tiling import Box, Grid, Tile, blend, neighbours

grids = st.builds(
    Grid,
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    tile_px=st.integers(1, 70),
    halo_px=st.integers(0, 25),
)
small_grids = st.builds(
    Grid, height=st.integers(1, 20), width=st.integers(1, 20), tile_px=st.integers(1, 9), halo_px=st.integers(0, 7)
)


@given(grids)
def test_every_pixel_lies_in_one_core_and_every_core_in_its_read_box(grid: Grid) -> None:
    covered = np.zeros((grid.height, grid.width), int)
    for tile in grid.tiles():
        covered[tile.core.slices] += 1
        assert tile.core.common(tile.read) == tile.core
        assert tile.read.common(grid.box) == tile.read
        if grid.num_rows == grid.num_cols == 1:
            assert tile.core == tile.read == grid.box
    assert (covered == 1).all()
    assert [(tile.row, tile.col) for tile in grid.tiles()] == list(np.ndindex(grid.num_rows, grid.num_cols))


@given(grids)
def test_the_tiles_of_an_image_give_the_image(grid: Grid) -> None:
    image = np.arange(grid.height * grid.width).reshape(grid.height, grid.width)
    stitched = np.full_like(image, -1)
    for tile in grid.tiles():
        stitched[tile.core.slices] = image[tile.read.slices][tile.inside.slices]
    assert (stitched == image).all()


@given(grids, st.integers(1, 5))
def test_blocks_hold_every_tile_once_and_reach_as_far_as_their_tiles(grid: Grid, side: int) -> None:
    blocks = list(grid.blocks(side))
    assert sorted((tile.row, tile.col) for block in blocks for tile in block.tiles) == [
        (tile.row, tile.col) for tile in grid.tiles()
    ]
    for block in blocks:
        assert len(block.tiles) <= side**2
        assert sum(tile.core.height * tile.core.width for tile in block.tiles) == block.core.height * block.core.width
        assert all(tile.read.common(block.read) == tile.read for tile in block.tiles)


def blended(grid: Grid, image: np.ndarray) -> np.ndarray:
    stitched = np.full(image.shape, np.nan, np.float32)
    for tile in grid.tiles():
        maps = {(other.row, other.col): image[other.read.slices] for other in neighbours(grid, tile)}
        stitched[tile.core.slices] = blend(grid, tile, maps)
    return stitched


@settings(max_examples=15)
@given(small_grids, st.floats(0, 1, width=32))
def test_blending_a_constant_gives_the_constant(grid: Grid, level: float) -> None:
    assert (blended(grid, np.full((grid.height, grid.width), level, np.float32)) == np.float32(level)).all()


@settings(max_examples=15)
@given(small_grids, st.integers(0, 9))
def test_blending_tiles_that_agree_gives_what_they_agree_on(grid: Grid, seed: int) -> None:
    image = np.random.default_rng(seed).random((grid.height, grid.width), np.float32)
    np.testing.assert_allclose(blended(grid, image), image, rtol=3e-7)


@given(grids)
def test_windows_sum_to_1_and_never_weigh_against(grid: Grid) -> None:
    total = np.zeros((grid.height, grid.width))
    for tile in grid.tiles():
        along_y, along_x = grid.weights(tile)
        assert along_y.min() >= 0 and along_x.min() >= 0
        total[tile.read.slices] += np.outer(along_y, along_x)
    np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_two_tiles_fade_into_one_another_over_the_halo() -> None:
    grid = Grid(height=8, width=200, tile_px=100, halo_px=20)
    ramp = np.zeros((8, 200), np.float32)
    maps = {(0, 0): ramp[:, :120] + 0.2, (0, 1): ramp[:, 80:] + 0.8}
    joined = np.concatenate([blend(grid, tile, maps) for tile in grid.tiles()], axis=1)[3]
    assert (joined[:80] == np.float32(0.2)).all() and (joined[120:] == np.float32(0.8)).all()
    steps = np.diff(joined)
    assert (steps >= 0).all() and steps.max() < 0.03  # 0.6 over 40 px, at most 1.5 times as steep as a line
    assert joined[99] + joined[100] == pytest.approx(1.0)


def test_a_slide_smaller_than_a_tile_is_one_tile() -> None:
    (tile,) = Grid(height=30, width=40, tile_px=2048, halo_px=256).tiles()
    assert tile == Tile(0, 0, Box(0, 0, 30, 40), Box(0, 0, 30, 40))


@pytest.mark.parametrize("wrong", [{"height": 0}, {"width": 0}, {"tile_px": 0}, {"halo_px": -1}])
def test_a_grid_without_pixels_is_refused(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Grid(**{"height": 5, "width": 5, "tile_px": 5, "halo_px": 0, **wrong})
