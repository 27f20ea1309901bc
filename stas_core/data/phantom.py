"""H&E-like lung fields with exact truth, for the demo, tests and benchmarks where real images may not be shipped.

A field holds what a pathologist sees at 20x (about 0.5 um/px): septa of fibres, capillaries and nuclei around air
spaces, vessels, red cells, oedema, carbon, lymphocytes, macrophages (the distractors: single or in loose groups, much
cytoplasm), tumour nests afloat in air (the targets: cohesive, crowded, large nuclei), and sometimes the border of the
tumour itself, made of a nest's cells but no target. Stains are mixed by the Beer-Lambert law, so stain estimation
means on a phantom what it means on tissue. Counts and areas of targets follow the published fields.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from pydantic import Field

from stas_core.arrays import Mask, RgbImage
from stas_core.config import Config
from stas_core.data.annotations import rasterise
from stas_core.data.labelme import parse_labelme, to_labelme
from stas_core.data.phantom_tissue import (
    FULL_FIELD_PX,
    LOG_AREA_BETWEEN_SD,
    LOG_AREA_MEAN,
    LOG_AREA_WITHIN_SD,
    Nest,
    air_around,
    annotate,
    draw_look,
    draw_nest,
    noise,
    paint_loose_cells,
    paint_nest,
    paint_septa,
    paint_tumour,
    paint_vessels,
    scan,
)


class PhantomConfig(Config):
    """A phantom cohort."""

    num_images: int = Field(40, ge=1)
    """Number of images."""
    height: int = Field(942, ge=32)
    """Image height in px; cells keep their size, so a smaller field shows fewer."""
    width: int = Field(1716, ge=32)
    """Image width in px."""
    seed: int = Field(0, ge=0)
    """Seed of the cohort."""
    num_groups: int = Field(4, ge=1)
    """Number of slides the images come from, in turn; each has its own tumour, stain and scanner."""
    tumour_border_share: float = Field(0.15, ge=0, le=1)
    """Share of the images with the tumour's border at one side."""


@dataclass(frozen=True)
class Phantom:
    """One field: image, truth as mask and as labelme JSON, and the slide it comes from."""

    image: RgbImage
    mask: Mask
    labelme: bytes
    group: str


def phantom_id(index: int) -> str:
    """Return the id of a phantom image."""
    return f"phantom_{index:04d}"


def make_phantom(config: PhantomConfig, index: int) -> Phantom:
    """Make image `index` of a cohort; it depends on nothing but the config and the index."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([config.seed, index])))
    group = index % config.num_groups
    look = draw_look(np.random.default_rng(np.random.SeedSequence([config.seed], spawn_key=(group,))))
    size = (config.height, config.width)
    border = _tumour_border(size, rng) if rng.random() < config.tumour_border_share else np.zeros(size, bool)
    nests = _plan_nests(border, rng)
    polygons = [annotate(nest, size, rng) for nest in nests]
    labelme = to_labelme(polygons, size, f"{phantom_id(index)}.jpg")
    mask, _ = rasterise(parse_labelme(labelme, phantom_id(index)), size)

    clearing = air_around(nests, size, rng)
    border &= ~clearing
    canvas = np.zeros((4, *size), np.float32)
    tissue = paint_septa(canvas, nests, clearing | border, rng)
    paint_vessels(canvas, tissue, clearing | border, rng)
    paint_loose_cells(canvas, tissue | cv2.dilate(mask.view(np.uint8), np.ones((9, 9))).astype(bool) | border, rng)
    if border.any():
        paint_tumour(canvas, border, look, rng)
    for nest in nests:
        paint_nest(canvas, nest, look, rng)
    return Phantom(scan(canvas, look, rng), mask, labelme, f"slide_{group}")


def _plan_nests(border: Mask, rng: np.random.Generator) -> list[Nest]:
    """Place one or more nests off the tumour that do not touch each other, in clusters, as aerogenous spread does."""
    height, width = border.shape
    from_border = cv2.distanceTransform((~border).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3)
    wanted = int(rng.geometric(0.39)) if rng.random() < 0.96 else int(rng.integers(7, 25))
    wanted = min(24, round(1 + (wanted - 1) * min(1.0, np.sqrt(height * width / FULL_FIELD_PX))))
    log_area = rng.normal(LOG_AREA_MEAN, LOG_AREA_BETWEEN_SD)
    away = np.argwhere(from_border >= 0.6 * from_border.max())
    centre = away[rng.integers(len(away)), ::-1].astype(float)
    nests: list[Nest] = []
    for _ in range(wanted * 30):
        if len(nests) == wanted:
            break
        radius = np.sqrt(np.exp(rng.normal(log_area, LOG_AREA_WITHIN_SD)) / np.pi)
        radius = float(np.clip(radius, 13, max(8, 0.34 * min(height, width))))
        edge = np.minimum(radius * 0.7, [width / 3, height / 3])
        at = np.clip(rng.normal(centre, 0.22 * width) if nests else centre, edge, [width - edge[0], height - edge[1]])
        nest = draw_nest(at, radius, rng)
        apart = all(np.hypot(*(at - other.centre)) > nest.reach + other.reach + 12 for other in nests)
        if not nests or (apart and from_border[int(at[1]), int(at[0])] > nest.reach + 20):
            nests.append(nest)
    return nests


def _tumour_border(size: tuple[int, int], rng: np.random.Generator) -> Mask:
    """Return the tumour's own mass: one side of the field behind an uneven front."""
    front = np.arange(size[1]) + min(70, size[1] / 8) * noise(size, 160, rng) + 8 * noise(size, 20, rng)
    border = front < rng.uniform(0.08, 0.3) * size[1]
    return np.ascontiguousarray(border[:, ::-1] if rng.random() < 0.5 else border)
