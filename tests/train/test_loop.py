import errno
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stas_core import process, tables
from stas_core.data import images
from stas_core.data.cohort import CohortRow, rows_of
from stas_core.data.fields import load_image, load_mask
from stas_core.errors import ConfigError, DivergedError, WriteError
from stas_core.networks import checkpoints
from stas_core.predict.predictor import Member, Predictor
from stas_core.runs import EpochMetrics, FoldFolder, FoldResult, OofScore
from stas_core.scores import metrics
from stas_core.train import loop, saved_state
from stas_core.train.context import LocalContext
from stas_core.train.dataset import TrainingSet
from stas_core.train.recipe import FoldRecipe, FoldTask
from stas_core.train.saved_state import StateRecord
from stas_core.train.schedule import lr_factor

CPU = torch.device("cpu")


def with_settings(recipe: FoldRecipe, section: str, **values: object) -> FoldRecipe:
    changed = getattr(recipe, section).model_dump() | values
    return FoldRecipe.model_validate(recipe.model_dump() | {section: changed})


def train(folder: Path, recipe: FoldRecipe, rows: list[CohortRow], context: LocalContext | None = None) -> FoldResult:
    folder.mkdir(exist_ok=True)
    task = FoldTask(0, rows, str(folder / "fold"), {"commit": "test"})
    return loop.train_fold(context or LocalContext(folder, device=CPU), recipe, task)


def artefacts(folder: Path) -> dict[str, bytes]:
    """Return every checkpoint, map and index: what must not depend on interruptions."""
    fold = folder / "fold"
    files = [*fold.glob("checkpoints/**/*"), *fold.glob("oof/*"), *fold.glob("examples/*/*"), fold / "oof.parquet"]
    return {str(path.relative_to(fold)): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]
) -> tuple[Path, FoldRecipe, FoldResult]:
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = with_settings(tiny_recipe, "optim", ema_decay=0.5)
    return folder, recipe, train(folder, recipe, cohort_rows)


def test_a_fold_leaves_what_it_promises(
    undisturbed: tuple[Path, FoldRecipe, FoldResult], cohort_rows: list[CohortRow]
) -> None:
    folder, _, result = undisturbed
    fold = folder / "fold"
    metrics_table = tables.read_table(str(fold / "metrics.parquet"))
    assert metrics_table.schema.equals(tables.schema_of(EpochMetrics))
    assert metrics_table["epoch"].to_pylist() == [1, 2, 3]
    kept = sorted(path.name for path in (fold / "checkpoints").iterdir())
    dice = [epoch.val_dice or 0.0 for epoch in tables.from_table(EpochMetrics, metrics_table)]
    best_two = sorted(range(3), key=lambda i: (-dice[i], i))[:2]
    assert kept == [*(f"epoch_{i + 1:04d}" for i in sorted(best_two)), "last"]
    index = tables.read_table(str(fold / "oof.parquet"))
    assert index.schema.equals(tables.schema_of(OofScore))
    assert index["id"].to_pylist() == [row.id for row in rows_of(cohort_rows, 0, "validation")]
    assert result.dice == pytest.approx(np.mean([score.dice for score in tables.from_table(OofScore, index)]))
    assert list((fold / "tensorboard").iterdir())
    shown = FoldFolder(str(fold)).examples()
    assert len(shown) == 3 and set(shown) < {row.id for row in cohort_rows if row.fold == 0}
    assert all(list(by_epoch) == [1, 2, 3] for by_epoch in shown.values())


def test_maps_are_those_of_the_last_weights_and_scored_as_indexed(
    undisturbed: tuple[Path, FoldRecipe, FoldResult], cohort_rows: list[CohortRow]
) -> None:
    folder, recipe, _ = undisturbed
    model, record = checkpoints.load_checkpoint(str(folder / "fold" / "checkpoints" / "last"), CPU)
    assert record.averaged and record.epoch == 3
    predictor = Predictor([Member("m", model, record.scale)], device=CPU, config=recipe.inference)
    rows = {row.id: row for row in cohort_rows}
    for entry in tables.read_table(str(folder / "fold" / "oof.parquet")).to_pylist():
        stored = images.decode_map((folder / "fold" / entry["map_uri"]).read_bytes(), entry["id"])
        row = rows[entry["id"]]
        assert stored.shape == (row.height, row.width)
        assert np.array_equal(stored, predictor.predict_u8(load_image(row, 1.0)))
        assert metrics.count(stored >= 128, load_mask(row)).dice == entry["dice"]


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_resumed_run_gives_the_same_bytes(
    stop_after: int,
    tmp_path: Path,
    undisturbed: tuple[Path, FoldRecipe, FoldResult],
    cohort_rows: list[CohortRow],
) -> None:
    folder, recipe, _ = undisturbed

    class Killed(Exception):
        pass

    class Dying(LocalContext):
        def report(self, metrics: Mapping[str, Any], state: Path | None) -> None:
            super().report(metrics, state)
            if metrics["epoch"] == stop_after:
                raise Killed

    with pytest.raises(Killed):
        train(tmp_path, recipe, cohort_rows, Dying(tmp_path, device=CPU))
    train(tmp_path, recipe, cohort_rows)
    assert artefacts(tmp_path) == artefacts(folder)


def test_going_on_with_other_threads_is_told(
    tmp_path: Path,
    undisturbed: tuple[Path, FoldRecipe, FoldResult],
    cohort_rows: list[CohortRow],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, recipe, at_once = undisturbed
    assert at_once.ran_on == ["cpu: 1 worker(s) of 1 thread(s)"]
    monkeypatch.setattr(torch, "set_num_threads", lambda num: None)  # two would wait for each other on a busy machine
    two_threads = LocalContext(tmp_path, device=CPU, num_threads=2)
    train(tmp_path, with_settings(recipe, "training", epochs=1), cohort_rows, two_threads)
    train(tmp_path, with_settings(recipe, "training", epochs=2), cohort_rows, two_threads)
    result = train(tmp_path, recipe, cohort_rows)
    assert result.ran_on == ["cpu: 1 worker(s) of 2 thread(s)", "cpu: 1 worker(s) of 1 thread(s)"]


def test_a_stop_before_the_state_is_safe_loses_nothing(
    tmp_path: Path, undisturbed: tuple[Path, FoldRecipe, FoldResult], cohort_rows: list[CohortRow]
) -> None:
    folder, recipe, _ = undisturbed

    class Killed(Exception):
        pass

    class DyingEarly(LocalContext):
        def report(self, metrics: Mapping[str, Any], state: Path | None) -> None:
            if metrics["epoch"] == 3:  # its checkpoint is written and may have pushed another out
                raise Killed
            super().report(metrics, state)

    with pytest.raises(Killed):
        train(tmp_path, recipe, cohort_rows, DyingEarly(tmp_path, device=CPU))
    train(tmp_path, recipe, cohort_rows)
    assert artefacts(tmp_path) == artefacts(folder)


@pytest.mark.parametrize("where", ["a later state", "its folder"])
def test_a_full_temporary_folder_ends_the_fold_and_half_a_state_is_not_believed(
    where: str,
    tmp_path: Path,
    undisturbed: tuple[Path, FoldRecipe, FoldResult],
    cohort_rows: list[CohortRow],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, recipe, _ = undisturbed

    def run_full(target: Path, tensors: Mapping[str, torch.Tensor], record: StateRecord) -> None:
        if record.epoch == 2:
            (target / "state.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(target, tensors, record)

    save = saved_state.save
    with monkeypatch.context() as patch:
        if where == "its folder":
            (tmp_path / "full").touch()
            patch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
        patch.setattr(saved_state, "save", run_full)
        with pytest.raises(WriteError, match=r"temporary folder.*; free some space there.*run the same command again$"):
            train(tmp_path, recipe, cohort_rows)
    assert (tmp_path / "state").exists() == (where == "a later state")
    if where == "a later state":
        train(tmp_path, recipe, cohort_rows)
        assert artefacts(tmp_path) == artefacts(folder)


def test_folds_start_and_sample_independently(tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]) -> None:
    """Two folds of the same rows share the seed, and still neither first weights, order of samples nor crops."""

    def first_step(fold: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        recipe = with_settings(tiny_recipe, "training", seed=seed)
        run = loop._start(LocalContext(Path("unused"), device=CPU), recipe, FoldTask(fold, [], "", {}))
        samples = TrainingSet(cohort_rows, data=recipe.data, config=recipe.augment, seed=run.seed, num_epochs=3)
        _, _, steps = next(loop._epochs(run, samples))
        return torch.cat([p.detach().flatten() for p in run.model.parameters()]), next(steps)[0][0].images

    weights, pixels = first_step(fold=0, seed=0)
    for fold, seed, same in ((0, 0, True), (1, 0, False), (0, 1, False)):
        others = first_step(fold, seed)
        assert torch.equal(weights, others[0]) is same and torch.equal(pixels, others[1]) is same


def test_accumulation_averages_the_gradient(tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]) -> None:
    """With BatchNorm frozen, two passes of two images give the gradient of one pass of four."""
    recipe = with_settings(tiny_recipe, "model", batch_norm="frozen")

    def gradient(micro: int) -> torch.Tensor:
        run_recipe = with_settings(recipe, "optim", batch_size=4, micro_batch_size=micro)
        context = LocalContext(Path("unused"), device=CPU)
        process.set_up(context.device, num_threads=1, deterministic=True)
        run = loop._start(context, run_recipe, FoldTask(0, cohort_rows, "unused", {}))
        samples = TrainingSet(cohort_rows, data=run_recipe.data, config=run_recipe.augment, seed=0, num_epochs=3)
        _, _, steps = next(loop._epochs(run, samples))
        run.wrapped.train()
        loop._train_step(run, *next(steps), progress=0.0)
        return torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])

    once, twice = gradient(4), gradient(2)
    assert torch.allclose(once, twice, atol=1e-4 * float(once.abs().max()))


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("optim", {"clip_norm": 0.1}),
        ("training", {"amp": "bf16"}),
        ("data", {"crop_px": None, "scale": 0.5}),
        ("model", {"arch": "fpn"}),
        ("training", {"deterministic": False, "validate_every": 2, "top_k": 0}),
    ],
)
def test_options_train(
    section: str, values: dict[str, Any], tmp_path: Path, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]
) -> None:
    result = train(tmp_path, with_settings(tiny_recipe, section, **values), cohort_rows)
    assert 0 <= result.dice <= 1 and result.epochs == 3


def test_clipping_changes_the_result(tmp_path: Path, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]) -> None:
    for name, recipe in (
        ("free", tiny_recipe),
        ("clipped", with_settings(tiny_recipe, "optim", clip_norm=1e-3)),
    ):
        train(tmp_path / name, recipe, cohort_rows)
    assert artefacts(tmp_path / "free") != artefacts(tmp_path / "clipped")


def test_learning_rate_follows_the_schedule(
    undisturbed: tuple[Path, FoldRecipe, FoldResult],
) -> None:
    folder, recipe, _ = undisturbed
    history = tables.read_table(str(folder / "fold" / "metrics.parquet")).to_pylist()
    steps = 2  # four training images in batches of two
    for row in history:
        last = row["epoch"] * steps - 1
        factor = lr_factor(recipe.schedule, step=last, steps_per_epoch=steps, num_epochs=3)
        assert row["lr"] == pytest.approx(recipe.optim.lr * factor)


def test_divergence_and_empty_folds_are_errors(
    tmp_path: Path, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]
) -> None:
    with pytest.raises(DivergedError, match=r"not finite in epoch 1 at optim\.lr = 1e\+30, fold 0; lower optim"):
        train(tmp_path, with_settings(tiny_recipe, "optim", lr=1e30), cohort_rows)
    with pytest.raises(ConfigError, match=r"fold 7 has 8 training and 0 validation images"):
        task = FoldTask(7, cohort_rows, str(tmp_path), {})
        loop.train_fold(LocalContext(tmp_path, device=CPU), tiny_recipe, task)


def test_a_saved_state_survives_a_stop_between_renames(tmp_path: Path) -> None:
    context = LocalContext(tmp_path, device=CPU)
    for epoch in (1, 2):
        state = tmp_path / f"new_{epoch}"
        state.mkdir()
        (state / "state.json").write_text(json.dumps({"epoch": epoch}))
        context.report({}, state)
    (tmp_path / "state").rename(tmp_path / "state.old")
    with context.saved_state() as folder:
        assert folder is not None and json.loads((folder / "state.json").read_text()) == {"epoch": 2}
