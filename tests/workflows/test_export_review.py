"""The review queue goes out with its proposals in classes of their own, and comes back decided, to the pixel."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from stas_core import config, storage, tables
from stas_core.arrays import Mask, ProbMapU8
from stas_core.data import images
from stas_core.data.cohort import read_cohort
from stas_core.errors import ConfigError
from stas_core.failures import Failure
from stas_core.review import ReviewField
from stas_core.runs import OofScore, TrainingRun
from stas_core.scored_runs import ScoredRun, ScoredTarget
from tests.workflows.test_evaluate import write_run
from workflows import export, prepare_data
from workflows.export import ExportConfig
from workflows.folds.reviewing import write_review
from workflows.prepare_data import PrepareConfig

pytestmark = pytest.mark.usefixtures("prepared_here")
SIZE = (90, 120)
NESTS = {"left": (45, 25), "middle": (45, 60), "right": (45, 95)}
ANNOTATED = {"lacks": ("left", "right"), "extra": ("left", "middle", "right"), "good": ("left",), "none": ()}
SEEN = {"lacks": ("left", "middle", "right"), "extra": ("left", "right"), "good": ("left",), "none": ()}
IGNORED = {"labels": {"STAS": "target", "questioned": "target", "proposed": "ignore"}}


def nests(names: tuple[str, ...]) -> Mask:
    mask = np.zeros(SIZE, np.uint8)
    for name in names:
        cv2.circle(mask, NESTS[name][::-1], 13, 1, -1)
    return mask.astype(bool)


TRUTH = {name: nests(found) for name, found in ANNOTATED.items()}


def map_of(mask: Mask, peak: int = 250) -> ProbMapU8:
    return np.asarray(mask * peak, np.uint8)


def exported(out: Path, **values: Any) -> int:
    return export.run(config.build(ExportConfig, {"out": str(out), **values}), False)


def prepared(pictures: str, annotations: str, out: Path, **values: Any) -> tuple[int, dict[str, Mask]]:
    given = {"data": {"images": pictures, "annotations": annotations, **values.pop("data", {})}, "out": str(out)}
    split = {"num_folds": 2, "hold_out_fraction": 0}
    status = prepare_data.run(config.build(PrepareConfig, given | {"split": split} | values), False)
    rows = read_cohort(f"{out}/cohort.parquet")
    return status, {row.id: images.decode_mask(storage.read_bytes(row.mask_uri), row.id) for row in rows}


def same(found: dict[str, Mask], expected: dict[str, Mask]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def trained(tmp_path: Path) -> TrainingRun:
    """Return a training run of four fields: the annotation of one lacks a nest, that of another has one too many."""
    given = write_run(tmp_path / "fields", TRUTH)
    assert exported(tmp_path / "annotated", run=given, formats=["labelme"]) == 0
    assert prepared(f"{given}/inputs", f"{tmp_path}/annotated/labelme", tmp_path / "cohort")[0] == 0
    run = TrainingRun(str(tmp_path / "run"))
    rows = read_cohort(f"{tmp_path}/cohort/cohort.parquet")
    for number in (0, 1):
        fold, index = run.fold(number), []
        for row in (row for row in rows if row.fold == number):
            uri = fold.write_map(row.id, images.encode_map(map_of(nests(SEEN[row.id]))))
            index.append(OofScore(row.id, number, uri, 0.5, 0.5, 0.5, 1, 1, 1))
        fold.write_oof(index)
        storage.write_json(fold.path(fold.DONE), {})
    storage.write_bytes(run.path(run.CONFIG), f"data: {{cohort: {tmp_path}/cohort/cohort.parquet}}\n".encode())
    write_review(run, (0, 1), rows)
    return run


def decide(path: Path) -> None:
    """Take in what is proposed and leave out what is questioned, as a person does in labelme or QuPath."""
    values = json.loads(path.read_text())
    if "shapes" in values:
        values["shapes"] = [shape for shape in values["shapes"] if shape["label"] != "questioned"]
        for shape in values["shapes"]:
            shape["label"] = "STAS"
    else:
        classes = [feature["properties"]["classification"]["name"] for feature in values["features"]]
        kept = [one for one, name in zip(values["features"], classes, strict=True) if name != "questioned"]
        for feature in kept:
            feature["properties"]["classification"]["name"] = "STAS"
        values["features"] = kept
    path.write_text(json.dumps(values))


def test_what_is_decided_comes_back_to_the_pixel_and_what_is_not_is_refused(
    trained: TrainingRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert exported(tmp_path / "out", run=trained.uri, review=True, formats=["labelme", "geojson", "coco", "asap"]) == 0
    told = "2 images of the review queue: 1 targets proposed, 1 questioned; rename each to STAS, or delete it\n"
    assert capsys.readouterr().out.endswith(told)
    pictures, files = f"{tmp_path}/fields/inputs", {"labelme": ".json", "geojson": ".geojson"}
    assert sorted(path.stem for path in (tmp_path / "out" / "labelme").iterdir()) == ["extra", "lacks"]
    status, found = prepared(
        pictures, f"{tmp_path}/out/labelme*/*.json", tmp_path / "any", annotation={"unknown_labels": "target"}
    )
    refused = tables.read_rows(f"{tmp_path}/any/failures.parquet", Failure)
    assert status == 1 and set(found) == {"good", "none"}
    assert all("from a review, accept or delete them" in failure.message for failure in refused)
    assert "'proposed': 1 in 1 image(s)" in capsys.readouterr().out
    for form, suffix in (files | {"coco": ".json"}).items():
        everything = f"{tmp_path}/out/{form}*/*{suffix}"
        status, found = prepared(pictures, everything, tmp_path / f"{form} undecided", annotation=IGNORED)
        assert status == 0 and same(found, TRUTH)
    for form, suffix in files.items():
        for name in ("lacks", "extra"):
            decide(tmp_path / "out" / form / f"{name}{suffix}")
        status, found = prepared(pictures, f"{tmp_path}/out/{form}*/*{suffix}", tmp_path / f"{form} decided")
        assert status == 0
        assert same(found, TRUTH | {name: nests(SEEN[name]) for name in ("lacks", "extra")})
    with pytest.raises(ConfigError, match="were corrected or added since the export"):
        exported(tmp_path / "out", run=trained.uri, review=True, most_reviewed=1)
    assert exported(tmp_path / "one", run=trained.uri, review=True, most_reviewed=1) == 0
    assert len(list((tmp_path / "one" / "labelme").iterdir())) == 1
    assert len(list((tmp_path / "one" / "labelme_rest").iterdir())) == 3


def test_of_scored_images_the_queue_alone_makes_a_cohort(tmp_path: Path, stage: Callable[..., Any]) -> None:
    """Doubtful targets are questioned; what post-processing took away of a sure map is proposed."""
    masks = {name: nests(("left", "right")) for name in ("doubtful", "lacks", "good")}
    maps = {name: map_of(mask) for name, mask in masks.items()}
    maps["doubtful"][nests(("left",))] = 140
    maps["lacks"] = map_of(nests(("left", "middle", "right")))
    run = ScoredRun(write_run(tmp_path / "run", masks, maps))
    fields = [
        ReviewField(rank, name, f"{name}.png", 0.5, ["uncertain"], 1, None)
        for rank, name in enumerate(("doubtful", "lacks"), start=1)
    ]
    tables.write_rows(run.path(run.REVIEW), ReviewField, fields)
    area = int(nests(("left",)).sum())
    targets = [ScoredTarget("good", 1, area, 25, 45, 12, 32, 39, 59, 0.9, 0.98, False)]
    tables.write_rows(run.path(run.TARGETS), ScoredTarget, targets)
    done = stage("export", f"run={run.uri}", "review=true", "formats=[geojson]", f"out={tmp_path}/out")
    assert done.status == 0 and "2 images of the review queue: 1 targets proposed, 1 questioned" in done.out, done.err
    assert f"data.annotations={tmp_path}/out/geojson data.unannotated=leave_out out=" in done.out
    for name in ("doubtful", "lacks"):
        decide(tmp_path / "out" / "geojson" / f"{name}.geojson")
    status, found = prepared(
        f"{run.uri}/inputs", f"{tmp_path}/out/geojson", tmp_path / "cohort", data={"unannotated": "leave_out"}
    )
    assert status == 0 and same(found, {"doubtful": nests(("right",)), "lacks": nests(("left", "middle", "right"))})
    passed_over = storage.read_json(f"{tmp_path}/cohort/manifest.json")["passed_over"]
    assert passed_over["data.images"] == {"images without annotation": 1}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"none of the 3 images in .* give the folder of their annotations"):
        prepared(f"{run.uri}/inputs", f"{tmp_path}/empty", tmp_path / "nothing", data={"unannotated": "leave_out"})


def test_an_image_of_the_queue_whose_map_is_gone_is_shown_with_its_reason(tmp_path: Path) -> None:
    masks = {name: nests(("left", "right")) for name in ("first", "second")}
    run = ScoredRun(write_run(tmp_path / "run", masks, {name: map_of(mask) for name, mask in masks.items()}))
    fields = [ReviewField(rank, name, f"{name}.png", 0.5, ["drift"], 1, None) for rank, name in enumerate(masks, 1)]
    tables.write_rows(run.path(run.REVIEW), ReviewField, fields)
    tables.write_rows(run.path(run.TARGETS), ScoredTarget, [])
    storage.remove(run.file("maps", "first"))
    assert exported(tmp_path / "out", run=run.uri, review=True, formats=["geojson"]) == 1
    (failure,) = tables.read_rows(f"{tmp_path}/out/failures.parquet", Failure)
    assert failure.id == "first" and "maps/first.png" in failure.message
    assert [path.stem for path in (tmp_path / "out" / "geojson").iterdir()] == ["second"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search(r'class="failed"><th scope="row" data-v="first">.*?class="problem"[^<]*maps/first\.png', page)


def test_what_cannot_be_reviewed_says_why(trained: TrainingRun, tmp_path: Path) -> None:
    for values, words in (
        ({"cohort": f"{tmp_path}/cohort/cohort.parquet"}, "review=true takes the review queue of a run"),
        ({"run": trained.uri, "formats": ["mask"]}, "mask images have no classes"),
        ({"run": f"{tmp_path}/fields"}, "holds no review.parquet"),
        ({"run": trained.uri, "label": "proposed"}, "targets that nobody has decided on"),
    ):
        with pytest.raises(ConfigError, match=words):
            exported(tmp_path / "out", review=True, **values)
    rows = pq.read_table(tmp_path / "cohort" / "cohort.parquet")
    pq.write_table(rows.filter(pc.not_equal(rows["id"], pa.scalar("lacks"))), tmp_path / "fewer.parquet")
    with pytest.raises(ConfigError, match=r"1 images of the review queue, such as lacks, are not in .*fewer\.parquet"):
        exported(tmp_path / "out", review=True, run=trained.uri, cohort=f"{tmp_path}/fewer.parquet")
    tables.write_rows(trained.path(trained.REVIEW), ReviewField, [])
    with pytest.raises(ConfigError, match="is empty: nothing is to be decided"):
        exported(tmp_path / "out", review=True, run=trained.uri)
