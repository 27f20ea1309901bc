"""A halo is worth what it is: exact for networks that see no further, never for those that see a whole tile."""

import numpy as np
import torch

from stas_core import config
from stas_core.arrays import RgbImage
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.model import build_model
from stas_core.predict.inference import InferenceConfig
from stas_core.predict.predictor import Member, Predictor
from stas_core.slides import halo
from stas_core.slides.halo import Seam
from stas_core.slides.tiling import Box
from stas_core.slides.tissue import Tissue
from tests.slides.made import stained

SLIDE = stained(1600, 1600)


def read(box: Box) -> RgbImage:
    """Return a box of a slide that is white outside."""
    padded = np.pad(SLIDE, ((1024, 1024), (1024, 1024), (0, 0)), constant_values=255)
    return padded[box.y0 + 1024 : box.y1 + 1024, box.x0 + 1024 : box.x1 + 1024]


def table(encoder: str, norm: str, halo_px: int = 32) -> dict[int, Seam]:
    torch.manual_seed(0)
    small = {"encoder": encoder, "encoder_weights": "none", "decoder_channels": [16, 8, 8, 8, 8], "norm": norm}
    model = build_model(config.build(ModelConfig, small | {"activation": "relu"}))
    cpu = torch.device("cpu")
    predictor = Predictor([Member("a", model)], device=cpu, config=InferenceConfig(flips=("identity",)))
    place = Box(640, 640, 768, 768)
    found = halo.measure_seams(predictor, read, place, tile_px=2048, halo_px=halo_px, low=128)
    return {seam.halo_px: seam for seam in found}


def test_a_network_without_statistics_over_the_tile_is_exact_within_its_reach() -> None:
    seams = table("resnet10t", "batch")
    assert sorted(seams) == [0, 32, 64, 128, 256]
    assert seams[256].off_share <= seams[0].off_share and seams[256].off_share < 0.01
    assert seams[0].cost == 1 and 1.06 < seams[32].cost < 1.07
    assert not any("warning" in line for line in halo.describe(list(seams.values()), 256))


def test_a_network_that_sees_a_whole_tile_is_warned_of() -> None:
    seams = table("resnet10t", "layer")
    assert seams[256].off_share > halo.MUCH_OFF
    assert any("tile.blend=true" in line for line in halo.describe(list(seams.values()), 256))


def test_a_halo_as_wide_as_the_reference_is_held_against_a_wider_one() -> None:
    seams = table("resnet10t", "layer", 512)
    assert sorted(seams) == [0, 64, 128, 256, 512] and seams[512].off_share > halo.MUCH_OFF
    lines = halo.describe(list(seams.values()), 512)
    assert (
        "held against a halo of 1024 px, on one square of at most 512 px" in lines[0] and "tile.blend=true" in lines[-1]
    )
    assert "held against a halo of 512 px" in halo.describe(list(seams.values()), 256)[0]


def test_who_blends_is_not_told_to_blend() -> None:
    seams = [Seam(halo_px=256, off_share=0.5, flipped_share=0.1, largest_off=0.3, cost=1.5)]
    (warning,) = [line for line in halo.describe(seams, 256, blended=True) if line.startswith("warning")]
    assert "tile.blend=true" not in warning and "blending the tiles hides the seams" in warning


def test_the_place_is_where_tissue_is() -> None:
    mask = np.zeros((100, 100), bool)
    mask[60:90, 20:50] = True
    place = halo.choose_place(Tissue(mask, 8.0, 0.0, "computed"), 0.5, (1600, 1600), 2048)
    held = mask[int(place.y0 / 16) : -(-place.y1 // 16), int(place.x0 / 16) : -(-place.x1 // 16)]
    assert place.height == place.width == 512 and held.sum() >= 0.95 * mask.sum()
    small = halo.choose_place(Tissue(np.ones((3, 5), bool), 8.0, 0.0, "computed"), 0.5, (50, 90), 2048)
    assert small == Box(0, 0, 50, 50)
