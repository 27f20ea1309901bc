"""The figures of a slide, where they can be worked out by hand."""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
from shapely.geometry import MultiPolygon, Polygon, box

from stas_core import tables
from stas_core.errors import InputError
from stas_core.predict.postprocess import Targets
from stas_core.slides import scores
from stas_core.slides.quality import warnings_of
from stas_core.slides.scores import (
    NO_OUTLINE,
    PlacedTargets,
    SlideScores,
    SlideTarget,
    describe_scores,
    place_targets,
    ranges,
    score_slide,
    scores_table,
    targets_table,
)
from stas_core.slides.section import Frame, Section, Tumour
from stas_core.slides.spread import Circle
from stas_core.slides.tissue import Tissue
from tests.conftest import ROOT

FRAME = Frame(height=20_000, width=20_000, mpp=0.5, level0_px=2.0)  # 10 mm of a slide scanned at 40x


def made_targets(places_um: list[tuple[float, float]], areas_um2: list[float]) -> Targets:
    x, y = (np.array([place[axis] for place in places_um], float) / FRAME.mpp - 0.5 for axis in (0, 1))
    number = len(places_um)
    return Targets(
        area_px=(np.array(areas_um2) / FRAME.mpp**2).astype(np.int64),
        centroid_x=x,
        centroid_y=y,
        bbox=np.zeros((number, 4), np.int64),
        mean_prob=np.full(number, 0.8),
        peak_prob=np.full(number, 0.9),
        sides=np.zeros((number, 4), bool),
    )


def made_tissue(margin_px: int = 125, mpp: float = 8.0) -> Tissue:
    """Return a square of tissue from 1 to 9 mm with an air space in its middle."""
    mask = np.zeros((1250, 1250), bool)
    mask[margin_px : 1250 - margin_px, margin_px : 1250 - margin_px] = True
    mask[600:650, 600:650] = False
    return Tissue(mask, mpp, 50.0, "computed")


def scored(
    places_um: list[tuple[float, float]], outline: Polygon | MultiPolygon | None = None, **options: Any
) -> SlideScores:
    section = Section.of(options.get("tissue") or made_tissue())
    tumour = None if outline is None else Tumour(outline, FRAME)
    areas = [100.0 * number for number in range(1, len(places_um) + 1)]
    placed = place_targets(made_targets(places_um, areas), frame=FRAME, section=section, tumour=tumour)
    return score_slide("0007", placed, section=section, tumour=tumour)


def test_figures_that_need_no_outline() -> None:
    found = scored([(3000, 3000), (3300, 3400), (3000, 3010), (7000, 3000), (1100, 5000)])
    assert found.tissue_mm2 == pytest.approx(64 - 0.16)
    assert (found.num_targets, found.stas_mm2) == pytest.approx((5, 1500e-6))
    assert found.targets_per_mm2 == pytest.approx(5 / 63.84)
    assert (found.size_p5_um2, found.size_p25_um2, found.size_median_um2) == (120, 200, 300)
    assert (found.densest_count, found.densest_class) == (3, "1-4")
    assert (found.densest_x_um, found.densest_y_um) == pytest.approx((3150, 3200), abs=1)
    assert found.densest_x_px == pytest.approx(4 * 3150, abs=4)
    assert found.edge_share == 0.2  # what lies 100 um from the left edge
    assert found.gap_max_um == pytest.approx(np.hypot(3700, 400))
    assert found.gap_median_um == pytest.approx((np.hypot(300, 390) + np.hypot(2200, 1600)) / 2)


def test_an_air_space_is_no_edge_of_the_section_and_a_region_of_interest_neither() -> None:
    centre, inside_left = np.array([5000.0, 1150.0, 500.0]), np.array([5000.0, 5000.0, 500.0])
    found = Section.of(made_tissue()).distances_um(centre, inside_left)
    assert found is not None and found.tolist() == pytest.approx([4000, 150, 0], abs=8)
    full = Tissue(np.ones((1250, 1250), bool), 8.0, 50.0, "computed")
    assert Section.of(full).distances_um(centre, inside_left) is None
    assert scored([(5000, 5000)], tissue=full).edge_share is None
    roi = np.zeros((1250, 1250), bool)
    roi[:, 600:] = True
    narrowed = Section.of(made_tissue().within(roi, "roi"), whole=made_tissue())
    again = narrowed.distances_um(centre, inside_left)
    assert again is not None and again.tolist() == found.tolist()
    assert narrowed.area_mm2 < Section.of(made_tissue()).area_mm2


def test_figures_that_go_by_the_tumours_edge() -> None:
    outline = box(2000, 2000, 6000, 6000)  # 1 to 3 mm, both ways
    found = scored([(2000, 2000), (3100, 2000), (3600, 2000), (3500, 2000), (2000, 5200)], outline)
    assert (found.num_inside, found.num_outside, found.no_tumour_reason) == (1, 4, None)
    assert (found.outside_median_um, found.outside_max_um) == pytest.approx((550, 2200))
    assert (found.outside_class, found.outside_per_band) == (">=2 mm", [1, 2, 0, 0, 1])
    assert found.chain_gap_um == pytest.approx(2200)
    assert (found.tumour_edge_mm, found.outside_per_edge_mm) == pytest.approx((8, 0.5))
    near = scored([(2000, 2000), (3100, 2000), (3600, 2000)], outline)
    assert near.outside_class == "<2 mm" and near.chain_gap_um == pytest.approx(500)
    none = scored([(2000, 2000), (3000, 2000)], outline)  # one on the edge
    assert (none.num_inside, none.outside_class, none.outside_per_band) == (2, "0", [])
    assert none.outside_max_um is none.chain_gap_um is None


def test_an_outline_may_have_holes_parts_and_crossing_lines() -> None:
    holed = Polygon(box(2000, 2000, 6000, 6000).exterior, [box(3000, 3000, 5000, 5000).exterior])
    found = scored(
        [(2000, 2000), (1200, 2000), (8000, 8000)], MultiPolygon([holed, box(16_000, 16_000, 17_000, 17_000)])
    )
    assert found.num_inside == 2 and found.outside_max_um == pytest.approx(500)
    assert found.tumour_edge_mm == pytest.approx(8 + 4 + 2)
    bow_tie = Polygon([(2000, 2000), (6000, 6000), (6000, 2000), (2000, 6000)])
    assert scored([(1100, 2000), (2000, 1100)], bow_tie).num_inside == 1


@pytest.mark.parametrize(
    ("outline", "message", "reason"),
    [
        (Polygon(), "is a Polygon without area, expected a polygon; draw it", "missing_shapes"),
        (Polygon([(0, 0), (9, 9), (3, 3)]), "without area", "missing_shapes"),
        (
            box(30_000, 0, 40_000, 50),
            r"x 30000 to 40000 .* is 20000x20000 px at 0.5 um/px; export",
            "wrong_coordinates",
        ),
    ],
)
def test_an_outline_that_cannot_be_meant_is_refused(outline: Polygon, message: str, reason: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Tumour(outline, FRAME)
    assert caught.value.reason == reason


def test_without_targets_or_outline_figures_are_null_and_never_zero() -> None:
    empty = scored([])
    assert (empty.num_targets, empty.stas_mm2, empty.targets_per_mm2) == (0, 0, 0)
    assert (empty.densest_count, empty.densest_class, empty.densest_x_px, empty.edge_share) == (0, "0", None, None)
    assert empty.size_median_um2 is empty.gap_max_um is None
    assert empty.num_outside is None and empty.outside_class is None
    assert empty.no_tumour_reason == NO_OUTLINE
    assert scored([], box(0, 0, 9, 9)).outside_class == "0"


def test_distances_to_any_outline_are_those_of_shapely() -> None:
    rng = np.random.default_rng(0)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 60))
    star = Polygon(10_000 + (rng.uniform(2000, 8000, 60) * np.stack([np.cos(angles), np.sin(angles)])).T)
    points = rng.uniform(0, 10_000, (500, 2))
    found = Tumour(star, FRAME).distances_um(*points.T.copy())
    np.testing.assert_allclose(found, shapely.distance(star, shapely.points(points * 2)) / 2, atol=1e-6)


def test_a_table_holds_the_figures_their_ranges_and_what_they_are() -> None:
    whole = scored([(3000, 3000), (3300, 3400)])
    members = [scored([(3000, 3000)]), scored([(3000, 3000), (3300, 3400), (7000, 3000)]), scored([])]
    table = scores_table([whole, whole], [members, members[:1]])
    first, second = table.to_pylist()
    assert (first["num_targets"], first["num_targets_min"], first["num_targets_max"]) == (2, 0, 3)
    assert first["gap_max_um_min"] == first["gap_max_um_max"] == pytest.approx(3721.6, abs=0.1)
    assert first["num_outside_min"] is second["num_targets_min"] is None
    assert "densest_x_px_min" not in table.schema.names and "tissue_mm2_min" not in table.schema.names
    assert tables.from_table(SlideScores, table)[0] == whole
    assert all(field.metadata and field.metadata[b"description"] for field in table.schema)
    assert ranges(members[:1]) == dict.fromkeys(ranges(members))


def test_each_target_has_its_distances(tmp_path: Any) -> None:
    section = Section.of(made_tissue())
    targets = made_targets([(1100, 5000), (2000, 2000)], [100, 200])
    tumour = Tumour(box(2000, 2000, 6000, 6000), FRAME)
    placed = place_targets(targets, frame=FRAME, section=section, tumour=tumour)
    table = targets_table("0007", placed, np.array([0.1, 0.2]))
    tables.write_table(f"{tmp_path}/targets.parquet", table)
    one, other = tables.read_rows(f"{tmp_path}/targets.parquet", SlideTarget)
    assert (one.target, one.area_um2, one.x_um, one.x_px) == pytest.approx((1, 100, 1100, 4400))
    assert (one.edge_um, one.tumour_um) == pytest.approx((100, 2000), abs=8)
    assert (one.in_tumour, other.in_tumour, other.tumour_um, other.disagreement) == (False, True, 0, 0.2)
    bare = place_targets(targets, frame=FRAME, section=section, tumour=None)
    nulls = targets_table("0007", bare, None)
    assert nulls.schema == tables.schema_of(SlideTarget)
    assert nulls["tumour_um"].to_pylist() == nulls["disagreement"].to_pylist() == [None, None]


def test_every_figure_is_described_in_the_document() -> None:
    assert tables.descriptions(SlideScores).keys() == {field.name for field in dataclasses.fields(SlideScores)}
    assert tables.descriptions(SlideTarget).keys() == {field.name for field in dataclasses.fields(SlideTarget)}
    assert describe_scores() in (ROOT / "SCORES.md").read_text(), "write describe_scores() into SCORES.md again"
    assert "positive" not in describe_scores()


def test_what_is_odd_about_a_slide_is_said_with_its_number() -> None:
    tissue = made_tissue()
    assert warnings_of(tissue, sharpness=0.9) == warnings_of(tissue, sharpness=None) == []
    odd = dataclasses.replace(tissue, mask=tissue.mask & False, pen_share=0.123, fill_share=0.4)
    found = warnings_of(odd, sharpness=0.2)
    for words in (
        "blurred: sharpness 0.20",
        "ink covers 12.3%",
        "40.0% of the slide was not imaged",
        "tissue: 0.00% of the slide",
    ):
        assert any(words in one for one in found), words
    assert len(found) == 4


def test_placed_targets_are_as_many_as_targets() -> None:
    placed = place_targets(made_targets([(1, 1)], [100]), frame=FRAME, section=Section.of(made_tissue()), tumour=None)
    assert isinstance(placed, PlacedTargets) and len(placed) == 1


def test_columns_are_described_in_the_file(tmp_path: Any) -> None:
    tables.write_rows(f"{tmp_path}/scores.parquet", SlideScores, [scored([])])
    field = pa.parquet.read_schema(f"{tmp_path}/scores.parquet").field("stas_mm2")
    assert field.metadata == {b"description": b"Area of all targets."}


def test_a_search_that_was_cut_short_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scored([(3000, 3000), (6000, 9000)]).warnings == []
    monkeypatch.setattr(scores, "densest_circle", lambda *_: Circle(1.0, 1.0, 2, 48.6))
    (warning,) = scored([(3000, 3000), (6000, 9000)]).warnings
    assert "none of a radius 49 um smaller has more" in warning
