"""How many um a pixel of a slide has, and where that is known from.

A wrong resolution gives maps that look plausible and are nonsense, so it is never guessed: what is missing, absurd or
not square is refused, and what is used says its source.
"""

import math
from dataclasses import dataclass
from enum import Enum

from stas_core.errors import AbsurdMpp, AnisotropicMpp, MissingMpp
from stas_core.slides.slide import SlideInfo

FINEST_MPP, COARSEST_MPP = 0.05, 5.0
"""What is believed, in um per pixel: scanners give 0.1 to 1; 26.5, 265 or 353 are 960, 96 or 72 dots per inch."""
MAX_ANISOTROPY = 0.03
"""How far the sides of a pixel may differ, as a share."""
UM_PER_OBJECTIVE = 10.0
"""um per pixel times magnification: 0.5 at 20x, 0.25 at 40x, by convention of all vendors."""


class MppSource(str, Enum):
    """Where a resolution is known from, best first."""

    OVERRIDE = "override"
    METADATA = "metadata"
    OBJECTIVE = "objective"


@dataclass(frozen=True)
class Mpp:
    """um per level-0 pixel of a slide."""

    value: float
    source: MppSource


def resolve_mpp(info: SlideInfo, override: float | None = None) -> Mpp:
    """Return a slide's resolution: the user's, else the file's, else what its objective means.

    Raises:
        MissingMpp, AbsurdMpp, AnisotropicMpp: naming the slide, the value, and how to give another.

    Example:
        >>> resolve_mpp(SlideInfo("a.svs", "aperio", (), objective=20.0)).value
        0.5
    """
    if override is not None:
        return Mpp(_believed(override, info.name, "given"), MppSource.OVERRIDE)
    sides = [side for side in (info.mpp_x, info.mpp_y) if side is not None and side > 0]
    if sides:
        for side in sides:
            _believed(side, info.name, "in the file")
        if max(sides) / min(sides) - 1 > MAX_ANISOTROPY:
            raise AnisotropicMpp(
                f"{info.name} has {info.mpp_x:g} um/px across and {info.mpp_y:g} down, expected sides that differ by "
                f"{MAX_ANISOTROPY:.0%} at most; resample it to square pixels, or give its um/px as an override"
            )
        return Mpp(math.sqrt(sides[0] * sides[-1]), MppSource.METADATA)
    if info.objective:
        value = _believed(UM_PER_OBJECTIVE / info.objective, info.name, f"of its {info.objective:g}x objective")
        return Mpp(value, MppSource.OBJECTIVE)
    raise MissingMpp(
        f"{info.name} does not say how many um a pixel has, neither by resolution nor by objective; give its um/px as "
        "an override: 0.5 at 20x, 0.25 at 40x for most scanners"
    )


def _believed(value: float, name: str, where: str) -> float:
    if not FINEST_MPP <= value <= COARSEST_MPP:  # NaN too
        raise AbsurdMpp(
            f"{name}: {value:g} um/px ({where}), expected {FINEST_MPP:g} to {COARSEST_MPP:g}; it may be the default "
            "of the program that wrote the file; give the slide's um/px as an override"
        )
    return value
