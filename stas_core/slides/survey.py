"""What is found out about a slide before any of it is predicted: its frame, its tissue, and which tiles that takes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from stas_core import storage
from stas_core.data import appearance
from stas_core.data.stain import Stain
from stas_core.errors import StorageError
from stas_core.slides import tissue as tissues
from stas_core.slides.outlines import mask_of_outlines
from stas_core.slides.regions import RegionReader
from stas_core.slides.resolution import Mpp, MppSource, resolve_mpp
from stas_core.slides.slide import Slide
from stas_core.slides.tiling import Block, Grid, Tile
from stas_core.slides.tissue import Tissue, TissueConfig

TissueShades = UInt8[np.ndarray, "_ _"]
"""Tissue as it is saved, at `TissueConfig.mpp`: 255 is scored, 128 lies outside of the region of interest."""
SCORED, NOT_SCORED = 255, 128


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A slide as it is scored; written as JSON."""

    vendor: str
    width_px: int
    """Of level 0."""
    height_px: int
    bounds: tuple[int, int, int, int] | None
    """x0, y0, width, height of the scanned part, in level-0 px, where the file says so."""
    objective: float | None
    mpp: float
    """um per level-0 pixel."""
    mpp_source: str
    """override, metadata or objective."""
    frame_mpp: float
    """um per pixel of the frame: that of tiles, maps and masks."""
    frame_width: int
    frame_height: int
    level: int
    """The level that tiles are read from."""
    level0_px: float
    """Level-0 pixels per pixel of the frame, along a side."""
    tissue_mpp: float
    tissue_margin_um: float
    tissue_source: str
    """computed, GeoJSON or image."""
    tissue_digest: str
    """Fingerprint of the tissue."""
    pen_share: float
    fill_share: float
    sharpness: float | None
    """See `tissue.measure_sharpness`; null: the slide is too coarse to tell."""
    stain_matrix: list[float] | None
    """3 x 2, row-major, of tissue at the frame's resolution; null, like `stain_max_c`, if it has too little stain."""
    stain_max_c: list[float] | None
    roi_digest: str | None
    """Fingerprint of the region of interest's file; null: there is none."""

    def tissue(self, shades: TissueShades, *, whole: bool = False) -> Tissue:
        """Return the tissue that is scored, or with `whole` that beyond the region of interest too."""
        mask = np.asarray(shades > 0 if whole else shades == SCORED)
        return Tissue(mask, self.tissue_mpp, self.tissue_margin_um, self.tissue_source, self.pen_share, self.fill_share)

    def stain(self) -> Stain | None:
        """Return the slide's stains, where they are known."""
        if self.stain_matrix is None or self.stain_max_c is None:
            return None
        return Stain(np.array(self.stain_matrix).reshape(3, 2), np.array(self.stain_max_c))

    def stain_figures(self) -> dict[str, float]:
        """Return the figures of `appearance.Look` that are known of the slide: those of its stains."""
        found = asdict(appearance.of_stain(self.stain(), None, None))
        return {name: value for name, value in found.items() if value is not None}

    @property
    def corner(self) -> tuple[int, int]:
        """Return x, y of the level-0 pixel that outlines count from: QuPath's is that of the scanned part."""
        return (0, 0) if self.bounds is None else (self.bounds[0], self.bounds[1])

    def slide_mpp(self) -> Mpp:
        """Return the slide's resolution."""
        return Mpp(self.mpp, MppSource(self.mpp_source))

    def to_json(self) -> dict[str, Any]:
        """Return the survey as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any], uri: str) -> "Survey":
        """Return the survey from its JSON values.

        Raises:
            StorageError: it is something else.
        """
        try:
            bounds = values["bounds"]
            return cls(**{**values, "bounds": None if bounds is None else tuple(bounds)})
        except (KeyError, TypeError) as error:
            raise StorageError(f"{uri} is no survey of a slide ({error}); delete it, and run again") from error


def survey_slide(
    slide: Slide,
    *,
    mpp: float | None,
    frame_mpp: float,
    config: TissueConfig,
    tissue: tuple[bytes, str] | None = None,
    roi: tuple[bytes, str] | None = None,
) -> tuple[Survey, TissueShades]:
    """Survey a slide; return what was found, and its tissue.

    Args:
        slide: the open slide.
        mpp: um per level-0 pixel, where the user gives it.
        frame_mpp: um per pixel that the models were trained at.
        config: what counts as tissue.
        tissue: a GeoJSON or mask image (bytes and name) that says where tissue is, in place of its colour.
        roi: a GeoJSON (bytes and name) outside of which nothing is scored.

    Raises:
        InputError: why the slide cannot be scored.
    """
    resolution = resolve_mpp(slide.info, mpp)
    frame = RegionReader(slide, resolution, frame_mpp)
    found = _tissue(slide, resolution, config, tissue)
    shades = found.mask.astype(np.uint8) * NOT_SCORED
    if roi is not None:
        height, width = found.mask.shape
        found = found.within(mask_of_outlines(*roi, slide.info, (height, width)), slide.info.name)
    shades[found.mask] = SCORED
    stain = tissues.estimate_stain(frame, found)
    info = slide.info
    bounds = info.bounds
    survey = Survey(
        vendor=info.vendor,
        width_px=info.width,
        height_px=info.height,
        bounds=None if bounds is None else (bounds.x0, bounds.y0, bounds.width, bounds.height),
        objective=info.objective,
        mpp=resolution.value,
        mpp_source=resolution.source.value,
        frame_mpp=frame_mpp,
        frame_width=frame.width,
        frame_height=frame.height,
        level=frame.level,
        level0_px=frame.level0_px,
        tissue_mpp=found.mpp,
        tissue_margin_um=found.margin_um,
        tissue_source=found.source,
        tissue_digest=digest_of(shades),
        pen_share=found.pen_share,
        fill_share=found.fill_share,
        sharpness=tissues.measure_sharpness(slide, resolution, found),
        stain_matrix=None if stain is None else stain.matrix.ravel().tolist(),
        stain_max_c=None if stain is None else stain.max_c.tolist(),
        roi_digest=None if roi is None else storage.fingerprint(roi[0]),
    )
    return survey, shades


def _tissue(slide: Slide, resolution: Mpp, config: TissueConfig, given: tuple[bytes, str] | None) -> Tissue:
    """Return where tissue is by what was given, or else by colour."""
    if given is None:
        return tissues.find_tissue(slide, resolution, config)
    data, name = given
    draw = tissues.tissue_of_outlines if _is_json(name) else tissues.tissue_of_image
    return draw(data, name, slide, resolution, config)


def digest_of(shades: TissueShades) -> str:
    """Return the fingerprint of tissue as it is saved."""
    return storage.fingerprint(str(shades.shape), shades.tobytes())


def _is_json(name: str) -> bool:
    return name.lower().endswith((".geojson", ".json"))


def tiles_to_predict(grid: Grid, tissue: Tissue, mpp: float) -> Iterator[Tile]:
    """Yield the tiles that touch tissue, or its margin; the maps are 0 elsewhere."""
    return (tile for tile in grid.tiles() if tissue.tissue_in(tile.core, mpp))


def blocks_to_predict(grid: Grid, side: int, tissue: Tissue, mpp: float) -> Iterator[tuple[Block, list[Tile]]]:
    """Yield the blocks of `side` x `side` tiles that hold tissue, each with its tiles that do."""
    for block in grid.blocks(side):
        tiles = [tile for tile in block.tiles if tissue.tissue_in(tile.core, mpp)]
        if tiles:
            yield block, tiles
