"""What may make the figures of a slide wrong, as sentences with numbers: the slide is scored all the same."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from stas_core.arrays import MaxC, StainMatrix
from stas_core.data.stain import Stain
from stas_core.slides.tissue import BLURRED_BELOW, Tissue

PEN_ABOVE, FILL_ABOVE = 0.01, 0.05
"""Shares of the slide under ink, and not imaged, that are worth a look."""
LEAST_TISSUE, MOST_TISSUE = 0.005, 0.95
"""Shares of a slide that tissue has; a section covers more only where it alone was scanned."""
_NAMES = ("hematoxylin", "eosin")


@dataclass(frozen=True)
class StainRange:
    """The stains of a cohort: least and largest concentrations, and directions about their mean."""

    low: MaxC
    high: MaxC
    matrix: StainMatrix
    """Mean directions, of length 1."""
    widest_deg: MaxC
    """Largest angle of an image's direction to the mean one, of hematoxylin and eosin."""

    @classmethod
    def of(cls, cohort: Sequence[Stain]) -> "StainRange":
        """Return the range of the images that a model was trained on.

        Raises:
            ValueError: there is none.
        """
        if not cohort:
            raise ValueError("no stain to take a range of; give those of the cohort's images that have one")
        amounts, directions = np.stack([one.max_c for one in cohort]), np.stack([one.matrix for one in cohort])
        mean = directions.mean(axis=0)
        mean /= np.linalg.norm(mean, axis=0)
        widest = np.max([_angles_deg(one, mean) for one in directions], axis=0)
        return cls(amounts.min(axis=0), amounts.max(axis=0), mean, widest)


def _angles_deg(one: StainMatrix, other: StainMatrix) -> MaxC:
    cosines = (one * other).sum(axis=0) / np.linalg.norm(one, axis=0) / np.linalg.norm(other, axis=0)
    return np.asarray(np.degrees(np.arccos(np.clip(cosines, -1, 1))))


def warnings_of(
    tissue: Tissue, *, sharpness: float | None, stain: Stain | None, cohort: StainRange | None = None
) -> list[str]:
    """Return what is odd about a slide, each with its number and what to do.

    Args:
        tissue: its tissue.
        sharpness: of `measure_sharpness`; None: not known.
        stain: of `tissue.estimate_stain`; None: not known.
        cohort: the stains that the models were trained on; None: not known, so no stain is odd.
    """
    found = []
    if sharpness is not None and sharpness < BLURRED_BELOW:
        found.append(f"blurred: sharpness {sharpness:.2f}, in focus {BLURRED_BELOW:g} or more; scan it again")
    if tissue.pen_share > PEN_ABOVE:
        found.append(f"pen: ink covers {tissue.pen_share:.1%} of the slide; tissue under it was not scored")
    if tissue.fill_share > FILL_ABOVE:
        found.append(f"black: {tissue.fill_share:.1%} of the slide was not imaged; tissue may be missing")
    if not LEAST_TISSUE <= tissue.share <= MOST_TISSUE:
        found.append(
            f"tissue: {tissue.share:.2%} of the slide, expected {LEAST_TISSUE:.1%} to {MOST_TISSUE:.0%}; look at its "
            "outline, or give a tissue mask"
        )
    if stain is not None and cohort is not None:
        found += _odd_stains(stain, cohort)
    return found


def _odd_stains(stain: Stain, cohort: StainRange) -> Iterable[str]:
    angles = _angles_deg(stain.matrix, cohort.matrix)
    for index, name in enumerate(_NAMES):
        amount, low, high = stain.max_c[index], cohort.low[index], cohort.high[index]
        if not low <= amount <= high:
            yield (
                f"stain: {name} of concentration {amount:.2f}, in training {low:.2f} to {high:.2f}; "
                "treat the figures with care"
            )
        if angles[index] > cohort.widest_deg[index]:
            yield (
                f"stain: colour of {name} {angles[index]:.1f} degrees from the training images' mean, which lie within "
                f"{cohort.widest_deg[index]:.1f}; treat the figures with care"
            )
