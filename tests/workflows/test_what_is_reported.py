"""What a run tells of inputs that it could not use or that look odd, also where an error ends it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stas_core import config, storage
from stas_core.data import images
from stas_core.data.annotations import AnnotationConfig
from stas_core.errors import ConfigError
from stas_core.scores import evaluation
from tests.workflows.test_evaluate import settings as evaluation_of
from tests.workflows.test_evaluate import write_run
from workflows import evaluate, measuring, prepare_data
from workflows.prepare_data import PrepareConfig

MASK = np.zeros((40, 60), bool)
MASK[10:21, 10:21] = True
SQUARE = [[10, 10], [20, 10], [20, 20], [10, 20]]


def labelme(*squares: Any, name: str) -> bytes:
    shapes = [{"label": "STAS", "points": points, "shape_type": "polygon"} for points in squares]
    return json.dumps({"shapes": shapes, "imagePath": name, "imageHeight": 40, "imageWidth": 60}).encode()


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(items: Any, annotation: AnnotationConfig) -> Iterator[evaluation.Outcome]:
        return (evaluation.score_files(item, annotation) for item in items)

    def measure(items: Any, *given: Any) -> Iterator[dict[str, Any]]:
        return (measuring.measure_item(item, *given) for item in items)

    monkeypatch.setattr(evaluate, "stream", score)
    monkeypatch.setattr(prepare_data, "stream", measure)


def test_oddities_of_annotations_are_counted_by_evaluate_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", {"a": MASK, "b": MASK})
    for name in "ab":
        storage.write_bytes(f"{tmp_path}/truth/{name}.json", labelme(SQUARE, name="z.jpg"))
    made = evaluation_of(tmp_path / "out", run, truth={"annotations": f"{tmp_path}/truth"})
    assert evaluate.run(made, False) == 0
    assert "finding: other_image: 2 in 2 image(s), such as a: file: other_image" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["findings"] == {"other_image": 2}


def test_why_images_are_missing_is_told_before_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", {"a": MASK})
    for name in "bc":
        storage.write_bytes(f"{tmp_path}/truth/{name}.png", images.encode_mask(MASK))
    with pytest.raises(ConfigError, match="none of the 2 images"):
        evaluate.run(evaluation_of(tmp_path / "out", run, truth={"masks": f"{tmp_path}/truth"}), False)
    assert (
        "missing: 2 not_scored\nmissing: 2 x not_scored, such as b: the run has no image b" in capsys.readouterr().out
    )


def test_jpegs_beside_masks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", {"a": MASK, "b": MASK})
    storage.write_bytes(f"{tmp_path}/truth/a.png", images.encode_mask(MASK))
    storage.write_bytes(f"{tmp_path}/truth/b.JPG", b"")
    assert evaluate.run(evaluation_of(tmp_path / "out", run, truth={"masks": f"{tmp_path}/truth"}), False) == 0
    assert "truth.masks: passed over 1 .jpg (JPEG blurs masks: save them as PNG)" in capsys.readouterr().out


def test_an_annotation_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, {"a": MASK})
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(64_000_001)
    read = storage.read_bytes

    def read_all_but_it(uri: str) -> bytes:
        assert not uri.endswith(".json")
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", read_all_but_it)
    item = dict.fromkeys(("map_uri", "against_uri", "against_map_uri", "truth_fingerprint"), "")
    item |= {"id": "a", "group": "a", "truth_uri": f"{tmp_path}/a.json", "mask_uri": f"{tmp_path}/masks/a.png"}
    failure = evaluation.score_files(evaluation.PairedFiles(**item), AnnotationConfig()).failure
    assert failure is not None and failure.reason == "oversized_annotation"
    assert "a.json holds 64,000,001 bytes, more than" in failure.message


def test_no_figure_of_an_earlier_run_stays(tmp_path: Path) -> None:
    data, out, figure = tmp_path / "data", tmp_path / "out", tmp_path / "out" / "figures" / "target_areas.png"
    made = {"data": {"images": str(data), "annotations": str(data)}, "out": str(out)}
    settings = config.build(PrepareConfig, made | {"split": {"num_folds": 2, "hold_out_fraction": 0}})
    for name in "ab":
        pixels = np.full((40, 60, 3), (230, 180, 210), np.uint8)
        storage.write_bytes(f"{data}/{name}.png", images.encode_png(pixels))
        storage.write_bytes(f"{data}/{name}.json", labelme(SQUARE, name=f"{name}.png"))
    assert prepare_data.run(settings, False) == 0
    assert figure.exists()
    for name in "ab":
        storage.write_bytes(f"{data}/{name}.json", labelme(name=f"{name}.png"))
    assert prepare_data.run(settings, False) == 0
    assert not figure.exists() and (figure.parent / "strata.png").exists()
