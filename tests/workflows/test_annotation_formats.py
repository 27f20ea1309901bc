"""A folder of fields in every annotation format: the same cohort, and words for what is wrong with one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stas_core import config, storage
from stas_core.data import annotation_listing, asap, coco, geojson, ids, images, truth
from stas_core.data.annotations import AnnotationConfig, Description, describe
from stas_core.data.cohort import read_cohort
from stas_core.data.labelme import parse_labelme, to_labelme
from stas_core.errors import ConfigError, UnreadableAnnotation
from stas_core.failures import Failure
from stas_core.tables import read_rows
from workflows import prepare_data
from workflows.field_inputs import Inputs, find_inputs
from workflows.prepare_data import PrepareConfig

NUM_FIELDS = 4


pytestmark = pytest.mark.usefixtures("prepared_here")


def prepared(folder: Path, annotations: Path, out: Path, **values: Any) -> int:
    data = {"images": f"{folder}/images", "annotations": str(annotations)}
    split = {"num_folds": 2, "hold_out_fraction": 0}
    made = config.build(PrepareConfig, {"data": data, "out": str(out), "split": split, **values})
    return prepare_data.run(made, False)


def masks_of(out: Path) -> dict[str, np.ndarray]:
    rows = read_cohort(f"{out}/cohort.parquet")
    return {row.id: images.decode_mask(storage.read_bytes(row.mask_uri), row.id) for row in rows}


def reasons(out: Path) -> dict[str, tuple[str, str]]:
    return {one.id: (one.reason, one.message) for one in read_rows(f"{out}/failures.parquet", Failure)}


@pytest.fixture(scope="module")
def fields(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of fields with their labelme files."""
    folder = tmp_path_factory.mktemp("fields")
    for kind in ("images", "annotations"):
        (folder / kind).mkdir()
        for path in sorted((phantom_folder / kind).iterdir())[:NUM_FIELDS]:
            shutil.copy(path, folder / kind)
    return folder


def written(fields: Path, folder: Path) -> dict[str, Path]:
    """Write the fields' polygons in the other formats, as the tools of these would have them; return the folders."""
    listed = []
    for path in sorted((fields / "annotations").iterdir()):
        found = parse_labelme(path.read_bytes(), path.name)
        polygons = [shape.points + 0.5 for shape in found.shapes]
        assert found.height is not None and found.width is not None
        flat = [{"segmentation": [points.ravel().tolist()]} for points in polygons]
        listed.append((f"images/{path.stem}.jpg", (found.height, found.width), flat))
        targets = [(str(number), [[points]]) for number, points in enumerate(polygons)]
        storage.write_bytes(f"{folder}/geojson/{path.stem}.jpg.geojson", geojson.to_geojson({"STAS": targets}))
        storage.write_bytes(f"{folder}/asap/{path.stem}.xml", asap.to_asap({"STAS": polygons}))
    storage.write_bytes(f"{folder}/coco/instances.json", coco.to_coco(listed, "STAS"))
    return {name: folder / name for name in ("geojson", "asap", "coco")}


def test_fields_in_five_formats_are_five_cohorts_with_equal_masks(
    fields: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepared(fields, fields / "annotations", tmp_path / "labelme") == 0
    told = capsys.readouterr().out
    assert f"annotations: {NUM_FIELDS} labelme\nlabels: 'STAS' (target): " in told
    expected = masks_of(tmp_path / "labelme")
    others = written(fields, tmp_path / "in") | {"mask": tmp_path / "labelme" / "masks"}
    names = {"geojson": "GeoJSON", "asap": "ASAP XML", "coco": "COCO", "mask": "mask image"}
    for name, folder in others.items():
        assert prepared(fields, folder, tmp_path / name) == 0
        found = masks_of(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[one], expected[one]) for one in expected), name
        told = capsys.readouterr().out
        assert f"annotations: {NUM_FIELDS} {names[name]}\n" in told
        facts = storage.read_json(f"{tmp_path}/{name}/manifest.json")
        assert facts["annotation_formats"] == {name: NUM_FIELDS}
        label = "foreground" if name == "mask" else "STAS"
        assert facts["labels"][label]["means"] == "target" and facts["labels"][label]["images"] == NUM_FIELDS


def test_unknown_labels_of_all_images_are_counted_with_the_words_to_list_them(
    fields: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = tmp_path / "annotations"
    shutil.copytree(fields / "annotations", annotations)
    paths = sorted(annotations.iterdir())
    for path in paths[:2]:
        values = json.loads(path.read_text())
        extra = values["shapes"][0]
        values["shapes"] += [extra | {"label": "tumor"}, extra | {"label": "tumor"}, extra | {"label": "old vessel"}]
        path.write_text(json.dumps(values))
    assert prepared(fields, annotations, tmp_path / "out") == 1
    told = capsys.readouterr().out
    assert "labels that annotation.labels does not list: 'tumor': 4 in 2 image(s), 'old vessel': 2 in 2" in told
    assert (
        "say what each means: annotation.labels.tumor=target 'annotation.labels.old vessel=target' (or ignore)" in told
    )
    assert reasons(tmp_path / "out").keys() == {path.stem for path in paths[:2]}
    meanings = {"labels": {"STAS": "target", "tumor": "ignore", "old vessel": "ignore"}}
    assert prepared(fields, annotations, tmp_path / "out", annotation=meanings) == 0
    assert "'tumor' (ignore): 4 in 2 image(s)" in capsys.readouterr().out


def test_images_are_measured_again_where_annotations_are_read_otherwise_than_before(
    fields: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepared(fields, fields / "annotations", tmp_path / "out") == 0
    assert prepared(fields, fields / "annotations", tmp_path / "out") == 0
    assert "nothing to do" in capsys.readouterr().out
    monkeypatch.setattr(truth, "READ_AS", "another way")
    assert prepared(fields, fields / "annotations", tmp_path / "out") == 0
    assert f"0 already measured, {NUM_FIELDS} to do" in capsys.readouterr().out


def test_where_no_input_can_be_used_the_reasons_are_grouped_and_counted(fields: Path, tmp_path: Path) -> None:
    names = [path.stem for path in sorted((fields / "images").iterdir())]
    for name in names:
        storage.write_bytes(f"{tmp_path}/a/{name}.txt", b"1 2 3")
    storage.write_bytes(f"{tmp_path}/a/notes.json", b"{}")
    with pytest.raises(ConfigError) as caught:
        prepared(fields, tmp_path / "a", tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"none of the {NUM_FIELDS + 1} inputs can be used; see {tmp_path}/out/failures.parquet")
    assert lines[1].startswith(f"  {NUM_FIELDS} x missing_annotation, such as {names[0]}: {fields}/images/")
    assert f"found {NUM_FIELDS} .txt that are not read, 1 named like no image" in lines[1]
    assert "expected <name>.json (labelme, GeoJSON or COCO), .geojson" in lines[1]
    assert "  notes: missing_image: " in lines[2] and "only a COCO .json names its images itself" in lines[2]


def test_a_slide_beside_fields_and_images_that_a_coco_file_lacks_are_reported(fields: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fields"
    shutil.copytree(fields, folder)
    (folder / "images" / "big.svs").write_bytes(b"II*\0")
    names = [path.stem for path in sorted((fields / "images").iterdir())]
    annotations = written(fields, tmp_path / "in")["coco"]
    path = annotations / "instances.json"
    values = json.loads(path.read_text())
    values["images"][0]["file_name"] = "elsewhere.jpg"
    values["images"][1]["file_name"] = "../../etc/passwd::x.jpg"
    path.write_text(json.dumps(values))
    assert prepared(folder, annotations, tmp_path / "out") == 1
    found = reasons(tmp_path / "out")
    assert {one: reason for one, (reason, _) in found.items()} == {
        "big.svs": "oversized_image",
        names[0]: "missing_annotation",
        names[1]: "missing_annotation",
        "elsewhere": "missing_image",
        "passwd::x": "unusable_id",
    }
    assert "is a whole slide, not a field: cut it into fields, or score it by score_slides" in found["big.svs"][1]
    assert "annotates an image elsewhere, which is not in" in found["elsewhere"][1]


def no_look(uri: str) -> Description:
    raise UnreadableAnnotation(uri)


def found(folder: Path, wanted: set[str], look: Callable[[str], Description] = no_look) -> Any:
    return annotation_listing.find_annotations(str(folder), wanted, image_uris=(), describe=look)


def test_which_file_is_an_images_annotation(tmp_path: Path) -> None:
    for name in ("a.geojson.gz", "b.jpg.geojson", "b.png", "c.xml", "d.png", "e.jpg", "f.json", "f.geojson", "g.csv"):
        storage.write_bytes(f"{tmp_path}/{name}", b"x")
    listed = found(tmp_path, set("abcdef"))
    kept = {image_id: storage.name_of(uri) for image_id, uri in listed.uris.items()}
    assert kept == {"a": "a.geojson.gz", "b": "b.jpg.geojson", "c": "c.xml", "d": "d.png"}
    assert [image_id for image_id, _ in listed.refused] == ["f"]
    assert listed.passed_over == {".csv": 1, ".jpg": 1, ".png": 1}


@given(st.integers(0, 60))
def test_only_so_many_files_in_vain_are_looked_into(count: int) -> None:
    asked: list[str] = []

    def look(uri: str) -> Description:
        asked.append(uri)
        raise UnreadableAnnotation("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "list_files", lambda *_: [f"{number}.json" for number in range(count)])
        listed = found(Path("x"), {"a"}, look)
    assert len(asked) == min(count, annotation_listing.MAX_MISSES) and len(listed.uris) == count


def test_a_coco_file_among_many_others_is_opened_first_and_what_was_not_is_said(fields: Path, tmp_path: Path) -> None:
    coco_file = (written(fields, tmp_path / "in")["coco"] / "instances.json").read_bytes()
    for number in range(annotation_listing.MAX_MISSES + 5):
        storage.write_bytes(f"{tmp_path}/a/{number}.json", b"{}")

    def inputs(source: str) -> Inputs:
        return find_inputs("prepare_data", f"{fields}/images", source, look_at)

    for name in ("zz_instances_default.json", "zz_COCO.json.gz"):
        storage.write_bytes(f"{tmp_path}/a/{name}", coco_file)
        assert len(inputs(f"{tmp_path}/a").items) == NUM_FIELDS
        storage.remove(f"{tmp_path}/a/{name}")
    storage.write_bytes(f"{tmp_path}/a/zz.json", coco_file)
    told = {one.id: one.message for one in inputs(f"{tmp_path}/a").failed}
    assert "was not opened: 20 other .json files named like no image" in told["zz"] and "no COCO file" in told["zz"]
    assert "give the file itself in place of its folder" in told["zz"]
    assert "is no COCO file" not in told["zz"] and "was not opened" not in told["0"]
    assert len(inputs(f"{tmp_path}/a/zz.json").items) == NUM_FIELDS


def look_at(uri: str) -> Description:
    return describe(storage.read_bytes(uri), storage.name_of(uri), None, AnnotationConfig())


COMPOSED, APART = "M\u00fcller1", "Mu\u0308ller1"
ACROSS = [(COMPOSED, APART), (APART, COMPOSED), ("A1", "a1"), ("\u00c9tude", "e\u0301TUDE")]


@pytest.mark.parametrize(("image", "annotation"), ACROSS)
def test_names_that_differ_in_case_or_the_form_of_accents_are_of_one_image(
    image: str, annotation: str, tmp_path: Path
) -> None:
    field, size = np.full((40, 60, 3), 200, np.uint8), (40, 60)
    polygon = np.array([[10.0, 5], [30, 5], [30, 20], [10, 20]])
    flat = [{"segmentation": [polygon.ravel().tolist()]}]
    storage.write_bytes(f"{tmp_path}/images/{image}.jpg", images.encode_jpeg(field))
    labelled = to_labelme([polygon], size, f"{annotation}.jpg")
    outlined = geojson.to_geojson({"STAS": [("1", [[polygon]])]})
    coco_file = coco.to_coco([(f"x/{annotation}.JPG", size, flat), ("b.jpg", size, [])], "STAS")
    mask = images.encode_mask(np.ones(size, bool))

    def inputs(files: dict[str, bytes]) -> Inputs:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, data in files.items():
            storage.write_bytes(f"{folder}/{name}", data)
        source = f"{tmp_path}/images"
        return find_inputs("prepare_data", source, str(folder), look_at, unannotated="negative", negative="none")

    for name, data in {
        f"{annotation}.json": labelled,
        f"{annotation}.jpg.geojson": outlined,
        f"{annotation}.png": mask,
        f"{annotation}.xml": asap.to_asap({"STAS": [polygon]}),
        "all.json": coco_file,
    }.items():
        (item,) = inputs({name: data}).items
        assert item["id"] == image
        drawn, findings, _ = truth.read_annotation(
            storage.read_bytes(item["annotation_uri"]), name, size, AnnotationConfig(), image
        )
        assert drawn.any() and findings == [], name
    for other in (f"{annotation}.geojson", "all.json"):
        both = inputs({f"{annotation}.json": labelled, other: coco_file if other == "all.json" else outlined})
        (failure,) = [one for one in both.failed if one.id == image]
        assert both.items == [] and failure.reason == "duplicate_id"
        assert "names that differ only in case or in how accents are written are one" in failure.message


def test_names_that_are_not_of_one_image_alone_are_matched_to_none() -> None:
    for wanted in ({"A1", "a1"}, {COMPOSED, APART}):
        namesake = ids.namesake_among(wanted)
        assert {namesake(one) for one in wanted} == wanted
        assert namesake(min(wanted).upper() + "x") == min(wanted).upper() + "x"
    assert ids.namesake_among({"A1", "a1"})("\uff21\uff11") == "\uff21\uff11"
    assert ids.namesake_among({COMPOSED, APART})(APART.upper()) == APART.upper()


@pytest.mark.parametrize(
    "words",
    [
        ["annotation.labels={tumor: target}"],
        ["annotation.labels={tumor:target}"],
        ["annotation.labels={tumor:", "target}"],
        ["annotation.labels={tumor: target,", "other:", "ignore}"],
    ],
)
def test_the_natural_spellings_of_labels_work(words: list[str]) -> None:
    labels = config.load_config(PrepareConfig, None, [*words, "max_failed_fraction=0.5"]).annotation.labels
    assert labels == {"tumor": "target"} | ({"other": "ignore"} if len(words) > 2 else {})
