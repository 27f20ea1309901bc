"""The figures of a whole slide, from its targets: how much there is, where it is densest, how far it lies from what.

They are measurements, not a diagnosis: whether spread through air spaces (STAS) is present is for a pathologist to
say. By definition it is tumour cells within air spaces beyond the edge of the main tumour (WHO Classification of
Tumours, Thoracic Tumours, 5th ed. 2021), so figures that go by this edge are null unless the tumour is outlined.

Places are the targets' centroids; the middle of pixel i lies at i + 0.5. `describe_scores` says what each figure is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from stas_core import markdown, tables
from stas_core.predict.postprocess import Targets
from stas_core.slides.section import Frame, Section, Tumour
from stas_core.slides.spread import Circle, densest_circle, gaps, widest_gap_back
from stas_core.tables import Int32

FIELD_UM = float(np.sqrt(0.95e6 / np.pi))
"""Radius of a microscope's field of 0.95 mm2: a 20x objective and an eyepiece of field number 22."""
FIELD_SLACK_UM = 5.0
"""Of the densest field's radius: about half a nest, so less than where one lies means."""
EDGE_UM = 200.0
FAR_UM = 2000.0
BAND_UM = 500.0
NO_OUTLINE = "no tumour outline was given"

FieldClass = Literal["0", "1-4", ">=5"]
DistanceClass = Literal["0", "<2 mm", ">=2 mm"]
Values = Float64[np.ndarray, "n"]


@dataclass(frozen=True, kw_only=True)
class SlideScores:
    """A row of a slide's figures."""

    id: str
    """Of the slide."""
    tissue_mm2: float
    """Area of the tissue that was scored, without large air spaces."""
    stas_mm2: float
    """Area of all targets."""
    num_targets: int
    """Targets on the slide, wherever they lie."""
    targets_per_mm2: float | None
    """Targets per mm2 of tissue (density as in STASNet: Feng et al., npj Precis Oncol 2024;8:173); null without
    tissue."""
    size_p5_um2: float | None
    """5th percentile of the targets' areas; null, as the next four, without targets."""
    size_p25_um2: float | None
    """25th percentile of the targets' areas."""
    size_median_um2: float | None
    """Median of the targets' areas."""
    size_p75_um2: float | None
    """75th percentile of the targets' areas."""
    size_p95_um2: float | None
    """95th percentile of the targets' areas."""
    densest_count: int
    """Centroids in the densest circle of 0.95 mm2 (a 20x field, radius 550 um), wherever it lies; no circle of a
    radius 5 um smaller holds more, or, of very many targets, of the radius that a warning says."""
    densest_class: str
    """Class of that count, 0, 1-4 or >=5, as clusters in the most prominent 20x field (Uruga et al., J Thorac Oncol
    2017;12:1046). A pathologist counts single cells, too."""
    densest_x_px: float | None
    """Middle of that circle in level-0 pixels; null, as the next three, without targets."""
    densest_y_px: float | None
    """Middle of that circle in level-0 pixels, downwards."""
    densest_x_um: float | None
    """Middle of that circle in um from the left of level 0."""
    densest_y_um: float | None
    """Middle of that circle in um from the top of level 0."""
    edge_share: float | None
    """Share of targets within 200 um of the section's edge, where tissue meets glass (not air spaces within). Cells at
    ragged edges are a sign of artefact (Kadota et al., J Thorac Oncol 2015;10:806). Null without targets, or if the
    slide shows no edge."""
    gap_median_um: float | None
    """Median gap between targets: length of the lines of their minimum spanning tree, centroid to centroid; null, as
    the next two, with fewer than two targets."""
    gap_p95_um: float | None
    """95th percentile of these gaps."""
    gap_max_um: float | None
    """Largest of these gaps: without continuity of spread, clusters may be artefacts (Kadota et al. 2015)."""
    num_inside: int | None
    """Targets in the tumour's outline or on its edge; null, as all that follows up to the reason, without an
    outline."""
    num_outside: int | None
    """Targets beyond the tumour's outline, the only ones that can be STAS by definition (WHO 2021)."""
    outside_median_um: float | None
    """Median distance of these targets from the tumour's edge (distance as in STASNet); null, as the next two, if there
    are none."""
    outside_p95_um: float | None
    """95th percentile of these distances."""
    outside_max_um: float | None
    """Largest of these distances."""
    outside_class: str | None
    """Class of the largest distance: 0 (no target outside), <2 mm or >=2 mm (Cancers 2024;16(12):2218)."""
    outside_per_band: list[int] | None
    """Targets in each band of 0.5 mm of distance from the tumour's edge, from 0 to the farthest; the lower end of a
    band belongs to it."""
    chain_gap_um: float | None
    """Longest stride that cannot be avoided from some outside target back to the tumour's edge, from target to target;
    null without targets outside."""
    tumour_edge_mm: float | None
    """Length of the tumour's outline, that of holes and of the section's own edge included."""
    outside_per_edge_mm: float | None
    """Targets outside per mm of the tumour's outline."""
    no_tumour_reason: str | None
    """Why figures of the tumour are null; null if they are not."""
    warnings: list[str]
    """What may make these figures wrong: blur, pen, what was not imaged, odd tissue or stain, very many targets."""


@dataclass(frozen=True, kw_only=True)
class SlideTarget:
    """A row of a slide's targets."""

    id: str
    """Of the slide."""
    target: Int32
    """Its number within the slide, from 1."""
    area_um2: float
    """Its area."""
    x_um: float
    """Its centroid in um from the left of level 0."""
    y_um: float
    """Its centroid in um from the top of level 0."""
    x_px: float
    """Its centroid in level-0 pixels."""
    y_px: float
    """Its centroid in level-0 pixels, downwards."""
    mean_prob: float
    """Mean probability of its pixels."""
    peak_prob: float
    """Largest probability of its pixels."""
    edge_um: float | None
    """Distance of its centroid from the section's edge; null if the slide shows none."""
    tumour_um: float | None
    """Distance of its centroid from the tumour's outline, 0 inside; null without an outline."""
    in_tumour: bool | None
    """Whether its centroid lies in the tumour's outline; null without one."""
    disagreement: float | None
    """How far the ensemble's members differ on it; null with one member."""


@dataclass(frozen=True)
class PlacedTargets:
    """The targets of a slide, and how far each is from what."""

    targets: Targets
    frame: Frame
    area_um2: Values
    points_um: Float64[np.ndarray, "n 2"]
    """(x, y) of their centroids."""
    edge_um: Values | None
    """Distance from the section's edge; None: the slide shows none."""
    tumour_um: Values | None
    """Distance from the tumour's edge, 0 inside; None: no outline was given."""

    def __len__(self) -> int:
        return len(self.targets)


def place_targets(targets: Targets, *, frame: Frame, section: Section, tumour: Tumour | None) -> PlacedTargets:
    """Measure where each target lies."""
    x_um, y_um = (targets.centroid_x + 0.5) * frame.mpp, (targets.centroid_y + 0.5) * frame.mpp
    return PlacedTargets(
        targets,
        frame,
        area_um2=targets.area_px * frame.mpp**2,
        points_um=np.stack([x_um, y_um], axis=1),
        edge_um=section.distances_um(x_um, y_um),
        tumour_um=None if tumour is None else tumour.distances_um(x_um, y_um),
    )


def score_slide(
    slide_id: str, placed: PlacedTargets, *, section: Section, tumour: Tumour | None, warnings: Sequence[str] = ()
) -> SlideScores:
    """Measure a slide by its targets."""
    areas = placed.area_um2
    size_p5, size_p25, size_median, size_p75, size_p95 = _percentiles(areas, (5, 25, 50, 75, 95))
    between = gaps(placed.points_um)
    gap_median, gap_p95, gap_max = _percentiles(between, (50, 95, 100))
    is_at_edge = None if placed.edge_um is None else placed.edge_um <= EDGE_UM
    circle = densest_circle(placed.points_um, FIELD_UM, FIELD_SLACK_UM)
    return SlideScores(
        id=slide_id,
        tissue_mm2=section.area_mm2,
        stas_mm2=float(areas.sum()) / 1e6,
        num_targets=len(placed),
        targets_per_mm2=len(placed) / section.area_mm2 if section.area_mm2 else None,
        size_p5_um2=size_p5,
        size_p25_um2=size_p25,
        size_median_um2=size_median,
        size_p75_um2=size_p75,
        size_p95_um2=size_p95,
        **_densest(circle, placed.frame),
        edge_share=None if is_at_edge is None or not len(placed) else float(is_at_edge.mean()),
        gap_median_um=gap_median,
        gap_p95_um=gap_p95,
        gap_max_um=gap_max,
        **_of_tumour(placed, tumour),
        warnings=[*warnings, *_of_search(circle)],
    )


def _percentiles(values: np.ndarray, shares: tuple[int, ...]) -> list[float | None]:
    if not len(values):
        return [None] * len(shares)
    return [float(value) for value in np.percentile(values, shares)]


def _of_search(circle: Circle | None) -> list[str]:
    if circle is None or circle.slack <= FIELD_SLACK_UM:
        return []
    return [
        f"densest field: too many targets to try every place; none of a radius {circle.slack:.0f} um smaller has more"
    ]


def _densest(circle: Circle | None, frame: Frame) -> dict[str, Any]:
    if circle is None:
        places = ("densest_x_px", "densest_y_px", "densest_x_um", "densest_y_um")
        return {"densest_count": 0, "densest_class": field_class(0), **dict.fromkeys(places)}
    per_um = frame.level0_px / frame.mpp
    return {
        "densest_count": circle.count,
        "densest_class": field_class(circle.count),
        "densest_x_px": circle.x * per_um,
        "densest_y_px": circle.y * per_um,
        "densest_x_um": circle.x,
        "densest_y_um": circle.y,
    }


def field_class(count: int) -> FieldClass:
    """Return the class of a count of clusters in the densest field.

    Example:
        >>> [field_class(count) for count in (0, 1, 4, 5)]
        ['0', '1-4', '1-4', '>=5']
    """
    return "0" if count == 0 else "1-4" if count < 5 else ">=5"


def _of_tumour(placed: PlacedTargets, tumour: Tumour | None) -> dict[str, Any]:
    if tumour is None or placed.tumour_um is None:
        return {**dict.fromkeys(_OF_TUMOUR), "no_tumour_reason": NO_OUTLINE}
    outside = placed.tumour_um > 0
    distances = placed.tumour_um[outside]
    median, p95, largest = _percentiles(distances, (50, 95, 100))
    is_far = largest is not None and largest >= FAR_UM
    distance_class: DistanceClass = "0" if largest is None else ">=2 mm" if is_far else "<2 mm"
    return {
        "num_inside": int(np.count_nonzero(~outside)),
        "num_outside": len(distances),
        "outside_median_um": median,
        "outside_p95_um": p95,
        "outside_max_um": largest,
        "outside_class": distance_class,
        "outside_per_band": np.bincount((distances // BAND_UM).astype(np.int64)).tolist(),
        "chain_gap_um": widest_gap_back(placed.points_um[outside], distances) if len(distances) else None,
        "tumour_edge_mm": tumour.edge_mm,
        "outside_per_edge_mm": len(distances) / tumour.edge_mm,
        "no_tumour_reason": None,
    }


_NAMES = [field.name for field in fields(SlideScores)]
_OF_TUMOUR = _NAMES[_NAMES.index("num_inside") : _NAMES.index("no_tumour_reason")]
_SAME_FOR_ALL = {"tissue_mm2", "tumour_edge_mm", "densest_x_px", "densest_y_px", "densest_x_um", "densest_y_um"}
"""Figures without a range over members: they do not depend on them, or are places."""
_FIGURES = [
    field
    for field in tables.schema_of(SlideScores)
    if field.type in (pa.int64(), pa.float64()) and field.name not in _SAME_FOR_ALL
]
RANGES_SCHEMA: pa.Schema = pa.schema(
    pa.field(
        f"{figure.name}_{end}",
        figure.type,
        metadata={"description": f"{name} {figure.name} of the ensemble's members."},
    )
    for figure in _FIGURES
    for end, name in (("min", "Least"), ("max", "Largest"))
)
"""The columns that `ranges` fills; null with one member, or if no member has the figure."""


def ranges(members: Sequence[SlideScores]) -> dict[str, float | None]:
    """Return the least and the largest of each figure over an ensemble's members, scored alone, by column."""
    found: dict[str, float | None] = dict.fromkeys(RANGES_SCHEMA.names)
    if len(members) > 1:
        for figure in _FIGURES:
            values = [value for one in members if (value := getattr(one, figure.name)) is not None]
            if values:
                found |= {f"{figure.name}_min": min(values), f"{figure.name}_max": max(values)}
    return found


def scores_table(rows: Sequence[SlideScores], members: Sequence[Sequence[SlideScores]]) -> pa.Table:
    """Return slides' figures with their ranges: a row per slide, `members` being those of each."""
    table = tables.to_table(SlideScores, rows)
    spans = pa.Table.from_pylist([ranges(of_slide) for of_slide in members], schema=RANGES_SCHEMA)
    if len(rows) != len(members):
        raise ValueError(f"{len(rows)} slides and members of {len(members)}; give those of each slide")
    return pa.Table.from_arrays([*table.columns, *spans.columns], schema=pa.schema([*table.schema, *RANGES_SCHEMA]))


def targets_table(slide_id: str, placed: PlacedTargets, disagreement: Values | None) -> pa.Table:
    """Return a slide's targets as a table of `SlideTarget`; `disagreement` is given per target."""
    x_um, y_um = placed.points_um.T
    per_um = placed.frame.level0_px / placed.frame.mpp
    columns: dict[str, Any] = {
        "id": [slide_id] * len(placed),
        "target": np.arange(1, len(placed) + 1),
        "area_um2": placed.area_um2,
        "x_um": x_um,
        "y_um": y_um,
        "x_px": x_um * per_um,
        "y_px": y_um * per_um,
        "mean_prob": placed.targets.mean_prob,
        "peak_prob": placed.targets.peak_prob,
        "edge_um": placed.edge_um,
        "tumour_um": placed.tumour_um,
        "in_tumour": None if placed.tumour_um is None else placed.tumour_um == 0,
        "disagreement": disagreement,
    }
    schema = tables.schema_of(SlideTarget)
    arrays = [
        pa.nulls(len(placed), field.type) if columns[field.name] is None else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def describe_scores() -> str:
    """Return what each figure of a slide is, as a Markdown table."""
    texts = tables.descriptions(SlideScores)
    rows = [(f"`{field.name}`", str(field.type), texts[field.name]) for field in tables.schema_of(SlideScores)]
    return markdown.table(("figure", "type", "what it is"), rows)
