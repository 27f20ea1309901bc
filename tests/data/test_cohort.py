from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core import storage, tables
from stas_core.data import cohort, images
from stas_core.data.annotations import AnnotationConfig
from stas_core.data.cohort import CohortRow, SplitConfig
from stas_core.errors import ConfigError, SizeMismatch, StorageError


def test_strata_have_the_published_edges() -> None:
    shares = [0, 0.0099, 0.01, 0.02, 0.03, 0.04, 0.05, 0.0999, 0.1, 1]
    assert [cohort.stratum_of(share) for share in shares] == [0, 0, 1, 2, 3, 4, 5, 5, 6, 6]


def test_targets_are_8_connected_components() -> None:
    mask = np.zeros((5, 6), bool)
    mask[0, 0] = mask[1, 1] = True  # one target through a corner
    mask[3:5, 4:6] = True
    assert cohort.target_areas(mask) == [2, 4]
    assert cohort.target_areas(np.zeros((1, 1), bool)) == []


def test_a_measured_image_says_what_its_mask_holds(phantom_folder: Path) -> None:
    image = sorted((phantom_folder / "images").iterdir())[0]
    annotation = phantom_folder / "annotations" / f"{image.stem}.json"
    measured = cohort.measure(image.read_bytes(), annotation.read_bytes(), "x", config=AnnotationConfig())
    values = measured.values
    assert (values["height"], values["width"]) == measured.mask.shape == (96, 128)
    assert sum(values["target_areas_px"]) == measured.mask.sum() == round(values["foreground_share"] * 96 * 128)
    assert values["num_targets"] == len(values["target_areas_px"])
    other = cohort.measure(image.read_bytes() + b" ", annotation.read_bytes(), "x", config=AnnotationConfig())
    assert other.values["fingerprint"] != values["fingerprint"]


def test_an_annotation_of_another_size_is_an_error(phantom_folder: Path) -> None:
    annotation = next((phantom_folder / "annotations").iterdir()).read_bytes()
    image = images.encode_png(np.zeros((50, 128, 3), np.uint8))
    with pytest.raises(SizeMismatch):
        cohort.measure(image, annotation, "x", config=AnnotationConfig())


strata_lists = st.lists(st.integers(0, 6), min_size=12, max_size=80)


@settings(max_examples=60)
@given(strata_lists, st.integers(2, 5), st.sampled_from([0.0, 0.1263, 0.3]), st.integers(0, 5))
def test_ungrouped_split_is_complete_balanced_and_seeded(strata: list[int], k: int, share: float, seed: int) -> None:
    config = SplitConfig(num_folds=k, hold_out_fraction=share, seed=seed)
    folds = cohort.draw_split(strata, None, config).folds
    assert folds == cohort.draw_split(strata, None, config).folds
    assert len(folds) == len(strata) and set(folds) - {None} == set(range(k))
    assert sum(fold is None for fold in folds) == round(len(strata) * share)
    for stratum in set(strata):
        counts = Counter(fold for fold, s in zip(folds, strata, strict=True) if s == stratum and fold is not None)
        sizes = [counts[fold] for fold in range(k)]
        assert max(sizes) - min(sizes) <= 1
        held_out = sum(fold is None for fold, s in zip(folds, strata, strict=True) if s == stratum)
        assert abs(held_out - strata.count(stratum) * share) < 1
    totals = Counter(fold for fold in folds if fold is not None)
    assert max(totals.values()) - min(totals.values()) <= 1


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 19)), min_size=60, max_size=120), st.integers(0, 3))
def test_grouped_split_keeps_groups_whole(pairs: list[tuple[int, int]], seed: int) -> None:
    strata, groups = [s for s, _ in pairs], [f"g{g}" for _, g in pairs]
    if len(set(groups)) < 10:
        return
    assignment = cohort.draw_split(strata, groups, SplitConfig(num_folds=3, hold_out_fraction=0.2, seed=seed))
    parts: dict[str, set[int | None]] = {}
    for group, fold in zip(groups, assignment.folds, strict=True):
        parts.setdefault(group, set()).add(fold)
    assert all(len(found) == 1 for found in parts.values())
    assert set(assignment.folds) - {None} == {0, 1, 2}
    assert assignment.max_deviation >= 0


def test_grouped_split_of_equal_groups_is_even() -> None:
    strata = [0, 0, 1, 2] * 25
    groups = [f"g{i // 4}" for i in range(100)]
    assignment = cohort.draw_split(strata, groups, SplitConfig(num_folds=4, hold_out_fraction=0.2))
    assert [assignment.folds.count(part) for part in (0, 1, 2, 3, None)] == [20] * 5
    assert assignment.max_deviation == pytest.approx(0)


def test_too_few_images_or_groups_for_the_folds() -> None:
    with pytest.raises(ConfigError, match=r"split\.num_folds = 5: 3 images leave fold\(s\) \[3, 4\] empty"):
        cohort.draw_split([0, 0, 0], None, SplitConfig(hold_out_fraction=0))
    with pytest.raises(ConfigError, match=r"2 groups leave fold"):
        cohort.draw_split([0] * 9, ["a", "b", "b"] * 3, SplitConfig(num_folds=3, hold_out_fraction=0))


def import_split(ids: list[str], data: bytes, config: SplitConfig) -> list[int | None]:
    return cohort.read_published_split(data, config).values_of(ids)


def test_published_split_is_imported_with_its_numbers() -> None:
    config = SplitConfig(published_csv="p.csv", hold_out_fold=0)
    data = b"image_id,fold,x\na,0,1\nb,3,1\nunused,1,1\n"
    assert import_split(["a", "b"], data, config) == [None, 3]
    with pytest.raises(ConfigError, match=r"no row for 1 of 2 images, first c"):
        import_split(["a", "c"], data, config)
    with pytest.raises(ConfigError, match=r"has columns \['id', 'fold'\], expected image_id and fold"):
        import_split(["a"], b"id,fold\na,1\n", config)
    with pytest.raises(ConfigError, match="column fold: invalid literal"):
        import_split(["a"], b"image_id,fold\na,x\n", config)


def test_table_round_trips_and_folds_partition_it(cohort_uri: str, cohort_rows: list[CohortRow]) -> None:
    assert tables.read_table(cohort_uri).schema.equals(cohort.SCHEMA)
    assert [row.id for row in cohort_rows] == sorted(row.id for row in cohort_rows)
    assert cohort.folds_of(cohort_rows) == [0, 1]
    for fold in (0, 1):
        train = cohort.rows_of(cohort_rows, fold, "train")
        validation = cohort.rows_of(cohort_rows, fold, "validation")
        assert not {r.id for r in train} & {r.id for r in validation}
        assert len(train) + len(validation) == len(cohort_rows)
    row = cohort_rows[0]
    assert row.stain is not None and row.stain.matrix.shape == (3, 2)
    assert images.decode_mask(storage.read_bytes(row.mask_uri), "m").sum() == sum(row.target_areas_px)


def test_another_table_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    tables.write_table(str(tmp_path / "t.parquet"), pa.table({"id": ["a"]}))
    with pytest.raises(StorageError, match=r"t\.parquet has no column 'image_uri'.*it has \['id'\]"):
        cohort.read_cohort(str(tmp_path / "t.parquet"))
