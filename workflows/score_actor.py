"""The actor of score_images: an ensemble that stays on its device and predicts decoded rows."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch

from stas_core import inference, storage
from stas_core.arrays import AnyRgbImage
from stas_core.errors import OutOfMemory
from stas_core.inference import InferenceConfig, Prediction, Predictor
from workflows.score_worker import PREDICTED, SaveConfig


@dataclass(frozen=True)
class Ensemble:
    """Which models are applied, and how."""

    checkpoints: tuple[str, ...]
    weights: str
    """Fingerprint of the checkpoints."""
    inference: InferenceConfig
    use_gpu: bool
    threads: int

    @property
    def key(self) -> str:
        """What a map depends on beside its image, to the last bit."""
        settings = self.inference.model_copy(update={"batch_size": self.inference.batch_size or 1})
        device = "gpu" if self.use_gpu else "cpu"
        return storage.fingerprint(self.weights, settings.model_dump_json(), device, str(self.threads))

    def with_batch_size(self, batch_size: int) -> "Ensemble":
        """Return the ensemble with a settled batch size."""
        return replace(self, inference=self.inference.model_copy(update={"batch_size": batch_size}))


class ScoreActor:
    """Owns an ensemble on a device and predicts the images of decoded rows."""

    def __init__(self, ensemble: Ensemble, save: SaveConfig):
        torch.set_num_threads(ensemble.threads)
        cv2.setNumThreads(ensemble.threads)
        # Logical GPUs (tests, dry runs of a GPU layout) come without CUDA.
        self._device = torch.device("cuda" if ensemble.use_gpu and torch.cuda.is_available() else "cpu")
        members = inference.load_members(ensemble.checkpoints, self._device)
        self._predictor = Predictor(members, device=self._device, config=ensemble.inference)
        self._save = save

    def __call__(self, table: pa.Table) -> pa.Table:
        """Predict the rows that did not fail."""
        rows = [_without_image(row) for row in table.drop_columns("image").to_pylist()]
        pixels = table.column("image")
        good = [index for index, row in enumerate(rows) if row["reason"] is None]
        batch = [_image(pixels[index], rows[index]) for index in good]
        start = time.perf_counter()
        predicted = self._predict(batch)
        for index, image, values in zip(good, batch, predicted, strict=True):
            rows[index] |= values | {"predict_s": (time.perf_counter() - start) / len(good)}
            if self._save.overlays:
                rows[index]["image"] = image.tobytes()
        return pa.Table.from_pylist(rows, schema=PREDICTED)

    def _predict(self, batch: Sequence[AnyRgbImage]) -> list[dict[str, Any]]:
        try:
            return [self._values(prediction) for prediction in self._predictor.predict(batch)]
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            if len(batch) > 1:
                return [values for image in batch for values in self._predict([image])]
            size = f"{batch[0].shape[1]}x{batch[0].shape[0]} px"
            message = f"an image of {size} does not fit on the device: {error}; lower inference.batch_size or the image"
            return [{"reason": OutOfMemory.reason, "message": message}]

    def _values(self, prediction: Prediction) -> dict[str, Any]:
        values = {
            "prob": prediction.prob_u8().tobytes(),
            "mean_disagreement": float(prediction.std.mean(dtype=torch.float64)),
            "num_passes": prediction.num_passes,
        }
        return values | ({"std": prediction.std_u8().tobytes()} if self._save.disagreement else {})


def _without_image(row: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(PREDICTED.names) | row


def _image(scalar: Any, row: Mapping[str, Any]) -> AnyRgbImage:
    return np.frombuffer(scalar.as_buffer(), np.uint8).reshape(row["height"], row["width"], 3)
