"""An ensemble applied to tiles of a slide."""

from collections.abc import Mapping, Sequence

import numpy as np

from stas_core.arrays import RgbImage
from stas_core.predict.predictor import Prediction, Predictor
from stas_core.slides.blocks import PROB, STD, Planes, TileKey, member_plane, page_box
from stas_core.slides.tiling import Box, Tile


def predict_tiles(
    predictor: Predictor, pixels: RgbImage, box: Box, tiles: Sequence[Tile], *, blended: bool, with_members: bool
) -> Mapping[TileKey, Planes]:
    """Predict the tiles of a block, each from its read box.

    Args:
        predictor: the ensemble.
        pixels: the pixels of `box`, (h, w, 3).
        box: what holds the read boxes of all tiles, in the slide's frame.
        tiles: which tiles.
        blended: return all that was read for a tile, not its core alone.
        with_members: return also the map of each member, and how they disagree; of one member there is neither.

    Raises:
        NotFinite: the models give no probabilities.
    """
    crops = [np.ascontiguousarray(pixels[tile.read.within(box).slices]) for tile in tiles]
    found = {}
    for index, prediction in predictor.each(crops):
        tile = tiles[index]
        kept = page_box(tile, blended=blended).within(tile.read)
        found[tile.row, tile.col] = _planes(prediction, kept, with_members)
    return found


def _planes(prediction: Prediction, kept: Box, with_members: bool) -> Planes:
    planes = {PROB: prediction.prob_u8()}
    num_members = len(prediction.members)
    if with_members and num_members > 1:
        planes[STD] = prediction.std_u8()
        planes |= {member_plane(number): prediction.member_u8(number) for number in range(num_members)}
    return {name: np.ascontiguousarray(levels[kept.slices]) for name, levels in planes.items()}
