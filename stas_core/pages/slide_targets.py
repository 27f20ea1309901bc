"""The largest targets of a slide, as its page lists them: how large, how sure, how far outside, and where."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely

from stas_core import storage, tables
from stas_core.errors import InputError, StorageError
from stas_core.pages.contents import Column

MOST_TARGETS = 50
"""Of a slide that a page lists: the largest."""
_MOST_BYTES = 200_000_000
"""Of a file of targets that is read for it."""
COLUMNS = (
    Column("area_um2", "area \u00b5m\u00b2", kind="whole"),
    Column("longest_um", "longest \u00b5m", "greatest distance between two points of its outline", kind="whole"),
    Column("mean_prob", "mean prob.", digits=2),
    Column("peak_prob", "peak prob.", digits=2),
    Column(
        "tumour_um",
        "outside \u00b5m",
        "distance of its centroid from the tumour's outline, 0 inside; a dash: no outline is known",
        kind="whole",
    ),
    Column(
        "edge_um",
        "to edge \u00b5m",
        "distance of its centroid from the section's edge; near it lie artefacts; a dash: the slide shows no edge",
        kind="whole",
    ),
    Column("disagreement", "disagree", "standard deviation of the members' probabilities, mean over it", digits=2),
    Column("x_mm", "x mm", "of its centroid, from the left of the slide as QuPath shows it", digits=2),
    Column("y_mm", "y mm", "of its centroid, from the top of the slide as QuPath shows it", digits=2),
)
"""Of a target in the list."""
_NUMBERS = ("area_um2", "centroid_x", "centroid_y", "mean_prob", "peak_prob")
_MAY_LACK = ("tumour_um", "edge_um", "disagreement")
_FIELDS: list[Any] = [
    pa.field("number", pa.int32(), nullable=False),
    pa.field("geometry", pa.binary(), nullable=False),
    *(pa.field(name, pa.float64(), nullable=False) for name in _NUMBERS),
    *(pa.field(name, pa.float64()) for name in _MAY_LACK),
]


@dataclass(frozen=True)
class ListedTargets:
    """What a page lists of a slide's targets."""

    targets: Sequence[Mapping[str, Any]] = ()
    """As `Item.targets`, the largest first."""
    note: str = ""
    """How many more there are, and where."""
    missing: str = ""
    """Why none is listed."""


def largest_targets(uri: str, row: Mapping[str, Any]) -> ListedTargets:
    """Return the largest targets of a slide, with their boxes in px of level 0.

    Args:
        uri: of its file of targets; "": there is none.
        row: of the slide, in `slides.parquet`.
    """
    num_targets = row["num_targets"]
    if not uri:
        why = "no table of them was kept: score with save.targets=true"
        return ListedTargets(missing=why if num_targets else "")
    try:
        if storage.size(uri) > _MOST_BYTES:
            return ListedTargets(missing=f"{uri} is too large to be read for a page; it lists all {num_targets:,}")
        table = tables.read_table(uri)
        corner = _corner(table.schema.metadata or {})
        table = tables.conforming(uri, table, pa.schema(_FIELDS), optional=_MAY_LACK)
    except (StorageError, InputError) as error:
        return ListedTargets(missing=str(error))
    if table.num_rows != num_targets:
        why = f"{uri} lists {table.num_rows:,}, and slides.parquet counts {num_targets:,}; score the slide again"
        return ListedTargets(missing=why)
    chosen = table.take(np.argsort(-table["area_um2"].to_numpy(), kind="stable")[:MOST_TARGETS])
    listed = [_target(one, corner, row) for one in chosen.to_pylist()]
    name = "/".join(uri.split("/")[-2:])
    more = table.num_rows - len(listed)
    note = f"The {len(listed)} largest of {table.num_rows:,}; the other {more:,} are in {name}, too." if more else ""
    return ListedTargets(listed, note)


def _corner(metadata: Mapping[bytes, bytes]) -> npt.NDArray[np.float64]:
    """Return x, y of the level-0 pixel that a file's coordinates count from."""
    try:
        found = json.loads(metadata.get(b"stas", b"{}"))
        corner = np.array(found.get("bounds_corner") or (0, 0), np.float64)
    except (ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"what its metadata says of its coordinates is damaged ({error}); score again") from error
    if corner.shape != (2,) or not np.isfinite(corner).all():
        raise StorageError(f"its coordinates count from {corner.tolist()}, expected x and y; score the slide again")
    return corner


def _target(values: Mapping[str, Any], corner: npt.NDArray[np.float64], row: Mapping[str, Any]) -> dict[str, Any]:
    mpp = row["mpp"]
    (shape,) = shapely.from_wkb([values["geometry"]], on_invalid="ignore")
    points = np.zeros((0, 2)) if shape is None else shapely.get_coordinates(shapely.convex_hull(shape))
    box = longest_um = None
    if len(points):
        box = (*(points.min(axis=0) + corner).tolist(), *(points.max(axis=0) + corner).tolist())
        longest_um = float(np.linalg.norm(points[:, None] - points[None], axis=-1).max()) * mpp
    return {
        "number": values["number"],
        "box": box,
        "longest_um": longest_um,
        "x_mm": values["centroid_x"] * mpp / 1000,
        "y_mm": values["centroid_y"] * mpp / 1000,
        **{name: values[name] for name in ("area_um2", "mean_prob", "peak_prob", *_MAY_LACK)},
    }
