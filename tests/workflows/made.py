"""Small things that tests of scoring and tuning make: images, an untrained ensemble, out-of-fold maps, settings."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from stas_core import config, storage
from stas_core.data import images
from stas_core.data.cohort import CohortRow
from stas_core.data.fields import load_mask
from stas_core.data.phantom import PhantomConfig, make_phantom
from stas_core.networks import checkpoints
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.checkpoints import CheckpointRecord
from stas_core.networks.model import build_model
from stas_core.runs import OofScore, TrainingRun
from stas_core.scores import metrics
from tests.conftest import TINY_MODEL
from workflows import forecast
from workflows.forecast import Forecast
from workflows.score_images import ScoreConfig


def make_images(folder: Path, num_names: int, *, num_distinct: int = 20) -> Path:
    """Write phantom fields of 96 x 128 px, each under several names."""
    folder.mkdir(parents=True)
    phantom = PhantomConfig(num_images=num_distinct, height=96, width=128, seed=3)
    data = [images.encode_jpeg(make_phantom(phantom, index).image) for index in range(min(num_names, num_distinct))]
    for index in range(num_names):
        (folder / f"field_{index:05d}.jpg").write_bytes(data[index % num_distinct])
    return folder


def make_ensemble(folder: Path) -> str:
    """Write a run of two untrained folds of different scale; return its folder."""
    for fold, scale in enumerate((1.0, 0.5)):
        torch.manual_seed(fold)
        model_config = config.build(ModelConfig, TINY_MODEL)
        record = CheckpointRecord(model_config.model_dump(mode="json"), scale, fold, 1, False, {"dice": 0.5}, {})
        uri = TrainingRun(str(folder)).fold(fold).last
        checkpoints.save_checkpoint(uri, build_model(model_config).state_dict(), record)
    return str(folder)


def settings(source: Path | str, ensemble: str, out: Path | str, **values: Any) -> ScoreConfig:
    """Return settings under which the untrained ensemble finds something, and every output is written."""
    easy = {"steps": [{"drop": 100, "high": 130, "core": 120, "ratio": 0.1, "low": 110}], "min_target_px": 10}
    plain = {
        "out": str(out),
        "data": {"images": str(source)},
        "ensemble": {"uri": ensemble},
        "postprocess": easy | {"max_foreground_share": None},
        "save": {"disagreement": True},
        "accept_warnings": True,
        "resources": {"calibrate": False, "actors": 1, "cpus_per_task": 0.5},
    }
    return config.build(ScoreConfig, plain | values)


def write_config(path: Path, source: Path | str, ensemble: str, out: Path | str, **values: Any) -> Path:
    """Write the settings as a YAML file; return its path."""
    path.write_text(config.dump(settings(source, ensemble, out, **values)))
    return path


def assert_foreseen(planned: Forecast, out: Path, *, within: float = 1.5) -> None:
    """Check that a run wrote what was planned, up to a factor."""
    written = storage.read_json(str(out / "manifest.json"))["forecast"]["disk_bytes"]["actual"]
    assert planned.disk_bytes is not None
    assert written / within < planned.disk_bytes < written * within + forecast.RECORDS_BYTES


def make_oof_run(folder: Path, rows: Sequence[CohortRow], cohort_uri: str) -> str:
    """Write what tune_postprocess reads of a training run: maps on which only a high peak tells true from false."""
    rng = np.random.default_rng(0)
    for fold in sorted({row.fold for row in rows if row.fold is not None}):
        out = TrainingRun(str(folder)).fold(fold)
        index: list[OofScore] = []
        for row in (row for row in rows if row.fold == fold):
            truth = load_mask(row)
            noise = ndimage.gaussian_filter(rng.random(truth.shape), 3)
            false = (noise > np.quantile(noise, 0.97)) & ~truth
            prob = np.where(truth, 200, np.where(false, 140, 0)).astype(np.uint8)
            place = out.write_map(row.id, images.encode_map(prob))
            counts = metrics.count(metrics.is_target(prob), truth)
            index.append(OofScore(row.id, fold, place, counts.dice, counts.precision, counts.recall, **asdict(counts)))
        out.write_oof(index)
        storage.write_json(out.path(out.DONE), {})
    (folder / "config.resolved.yaml").write_text(f"data: {{cohort: {cohort_uri}}}\n")
    return str(folder)
