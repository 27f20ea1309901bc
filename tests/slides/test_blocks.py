"""Blocks of tiles, read back, are the map that was cut; and what is damaged says so."""

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core.config import build
from stas_core.errors import ConfigError, StorageError
from stas_core.slides.blocks import PROB, STD, SlideMaps, TileConfig, block_name, encode_block, page_box
from stas_core.slides.stitching import ArraySource, MapSource, postprocess_slide
from stas_core.slides.thresholds import SlidePostprocessConfig
from stas_core.slides.tiling import Box, Grid, Tile
from stas_core.slides.truth_sources import OutlineSource

Plane = np.ndarray


def cut(folder: Path, planes: dict[str, Plane], config: TileConfig, predicted: set[tuple[int, int]]) -> Grid:
    """Write the blocks of whole maps, as prediction does."""
    height, width = planes[PROB].shape
    grid = config.grid(height, width)
    for block in grid.blocks(config.block):
        tiles = {
            (tile.row, tile.col): {
                name: np.ascontiguousarray(plane[page_box(tile, blended=config.blend).slices])
                for name, plane in planes.items()
            }
            for tile in block.tiles
            if (tile.row, tile.col) in predicted
        }
        if tiles:
            data = encode_block(tiles)
            assert data == encode_block(dict(reversed(tiles.items())))
            (folder / block_name(block.row, block.col)).write_bytes(data)
    return grid


@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    halo_px=st.sampled_from([0, 32]),
    blend=st.booleans(),
    block=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_a_map_that_was_cut_into_blocks_is_read_back(
    size: tuple[int, int], halo_px: int, blend: bool, block: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    config = TileConfig(px=64, halo_px=halo_px, blend=blend, block=block)
    planes = {PROB: rng.integers(0, 256, size, np.uint8), STD: rng.integers(0, 256, size, np.uint8)}
    grid = config.grid(*size)
    every = {(tile.row, tile.col) for tile in grid.tiles()}
    predicted = {at for at in every if rng.random() < 0.7}
    expected = {name: np.zeros_like(plane) for name, plane in planes.items()}
    for tile in grid.tiles():
        if (tile.row, tile.col) in predicted:
            for name, plane in planes.items():
                expected[name][tile.core.slices] = plane[tile.core.slices]
    with tempfile.TemporaryDirectory() as folder:
        cut(Path(folder), planes, config, predicted)
        maps = SlideMaps(folder, grid, config, predicted)
        for name, plane in expected.items():
            source = maps.plane(name)
            assert isinstance(source, MapSource) and source.size == size
            assert np.array_equal(source.read(0, 0, *size), plane)
            y0, x0 = int(rng.integers(size[0])), int(rng.integers(size[1]))
            height, width = int(rng.integers(1, size[0] - y0 + 1)), int(rng.integers(1, size[1] - x0 + 1))
            box = plane[y0 : y0 + height, x0 : x0 + width]
            assert np.array_equal(source.read(y0, x0, height, width), box)
            assert not source.is_blank(y0, x0, height, width) or not box.any()
        if not predicted:
            assert maps.plane(PROB).is_blank(0, 0, *size)


def test_blended_tiles_that_disagree_fade_into_one_another(tmp_path: Path) -> None:
    config = TileConfig(px=64, halo_px=32, blend=True)
    grid = config.grid(64, 128)
    tiles: list[Tile] = list(grid.tiles())
    levels = {tile.col: np.full((64, 96), 200 * tile.col, np.uint8) for tile in tiles}
    data = encode_block({(0, tile.col): {PROB: levels[tile.col]} for tile in tiles})
    (tmp_path / "0_0.tif").write_bytes(data)
    line = SlideMaps(str(tmp_path), grid, config, [(0, 0), (0, 1)]).plane(PROB).read(0, 0, 64, 128)[0].astype(int)
    assert line[0] == 0 and line[-1] == 200 and (np.diff(line) >= 0).all() and np.diff(line).max() <= 6
    alone = SlideMaps(str(tmp_path), grid, config, [(0, 1)]).plane(PROB).read(0, 0, 64, 128)[0]
    assert (alone[:64] == 0).all() and (alone[64:] == 200).all()  # glass beside it is no reason to fade


def test_a_slide_is_post_processed_from_its_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    few = np.where(rng.random((20, 25)) < 0.1, rng.integers(150, 256, (20, 25)), 0).astype(np.uint8)
    prob = np.kron(few, np.ones((15, 15), np.uint8))
    config = TileConfig(px=64, halo_px=32)
    predicted = {(tile.row, tile.col) for tile in config.grid(*prob.shape).tiles()}
    grid = cut(tmp_path, {PROB: prob}, config, predicted)
    cascade = SlidePostprocessConfig().in_pixels(0.5)
    from_blocks = postprocess_slide(SlideMaps(str(tmp_path), grid, config, predicted).plane(PROB), cascade, tile_px=50)
    whole = postprocess_slide(ArraySource(prob), cascade)
    assert len(whole.targets) > 3
    assert np.array_equal(from_blocks.targets.area_px, whole.targets.area_px)
    assert np.array_equal(from_blocks.targets.mean_prob, whole.targets.mean_prob)


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"x" * len(data), lambda data: b""]
)
def test_a_damaged_block_is_named_with_the_remedy(tmp_path: Path, damage: object) -> None:
    config = TileConfig(px=64, halo_px=32)
    grid = cut(tmp_path, {PROB: np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)}, config, {(0, 0)})
    file = tmp_path / "0_0.tif"
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(StorageError, match=r"0_0\.tif.*delete"):
        SlideMaps(str(tmp_path), grid, config, [(0, 0)]).plane(PROB).read(0, 0, 64, 64)


def test_blocks_of_a_store_are_fetched_once_and_named_by_where_they_lie(tmp_path: Path) -> None:
    there, copies = tmp_path / "there", tmp_path / "copies"
    for folder in (there, copies):
        folder.mkdir()
    config, prob = TileConfig(px=64, halo_px=32), np.random.default_rng(0).integers(0, 256, (64, 400), np.uint8)
    every = {(0, col) for col in range(7)}
    grid = cut(there, {PROB: prob}, config, every)
    maps = SlideMaps(str(there), grid, config, every, copies=copies)
    threads = [maps, maps.for_thread(), maps.for_thread()]
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda one: one.plane(PROB).read(0, 0, 64, 400), threads):
            assert np.array_equal(found, prob)
    assert {path.name for path in copies.iterdir()} == {path.name for path in there.iterdir()}
    shutil.rmtree(there)
    assert np.array_equal(maps.for_thread().plane(PROB).read(0, 0, 64, 400), prob)
    (copies / "0_1.tif").write_bytes(b"x")
    (copies / "0_2.tif").unlink()
    for col in (2, 4):
        with pytest.raises(StorageError, match=rf"{there}/0_{col // 2}\.tif"):
            maps.for_thread().plane(PROB).read(0, 64 * col, 64, 64)


def test_a_block_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = TileConfig(px=64, halo_px=32)
    with pytest.raises(StorageError, match=r"0_0\.tif"):
        SlideMaps(str(tmp_path), config.grid(64, 64), config, [(0, 0)]).plane(PROB).read(0, 0, 64, 64)


@pytest.mark.parametrize(("key", "value"), [("px", 1000), ("halo_px", 100)])
def test_tiles_that_networks_would_sample_elsewhere_are_refused(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"{key}.*no multiple of 32.*use \d+"):
        build(TileConfig, {key: value})


@pytest.mark.parametrize("blend", [False, True])
def test_maps_are_0_outside_of_a_region_of_interest(tmp_path: Path, blend: bool) -> None:
    config = TileConfig(px=64, halo_px=32, blend=blend)
    prob = np.full((150, 200), 200, np.uint8)
    every = {(tile.row, tile.col) for tile in config.grid(150, 200).tiles()}
    grid = cut(tmp_path, {PROB: prob}, config, every)
    outline = b'{"type": "Polygon", "coordinates": [[[20, 30], [140, 30], [140, 100], [20, 100], [20, 30]]]}'
    drawn = OutlineSource.of(outline, "roi.geojson", size=(150, 200), level0_px=1.0)

    def region(box: Box) -> np.ndarray:
        return drawn.read(box.y0, box.x0, box.height, box.width) > 0

    levels = SlideMaps(str(tmp_path), grid, config, every, region).plane(PROB).read(0, 0, 150, 200)
    inside = np.zeros_like(prob, bool)
    inside[30:100, 20:140] = True
    assert (levels[32:98, 22:138] == 200).all()
    outside = ~cv2.dilate(inside.view(np.uint8), np.ones((3, 3))).astype(bool)
    assert not levels[outside].any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"block": 16},
            r"3 \* \(16 \* 2048 \+ 2 \* 256\)\^2 = 3,323 MB, expected at most 512 MB.*: use block = 6 or less",
        ),
        ({"px": 8192, "halo_px": 2048}, r"1,258 MB.*: use block = 1 or less"),
    ],
)
def test_a_block_that_no_reader_has_memory_for_is_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(TileConfig, values)
    assert build(TileConfig, {"px": 256, "halo_px": 0, "block": 16}).block == 16
    assert build(TileConfig, {"px": 8192, "halo_px": 2048, "block": 1}).px == 8192
