"""Where a slide has tissue, so that glass costs nothing, and what the slide looks like on the way.

The mask is kept small, some 8 um per pixel. It is drawn as tight as tissue is, for areas; `tissue_in` leaves a margin,
since a missed nest costs more than a tile of glass.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np
from pydantic import Field

from stas_core.arrays import Mask, RgbImage
from stas_core.config import Config
from stas_core.data import images
from stas_core.data import stain as stains
from stas_core.data.stain import Stain
from stas_core.errors import NoTissue, SizeMismatch
from stas_core.slides.outlines import mask_of_outlines
from stas_core.slides.regions import RegionReader
from stas_core.slides.resolution import Mpp
from stas_core.slides.slide import Slide
from stas_core.slides.tiling import Box

_GLASS, _DARKEST_GLASS, _MOST_COLOUR_OF_GLASS, _MOST_PINK_OF_GLASS = 245.0, 200, 25, 6
"""Grey value of glass where a slide shows none, and what may be glass."""
_MIN_GLASS_SHARE = 0.005
_FILL = 30
"""Scanners fill what they did not image with black, at most this bright."""
_LEAST_COLOUR = 0.1
"""By what share of the green density it exceeds the red or blue one, at least: noise of a dark grey stays below."""
_DARKEST_TISSUE = 70
"""Tissue lets some light of some colour through; what does not is ink, a fold, or fluorescence."""
BLURRED_BELOW = 0.35
"""Sharpness of a scan that is out of focus: three real scans had 0.9 to 1.05, and 0.12 to 0.29 blurred by 1 um."""
_SHARP_MPP, _SHARP_PX, _NUM_PATCHES = 1.0, 256, 25


class TissueConfig(Config):
    """What counts as tissue."""

    mpp: float = Field(8.0, ge=2, le=64)
    """um per pixel of the tissue mask."""
    min_density: float = Field(0.04, gt=0, le=1)
    """Least optical density (log10, green) of tissue, over that of glass: thin septa and faint stains have 0.05."""
    min_colour: float = Field(0.012, ge=0, le=1)
    """By how much the green density exceeds the red or blue one: dust, shadows and black ink are grey."""
    min_area_um2: float = Field(1500.0, ge=0)
    """Smaller specks are dust; a nest of STAS has some ten cells."""
    max_hole_um2: float = Field(100_000.0, ge=0)
    """Smaller air spaces belong to the tissue round them."""
    margin_um: float = Field(50.0, ge=0)
    """Tiles this near to tissue are inferred too."""


@dataclass(frozen=True)
class Tissue:
    """The tissue of a slide, in the frame of `RegionReader` at `mpp`."""

    mask: Mask
    mpp: float
    margin_um: float
    source: str
    """computed, GeoJSON or image."""
    pen_share: float = 0.0
    """Share of the slide under ink."""
    fill_share: float = 0.0
    """Share of the slide that the scanner left black."""

    @property
    def share(self) -> float:
        """Return the share of the slide that is tissue."""
        return float(self.mask.mean())

    @property
    def area_mm2(self) -> float:
        """Return the area of tissue."""
        return float(np.count_nonzero(self.mask)) * (self.mpp / 1000) ** 2

    def tissue_in(self, box: Box, mpp: float) -> bool:
        """Tell whether a box of the frame at `mpp` holds tissue, or lies within the margin of some."""
        scale, margin = mpp / self.mpp, self.margin_um / self.mpp
        rows, cols = self.mask.shape
        y0, y1 = _stretch(box.y0 * scale - margin, box.y1 * scale + margin, rows)
        x0, x1 = _stretch(box.x0 * scale - margin, box.x1 * scale + margin, cols)
        sums = self._sums
        return bool(sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0])

    @cached_property
    def _sums(self) -> np.ndarray:
        return np.asarray(cv2.integral(self.mask.view(np.uint8)))

    def within(self, roi: Mask, name: str) -> "Tissue":
        """Return the tissue inside a region of interest, of this mask's size.

        Raises:
            NoTissue: there is none.
        """
        inside = self.mask & roi
        if not inside.any():
            raise NoTissue(f"{name}: no tissue lies in the region of interest; draw it on tissue, or leave it out")
        return replace(self, mask=inside)


def find_tissue(slide: Slide, mpp: Mpp, config: TissueConfig) -> Tissue:
    """Find the tissue of a slide by its colour.

    Raises:
        NoTissue: the slide is blank, or holds only ink and dust.
        UnreadableSlide: the file does not give its pixels.
    """
    reader = RegionReader(slide, mpp, config.mpp)
    pixels = reader.read(reader.box)
    fill = pixels.max(axis=2) <= _FILL
    pen = _ink(pixels, config)
    mask = _stained(pixels, config) & ~pen
    mask = _tidied(mask, pen | fill, config)
    if not mask.any():
        raise NoTissue(
            f"{slide.info.name} holds no stained area of {config.min_area_um2:g} um2 or more; look at its thumbnail, "
            "and give a tissue mask if there is tissue"
        )
    return Tissue(mask, config.mpp, config.margin_um, "computed", float(pen.mean()), float(fill.mean()))


def tissue_of_outlines(data: bytes, name: str, slide: Slide, mpp: Mpp, config: TissueConfig) -> Tissue:
    """Return the tissue that a user outlined in GeoJSON.

    Raises:
        InputError: as `mask_of_outlines`.
    """
    reader = RegionReader(slide, mpp, config.mpp)
    mask = mask_of_outlines(data, name, slide.info, (reader.height, reader.width))
    return Tissue(mask, config.mpp, config.margin_um, "GeoJSON")


def tissue_of_image(data: bytes, name: str, slide: Slide, mpp: Mpp, config: TissueConfig) -> Tissue:
    """Return the tissue of a user's mask image of the whole slide, of any size.

    Raises:
        UnclearMask, SizeMismatch, NoTissue: naming the file.
    """
    reader = RegionReader(slide, mpp, config.mpp)
    given = images.decode_mask(data, name)
    info, (height, width) = slide.info, given.shape
    if abs(width * info.height / (height * info.width) - 1) > 0.02 + 1 / min(width, height):
        raise SizeMismatch(
            f"{name} is {width}x{height} px, and {info.name} {info.width}x{info.height}: of another shape; give a mask "
            "of the whole slide"
        )
    share = cv2.resize(given.astype(np.float32), (reader.width, reader.height), interpolation=cv2.INTER_AREA)
    mask = np.asarray(share > 0)
    if not mask.any():
        raise NoTissue(f"{name} marks no tissue; draw some, or leave the mask out")
    return Tissue(mask, config.mpp, config.margin_um, "image")


def measure_sharpness(slide: Slide, mpp: Mpp, tissue: Tissue) -> float | None:
    """Return how sharp tissue is: grey levels of fine detail (1 um) over those of all detail, the median of patches.

    It falls as a scan goes out of focus, whatever the stain; None: the slide is too coarse to tell.
    """
    if mpp.value > _SHARP_MPP:
        return None
    reader = RegionReader(slide, mpp, _SHARP_MPP)
    places = np.argwhere(tissue.mask)
    chosen = places[np.linspace(0, len(places) - 1, min(_NUM_PATCHES, len(places))).astype(int)]
    found = []
    for row, col in (chosen + 0.5) * tissue.mpp / _SHARP_MPP:
        y0 = max(0, min(int(row) - _SHARP_PX // 2, reader.height - _SHARP_PX))
        x0 = max(0, min(int(col) - _SHARP_PX // 2, reader.width - _SHARP_PX))
        patch = reader.read(Box(y0, x0, min(y0 + _SHARP_PX, reader.height), min(x0 + _SHARP_PX, reader.width)))
        grey = cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY).astype(np.float32)
        found.append(float(cv2.Laplacian(grey, cv2.CV_32F).std() / max(float(grey.std()), 1.0)))
    return float(np.median(found))


def estimate_stain(reader: RegionReader, tissue: Tissue) -> Stain | None:
    """Estimate a slide's stains from patches spread over its tissue; None: as `data.stain.estimate`.

    Give it a reader of the model's resolution, so that concentrations can be held against the cohort's.
    """
    places = np.argwhere(tissue.mask)
    chosen = places[np.linspace(0, len(places) - 1, min(_NUM_PATCHES, len(places))).astype(int)]
    patches = []
    for row, col in ((chosen + 0.5) * tissue.mpp / reader.mpp).astype(int).tolist():
        y0, x0 = max(0, row - _SHARP_PX // 2), max(0, col - _SHARP_PX // 2)
        box = Box(y0, x0, min(y0 + _SHARP_PX, reader.height), min(x0 + _SHARP_PX, reader.width))
        patches.append(reader.read(box).reshape(-1, 1, 3))
    return stains.estimate(np.concatenate(patches)) if patches else None


def _stained(pixels: RgbImage, config: TissueConfig) -> Mask:
    """Return what absorbs more green than glass does, and more of it than of red or of blue."""
    smooth = cv2.GaussianBlur(pixels, (3, 3), 0).astype(np.float32)
    density = -np.log10(np.clip((smooth + 1) / (_glass(pixels) + 1), 1e-3, 1))
    red, green, blue = density[..., 0], density[..., 1], density[..., 2]
    coloured = green - np.minimum(red, blue) > np.maximum(config.min_colour, _LEAST_COLOUR * green)
    return np.asarray((green > config.min_density) & coloured & (pixels.max(axis=2) >= _DARKEST_TISSUE))


def _glass(pixels: RgbImage) -> np.ndarray:
    """Return the colour of glass; what was not imaged (pure white) does not count."""
    darkest, brightest = pixels.min(axis=2), pixels.max(axis=2)
    bright = (darkest >= _DARKEST_GLASS) & (brightest - darkest <= _MOST_COLOUR_OF_GLASS) & (darkest < 254)
    signed = pixels.astype(np.int16)  # a lamp may be yellow or blue, but only stain is pink
    bright &= signed[..., 1] >= np.minimum(signed[..., 0], signed[..., 2]) - _MOST_PINK_OF_GLASS
    if bright.mean() < _MIN_GLASS_SHARE:
        return np.full(3, _GLASS, np.float32)
    return np.asarray(np.percentile(pixels[bright], 75, axis=0), np.float32)


def _ink(pixels: RgbImage, config: TissueConfig) -> Mask:
    """Return marks of a pen: green and blue ones absorb red most, red ones let no blue through, black ones nothing."""
    red, green, blue = (pixels[..., channel].astype(np.int16) for channel in range(3))
    brightest, darkest = pixels.max(axis=2).astype(np.int16), pixels.min(axis=2).astype(np.int16)
    colour = brightest - darkest
    green_or_blue = (green - red > 20) & (colour > 70)
    red_ink = (red - green > 110) & (blue - green < 25)
    black = (brightest < 90) & (colour < 25) & (brightest > _FILL)
    # A stroke is wide and long; cells and blood are not.
    wide = _at_least(np.asarray(green_or_blue | red_ink | black), 20_000 / config.mpp**2)
    rim = round(24 / config.mpp)  # strokes fade at their edges
    return cv2.dilate(wide.view(np.uint8), np.ones((2 * rim + 1,) * 2, np.uint8)).view(bool)


def _tidied(mask: Mask, never: Mask, config: TissueConfig) -> Mask:
    """Return the mask without specks, and with small holes filled."""
    large = _at_least(mask, config.min_area_um2 / config.mpp**2)
    holes = ~large
    open_ones = _at_least(holes, config.max_hole_um2 / config.mpp**2) | _at_the_rim(holes)
    return np.asarray((large | (holes & ~open_ones)) & ~never)


def _at_the_rim(mask: Mask) -> Mask:
    """Return the components that the slide's border cuts: they are glass, however small the slide."""
    num, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    cut = np.zeros(num, bool)
    for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        cut[side] = True
    cut[0] = False
    return np.asarray(cut[labels])


def _at_least(mask: Mask, least_px: float) -> Mask:
    """Return the components of at least so many pixels."""
    num, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    kept = np.zeros(num, bool)
    kept[1:] = stats[1:, cv2.CC_STAT_AREA] >= least_px
    return np.asarray(kept[labels])


def _stretch(start: float, stop: float, end: int) -> tuple[int, int]:
    """Return the pixels that a stretch touches; a frame's last fraction of a pixel belongs to its last pixel."""
    first = int(np.clip(np.floor(start), 0, end - 1))
    return first, int(np.clip(np.ceil(stop), first + 1, end))
