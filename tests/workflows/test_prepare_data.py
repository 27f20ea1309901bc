import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stas_core import config, storage, tables
from stas_core.data import images
from stas_core.data.cohort import SCHEMA, read_cohort
from stas_core.failures import Failure
from tests.docs.documented import assert_documented
from workflows import prepare_data
from workflows.cluster import Node
from workflows.prepare_data import PrepareConfig

pytestmark = pytest.mark.usefixtures("ray_nodes")


def settings(folder: Path | str, out: Path | str, **values: Any) -> PrepareConfig:
    data = {"images": f"{folder}/images", "annotations": f"{folder}/annotations"}
    split = {"num_folds": 2, "hold_out_fraction": 0.25}
    return config.build(PrepareConfig, {"data": data, "out": str(out), "split": split, **values})


def files(out: Path) -> dict[str, bytes]:
    """Return what must be equal between equal runs."""
    names = ["cohort.parquet", "failures.parquet", *(f"masks/{path.name}" for path in (out / "masks").iterdir())]
    return {name: (out / name).read_bytes() for name in names}


def failures(out: Path) -> dict[str, str]:
    table = tables.read_table(str(out / "failures.parquet"))
    assert table.schema.equals(tables.schema_of(Failure))
    return {row["id"]: row["reason"] for row in table.to_pylist()}


@pytest.fixture
def measured_ids(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record which images are measured, in the driver."""
    seen: list[str] = []
    stream = prepare_data.stream

    def recording(items: Any, *args: Any) -> Any:
        seen.extend(item["id"] for item in items)
        return stream(items, *args)

    monkeypatch.setattr(prepare_data, "stream", recording)
    yield seen


def test_through_ray_equals_plain_python(phantom_folder: Path, cohort_uri: str, tmp_path: Path) -> None:
    assert prepare_data.run(settings(phantom_folder, tmp_path), False) == 0
    plain, rayed = tables.read_table(cohort_uri), tables.read_table(str(tmp_path / "cohort.parquet"))
    assert rayed.schema.equals(SCHEMA)
    drawn = ["split", "fold"]  # the plain cohort has no hold-out
    assert rayed.drop_columns(drawn).equals(plain.drop_columns(drawn))
    for row in read_cohort(cohort_uri):
        assert (tmp_path / "masks" / f"{row.id}.png").read_bytes() == Path(row.mask_uri).read_bytes()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "contact_sheet.png",
        "strata.png",
        "target_areas.png",
        "targets_per_image.png",
    }
    manifest = storage.read_json(str(tmp_path / "manifest.json"))
    assert (manifest["num_images"], manifest["num_failures"], manifest["report"]) == (8, 0, ["report.html"])
    assert_documented("prepare_data", tmp_path)


def test_a_second_run_does_only_what_is_missing_or_changed(
    phantom_folder: Path, tmp_path: Path, measured_ids: list[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(phantom_folder, folder)
    assert prepare_data.run(settings(folder, out), False) == 0
    before = files(out)
    measured_ids.clear()

    assert prepare_data.run(settings(folder, out), False) == 0
    assert measured_ids == []

    ids = sorted(path.stem for path in (folder / "images").iterdir())
    (out / "masks" / f"{ids[0]}.png").unlink()
    annotation = folder / "annotations" / f"{ids[1]}.json"
    changed = json.loads(annotation.read_text())
    changed["shapes"] = []
    annotation.write_text(json.dumps(changed))
    (folder / "images" / f"{ids[2]}.jpg").unlink()
    assert prepare_data.run(settings(folder, out), False) == 1
    assert sorted(measured_ids) == ids[:2]
    assert failures(out) == {ids[2]: "missing_image"}
    rows = {row.id: row for row in read_cohort(str(out / "cohort.parquet"))}
    assert rows[ids[1]].num_targets == 0 and ids[2] not in rows
    assert (out / "masks" / f"{ids[0]}.png").read_bytes() == before[f"masks/{ids[0]}.png"]

    fresh = tmp_path / "fresh"
    assert prepare_data.run(settings(folder, fresh), False) == 1
    assert {k: v for k, v in files(out).items() if ids[2] not in k} == files(fresh)


def test_bad_inputs_are_reported_and_the_rest_goes_on(phantom_folder: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(phantom_folder, folder)
    good = sorted(path.stem for path in (folder / "images").iterdir())
    image, annotation = (folder / "images" / f"{good[0]}.jpg"), (folder / "annotations" / f"{good[0]}.json")

    def add(name: str, image_data: bytes | None, annotation_data: bytes | None, suffix: str = ".jpg") -> None:
        if image_data is not None:
            (folder / "images" / f"{name}{suffix}").write_bytes(image_data)
        if annotation_data is not None:
            (folder / "annotations" / f"{name}.json").write_bytes(annotation_data)

    pixels = images.decode_image(image.read_bytes(), "x")
    cmyk = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG")
    deep = io.BytesIO()
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(deep, "PNG")
    text = annotation.read_bytes()
    add("truncated", image.read_bytes()[:-500], text)
    add("four_channels", cmyk.getvalue(), text)
    add("sixteen_bits", deep.getvalue(), text, ".png")
    add("zero_bytes", b"", text)
    add("no_annotation", image.read_bytes(), None)
    add("no_image", None, text)
    add("other_size", images.encode_png(pixels[:-8]), text, ".png")
    add("broken_json", image.read_bytes(), text[:-40])
    add("no_shapes", image.read_bytes(), b"{}")
    add("unknown_label", image.read_bytes(), text.replace(b'"STAS"', b'"tumour"'))
    add("twice", image.read_bytes(), text)
    add("twice", images.encode_png(pixels), None, ".png")

    assert prepare_data.run(settings(folder, out), False) == 1
    assert failures(out) == {
        "truncated": "unreadable_image",
        "four_channels": "wrong_channels",
        "sixteen_bits": "wrong_bit_depth",
        "zero_bytes": "empty_file",
        "no_annotation": "missing_annotation",
        "no_image": "missing_image",
        "other_size": "size_mismatch",
        "broken_json": "unreadable_annotation",
        "no_shapes": "missing_shapes",
        "unknown_label": "unknown_label",
        "twice": "duplicate_id",
    }
    assert [row.id for row in read_cohort(str(out / "cohort.parquet"))] == good
    assert prepare_data.run(settings(folder, out, max_failed_fraction=0.9), False) == 0
    allowed = {"labels": {"STAS": "target", "tumour": "ignore"}}
    assert prepare_data.run(settings(folder, out, annotation=allowed), False) == 1
    assert "unknown_label" not in failures(out)


def test_a_published_split_and_groups(phantom_folder: Path, tmp_path: Path) -> None:
    ids = sorted(path.stem for path in (phantom_folder / "images").iterdir())
    (tmp_path / "p.csv").write_text("image_id,fold\n" + "".join(f"{name},{i % 3}\n" for i, name in enumerate(ids)))
    split = {"published_csv": str(tmp_path / "p.csv"), "hold_out_fold": 0}
    assert prepare_data.run(settings(phantom_folder, tmp_path / "a", split=split), False) == 0
    rows = read_cohort(str(tmp_path / "a" / "cohort.parquet"))
    assert [row.fold for row in rows] == [None if i % 3 == 0 else i % 3 for i in range(8)]
    assert [row.split for row in rows] == ["hold-out" if i % 3 == 0 else "train" for i in range(8)]

    (tmp_path / "g.csv").write_text("image_id,group\n" + "".join(f"{name},g{i // 2}\n" for i, name in enumerate(ids)))
    split = {"groups_csv": str(tmp_path / "g.csv"), "num_folds": 2, "hold_out_fraction": 0}
    assert prepare_data.run(settings(phantom_folder, tmp_path / "b", split=split), False) == 0
    rows = read_cohort(str(tmp_path / "b" / "cohort.parquet"))
    assert all(rows[i].group == rows[i + 1].group and rows[i].fold == rows[i + 1].fold for i in range(0, 8, 2))
    assert "max_stratum_deviation" in storage.read_json(str(tmp_path / "b" / "split.json"))


def test_a_phantom_cohort_is_made_and_prepared(tmp_path: Path, ray_nodes: list[Node]) -> None:
    phantom = {"num_images": 6, "height": 64, "width": 96, "num_groups": 3}
    split = {"num_folds": 2, "hold_out_fraction": 0}
    made = config.build(PrepareConfig, {"out": str(tmp_path), "phantom": phantom, "split": split})
    assert prepare_data.run(made, False) == 0
    rows = read_cohort(str(tmp_path / "cohort.parquet"))
    assert len(rows) == 6 and len({row.group for row in rows}) == 3


@pytest.mark.real_data
def test_real_masks_have_the_published_areas(shared: Path, tmp_path: Path) -> None:
    """Of every fifteenth; `test_annotations` measures all of them, without the stage."""
    import csv

    stas, folder = shared / "data" / "stas", tmp_path / "in"
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True)
        for path in sorted((stas / f"Train_{name.capitalize()}").iterdir())[::15]:
            (folder / name / path.name).symlink_to(path)
    split = {"published_csv": str(stas / "reference_folds.csv"), "hold_out_fold": 0}
    assert prepare_data.run(settings(folder, tmp_path / "out", split=split), False) == 0
    with (stas / "reference_folds.csv").open() as file:
        published = {row["image_id"]: row for row in csv.DictReader(file)}
    rows = read_cohort(str(tmp_path / "out" / "cohort.parquet"))
    assert len(rows) == 19 and len(published) == 285
    for row in rows:
        assert sum(row.target_areas_px) == int(published[row.id]["area_px"])
        assert row.stratum == int(published[row.id]["stratum"])
        assert row.fold == (int(published[row.id]["fold"]) or None)
