"""Images/s of the sample pipeline on one thread: what reading, cropping, stain and augmentation cost.

    python tests/bench/samples.py [cohort.parquet]

On a made cohort of full-size phantom fields, or the one given. The baseline is decoding alone.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2

from stas_core import config
from stas_core.data.cohort import read_cohort
from stas_core.data.fields import load_image
from stas_core.train.dataset import Key, TrainingSet
from stas_core.train.recipe import AugmentConfig, DataConfig
from workflows import prepare_data
from workflows.cluster import ray_session
from workflows.prepare_data import PrepareConfig

NUM_SAMPLES = 32


def make_cohort(folder: Path) -> str:
    values = {"out": str(folder), "phantom": {"num_images": 8, "num_groups": 1}, "split": {"hold_out_fraction": 0}}
    with ray_session():
        prepare_data.run(config.build(PrepareConfig, values), False)
    return str(folder / "cohort.parquet")


def rate(work: Callable[[int], object]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for index in range(NUM_SAMPLES):
            work(index)
        times.append((time.perf_counter() - start) / NUM_SAMPLES)
    return 1 / statistics.median(times)


def main() -> None:
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = read_cohort(sys.argv[1] if len(sys.argv) > 1 else make_cohort(Path(folder)))[:8]

        def samples(augment: AugmentConfig, **data: object) -> Callable[[int], object]:
            made = TrainingSet(rows, data=DataConfig.model_validate(data), config=augment, seed=0, num_epochs=100)
            made.fill_cache()
            return lambda index: made[Key(1, index), False]

        published = AugmentConfig()
        cases = {
            "decoding alone (baseline)": lambda index: load_image(rows[index % len(rows)], 1.0),
            "full size, no cache": samples(published, cache="none"),
            "full size, cached": samples(published),
            "full size, cached, always the norm stain": samples(AugmentConfig(norm_p=1.0, hematoxylin_p=0.0)),
            "256 px crops at half scale, cached": samples(published, scale=0.5, crop_px=256),
        }
        rates = {name: rate(work) for name, work in cases.items()}
    baseline = rates["decoding alone (baseline)"]
    for name, value in rates.items():
        print(f"{name:45s} {value:8.1f} images/s  {value / baseline:6.2f}x")


if __name__ == "__main__":
    main()
