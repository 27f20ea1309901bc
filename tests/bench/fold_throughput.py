"""Images/s of a fold through Ray Train against a bare PyTorch loop over the same samples.

    python tests/bench/fold_throughput.py

Both train the demo's network on the same phantom crops, one worker, in one run, alternating. The bare loop is what one
would write by hand: no context, no validation, no checkpoints. Steady state: the first epoch of each run is left out.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from stas_core import config
from stas_core.data.cohort import read_cohort, rows_of
from stas_core.networks.model import build_model
from stas_core.predict.predictor import normalise
from stas_core.runs import TrainingRun
from stas_core.train import dataset
from stas_core.train.dataset import TrainingSet
from stas_core.train.losses import segmentation_loss
from workflows import prepare_data, train_folds
from workflows.cluster import ray_session
from workflows.folds.training import TrainFoldsConfig
from workflows.prepare_data import PrepareConfig

ROUNDS, EPOCHS = 3, 4


def settings(folder: Path, name: str) -> TrainFoldsConfig:
    return config.build(
        TrainFoldsConfig,
        {
            "out": str(folder / name),
            "folds": [0],
            "data": {"cohort": str(folder / "cohort" / "cohort.parquet"), "crop_px": 128, "samples_per_image": 6},
            "model": {
                "encoder": "tf_efficientnet_lite0",
                "encoder_weights": "package",
                "decoder_channels": [64, 32, 32, 16, 16],
                "activation": "relu",
                "norm": "batch",
            },
            "optim": {"batch_size": 8, "micro_batch_size": 8},
            "training": {"epochs": EPOCHS, "validate_every": 100},
            "resources": {"cpus_per_worker": 1},
        },
    )


def bare_loop(recipe: TrainFoldsConfig) -> float:
    """Train with nothing but PyTorch around the shared parts; return the median images/s of later epochs."""
    torch.set_num_threads(1)
    rows = rows_of(read_cohort(str(recipe.data.cohort)), 0, "train")
    samples = TrainingSet(rows, data=recipe.data, config=recipe.augment, seed=0, num_epochs=EPOCHS)
    samples.fill_cache()
    model = build_model(recipe.model).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (model.mean, model.std))
    rates = []
    for epoch in range(1, EPOCHS + 1):
        plan = dataset.plan_epoch(samples.num_samples, epoch=epoch, seed=0, batch_size=8, micro_batch_size=8)
        start = time.perf_counter()
        micro = [m for step in plan for m in step.micro_batches]
        for batch in dataset.batches(samples, micro, stride=32, num_workers=0, pin_memory=False):
            optimizer.zero_grad()
            logits = model(normalise(batch.images, mean, std))
            losses = segmentation_loss(logits, batch.targets, batch.valid, config=recipe.loss)
            torch.autograd.backward(losses.mean())
            optimizer.step()
        rates.append(samples.num_samples / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def through_ray(recipe: TrainFoldsConfig) -> float:
    assert train_folds.run(recipe, True) == 0
    rates = [epoch.images_per_s for epoch in TrainingRun(str(recipe.out)).fold(0).metrics()]
    return float(statistics.median(rates[1:]))


def main() -> None:
    with tempfile.TemporaryDirectory() as name, ray_session():
        folder = Path(name)
        phantom = {"num_images": 24, "height": 256, "width": 320, "num_groups": 1}
        split = {"num_folds": 3, "hold_out_fraction": 0}
        prepare_data.run(
            config.build(PrepareConfig, {"out": str(folder / "cohort"), "phantom": phantom, "split": split}), False
        )
        pairs = [
            (through_ray(settings(folder, f"ray_{i}")), bare_loop(settings(folder, "bare"))) for i in range(ROUNDS)
        ]
    ray_rate, bare_rate = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    print(f"\nimages/s, median of {ROUNDS} runs: Ray {ray_rate:.2f}, bare loop {bare_rate:.2f}")
    print(f"ratio {ray_rate / bare_rate:.3f} (bar: 0.95); pairs " + ", ".join(f"{a / b:.3f}" for a, b in pairs))


if __name__ == "__main__":
    main()
