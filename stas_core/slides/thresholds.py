"""The cascade's settings for slides, in um and um2: one step, which holds at any resolution."""

import math

from pydantic import Field

from stas_core.config import Config
from stas_core.errors import ConfigError
from stas_core.predict.postprocess import PUBLISHED_STEPS, BorderFill, PostprocessConfig, StepConfig

_ROUNDING = 1e-9
"""The share of an area by which floats may miss a whole number of pixels."""


class SlidePostprocessConfig(Config):
    """From a slide's probability map to its mask. Lengths and areas are those of the tissue."""

    step: StepConfig = PUBLISHED_STEPS[0]
    """Which components of the map are kept, and which of their pixels: the first published step."""
    closing_um: float = Field(4.5, ge=0, le=100)
    """Side of the square that gaps are closed with; 0 closes nothing. It becomes the nearest odd number of pixels."""
    closing_count: int = Field(1, ge=0, le=10)
    """How often to dilate, and then to erode, in the closing; 0 closes nothing."""
    border_fill: BorderFill = "none"
    """Fill holes that the slide's border cuts open: at each side that the mask touches, at the first, or not at all."""
    max_hole_um2: float = Field(5000, ge=0)
    """Larger holes stay open; 0: none is filled. The default, a circle of 80 um, takes in lumens, not air spaces."""
    min_target_um2: float = Field(37.5, ge=0)
    """Smaller targets are removed."""
    max_foreground_share: float | None = Field(None, gt=0, le=1)
    """The mask is empty if more than this share of the slide is selected; null: no such limit."""

    def in_pixels(self, mpp: float) -> PostprocessConfig:
        """Return the cascade for maps of `mpp` um/px.

        Raises:
            ConfigError: a length is too short for this resolution, or the resolution is none.

        Example:
            >>> cascade = SlidePostprocessConfig().in_pixels(mpp=0.5)
            >>> cascade.closing_px, cascade.max_hole_px, cascade.min_target_px
            (9, 20000, 150)
        """
        if not 0 < mpp < math.inf:
            raise ConfigError(f"mpp = {mpp}: expected um per pixel, above 0; correct the resolution of the maps")
        px_per_um2 = mpp**-2
        return PostprocessConfig(
            steps=(self.step,),
            closing_px=self._closing_px(mpp),
            closing_count=self.closing_count,
            border_fill=self.border_fill,
            max_hole_px=math.floor(self.max_hole_um2 * px_per_um2 * (1 + _ROUNDING)),
            min_target_px=math.ceil(self.min_target_um2 * px_per_um2 * (1 - _ROUNDING)),
            min_foreground_px=1,
            max_foreground_share=self.max_foreground_share,
        )

    def _closing_px(self, mpp: float) -> int:
        closing_px = 2 * math.floor(self.closing_um / mpp / 2) + 1
        if closing_px == 1 and self.closing_um > 0:
            raise ConfigError(
                f"closing_um = {self.closing_um:g}: less than 2 px of {mpp:g} um, which closes nothing; "
                f"use 0 to say so, or at least {2 * mpp:g}"
            )
        return closing_px
