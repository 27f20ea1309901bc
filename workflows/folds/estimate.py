"""How long folds train, from a few steps that are tried here."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stas_core import local_files, storage
from stas_core.data.cohort import CohortRow, rows_of
from stas_core.errors import ConfigError
from stas_core.runs import FoldFolder
from stas_core.train.examples import epochs_shown, images_shown
from stas_core.train.recipe import FoldRecipe, FoldTask
from workflows.cluster import Plan
from workflows.forecast import (
    RECORDS_BYTES,
    START_S,
    Forecast,
    Sheet,
    forget_peak,
    peak_bytes,
    shown_bytes,
    spread,
)
from workflows.progress import doing, duration

TRIED_PX = 4_000_000
"""Of a batch that is tried on a CPU."""
TRIED_PICTURES = 4
"""Of the examples that are drawn."""
TRIED_EPOCHS = 2
"""The first starts up what the second finds running."""


@dataclass(frozen=True)
class Pace:
    """How fast a worker trains and predicts, and what it needs."""

    train_s: float
    """Of a sample."""
    map_s: float
    """Of an out-of-fold map, with all its flips."""
    checkpoint_bytes: int
    state_bytes: int
    map_bytes: float
    example_bytes: float
    """Of a small map of an image as the fold learns."""
    memory_bytes: float
    """Of the worker, without the images that it keeps."""
    where: str


def try_training(recipe: FoldRecipe, rows: Sequence[CohortRow], fold: int, plan: Plan) -> Pace | None:
    """Train two short epochs on a few images of the cohort; None: the folds are to train on a GPU, and none is here.

    Raises:
        StasError: the fold would fail, too: its weights, images or batches are not usable.
    """
    import torch

    from stas_core.train.context import LocalContext
    from stas_core.train.loop import train_fold

    use_gpu = plan.gpus_per_worker > 0
    if use_gpu and not torch.cuda.is_available():
        return None
    micro = recipe.optim.micro_batch_size
    if not use_gpu:  # a plan must not take minutes
        micro = min(micro, max(1, TRIED_PX // _sample_px(recipe, rows)))
    few = [*spread(rows_of(rows, fold, "train"), micro), *spread(rows_of(rows, fold, "validation"), 2)]
    ends: list[float] = []

    def note(values: Mapping[str, Any]) -> None:
        if "maps" in values:
            ends.append(time.perf_counter())

    forget_peak()
    with local_files.temporary_folder() as folder, doing("trying two short epochs here", at_once=True):
        context = LocalContext(
            Path(folder, "context"),
            num_threads=plan.threads_per_worker,
            device=torch.device("cuda" if use_gpu else "cpu"),
            on_progress=note,
        )
        done = FoldFolder(f"{folder}/fold")
        began = time.perf_counter()
        train_fold(context, _short(recipe, micro), FoldTask(fold, few, done.uri, {}))
        whole = time.perf_counter() - began
        maps, shown = (list(local_files.find_all(done.path(name))) for name in ("oof", done.EXAMPLES))
        return Pace(
            train_s=1 / done.metrics()[-1].images_per_s,
            map_s=ends[1] - ends[0] if len(ends) > 1 else whole / (TRIED_EPOCHS + 1),
            checkpoint_bytes=local_files.bytes_below(done.last),
            state_bytes=local_files.bytes_below(f"{folder}/context"),
            map_bytes=local_files.bytes_of(maps) / max(1, len(maps)),
            example_bytes=local_files.bytes_of(shown) / max(1, len(shown)),
            memory_bytes=peak_bytes(),
            where=torch.cuda.get_device_name() if use_gpu else f"{plan.threads_per_worker} CPU thread(s)",
        )


def _sample_px(recipe: FoldRecipe, rows: Sequence[CohortRow]) -> int:
    if recipe.data.crop_px is not None:
        return int(recipe.data.crop_px**2)
    return int(max(row.height * row.width for row in rows) * recipe.data.scale**2)


def _short(recipe: FoldRecipe, micro: int) -> FoldRecipe:
    """Return the recipe, cut down to a step an epoch."""
    training = {"epochs": TRIED_EPOCHS, "validate_every": TRIED_EPOCHS, "save_state_every": TRIED_EPOCHS, "top_k": 0}
    changes = {
        "training": recipe.training.model_copy(update={**training, "compile": False}),
        "optim": recipe.optim.model_copy(update={"batch_size": micro, "micro_batch_size": micro}),
        "data": recipe.data.model_copy(update={"samples_per_image": 1, "num_loader_workers": 0}),
    }
    return recipe.model_copy(update=changes)


def fold_seconds(recipe: FoldRecipe, pace: Pace, rows: Sequence[CohortRow], fold: int, num_workers: int) -> float:
    """Return how long a fold takes on so many workers, which share its samples."""
    epochs, training = recipe.training.epochs, recipe.training
    samples = len(rows_of(rows, fold, "train")) * recipe.data.samples_per_image
    validated = len(rows_of(rows, fold, "validation"))
    val_s = pace.map_s * len(training.validation_flips) / len(recipe.inference.flips)
    validations = math.ceil(epochs / training.validate_every)
    work = epochs * samples * pace.train_s + validated * (validations * val_s + pace.map_s)
    return START_S + work / num_workers


def of_folds(
    base: Forecast, recipe: FoldRecipe, rows: Sequence[CohortRow], todo: Sequence[int], plan: Plan
) -> Forecast:
    """Forecast the training of folds; `base` is what is known before any is tried.

    Raises:
        StasError: as `try_training`.
    """
    epochs, held_out = recipe.training.epochs, sum(row.fold is None for row in rows)
    images = f"{len(rows) - held_out} images, {held_out} held out" if held_out else f"{len(rows)} images"
    work = f"{len(todo)} fold(s) of {epochs} epochs on {images}"
    base = replace(base, num_gpus=plan.num_gpus)
    if not todo:
        return replace(base, work="nothing: all folds are done", seconds=0.0, disk_bytes=0.0)
    forecast = replace(base, work=work, layout=plan.reason)
    _require_images(rows)
    pace = try_training(recipe, rows, todo[0], plan)
    if pace is None:
        return replace(forecast, basis="folds train on GPUs, and this machine has none: plan where there is one")
    longest = max(fold_seconds(recipe, pace, rows, fold, plan.workers_per_group) for fold in todo)
    seconds = math.ceil(len(todo) / plan.slots) * longest
    return replace(
        forecast,
        seconds=seconds,
        basis=f"{duration(longest)} a fold, from {TRIED_EPOCHS} short epochs tried here on {pace.where}",
        memory_bytes=pace.memory_bytes + _cache_bytes(recipe, rows, todo[0]),
        disk_bytes=_left_bytes(recipe, rows, todo, pace),
        scratch_bytes=2.0 * len(todo) * pace.state_bytes,
        faster=_faster(plan, len(todo), longest, seconds),
        faster_costs=_faster_costs(plan, len(todo)),
    )


def _left_bytes(recipe: FoldRecipe, rows: Sequence[CohortRow], todo: Sequence[int], pace: Pace) -> float:
    """Return what a run leaves: of each fold its checkpoints, maps and examples; of all the figures.

    The review queue, which depends on how good the maps are, is not counted.
    """
    from workflows.folds.drawing import EXAMPLE_WIDTH_PX, EXAMPLES_OF_A_KIND  # loads Matplotlib

    training, left = recipe.training, 0.0
    checkpoints = 1 + min(training.top_k, math.ceil(training.epochs / training.validate_every))
    for fold in todo:
        validated = rows_of(rows, fold, "validation")
        num_examples = len(images_shown(validated)) * len(epochs_shown(training))
        left += checkpoints * pace.checkpoint_bytes + len(validated) * pace.map_bytes
        left += num_examples * pace.example_bytes + RECORDS_BYTES
    trained = [row.image_uri for row in rows if row.fold is not None]
    sheet = Sheet(spread(trained, TRIED_PICTURES), min(3 * EXAMPLES_OF_A_KIND, len(trained)), EXAMPLE_WIDTH_PX)
    return left + shown_bytes(len(todo) + 2, sheet)


def _faster(plan: Plan, num_folds: int, fold_s: float, seconds: float) -> str:
    workers = num_folds * plan.workers_per_group
    if plan.slots >= num_folds:
        workers *= 2
        how, share = f"resources.workers_per_fold={2 * plan.workers_per_group}", 0.5
    else:
        how, share = "all folds at once", fold_s / seconds
    gpus = f" and {workers * plan.gpus_per_worker:g} GPU" if plan.gpus_per_worker else ""
    return f"{share:.0%} of the time with {how}: {workers * plan.cpus_per_worker} CPU{gpus}"


def _faster_costs(plan: Plan, num_folds: int) -> float:
    """Return the share of the price at which all folds train at once: no slot is paid for that a last round leaves."""
    return min(1.0, num_folds / (plan.slots * math.ceil(num_folds / plan.slots)))


def faster_trials(num_left: int, parallel: int) -> tuple[str, float]:
    """Return what twice as many trials at once make of a search's time, in words, and the share of its price."""
    rounds, fewer = math.ceil(num_left / parallel), math.ceil(num_left / (2 * parallel))
    if fewer == rounds:
        return "", 1.0
    share = "half" if 2 * fewer == rounds else f"{fewer / rounds:.0%} of"
    return f"{share} the time with parallel_trials={2 * parallel} on twice as much", 2 * fewer / rounds


def _cache_bytes(recipe: FoldRecipe, rows: Sequence[CohortRow], fold: int) -> float:
    """Return what a worker's decoded images and masks take."""
    if recipe.data.cache == "none":
        return 0.0
    return sum(4.0 * row.height * row.width for row in rows_of(rows, fold, "train")) * recipe.data.scale**2


def _require_images(rows: Sequence[CohortRow]) -> None:
    """Check that what the cohort names is there.

    Raises:
        ConfigError: naming the first file that is not.
    """
    uris = [uri for row in rows for uri in (row.image_uri, row.mask_uri)]
    gone = [uri for uri, mark in zip(uris, storage.stamps(uris), strict=True) if mark == storage.UNREADABLE]
    if gone:
        raise ConfigError(
            f"{len(gone)} of the {len(uris)} images and masks of the cohort cannot be read, such as {gone[0]}; put "
            "them back, or run prepare_data again"
        )
