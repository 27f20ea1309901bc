"""The actor of score_images: an ensemble that stays on its device and predicts decoded rows."""

import threading
import time
from collections.abc import Sequence
from typing import Any, TypedDict, cast

import cv2
import numpy as np
import pyarrow as pa
import torch

from stas_core import process, tables
from stas_core.arrays import AnyRgbImage
from stas_core.errors import OutOfMemory, as_input_error
from stas_core.predict import ensemble as ensembles
from stas_core.predict.predictor import Prediction, Predictor
from workflows.scoring.plan import Ensemble
from workflows.scoring.tasks import FoundMap, Outcome, PredictedRow, PredictTimes, SaveConfig


def load_predictor(ensemble: Ensemble) -> tuple[Predictor, torch.device]:
    """Load an ensemble onto the device that its maps are to be of, and give this process its threads.

    Raises:
        ResourceError: that is a GPU, and there is none.
    """
    torch.set_num_threads(ensemble.threads)
    cv2.setNumThreads(ensemble.threads)
    process.keep_freed_memory()
    device = process.device(on_gpu=ensemble.use_gpu, remedy="set resources.gpus_per_actor=0 to score on CPUs")
    members = ensembles.load_members(ensemble.checkpoints, device)
    return Predictor(members, device=device, config=ensemble.inference), device


class ScoreActor:
    """Owns an ensemble on a device and predicts the images of decoded rows."""

    def __init__(self, ensemble: Ensemble, save: SaveConfig):
        self._predictor, self._device = load_predictor(ensemble)
        self._save = save
        self._watch = GpuWatch(self._device) if self._device.type == "cuda" else None

    def __call__(self, table: pa.Table) -> pa.Table:
        """Predict the rows that did not fail."""
        rows = cast(list[PredictedRow], table.drop_columns("image").to_pylist())
        pixels = table.column("image")
        good = [index for index, row in enumerate(rows) if row["reason"] is None]
        batch = [_image(pixels[index], rows[index]) for index in good]
        start = time.perf_counter()
        predicted = self._predict(batch)
        num_good = max(1, len(good))
        times: PredictTimes = {"predict_s": (time.perf_counter() - start) / num_good}
        if self._watch is not None:
            seen = self._watch.take()
            times["gpu_watched_s"] = seen["gpu_watched_s"] / num_good
            times["gpu_busy_s"] = seen["gpu_busy_s"] / num_good
        for index, image, found in zip(good, batch, predicted, strict=True):
            rows[index] = {**rows[index], **found, **times}
            if self._save.overlays:
                rows[index]["image"] = image.tobytes()
        return tables.to_table(PredictedRow, rows)

    def _predict(self, batch: Sequence[AnyRgbImage]) -> list[FoundMap | Outcome]:
        try:
            return [self._found(prediction) for prediction in self._predictor.predict(batch)]
        except torch.AcceleratorError:
            raise  # the device is lost to this process, for every image to come: Ray starts another
        except Exception as error:  # noqa: BLE001 - one image must not end a run of thousands
            failure = failure_of(error, f"an image of {_size(batch[0])}", "cut it into fields")
        # Not in the handler: its traceback holds on to the tensors of the pass that failed.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) > 1:
            return [found for image in batch for found in self._predict([image])]
        return [failure]

    def _found(self, prediction: Prediction) -> FoundMap:
        found: FoundMap = {
            "prob": prediction.prob_u8().tobytes(),
            "mean_disagreement": float(prediction.std.mean(dtype=torch.float64)),
            "num_passes": prediction.num_passes,
        }
        if self._save.disagreement:
            found["std"] = prediction.std_u8().tobytes()
        return found


class GpuSeconds(TypedDict):
    """How long a GPU was watched, and how much of that it was busy."""

    gpu_watched_s: float
    gpu_busy_s: float


class GpuWatch:
    """Samples the GPU's utilisation counter once a second."""

    INTERVAL_S = 1.0

    def __init__(self, device: torch.device):
        self._device = device
        self._watched = self._busy = 0.0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def take(self) -> GpuSeconds:
        """Return the seconds watched since the last call and how many were busy; the first call starts the watch."""
        if self._thread is None:  # loading and the first batch's warm-up do not count
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        with self._lock:
            seen = GpuSeconds(gpu_watched_s=self._watched, gpu_busy_s=self._busy)
            self._watched = self._busy = 0.0
        return seen

    def _look(self) -> None:
        while True:
            time.sleep(self.INTERVAL_S)
            try:
                percent = torch.cuda.utilization(self._device)
            # No NVML, or a device without this counter (MIG): the share stays unknown, and is shown as n/a.
            except Exception:  # noqa: BLE001
                return
            with self._lock:
                self._watched += self.INTERVAL_S
                self._busy += self.INTERVAL_S * percent / 100


def failure_of(error: Exception, what: str, remedy: str) -> Outcome:
    """Return reason and message of what could not be predicted."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        # Without the error's own text: how many bytes were free differs from run to run.
        message = f"{what} does not fit into memory ({type(error).__name__}); {remedy}"
        return {"reason": OutOfMemory.reason, "message": f"{message}, or train the models at a lower data.scale"}
    failure = as_input_error(error, what)
    return {"reason": failure.reason, "message": str(failure)}


def _size(image: AnyRgbImage) -> str:
    return f"{image.shape[1]}x{image.shape[0]} px"


def _image(scalar: Any, row: PredictedRow) -> AnyRgbImage:
    return np.frombuffer(scalar.as_buffer(), np.uint8).reshape(row["height"], row["width"], 3)
