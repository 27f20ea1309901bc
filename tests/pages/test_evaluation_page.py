"""The page of an evaluation finds the truth wherever it is, and puts first what is worst."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stas_core import storage, tables
from stas_core.data import images
from stas_core.data.coco import to_coco
from stas_core.data.edges import mask_to_polygons
from stas_core.data.labelme import to_labelme
from stas_core.failures import Failure
from stas_core.pages import evaluation
from stas_core.pages.contents import Contents
from stas_core.pages.drawn_masks import outline_path
from stas_core.pages.finished import FinishedRun
from stas_core.pages.pictures import make_pictures
from stas_core.predict.annotation_files import coco_annotations
from stas_core.scores.bootstrap import BootstrapConfig
from stas_core.scores.detection import DetectionScore, score_detection
from stas_core.scores.evaluation import ImageScore, SubsetScore, cases_of, score_image, summarise_scores
from tests.pages.made import blob, scored_run

SIZE, NUM = (60, 96), 5


def truth_of(index: int) -> np.ndarray:
    return np.roll(blob(*SIZE, index), index, axis=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a scored run, its evaluation, and the truth as masks and as annotations."""
    made = tmp_path_factory.mktemp("evaluated")
    scored_run(made, NUM, SIZE)
    (made / "scores" / "config.resolved.yaml").write_text("data: {mpp: 0.25}\n")
    rows, in_coco = [], []
    for kind in ("truth", "labelme", "coco", "out"):
        (made / kind).mkdir()
    for index in range(NUM):
        name, truth = f"field_{index:04d}", truth_of(index)
        mask = images.decode_mask((made / "scores" / "masks" / f"{name}.png").read_bytes(), name)
        rows.append(score_image(name, name, truth, mask, None))
        (made / "truth" / f"{name}.png").write_bytes(images.encode_mask(truth))
        shapes = to_labelme(mask_to_polygons(truth), SIZE, f"{name}.jpg")
        (made / "labelme" / f"{name}.json").write_bytes(shapes)
        in_coco.append((f"{name}.jpg", SIZE, coco_annotations([truth])))
    (made / "coco" / "instances.json").write_bytes(to_coco(in_coco, "STAS"))
    config, out = BootstrapConfig(num_resamples=100), str(made / "out")
    tables.write_rows(f"{out}/scores.parquet", ImageScore, rows)
    tables.write_rows(f"{out}/summary.parquet", SubsetScore, summarise_scores(rows, config))
    tables.write_rows(f"{out}/detection.parquet", DetectionScore, score_detection(cases_of(rows), config))
    tables.write_rows(f"{out}/failures.parquet", Failure, [Failure("x", "evaluate", "not_scored", "no mask")])
    return made


def contents(folder: Path, **truth: Any) -> Contents:
    config = {"run": str(folder / "scores"), "truth": truth}
    return evaluation.build(FinishedRun.of(str(folder / "out"), {"stage": "evaluate", "config": config}))


@pytest.mark.parametrize(("key", "kind"), [("masks", "truth"), ("annotations", "labelme"), ("annotations", "coco")])
def test_the_truth_is_shown_as_it_was_read(key: str, kind: str, folder: Path) -> None:
    made = contents(folder, **{key: str(folder / kind)})
    pictures = list(make_pictures([item.source for item in made.items]))
    for item, picture in zip(made.items[1:], pictures[1:], strict=True):
        assert picture.notes == [] and {"image", "found", "truth"} <= set(picture.layers)
        assert picture.layers["truth"] == outline_path(truth_of(int(item.id[-1])))
        assert picture.dice is None or picture.dice == pytest.approx(item.values["dice"])


def test_the_worst_come_first_and_images_without_target_have_no_dice(folder: Path) -> None:
    made = contents(folder)
    assert made.items[0].id == "x" and made.items[0].problem == "not_scored: no mask"
    dice = [item.values["dice"] for item in made.items[1:]]
    known = [value for value in dice if value is not None]
    assert dice.count(None) == 1 and known == sorted(known)
    assert {item.source.mpp for item in made.items[1:] if item.source is not None} == {0.25}


def test_a_coco_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[str] = []
    read = storage.read_bytes

    def counted(uri: str, end: int | None = None) -> bytes:
        files.append(uri)
        return read(uri, end)

    monkeypatch.setattr(storage, "read_bytes", counted)
    made = contents(folder, annotations=str(folder / "coco"))
    pictures = list(make_pictures([item.source for item in made.items]))
    assert sum("truth" in picture.layers for picture in pictures) == NUM
    assert [Path(uri).name for uri in files if uri.endswith(".json")] == ["instances.json"]


def test_a_run_that_is_gone_leaves_its_scores_and_says_what_cannot_be_shown(folder: Path) -> None:
    config = {"run": str(folder / "elsewhere"), "truth": {"masks": str(folder / "nowhere")}}
    made = evaluation.build(FinishedRun.of(str(folder / "out"), {"stage": "evaluate", "config": config}))
    assert len(made.items) == NUM + 1 and [table.title for table in made.tables] == ["Scores", "Found or not"]
    pictures = list(make_pictures([item.source for item in made.items]))[1:]
    assert all(not picture.layers for picture in pictures)
    told = " ".join(made.item_notes)
    assert len(made.item_notes) == 3 and "elsewhere/images.parquet" in told and "nowhere" in told
    assert {tuple(picture.notes) for picture in pictures} == {
        ("found: the run that was evaluated has no masks (any more)",)
    }


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        ({"annotations": "nowhere"}, "No truth can be shown: .*nowhere"),
        ({"cohort": "nowhere/cohort.parquet"}, "No truth can be shown: .*nowhere/cohort.parquet"),
    ],
)
def test_a_truth_that_is_gone_is_told_once_for_all(folder: Path, truth: dict[str, str], words: str) -> None:
    made = contents(folder, **{key: str(folder / value) for key, value in truth.items()})
    assert len(made.item_notes) == 1 and re.match(words, made.item_notes[0])
    pictures = list(make_pictures([item.source for item in made.items]))[1:]
    assert all(set(picture.layers) >= {"image", "found"} and picture.notes == [] for picture in pictures)


def test_a_truth_that_lacks_an_image_says_so_there(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "labelme", tmp_path / "labelme")
    (tmp_path / "labelme" / "field_0001.json").unlink()
    (tmp_path / "labelme" / "field_0002.json").write_text("{")
    (tmp_path / "labelme" / "stranger.json").symlink_to(tmp_path / "nothing")  # of no image, and cannot be read
    made = contents(folder, annotations=str(tmp_path / "labelme"))
    pictures = dict(zip((item.id for item in made.items), make_pictures([i.source for i in made.items]), strict=True))
    assert made.item_notes == [] and pictures["field_0001"].notes == ["truth: it is not where it was"]
    assert ["field_0002.json" in note for note in pictures["field_0002"].notes] == [True]
    assert ["truth" in pictures[f"field_000{number}"].layers for number in range(NUM)] == [1, 0, 0, 1, 1]
