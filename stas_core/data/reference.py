"""What scoring holds images against: a few figures of the cohort that an ensemble was trained on.

They travel in `ensemble.json`, under `cohort`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from stas_core.data import appearance
from stas_core.data.appearance import Look
from stas_core.data.cohort import CohortRow
from stas_core.errors import CheckpointError

LARGE_SHARE = 0.5
"""A mask that covers more of an image than this is large: of the published 1,053 fields, none is."""
SAME_MPP = 0.1
"""How far pixel sizes may differ, as a share, and still count as the same."""
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class CohortReference:
    """Figures of the training images of a cohort; ranges are those of `appearance.Look`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    num_images: Annotated[int, Field(ge=1)]
    empty_share: Share
    """Share of the images without a target."""
    large_share: Share
    """Share of the images that are more than `LARGE_SHARE` target."""
    looks: dict[str, tuple[float, float]]
    """Of each figure, from where to where the images have it."""
    disagreement: Annotated[float, Field(ge=0, le=0.5)] | None = None
    """Mean disagreement of the members on hold-out images, the highest of them; null: there was none, or one member."""


def reference_of(rows: Sequence[CohortRow], disagreement: float | None = None) -> CohortReference | None:
    """Return the reference of a cohort's training images; None: it has none."""
    trained = [row for row in rows if row.fold is not None]
    if not trained:
        return None
    return CohortReference(
        num_images=len(trained),
        empty_share=sum(row.num_targets == 0 for row in trained) / len(trained),
        large_share=sum(row.foreground_share > LARGE_SHARE for row in trained) / len(trained),
        looks=appearance.ranges([look_of(row) for row in trained]),
        disagreement=disagreement,
    )


def is_same_mpp(one: float, other: float) -> bool:
    """Tell whether two pixel sizes count as the same."""
    return max(one, other) <= min(one, other) * (1 + SAME_MPP)


def common_mpp(rows: Sequence[CohortRow]) -> float | None:
    """Return the um per pixel that all images of a cohort have; None: it is not known of all, or they differ."""
    sizes = [row.mpp for row in rows if row.mpp is not None]
    if len(sizes) < len(rows) or not sizes or not is_same_mpp(min(sizes), max(sizes)):
        return None
    return sorted(sizes)[len(sizes) // 2]


def look_of(row: CohortRow) -> Look:
    """Return how an image of a cohort looks; a cohort of an earlier version knows stains alone."""
    return appearance.of_stain(row.stain, row.brightness, row.sharpness)


def parse_reference(values: Any, source: str) -> CohortReference:
    """Read a reference from JSON values.

    Raises:
        CheckpointError: naming the first value that is not as it should be.
    """
    try:
        return TypeAdapter(CohortReference).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("cohort", *first["loc"]))
        raise CheckpointError(
            f"{source}: {where} = {str(first['input'])[:80]!r}: {first['msg']}; copy it again from its run, or leave "
            "`cohort` out of it, and images are held against nothing"
        ) from error
