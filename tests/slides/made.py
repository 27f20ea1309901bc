"""Slides that tests make themselves."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

from stas_core import storage
from stas_core.arrays import Mask, ProbMapU8, RgbImage
from stas_core.scored_runs import MAPS, MASKS
from stas_core.slides import pyramid
from stas_core.slides.run import SlideRun
from stas_core.slides.survey import SCORED, Survey, digest_of

PERIOD_PX = 2048


def noise(height: int, width: int, seed: int = 0) -> RgbImage:
    """Return smooth random colours: neighbouring pixels differ, and JPEG keeps them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def write_pyramid(
    path: Path, pixels: RgbImage, *, mpp: float | tuple[float, float] | None = 0.5, num_levels: int = 3, **options: Any
) -> Path:
    """Write a pyramidal tiled TIFF of 256 px tiles, each level half of the one before."""
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib", "metadata": None} | options
    if mpp is not None:
        x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
        options |= {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"}
    else:
        options |= {"resolution": (1, 1), "resolutionunit": "NONE"}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in range(num_levels):
            if level:
                size = pixels.shape[1] // 2, pixels.shape[0] // 2
                pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
            file.write(pixels, subfiletype=int(level > 0), **options)
    return path


def write_ome(path: Path, pixels: RgbImage, size: float = 0.5, unit: str = "µm") -> Path:
    """Write a tiled OME-TIFF with a physical pixel size."""
    metadata = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeXUnit": unit}
    metadata |= {"PhysicalSizeY": size, "PhysicalSizeYUnit": unit}
    tifffile.imwrite(path, pixels, ome=True, tile=(256, 256), photometric="rgb", metadata=metadata)
    return path


def stained(height: int, width: int, seed: int = 0) -> RgbImage:
    """Return stained islands on glass: what a tissue mask finds, and networks see structure in."""
    rng = np.random.default_rng(seed)
    shape = cv2.resize(rng.random((height // 64 + 2, width // 64 + 2), np.float32), (width, height))
    grain = cv2.resize(rng.random((height // 4 + 2, width // 4 + 2), np.float32), (width, height))
    density = np.where(shape > 0.45, 0.1 + 0.35 * grain, 0)[..., None] * np.array([0.5, 1.0, 0.45])
    pixels: RgbImage = (243 * np.power(10.0, -density)).round().astype(np.uint8)
    return pixels


def make_slide(path: Path, side: int) -> Path:
    """Write a slide of the same tissue all over."""
    period = np.maximum(stained(PERIOD_PX, PERIOD_PX), 40)
    period[period.min(axis=2) > 230] -= np.array([20, 60, 15], np.uint8)  # no glass

    def strips() -> Iterator[RgbImage]:
        for y0 in range(0, side, PERIOD_PX):
            yield np.tile(period, (1, -(-side // PERIOD_PX), 1))[: min(PERIOD_PX, side - y0), :side]

    pyramid.write_pyramid(path, (side, side), strips(), mpp=0.5)
    return path


def survey_of(
    size: tuple[int, int], *, level0_px: float = 1.0, level0: tuple[int, int] | None = None, tissue_digest: str = ""
) -> Survey:
    """Return the survey of a slide whose frame has (height, width) `size`; None: level 0 is `level0_px` times that."""
    height, width = level0 or (round(size[0] * level0_px), round(size[1] * level0_px))
    return Survey(
        vendor="generic-tiff",
        width_px=width,
        height_px=height,
        bounds=None,
        objective=None,
        mpp=0.5 / level0_px,
        mpp_source="metadata",
        frame_mpp=0.5,
        frame_width=size[1],
        frame_height=size[0],
        level=0,
        level0_px=level0_px,
        tissue_mpp=8.0,
        tissue_margin_um=50.0,
        tissue_source="computed",
        tissue_digest=tissue_digest,
        pen_share=0.0,
        fill_share=0.0,
        sharpness=None,
        stain_matrix=None,
        stain_max_c=None,
        roi_digest=None,
    )


def keep_scored(
    run: SlideRun,
    slide_id: str,
    mask: Mask,
    *,
    prob: ProbMapU8 | None,
    level0_px: float = 1.0,
    roi: bytes | None = None,
) -> None:
    """Write what score_slides keeps of a slide: survey, mask and perhaps map, in a folder of this machine."""
    size = mask.shape[0], mask.shape[1]
    shades = np.full((size[0] // 16 + 1, size[1] // 16 + 1), SCORED, np.uint8)
    survey = survey_of(size, level0_px=level0_px, tissue_digest=digest_of(shades))
    survey = replace(survey, roi_digest=None if roi is None else storage.fingerprint(roi))
    run.write_survey(slide_id, "key", survey=survey, tissue=shades, roi=roi)
    levels = np.where(mask, 255, 0).astype(np.uint8)
    for kind, pixels, layout in ((MASKS, levels, pyramid.MASK), (MAPS, prob, pyramid.Layout())):
        if pixels is not None:
            path = Path(run.file(kind, slide_id))
            path.parent.mkdir(parents=True, exist_ok=True)
            pyramid.write_pyramid(path, size, [pixels], mpp=0.5, layout=layout)
