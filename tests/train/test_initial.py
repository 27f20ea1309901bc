"""`model.init_from`: folds that go on from trained models."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stas_core.data.cohort import CohortRow, rows_of
from stas_core.errors import CheckpointError, ConfigError, StorageError
from stas_core.networks import checkpoints
from stas_core.networks.checkpoints import CheckpointRecord
from stas_core.networks.model import build_model
from stas_core.predict import ensemble
from stas_core.runs import TrainingRun, write_ensemble
from stas_core.train import initial, loop
from stas_core.train.context import LocalContext
from stas_core.train.recipe import FoldRecipe, FoldTask

CPU = torch.device("cpu")


def with_model(recipe: FoldRecipe, **values: Any) -> FoldRecipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=values)})


def save(uri: str, recipe: FoldRecipe, fold: int, images: list[str] | None, **values: Any) -> None:
    """Write a checkpoint of random weights."""
    torch.manual_seed(fold)
    model = recipe.model.model_dump(mode="json", exclude={"init_from"})
    record = CheckpointRecord(model, recipe.data.scale, fold, 1, False, {"dice": 0.5}, {}, recipe.data.mpp)
    weights = build_model(recipe.model).state_dict()
    checkpoints.save_checkpoint(uri, weights, replace(record, **values), images)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]) -> str:
    """Return the ensemble of a run of both folds that says what each model was trained on."""
    found = TrainingRun(str(tmp_path_factory.mktemp("before")))
    for fold in (0, 1):
        images = [row.image_fingerprint for row in rows_of(cohort_rows, fold, "train")]
        save(found.fold(fold).last, tiny_recipe, fold, images)
    members = [{"fold": fold, "checkpoint": f"fold_{fold}/checkpoints/last"} for fold in (0, 1)]
    write_ensemble(found.path(found.ENSEMBLE), members)
    return found.path(found.ENSEMBLE)


def check(recipe: FoldRecipe, rows: list[CohortRow], folds: tuple[int, ...] = (0, 1)) -> initial.Start:
    return initial.check_start(recipe, rows, folds, 1.5)


def last(ensemble_uri: str, fold: int) -> str:
    return TrainingRun(str(Path(ensemble_uri).parent)).fold(fold).last


def test_each_fold_begins_with_the_weights_of_its_own_model(
    run: str, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Weights that a download, or a file that is not there, would have to give: nobody asks for them.
    recipe = with_model(tiny_recipe, init_from=run, encoder_weights="/none/weights.safetensors")
    optim = {"ema_decay": 0.5, "lr": 1e-12}
    training = {"epochs": 1}
    recipe = recipe.model_copy(
        update={
            "optim": recipe.optim.model_copy(update=optim),
            "training": recipe.training.model_copy(update=training),
        }
    )
    task = FoldTask(1, cohort_rows, str(tmp_path / "fold"), {})
    begun = loop._start(LocalContext(tmp_path, device=CPU), recipe, task)
    expected, _ = checkpoints.load_checkpoint(last(run, 1), CPU)
    for model in (begun.model, begun.final_model):
        assert all(torch.equal(found, expected.state_dict()[name]) for name, found in model.state_dict().items())

    class Killed(Exception):
        pass

    class Dying(LocalContext):
        def report(self, metrics: Any, state: Path | None) -> None:
            super().report(metrics, state)
            raise Killed

    with pytest.raises(Killed):
        loop.train_fold(Dying(tmp_path, device=CPU), recipe, task)
    monkeypatch.setattr(initial, "load", None)  # what was saved is gone on from, not what it began with
    loop.train_fold(LocalContext(tmp_path, device=CPU), recipe, task)
    made = str(tmp_path / "fold" / "checkpoints" / "last")
    assert "init_from" not in checkpoints.read_record(made).model
    assert checkpoints.read_trained_on(made) == checkpoints.read_trained_on(last(run, 1))
    assert len(checkpoints.read_trained_on(made) or ()) == len(rows_of(cohort_rows, 1, "train"))
    ensemble.load_ensemble(made, device=CPU)


def test_what_a_model_has_seen_is_handed_down(
    run: str, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow], tmp_path: Path
) -> None:
    ours = rows_of(cohort_rows, 0, "train")
    assert initial.trained_on(ours, None) == frozenset(row.image_fingerprint for row in ours)
    assert initial.trained_on(ours, last(run, 1)) == frozenset(row.image_fingerprint for row in cohort_rows)
    save(str(tmp_path / "silent"), tiny_recipe, 0, None)
    assert initial.trained_on(ours, str(tmp_path / "silent")) is None


def test_an_ensemble_gives_each_fold_its_own_model_and_counts_by_content(
    run: str, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow], tmp_path: Path
) -> None:
    start = check(with_model(tiny_recipe, init_from=run), cohort_rows)
    assert start.by_fold == {0: last(run, 0), 1: last(run, 1)} and not start.unchecked
    assert start.notes[0].endswith("seen no image that it is scored on (compared by content)") and len(start.notes) == 1
    shutil.copytree(Path(run).parent, tmp_path / "moved")
    folder = with_model(tiny_recipe, init_from=str(tmp_path / "moved"))
    assert check(folder, cohort_rows, (1,)).fingerprint == start.fingerprint
    single = with_model(tiny_recipe, init_from=last(run, 1))
    assert check(single, rows_of(cohort_rows, 1, "validation"), (1,)).fingerprint != start.fingerprint


def test_folds_that_do_not_match_are_refused(
    run: str, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow], tmp_path: Path
) -> None:
    recipe = with_model(tiny_recipe, init_from=run)
    with pytest.raises(ConfigError, match=r"has no models of fold 2 .*of the folds 0, 1.*the same folds"):
        check(recipe, cohort_rows, (0, 2))
    members = [{"checkpoint": last(run, fold)} for fold in (0, 1)]
    save(str(tmp_path / "another"), tiny_recipe, 1, [])
    write_ensemble(str(tmp_path / "e.json"), [*members, {"checkpoint": str(tmp_path / "another")}])
    with pytest.raises(ConfigError, match="has 2 models of fold 1"):
        check(with_model(tiny_recipe, init_from=str(tmp_path / "e.json")), cohort_rows)
    with pytest.raises(
        ConfigError, match=r"model\.init_from = .*none: .* holds no checkpoints; give an ensemble.* put them back"
    ):
        check(with_model(tiny_recipe, init_from=str(tmp_path / "none")), cohort_rows)


def test_a_run_of_one_fold_is_no_model_for_all(
    run: str, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow], tmp_path: Path
) -> None:
    shutil.copytree(Path(run).parent / "fold_0", tmp_path / "run" / "fold_0")
    whole, fold = (with_model(tiny_recipe, init_from=str(tmp_path / name)) for name in ("run", "run/fold_0"))
    with pytest.raises(ConfigError, match=r"run has no models of fold 1 \(its members are of the folds 0\)"):
        check(whole, cohort_rows, (1,))
    own = check(whole, cohort_rows, (0,))
    single = check(fold, rows_of(cohort_rows, 0, "validation"), (0, 3))
    assert set(single.by_fold.values()) == {str(tmp_path / "run/fold_0/checkpoints/last")} == set(own.by_fold.values())
    assert "each fold goes on from its model" in own.notes[0] and "all folds go on from" in single.notes[0]


def test_images_that_a_model_has_seen_are_not_scored(
    run: str, tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow]
) -> None:
    swapped = [replace(row, fold=1 - (row.fold or 0)) for row in cohort_rows]
    recipe = with_model(tiny_recipe, init_from=run)
    with pytest.raises(ConfigError, match=r"was trained on 4 of the 4 images that fold 0 is scored.*published_csv"):
        check(recipe, swapped)
    held_out = [replace(row, fold=None) if row.fold == 1 else row for row in cohort_rows]
    with pytest.raises(ConfigError, match=r"trained on 4 of the 8 .*\(4 of the hold-out\)"):
        check(recipe, held_out, (0,))
    with pytest.raises(ConfigError, match="that fold 1 is scored on"):
        check(with_model(tiny_recipe, init_from=last(run, 0)), cohort_rows)  # one for all
    renamed = [replace(row, id=f"other_{row.id}", image_uri="/elsewhere.png") for row in swapped]
    with pytest.raises(ConfigError, match="such as other_"):
        check(recipe, renamed)


def test_what_nobody_can_tell_is_said(tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow], tmp_path: Path) -> None:
    save(str(tmp_path / "c"), tiny_recipe, 3, None)
    start = check(with_model(tiny_recipe, init_from=str(tmp_path / "c")), cohort_rows)
    assert start.by_fold == {0: str(tmp_path / "c"), 1: str(tmp_path / "c")}
    assert "only honest if no image that is scored was in its training" in start.notes[0]
    assert len(start.unchecked) == 1 and "does not say what it was trained on" in start.unchecked[0]
    save(str(tmp_path / "c"), tiny_recipe, 3, [])  # it says that it has seen none
    told = check(with_model(tiny_recipe, init_from=str(tmp_path / "c")), cohort_rows)
    assert not told.unchecked and told.fingerprint != start.fingerprint


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n"


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (lambda whole: b"", "holds 0 bytes, expected fingerprint list; copy it again"),
        (lambda whole: LFS_POINTER, "is a Git LFS pointer, not the fingerprint list file itself; run `git lfs pull`"),
        (lambda whole: whole[: len(whole) // 2], "is not the list .* cut off, edited.* copy the whole folder again"),
        (lambda whole: whole.split(b"\n", 1)[1], "is not the list"),
        (lambda whole: b"\xff" + whole, "is not the list"),
        (lambda whole: None, "lacks trained_on.txt, which its checkpoint.json names; copy it"),
    ],
)
def test_a_damaged_list_of_seen_images_is_no_list(
    damaged: Callable[[bytes], bytes | None],
    message: str,
    run: str,
    tiny_recipe: FoldRecipe,
    cohort_rows: list[CohortRow],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(last(run, 1), tmp_path / "c")
    marks = folder / checkpoints.TRAINED_ON
    found = damaged(marks.read_bytes())
    marks.unlink()
    if found is not None:
        marks.write_bytes(found)
    with pytest.raises((CheckpointError, StorageError), match=message):
        check(with_model(tiny_recipe, init_from=str(folder)), cohort_rows, (1,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation": "silu"}, r"model\.activation is relu in .*, and silu here: .* set model\.activation=relu$"),
        ({"decoder_channels": (16, 16, 8, 8, 4)}, r"model\.decoder_channels is \[16,16,8,8,8\] in .*\[16,16,8,8,4\] h"),
        ({"arch": "fpn"}, r"model\.arch is unet in .*, and fpn here.* set model\.arch=unet model\.activation=relu "),
    ],
)
def test_another_architecture_is_refused_by_its_first_difference(
    run: str, tiny_recipe: FoldRecipe, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        initial.require_same_architecture(with_model(tiny_recipe, init_from=run, **values).model)
    same = with_model(tiny_recipe, init_from=run, batch_norm="frozen", norm_groups=2, encoder_weights="imagenet").model
    initial.require_same_architecture(same)


def test_another_scale_is_said_with_what_would_be_alike(
    tiny_recipe: FoldRecipe, cohort_rows: list[CohortRow], tmp_path: Path
) -> None:
    save(str(tmp_path / "c"), tiny_recipe, 0, [], scale=0.5, mpp=0.5)

    def notes(**data: Any) -> tuple[str, ...]:
        changed = {"data": tiny_recipe.data.model_copy(update=data)}
        return check(
            with_model(tiny_recipe, init_from=str(tmp_path / "c")).model_copy(update=changed), cohort_rows
        ).notes

    assert len(notes(mpp=0.5, scale=0.5)) == len(notes(mpp=0.25, scale=0.25)) == 1
    assert "at 1 um per pixel, and is shown these at 0.25; data.scale=0.25 would" in notes(mpp=0.25, scale=1.0)[1]
    assert notes(mpp=2.0, scale=1.0)[1].endswith("is shown these at 2")
    assert "was trained at data.scale = 0.5, this is data.scale = 1" in notes(scale=1.0)[1]
