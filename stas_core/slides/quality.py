"""What may make the figures of a slide wrong, as sentences with numbers: the slide is scored all the same."""

from stas_core.data.appearance import NAMES, Drift, Ranges
from stas_core.slides.tissue import BLURRED_BELOW, Tissue

PEN_ABOVE, FILL_ABOVE = 0.01, 0.05
"""Shares of the slide under ink, and not imaged, that are worth a look."""
LEAST_TISSUE, MOST_TISSUE = 0.005, 0.95
"""Shares of a slide that tissue has; a section covers more only where it alone was scanned."""


def warnings_of(tissue: Tissue, *, sharpness: float | None) -> list[str]:
    """Return what is odd about a slide, each with its number and what to do.

    Args:
        tissue: its tissue.
        sharpness: of `measure_sharpness`; None: not known.
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
    return found


def stain_warning(far: Drift, usual: Ranges) -> str:
    """Return what is odd about the stain of a slide that lies `far` from what is usual.

    Example:
        >>> stain_warning(Drift(score=2.0, figure="eosin", value=2.5), {"eosin": (1.0, 2.0)})
        'stain: amount of eosin 2.5, in training 1 to 2 (drift 2.0); treat the figures with care'
    """
    low, high = usual[far.figure]
    return (
        f"stain: {NAMES[far.figure]} {far.value:.3g}, in training {low:.3g} to {high:.3g} (drift {far.score:.1f}); "
        "treat the figures with care"
    )
