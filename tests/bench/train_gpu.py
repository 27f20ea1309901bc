"""Train one fold with `stas_core` alone (no Ray) on an NVIDIA GPU, and say how busy the GPU is.

    python tests/bench/train_gpu.py COHORT.parquet OUT [--fold 0] [--minutes 8] [--config FILE] [key=value ...]

Works where there is a torch image and nothing else (Python 3.12, torch 2.11). Runs for so many minutes, then stops at
an epoch's end; the same command goes on from there. Prints per epoch: images/s, seconds, Dice; at the end: peak GPU
memory and the share of a step's time in which the GPU runs a kernel (from the profiler, over 20 steps).
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from stas_core import config, process
from stas_core.data.cohort import read_cohort, rows_of
from stas_core.train import loop
from stas_core.train.context import LocalContext
from stas_core.train.dataset import TrainingSet
from stas_core.train.recipe import FoldRecipe, FoldTask


class OutOfTime(Exception):
    """The minutes are up; the state is saved."""


class TimedContext(LocalContext):
    """Prints each epoch, and stops after one once the time is up."""

    end: float = float("inf")

    def report(self, metrics: Mapping[str, Any], state: Path | None) -> None:
        super().report(metrics, state)
        scores = f"  Dice {metrics['val_dice']:.4f}" if "val_dice" in metrics else ""
        rate = f"{metrics['images_per_s']:.1f} images/s"
        print(f"epoch {metrics['epoch']}: loss {metrics['train_loss']:.4f}  {rate}{scores}", flush=True)
        if time.monotonic() > self.end and state is not None:
            raise OutOfTime


def busy_share(recipe: FoldRecipe, task: FoldTask, context: LocalContext, num_steps: int = 20) -> tuple[float, float]:
    """Return the share of the wall time in which a kernel runs, and images/s, over steps at steady state."""
    process.set_up(context.device, num_threads=context.num_threads, deterministic=recipe.training.deterministic)
    run = loop._start(context, recipe, task)
    rows = rows_of(task.rows, task.fold, "train")
    samples = TrainingSet(rows, data=recipe.data, config=recipe.augment, seed=1, num_epochs=1000)
    epochs = loop._epochs(run, samples)
    steps = (step for _, _, steps in epochs for step in steps)
    run.wrapped.train()

    def train(number: int) -> int:
        seen = 0
        for _ in range(number):
            micro_batches, num_samples = next(steps)
            loop._train_step(run, micro_batches, num_samples, 0.0)
            run.optimizer.step()
            seen += num_samples
        torch.cuda.synchronize()
        return seen

    train(5)
    start = time.perf_counter()
    seen = train(num_steps)
    rate = seen / (time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        train(num_steps)
        wall = time.perf_counter() - start
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    )
    busy, last = 0.0, 0.0
    for begin, end in spans:  # overlapping kernels count once
        busy += max(0.0, end - max(begin, last))
        last = max(last, end)
    return busy / 1e6 / wall, rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort")
    parser.add_argument("out", type=Path)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--threads", type=int, default=14)
    parser.add_argument("--config", type=Path, default=None)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    overrides = ["model.encoder_weights=none", "training.deterministic=false", *arguments.overrides]
    recipe = config.load_config(FoldRecipe, arguments.config, overrides)
    arguments.out.mkdir(parents=True, exist_ok=True)
    task = FoldTask(arguments.fold, read_cohort(arguments.cohort), str(arguments.out.absolute() / "fold"), {})
    context = TimedContext(arguments.out, num_threads=arguments.threads)
    context.end = time.monotonic() + 60 * arguments.minutes
    print(f"device {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}")
    try:
        result = loop.train_fold(context, recipe, task)
        print(f"done: out-of-fold Dice {result.dice:.4f}, {result.train_seconds / result.epochs:.1f} s per epoch")
    except OutOfTime:
        print("time is up; the same command goes on from here")
    if torch.cuda.is_available():
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        share, rate = busy_share(recipe, task, LocalContext(arguments.out / "none", num_threads=arguments.threads))
        print(f"GPU busy {share:.1%} of a step, {rate:.1f} images/s at steady state")


if __name__ == "__main__":
    main()
