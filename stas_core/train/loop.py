"""Train one cross-validation fold, from cohort rows to checkpoints and out-of-fold maps.

The loop knows nothing of Ray: whatever runs it stands behind `TrainContext`. Interrupted and resumed, it gives the
same bytes as an uninterrupted run on CPU in deterministic mode, because samples, learning rate and random state are
functions of (seed, epoch, step) and everything else is in the saved state.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stas_core import local_files, process, storage
from stas_core.arrays import ProbMapU8
from stas_core.data import images
from stas_core.data.cohort import CohortRow, rows_of
from stas_core.data.fields import load_image, load_mask
from stas_core.errors import ConfigError, DivergedError, NotFinite
from stas_core.networks import checkpoints
from stas_core.networks.checkpoints import CheckpointRecord, RankedEpoch
from stas_core.networks.model import SegmentationModel, apply_batch_norm_policy, build_model
from stas_core.predict.inference import InferenceConfig
from stas_core.predict.predictor import Member, Predictor, autocast, normalise
from stas_core.runs import EpochMetrics, FoldFolder, FoldResult, OofScore
from stas_core.scores import metrics
from stas_core.train import batch_norm, dataset, events, examples, initial, saved_state
from stas_core.train.context import TrainContext
from stas_core.train.dataset import Batch, TrainingSet
from stas_core.train.losses import segmentation_loss
from stas_core.train.recipe import FoldRecipe, FoldTask
from stas_core.train.saved_state import StateRecord
from stas_core.train.schedule import ema_decay, lr_factor

log = logging.getLogger(__name__)


@dataclass
class _Run:
    """A fold in training. Below `average`: what changes from epoch to epoch and is saved with the weights."""

    context: TrainContext
    recipe: FoldRecipe
    task: FoldTask
    validation_rows: Sequence[CohortRow]
    model: SegmentationModel
    wrapped: nn.Module
    optimizer: torch.optim.AdamW
    average: AveragedModel | None
    trained_on: frozenset[str] | None
    """Fingerprints of the images that the model sees or has seen before; None: not known."""
    epoch: int = 0
    history: list[EpochMetrics] = field(default_factory=list)
    best: list[RankedEpoch] = field(default_factory=list)
    ran_on: list[str] = field(default_factory=list)
    train_seconds: float = 0.0

    @property
    def folder(self) -> FoldFolder:
        """Where the fold's outputs go."""
        return FoldFolder(self.task.uri)

    @property
    def seed(self) -> int:
        """The fold's own seed."""
        return process.mix(self.recipe.training.seed, self.task.fold)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor that the next step depends on."""
        return saved_state.tensors_of(self.model, self.optimizer, self.average)

    @property
    def final_model(self) -> SegmentationModel:
        """The model that validation and out-of-fold maps use: the average where there is one."""
        return self.model if self.average is None else self.average.module  # type: ignore[return-value]


def train_fold(context: TrainContext, recipe: FoldRecipe, task: FoldTask) -> FoldResult:
    """Train a fold, or resume it from its saved state; write its checkpoints and out-of-fold maps."""
    training_rows = rows_of(task.rows, task.fold, "train")
    validation_rows = rows_of(task.rows, task.fold, "validation")
    if not training_rows or not validation_rows:
        raise ConfigError(
            f"fold {task.fold} has {len(training_rows)} training and {len(validation_rows)} validation images, "
            "expected at least 1 each; check folds and the cohort's fold column"
        )
    process.set_up(context.device, num_threads=context.num_threads, deterministic=recipe.training.deterministic)
    run = _start(context, recipe, task)
    samples = TrainingSet(
        training_rows,
        data=recipe.data,
        config=recipe.augment,
        seed=run.seed,
        num_epochs=recipe.training.epochs,
    )
    for epoch, num_steps, steps in _epochs(run, samples):
        _finish_epoch(run, {"fold": task.fold} | _train_epoch(run, epoch, num_steps, steps))
    return _predict_out_of_fold(run)


def _start(context: TrainContext, recipe: FoldRecipe, task: FoldTask) -> _Run:
    process.seed(recipe.training.seed, task.fold)
    named = recipe.model.init_from
    if context.rank == 0:
        context.progress({"reading": "the encoder's weights" if named is None else "the model that it goes on from"})
    origin = None if named is None else initial.checkpoint_of(named, task.fold)
    with context.saved_state() as folder:
        model = build_model(recipe.model, pretrained=folder is None and origin is None)
        if folder is None and origin is not None:
            initial.load(model, origin)
        model = apply_batch_norm_policy(
            model, recipe.model.batch_norm, device_type=context.device.type, world_size=context.world_size
        )
        model = model.to(context.device).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.optim.lr, weight_decay=recipe.optim.weight_decay, fused=True
        )
        average = None
        if recipe.optim.ema_decay is not None:
            average = AveragedModel(model, use_buffers=True)
        wrapped = context.wrap(model)
        if recipe.training.compile:
            wrapped = torch.compile(wrapped)  # type: ignore[assignment]
        seen = initial.trained_on(rows_of(task.rows, task.fold, "train"), origin)
        validated = rows_of(task.rows, task.fold, "validation")
        run = _Run(context, recipe, task, validated, model, wrapped, optimizer, average, seen)
        if folder is not None:
            state = saved_state.load(folder, model, optimizer, average)
            run.epoch, run.history, run.best = state.epoch, state.history, state.best
            run.ran_on, run.train_seconds = state.ran_on, state.train_seconds
            log.info("resumed after epoch %d", run.epoch)
    # What the order of summation, and so the last digits, depends on besides the recipe.
    ran_on = f"{context.device.type}: {context.world_size} worker(s) of {context.num_threads} thread(s)"
    if run.ran_on[-1:] != [ran_on]:
        run.ran_on.append(ran_on)
    return run


Epoch = tuple[int, int, Iterator[tuple[list[Batch], int]]]


def _epochs(run: _Run, samples: TrainingSet) -> Iterator[Epoch]:
    """Yield (epoch, number of steps, the steps' micro-batches with their total sample count) of the remaining epochs.

    One loader serves all epochs: its processes start once and never wait at an epoch's border.
    """
    context, recipe, done = run.context, run.recipe, run.epoch
    plans = [
        dataset.plan_epoch(
            samples.num_samples,
            epoch=epoch,
            seed=run.seed,
            batch_size=recipe.optim.batch_size,
            micro_batch_size=recipe.optim.micro_batch_size,
            rank=context.rank,
            world_size=context.world_size,
        )
        for epoch in range(done + 1, recipe.training.epochs + 1)
    ]
    if not plans:
        return
    fewest = min(len(micro.keys) for step in plans[0] for micro in step.micro_batches)  # every epoch is cut alike
    batch_norm.require_statistics(run.model, samples.rows, recipe.data, fewest)
    num_workers = recipe.data.num_loader_workers
    if num_workers is None:
        num_workers = max(0, context.num_threads - 1) if context.device.type == "cuda" else 0
    if context.rank == 0:
        context.progress({"epoch": done + 1, "reading": f"{len(samples.rows)} images"})
    samples.fill_cache()
    stream = dataset.batches(
        samples,
        [micro for plan in plans for step in plan for micro in step.micro_batches],
        stride=run.model.stride,
        num_workers=num_workers,
        pin_memory=context.device.type == "cuda",
    )
    for epoch, plan in enumerate(plans, start=done + 1):
        yield epoch, len(plan), ((list(islice(stream, len(s.micro_batches))), s.num_samples) for s in plan)


def _train_epoch(run: _Run, epoch: int, num_steps: int, steps: Iterator[tuple[list[Batch], int]]) -> dict[str, Any]:
    """Run an epoch's optimiser steps and return its metrics row."""
    context, recipe = run.context, run.recipe
    process.seed(run.seed, epoch, context.rank)  # dropout and the like start each epoch from a known state
    run.wrapped.train()
    start = time.perf_counter()
    loss_sum = torch.zeros((), device=context.device)
    num_samples, norm_sum, lr = 0, torch.zeros((), device=context.device), 0.0
    for index, (micro_batches, step_samples) in enumerate(steps):
        step = (epoch - 1) * num_steps + index
        factor = lr_factor(recipe.schedule, step=step, steps_per_epoch=num_steps, num_epochs=recipe.training.epochs)
        lr = recipe.optim.lr * factor
        loss_sum += _train_step(run, micro_batches, step_samples, (epoch - 1) / recipe.training.epochs)
        norm_sum += nn.utils.clip_grad_norm_(run.model.parameters(), recipe.optim.clip_norm or float("inf"))
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
        _update_average(run)
        num_samples += step_samples
        if context.rank == 0:
            context.progress(
                {
                    "epoch": epoch,
                    "epochs": recipe.training.epochs,
                    "step": index + 1,
                    "steps": num_steps,
                    "reading": "",
                    "validating": "",
                    "lr": lr,
                    "images_per_s": num_samples / (time.perf_counter() - start),
                }
            )
    # Ranks hold parts of each step's loss that sum to it; filler samples weigh nothing.
    loss = sum(context.gather([float(loss_sum)])) / num_steps
    if not np.isfinite(loss):
        raise _diverged(run, f"training loss is {loss}", epoch)
    # The last step may diverge after its loss was taken. Every rank looks: BatchNorm's statistics are each one's own.
    if bad := [name for name in context.gather([checkpoints.first_not_finite(run.tensors())]) if name is not None]:
        raise _diverged(run, f"{bad[0]} is not finite after the last step", epoch)
    seconds = time.perf_counter() - start
    run.train_seconds += seconds
    return {
        "epoch": epoch,
        "train_loss": loss,
        "lr": lr,
        "grad_norm": float(norm_sum) / num_steps,
        "images_per_s": num_samples / seconds,
    }


def _update_average(run: _Run) -> None:
    average, most = run.average, run.recipe.optim.ema_decay
    if average is not None and most is not None:
        decay = ema_decay(most, int(average.n_averaged))
        average.multi_avg_fn = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average.update_parameters(run.model)


def _diverged(run: _Run, what: str, epoch: int) -> DivergedError:
    optim, amp = run.recipe.optim, run.recipe.training.amp
    remedies = ["lower optim.lr", "set optim.clip_norm" if optim.clip_norm is None else "lower optim.clip_norm"]
    remedies += [] if amp == "none" else ["set training.amp=none"]
    return DivergedError(
        f"{what} in epoch {epoch} at optim.lr = {optim.lr}, fold {run.task.fold}; {', or '.join(remedies)}"
    )


def _train_step(run: _Run, micro_batches: list[Batch], num_samples: int, progress: float) -> torch.Tensor:
    """Accumulate the gradient of one step's mean loss; return this rank's part of that mean."""
    context, recipe = run.context, run.recipe
    run.optimizer.zero_grad(set_to_none=True)
    mean = torch.tensor(run.model.mean, device=context.device).view(1, 3, 1, 1)
    std = torch.tensor(run.model.std, device=context.device).view(1, 3, 1, 1)
    total = torch.zeros((), device=context.device)
    for number, batch in enumerate(micro_batches, start=1):
        moved = Batch(*(tensor.to(context.device, non_blocking=True) for tensor in batch))
        # DDP averages over ranks what is summed here, so each rank's part is scaled up by the number of ranks;
        # only the last pass of a step exchanges gradients.
        exchange = number == len(micro_batches) or context.world_size == 1
        with nullcontext() if exchange else run.wrapped.no_sync():  # type: ignore[operator]
            with autocast(context.device, recipe.training.amp):
                logits = run.wrapped(normalise(moved.images, mean, std))
            losses = segmentation_loss(logits, moved.targets, moved.valid, config=recipe.loss, progress=progress)
            part = (losses * moved.weights).sum() / num_samples
            torch.autograd.backward(part * context.world_size)
        total += part.detach()
    return total


def _finish_epoch(run: _Run, row: dict[str, Any]) -> None:
    """Validate if due, keep the best epochs, write the metrics, and report with the state to resume from."""
    context, config, epoch = run.context, run.recipe.training, row["epoch"]
    run.epoch = epoch
    last = epoch == config.epochs
    if last or epoch % config.validate_every == 0:
        scores = _validate(run)
        row |= {f"val_{name}": value for name, value in scores.items()}
    run.history.append(EpochMetrics(**row, unix_time_s=time.time()))
    if context.rank == 0:
        if "val_dice" in row:
            _keep_best(run, row)
        run.folder.write_metrics(run.history)
        events.write_events(run.folder.path("tensorboard"), run.history)
        context.progress(row | {"validating": ""})
    save_state = last or epoch % config.save_state_every == 0
    with local_files.temporary_folder() as folder:
        if context.rank == 0 and save_state:
            record = StateRecord(run.epoch, run.history, run.best, run.ran_on, run.train_seconds)
            what = f"the saved state of epoch {epoch} to the temporary folder {folder}"
            with storage.telling_full_disk(what, is_local=True):
                saved_state.save(Path(folder), run.tensors(), record)
        context.report(row, Path(folder) if context.rank == 0 and save_state else None)


def _validate(run: _Run) -> dict[str, float]:
    """Score the whole validation images at native size; ranks share the work."""
    context, recipe = run.context, run.recipe
    predictor = _predictor(run, InferenceConfig(flips=recipe.training.validation_flips, amp=recipe.inference.amp))
    is_shown = run.epoch in examples.epochs_shown(recipe.training)
    shown = set(examples.images_shown(run.validation_rows) if is_shown else ())
    counts = []
    for number, row in enumerate(run.validation_rows[context.rank :: context.world_size], start=1):
        prob = _predict(run, predictor, row)
        counts.append(metrics.count(metrics.is_target(prob), load_mask(row)))
        if row.id in shown:
            run.folder.write_example(run.epoch, row.id, images.encode_map(examples.small(prob)))
        if context.rank == 0:
            done = min(number * context.world_size, len(run.validation_rows))
            context.progress({"epoch": run.epoch, "validating": f"{done}/{len(run.validation_rows)}"})
    return _mean_scores(context.gather(counts))


def _predictor(run: _Run, config: InferenceConfig) -> Predictor:
    return Predictor([Member("", run.final_model, run.recipe.data.scale)], device=run.context.device, config=config)


def _predict(run: _Run, predictor: Predictor, row: CohortRow) -> ProbMapU8:
    try:
        return predictor.predict_u8(load_image(row, 1.0))
    except NotFinite as error:  # finite weights can still overflow
        raise _diverged(run, f"the map of validation image {row.id} is not finite", run.epoch) from error


def _mean_scores(counts: Sequence[metrics.Counts]) -> dict[str, float]:
    return {
        name: float(np.mean(sorted(getattr(count, name) for count in counts)))  # sorted: the same on any world size
        for name in ("dice", "precision", "recall")
    }


def _keep_best(run: _Run, row: Mapping[str, Any]) -> None:
    """Write this epoch's checkpoint if it ranks, and drop those that no longer do."""
    before = run.best
    run.best = checkpoints.keep_best(before, RankedEpoch(row["epoch"], row["val_dice"]), run.recipe.training.top_k)
    if row["epoch"] in {entry.epoch for entry in run.best}:
        uri = run.folder.epoch(row["epoch"])
        _write_checkpoint(uri, run, {k: v for k, v in row.items() if k.startswith("val_")})
    # What this epoch pushed out stays one validation longer: a crash before the state is safe resumes with the
    # old ranking, whose files must still be there.
    _drop_checkpoints(run, {entry.epoch for entry in (*before, *run.best)})


def _drop_checkpoints(run: _Run, kept: set[int]) -> None:
    for epoch in {row.epoch for row in run.history} - kept:
        storage.remove(run.folder.epoch(epoch))


def _write_checkpoint(uri: str, run: _Run, scores: dict[str, float]) -> None:
    record = CheckpointRecord(
        model=run.recipe.model.model_dump(mode="json", exclude={"init_from"}),
        scale=run.recipe.data.scale,
        fold=run.task.fold,
        epoch=run.epoch,
        averaged=run.average is not None,
        scores=scores,
        provenance=dict(run.task.provenance),
        mpp=run.recipe.data.mpp,
    )
    checkpoints.save_checkpoint(uri, run.final_model.state_dict(), record, run.trained_on)


def _predict_out_of_fold(run: _Run) -> FoldResult:
    """Write the last weights and their map of every validation image, with an index of scores.

    The last (or averaged) weights, never a checkpoint chosen on these images, so that thresholds tuned on the maps
    do not inherit the choice.
    """
    context, task = run.context, run.task
    predictor = _predictor(run, run.recipe.inference)
    index: list[OofScore] = []
    for number, row in enumerate(run.validation_rows[context.rank :: context.world_size], start=1):
        prob = _predict(run, predictor, row)
        place = run.folder.write_map(row.id, images.encode_map(prob))
        count = metrics.count(metrics.is_target(prob), load_mask(row))
        dice, precision, recall = count.dice, count.precision, count.recall
        index.append(OofScore(row.id, task.fold, place, dice, precision, recall, **asdict(count)))
        if context.rank == 0:
            context.progress({"maps": number * context.world_size, "num_maps": len(run.validation_rows)})
    index = context.gather(index)
    result = _summarise(run, index, task.fold)
    if context.rank == 0:
        run.folder.write_oof(index)
        scores = {"oof_dice": result.dice, "oof_precision": result.precision, "oof_recall": result.recall}
        _write_checkpoint(run.folder.last, run, scores)
        _drop_checkpoints(run, {entry.epoch for entry in run.best})
    return result


def _summarise(run: _Run, index: Sequence[OofScore], fold: int) -> FoldResult:
    validated = [(row.val_dice, -row.epoch) for row in run.history if row.val_dice is not None]
    best_dice, minus_epoch = max(validated)
    means = {
        name: float(np.mean(sorted(getattr(row, name) for row in index))) for name in ("dice", "precision", "recall")
    }
    return FoldResult(
        fold=fold,
        epochs=run.epoch,
        **means,
        last_val_dice=validated[-1][0],
        best_val_dice=best_dice,
        best_epoch=-minus_epoch,
        train_seconds=run.train_seconds,
        images_per_s=float(np.median([row.images_per_s for row in run.history])),
        ran_on=run.ran_on,
    )
