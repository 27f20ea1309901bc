"""A plan says which inputs are known to fail, and refuses what the run would refuse for want of any other."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stas_core import config, storage
from stas_core.data import images
from stas_core.errors import ConfigError
from stas_core.failures import Failure
from stas_core.scores.evaluation import score_files
from tests.scoring import here
from tests.workflows.test_evaluate import write_run
from workflows import evaluate, prepare_data, score_images, score_slides
from workflows.evaluate import EvaluateConfig
from workflows.forecast import Failing, Forecast
from workflows.prepare_data import PrepareConfig
from workflows.score_images import ScoreConfig
from workflows.score_slides import ScoreSlidesConfig

Run = Callable[[], object]


def told(forecasts: list[Forecast]) -> str:
    return "\n".join(forecasts[0].lines())


def refusals(*runs: Run) -> list[str]:
    """Return the first words of the errors that runs end with."""
    found = []
    for run in runs:
        with pytest.raises(ConfigError) as caught:
            run()
        found.append(str(caught.value).partition(":")[0].partition(";")[0])
    return found


@pytest.mark.parametrize(("allowed", "ends_badly"), [(0.0, True), (0.29, True), (0.3, False), (1.0, False)])
def test_more_failures_than_may_be_are_told(allowed: float, ends_badly: bool) -> None:
    known = [Failure(name, "a", "empty_file", f"{name}.png holds 0 bytes") for name in "ab"]
    tried = [Failure("c", "a", "slow", "c.png took 9 s")]
    notes = Failing(known, 10, allowed).notes(tried)
    assert notes[:4] == [
        "known to fail: 2 empty_file",
        "known to fail: 2 x empty_file, such as a: a.png holds 0 bytes",
        "refused of those tried: 1 slow",
        "refused of those tried: c: slow: c.png took 9 s",
    ]
    assert ("the run would end with status 1: 3 of 10 inputs fail, more than max_failed" in notes[-1]) is ends_badly
    every = [Failure(str(number), "a", "slow", f"{number} m {number} s") for number in range(1000)]
    assert len(Failing(every, 10**6, 1.0).notes()) <= 12


def test_where_no_input_is_left_the_run_is_refused_as_it_would_refuse_itself() -> None:
    known = [Failure("a", "b", "empty_file", "a.png holds 0 bytes")]
    with pytest.raises(ConfigError, match=r"^none can be used:\n  a: empty_file: a.png holds 0 bytes$"):
        Failing(known, 1, 1.0, refusal="none can be used").notes()
    with pytest.raises(ConfigError):
        Failing(known, 2, 1.0, refusal="none can be used").notes(known)
    assert Failing(known, 2, 1.0, refusal="none can be used").notes() and Failing(known, 1, 1.0).notes()


@pytest.mark.usefixtures("prepared_here")
def test_fields_that_cannot_be_used_are_in_the_plan_of_a_cohort(phantom_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(phantom_folder, tmp_path / "fields")
    annotations = sorted((tmp_path / "fields" / "annotations").iterdir())
    annotations[0].unlink()
    given = {"images": f"{tmp_path}/fields/images", "annotations": f"{tmp_path}/fields/annotations"}
    split = {"num_folds": 2, "hold_out_fraction": 0}

    def settings(**values: Any) -> PrepareConfig:
        return config.build(PrepareConfig, {"out": f"{tmp_path}/out", "data": given, "split": split, **values})

    said = told(prepare_data.plan(settings(), False))
    assert "known to fail: 1 missing_annotation" in said and "status 1: 1 of 8 inputs fail" in said
    assert "status 1" not in told(prepare_data.plan(settings(max_failed_fraction=0.2), False))

    annotations[1].write_text("{}")
    assert prepare_data.run(settings(), False) == 1
    annotations[2].write_text("{}")  # the other is known by now
    said = told(prepare_data.plan(settings(), False))
    assert "7 images with annotations, 1 to measure" in said
    assert "known to fail: 1 missing_annotation, 1 missing_shapes" in said
    assert "refused of those tried: 1 missing_shapes" in said and "status 1: 3 of 8 inputs fail" in said

    for path in annotations[3:]:
        path.unlink()
    shutil.rmtree(tmp_path / "out")
    runs = [lambda: prepare_data.plan(settings(), False), lambda: prepare_data.run(settings(), False)]
    assert refusals(*runs) == ["none of the 8 inputs can be used"] * 2


def test_images_and_slides_that_are_no_files_of_their_own_are_in_the_plan_of_scoring(
    tmp_path: Path, ensemble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = images.encode_png(np.full((32, 32, 3), (230, 180, 210), np.uint8))
    for name in ("x/a.png", "y/a.png", "b.png"):
        storage.write_bytes(f"{tmp_path}/images/{name}", pixels)
    values = {"ensemble": {"uri": ensemble}, "out": f"{tmp_path}/out", "inference": {"flips": ["identity"]}}

    def settings(where: str, **more: Any) -> ScoreConfig:
        given = {"data": {"images": f"{tmp_path}/images/{where}"}, "accept_warnings": True}
        return config.build(ScoreConfig, values | given | more)

    said = told(score_images.plan(settings(""), False))
    assert "1 images to predict" in said and "known to fail: 1 " in said and "status 1: 1 of 2 inputs fail" in said
    said = told(score_images.plan(settings("*/a.png"), False))
    assert "0 images to predict" in said and "status 1: 1 of 1 inputs fail" in said

    (tmp_path / "images" / "b.png").write_bytes(pixels[: len(pixels) // 2])
    storage.write_bytes(f"{tmp_path}/images/c.png", pixels)
    here.score_images_here(monkeypatch)
    assert score_images.run(settings("*.png"), False) == 1
    said = told(score_images.plan(settings("*.png", max_failed_fraction=0.4), False))
    assert "0 images to predict" in said and re.search(r"known to fail: b: \w+: an earlier run in .*out recorded", said)
    assert "status 1: 1 of 2 inputs fail, more than max_failed_fraction = 0.4" in said

    for name in ("x/a.svs", "y/a.svs"):
        storage.write_bytes(f"{tmp_path}/slides/{name}", b"")
    made = config.build(ScoreSlidesConfig, values | {"slides": f"{tmp_path}/slides", "model_mpp": 1, "out": "/none/s"})
    with monkeypatch.context() as patch:
        patch.setattr(score_slides, "begin", lambda out, *_, **__: Forecast("score_slides", out, "", ""))
        said = told(score_slides.plan(made, False))
    assert "0 slides, 0 to score" in said and "status 1: 1 of 1 inputs fail" in said


def test_a_truth_without_any_score_is_refused_before_the_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = np.zeros((40, 50), bool)
    mask[5:15, 5:20] = True
    run = write_run(tmp_path / "run", {"a": mask, "b": mask})
    storage.write_bytes(f"{tmp_path}/truth/c.png", images.encode_mask(mask))

    def settings(**values: Any) -> EvaluateConfig:
        given = {"run": run, "truth": {"masks": f"{tmp_path}/truth"}, "out": f"{tmp_path}/out"}
        return config.build(EvaluateConfig, given | values)

    none = [lambda: evaluate.plan(settings(), False), lambda: evaluate.run(settings(), False)]
    assert refusals(*none) == [f"none of the 1 images of the truth has a score in run = {run}"] * 2
    storage.write_bytes(f"{tmp_path}/truth/a.png", images.encode_mask(mask[1:]))
    with pytest.raises(ConfigError, match=r"(?s)none of the 2 images .* has a score.*size_mismatch"):
        evaluate.plan(settings(), False)
    storage.write_bytes(f"{tmp_path}/truth/b.png", images.encode_mask(mask))
    said = told(evaluate.plan(settings(), False))
    assert "known to fail: 1 not_scored" in said and "refused of those tried: 1 size_mismatch" in said
    assert "status 1: 2 of 3 inputs fail, more than max_missing_fraction = 0" in said
    most = settings(max_missing_fraction=0.7)
    assert "status 1" not in told(evaluate.plan(most, False))
    monkeypatch.setattr(evaluate, "stream", lambda items, given: (score_files(item, given) for item in items))
    evaluate.run(most, False)
    said = told(evaluate.plan(most, False))
    assert "nothing: it is up to date" in said and "known to fail: 1 not_scored" in said
