"""The largest targets of a slide are listed where they lie, with their measures; the others are counted."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stas_core.pages.slide_targets import MOST_TARGETS, largest_targets
from stas_core.predict.placement import Placement
from tests.pages.made import write_targets

SIZE, STEP, MPP = (300, 400), 20.0, 0.25
ROW = {"id": "slide", "width_px": 8_000, "height_px": 6_000, "mpp": MPP}


def discs(num: int) -> np.ndarray:
    """Return discs of different sizes, apart from each other, in a frame of 20 level-0 px per pixel."""
    mask = np.zeros(SIZE, np.uint8)
    for index in range(num):
        cv2.circle(mask, (15 + 30 * (index % 13), 15 + 30 * (index // 13)), 1 + index % 11, 1, -1)
    return mask.astype(bool)


def listed(path: Path, num: int, corner: tuple[int, int] | None = None, **columns: Any) -> Any:
    write_targets(str(path), discs(num), Placement(STEP, corner, STEP * MPP), **columns)
    return largest_targets(str(path), ROW | {"num_targets": num})


@pytest.mark.parametrize("corner", [None, (1_000, 500)])
def test_targets_are_where_the_picture_has_them(tmp_path: Path, corner: tuple[int, int] | None) -> None:
    found = listed(tmp_path / "a.parquet", 30, corner, tumour_um=np.arange(30.0))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(discs(30).astype(np.uint8), connectivity=8)
    areas = [one["area_um2"] for one in found.targets]
    assert areas == sorted(areas, reverse=True) and len(areas) == 30 and found.note == "" == found.missing
    for one in found.targets:
        x0, y0, x1, y1 = (round(value / STEP) for value in one["box"])
        number = labels[y0:y1, x0:x1].max()
        assert stats[number].tolist()[:4] == [x0, y0, x1 - x0, y1 - y0]
        assert one["area_um2"] == pytest.approx(stats[number, cv2.CC_STAT_AREA] * (STEP * MPP) ** 2)
        side_um = max(x1 - x0, y1 - y0) * STEP * MPP
        assert side_um <= one["longest_um"] <= 1.42 * side_um
        shift = 0 if corner is None else corner[0] * MPP / 1000  # as QuPath counts
        assert one["x_mm"] + shift == pytest.approx((x0 + x1) / 2 * STEP * MPP / 1000)
        assert one["tumour_um"] == one["number"] - 1 and one["disagreement"] is None


def test_of_many_targets_the_largest_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    (tmp_path / "targets").mkdir()
    found = listed(tmp_path / "targets" / "many.parquet", 130)
    assert len(found.targets) == MOST_TARGETS
    assert found.note == "The 50 largest of 130; the other 80 are in targets/many.parquet, too."


def test_what_cannot_be_listed_says_why(tmp_path: Path) -> None:
    path, row = tmp_path / "a.parquet", ROW | {"num_targets": 4}
    write_targets(str(path), discs(5), Placement(STEP, None, STEP * MPP))
    whole = pq.read_table(path)
    assert "lists 5, and slides.parquet counts 4" in largest_targets(str(path), row).missing
    for table, words in (
        (whole.drop_columns(["geometry"]), "no column 'geometry'"),
        (whole.set_column(2, "area_um2", pa.array(["large"] * 5)), "'area_um2' is of type string"),
        (whole.replace_schema_metadata({"stas": "{"}), "its coordinates is damaged"),
        (whole.replace_schema_metadata({"stas": json.dumps({"bounds_corner": [1, 2, 3]})}), "expected x and y"),
    ):
        pq.write_table(table, path)
        assert words in largest_targets(str(path), row | {"num_targets": 5}).missing
    assert largest_targets("", row | {"num_targets": 0}).missing == ""
    geometry = pa.array([b"no geometry", *whole["geometry"].to_pylist()[1:]], pa.binary())
    pq.write_table(whole.set_column(1, whole.field(1), geometry), path)
    boxes = {one["number"]: one["box"] for one in largest_targets(str(path), row | {"num_targets": 5}).targets}
    assert boxes[1] is None and None not in [boxes[number] for number in (2, 3, 4, 5)]
