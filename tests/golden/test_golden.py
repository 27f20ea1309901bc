"""Results that no change may move unnoticed, beside this file.

A change that moves them on purpose writes them anew, and shows the difference in its commit:

    python -m pytest tests/golden --regenerate-golden
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stas_core import tables
from stas_core.arrays import Mask, ProbMapU8
from stas_core.data import images
from stas_core.data.cohort import CohortRow
from stas_core.predict import geojson
from stas_core.predict.placement import TargetFacts
from stas_core.predict.polygons import trace_shapes
from stas_core.predict.postprocess import PostprocessConfig, find_targets, postprocess
from stas_core.runs import EpochMetrics
from stas_core.scores import evaluation, report
from stas_core.scores.bootstrap import BootstrapConfig
from stas_core.train import loop
from stas_core.train.context import LocalContext
from stas_core.train.recipe import FoldRecipe, FoldTask

FOLDER = Path(__file__).parent
NUM_STEPS = 20
Golden = Callable[[str, bytes], bytes]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Return a function that gives a kept file, and with --regenerate-golden first makes it of the data."""

    def kept(name: str, data: bytes) -> bytes:
        if request.config.getoption("regenerate_golden"):
            (FOLDER / name).write_bytes(data)
        return (FOLDER / name).read_bytes()

    return kept


def smooth(seed: int, times: int) -> np.ndarray:
    """Return noise of 0 to 255, smoothed in integers: the same on every machine."""
    noise = np.random.default_rng(seed).integers(0, 2**16, (120, 160))
    for _ in range(times):
        for axis in (0, 1):
            noise = (np.roll(noise, 1, axis) + 2 * noise + np.roll(noise, -1, axis)) // 4
    return np.asarray(255 * (noise - noise.min()) // (noise.max() - noise.min()))


def probability_map(seed: int) -> ProbMapU8:
    return np.asarray(smooth(seed, 40), np.uint8)


def truth(seed: int) -> Mask:
    return np.asarray(smooth(seed, 40) + smooth(seed + 100, 4) // 4 > 190)


STEPS = [{"drop": 150, "high": 220, "core": 190, "ratio": 0.2, "low": 170}]
SETTINGS = {
    "closed": PostprocessConfig.model_validate({"steps": STEPS, "min_target_px": 40, "min_foreground_px": 1}),
    "plain": PostprocessConfig.model_validate(
        {"steps": STEPS, "closing_count": 0, "border_fill": "none", "min_target_px": 0, "min_foreground_px": 1}
    ),
}


def masks() -> dict[str, Mask]:
    return {
        f"{seed}_{name}": postprocess(probability_map(seed), one) for seed in range(3) for name, one in SETTINGS.items()
    }


def test_masks(golden: Golden) -> None:
    found = masks()
    assert len(found) == 6 and all(0.02 < mask.mean() < 0.5 for mask in found.values())
    for name, mask in found.items():
        kept = golden(f"mask_{name}.png", images.encode_mask(mask))
        np.testing.assert_array_equal(mask, images.decode_mask(kept, name))


def test_geojson(golden: Golden) -> None:
    prob = probability_map(0)
    labels, targets = find_targets(postprocess(prob, SETTINGS["closed"]), prob)
    data = geojson.to_geojson(trace_shapes(labels), TargetFacts("field", targets))
    assert same_but_for_rounding(data.decode(), golden("field.geojson", data).decode(), 1e-9)


def test_report(golden: Golden) -> None:
    rows = []
    for number in range(12):
        prob = probability_map(number)
        mask = postprocess(prob, SETTINGS["closed"])
        rows.append(evaluation.score_image(str(number), f"slide {number % 6}", truth(number), mask, prob))
    config = BootstrapConfig(num_resamples=200)
    text = report.summary_markdown(evaluation.summarise_scores(rows, config), config)
    text += "\n\n" + report.comparisons_markdown(evaluation.compare_scores(rows, config), config) + "\n"
    assert same_but_for_rounding(text, golden("report.md", text.encode()).decode(), 1e-3)


def same_but_for_rounding(text: str, other: str, tolerance: float) -> bool:
    """Tell whether two texts have the same words, and numbers that differ by no more than a tolerance."""
    number = r"[-+]?\d+\.\d+(?:e[-+]?\d+)?"
    ours, theirs = ([float(one) for one in re.findall(number, each)] for each in (text, other))
    same_words = re.sub(number, "#", text) == re.sub(number, "#", other)
    return same_words and bool(np.allclose(ours, theirs, rtol=0, atol=tolerance))


def test_loss_curve(golden: Golden, tmp_path: Path, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]) -> None:
    """One step an epoch, of all four images of a fold: the loss of each epoch is that of a step."""
    values = tiny_recipe.model_dump()
    values["optim"] |= {"batch_size": 4, "micro_batch_size": 4}
    values["training"] |= {"epochs": NUM_STEPS, "validate_every": NUM_STEPS, "top_k": 0}
    context = LocalContext(tmp_path, device=torch.device("cpu"))
    task = FoldTask(0, cohort_rows, str(tmp_path / "fold"), {"commit": "golden"})
    loop.train_fold(context, FoldRecipe.model_validate(values), task)
    epochs = tables.read_rows(str(tmp_path / "fold" / "metrics.parquet"), EpochMetrics)
    losses = [epoch.train_loss for epoch in epochs]
    lines = "".join(f"{step} {loss:.6f}\n" for step, loss in enumerate(losses, start=1))
    kept = [float(line.split()[1]) for line in golden("loss_curve.txt", lines.encode()).decode().splitlines()]
    assert len(losses) == NUM_STEPS and losses[-1] < losses[0]
    # Machines round convolutions differently; a change of the method moves a step by far more.
    assert losses == pytest.approx(kept, rel=0.02)
