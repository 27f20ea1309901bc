from pathlib import Path
from typing import Any

import pytest

from stas_core import config, storage
from tests.conftest import TINY_MODEL
from workflows import pipeline
from workflows.pipeline import PipelineConfig
from workflows.runtime import Node


def test_the_stages_follow_each_other_and_are_skipped_when_they_hold(
    ray_nodes: list[Node], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    values: dict[str, Any] = {
        "out": str(out),
        "prepare": {
            "phantom": {"num_images": 9, "height": 96, "width": 128, "num_groups": 9},
            "split": {"num_folds": 2, "hold_out_fraction": 0.34},
        },
        "train": {
            "data": {"crop_px": 64},
            "model": TINY_MODEL,
            "optim": {"batch_size": 2, "micro_batch_size": 2},
            "training": {"epochs": 1},
        },
        "tune": {"space": {"min_target_px": {"low": 0, "high": 40}}, "search": {"num_settings": 4, "num_random": 2}},
        "score": {"resources": {"calibrate": False}},
    }
    run = config.build(PipelineConfig, values)
    stages = ("prepare_data", "train_folds", "tune_postprocess", "score_images", "evaluate")
    assert pipeline.run(run, False) == 0
    printed = capsys.readouterr().out
    assert [line.removeprefix("== ") for line in printed.splitlines() if line.startswith("== ")] == list(stages)
    assert "nothing to do" not in printed
    assert storage.read_table(str(out / "scores" / "images.parquet")).num_rows == 3
    assert storage.read_table(str(out / "evaluation" / "scores.parquet")).num_rows == 3
    # The thresholds that were recommended are those that were applied.
    recommended = config.parse_yaml((out / "thresholds" / "postprocess.tuned.yaml").read_text(), "tuned")
    applied = storage.read_json(str(out / "scores" / "manifest.json"))["config"]["postprocess"]
    assert applied["min_target_px"] == recommended["min_target_px"]

    assert pipeline.run(run, False) == 0
    assert capsys.readouterr().out.count("nothing to do") == len(stages)

    # What a stage made is lost: it and what depends on it are done again, the rest is not.
    storage.remove(str(out / "scores"))
    assert pipeline.run(run, False) == 0
    printed = capsys.readouterr().out
    assert printed.count("nothing to do") == 3 and "3 images: 3 to predict" in printed
