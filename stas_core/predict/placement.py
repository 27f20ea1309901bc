"""Where targets lie in the image that people see, and what is told of them beside their outlines."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from stas_core.predict.postprocess import Targets

DECIMALS = 2
"""Of coordinates: a hundredth of a level-0 pixel. Lines of a map's pixels are much farther apart, so that what is
valid on the map is valid there."""
Values = npt.NDArray[Any]


@dataclass(frozen=True)
class Placement:
    """How a map lies on level 0 of its image.

    Example:
        >>> Placement(level0_px=2.5, corner=(100, 50)).on_level0([40, 41], 0).tolist()
        [0.0, 2.5]
    """

    level0_px: float = 1.0
    """Level-0 pixels per pixel of the map, along a side."""
    corner: tuple[int, int] | None = None
    """x, y of the scanned part (`openslide.bounds-x`, `-y`), which QuPath counts from; None: the file names none."""
    mpp: float | None = None
    """um per pixel of the map; None: not known."""

    def on_level0(self, px: npt.ArrayLike, axis: int) -> npt.NDArray[np.float64]:
        """Return x (axis 0) or y (axis 1) coordinates of the map as QuPath counts them; corners of pixels are whole."""
        start = self.corner[axis] if self.corner else 0
        placed = np.asarray(px, np.float64) * self.level0_px - start
        return np.asarray(np.round(placed, DECIMALS) + 0.0)  # no negative zero

    @property
    def area_unit(self) -> str:
        """Return what areas are given in."""
        return "px2" if self.mpp is None else "um2"


@dataclass(frozen=True)
class TargetFacts:
    """What files of targets say beside their outlines: a row per target, in the order of their numbers."""

    image_id: str
    targets: Targets
    placement: Placement = field(default_factory=Placement)
    columns: Mapping[str, Values | None] = field(default_factory=dict)
    """Further columns, numbers or booleans, named with their unit (`edge_um`); None: null for all."""

    def __post_init__(self) -> None:
        for name, values in self.columns.items():
            if values is None:
                continue
            if values.shape != (len(self.targets),) or values.dtype.kind not in "biuf":
                raise ValueError(
                    f"column {name!r} of {self.image_id} is {values.dtype} of shape {values.shape}; expected a number "
                    f"for each of its {len(self.targets)} targets"
                )

    @property
    def area(self) -> npt.NDArray[np.float64]:
        """Return the targets' areas, in the placement's unit."""
        return np.asarray(self.targets.area_px * (self.placement.mpp or 1.0) ** 2)

    def record(self) -> dict[str, Any]:
        """Return what a file says of itself: its image, and what its coordinates are."""
        placement = self.placement
        return {
            "image": self.image_id,
            "coordinates": "level-0 px from the upper left corner, y downwards",
            "bounds_subtracted": placement.corner is not None,
            "bounds_corner": placement.corner,
            "level0_px_per_px": placement.level0_px,
            "um_per_px": placement.mpp,
            "um_per_level0_px": None if placement.mpp is None else placement.mpp / placement.level0_px,
        }
