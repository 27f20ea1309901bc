"""The actor that predicts: failures of single images, devices, the watch on its GPU."""

import time
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from stas_core.errors import (
    ResourceError,
)
from stas_core.networks.model import SegmentationModel
from stas_core.predict import ensemble as ensembles
from stas_core.predict import inference as inferences
from workflows.scoring.actor import GpuWatch, ScoreActor
from workflows.scoring.plan import Ensemble
from workflows.scoring.tasks import DECODED, SaveConfig


def test_one_image_that_cannot_be_predicted_does_not_end_the_others(ensemble: str) -> None:
    models = Ensemble(tuple(ensembles.find_checkpoints(ensemble)), "", inferences.InferenceConfig(), False, 1)
    actor = ScoreActor(models, SaveConfig(overlays=False))
    sizes = [(40, 50), (60, 70), (40, 50)]
    rows = [
        {"id": str(index), "height": height, "width": width, "image": bytes(height * width * 3), "decode_s": 0.0}
        for index, (height, width) in enumerate(sizes)
    ]
    table = pa.Table.from_pylist(rows, schema=DECODED)
    undisturbed = actor(table).drop_columns(["predict_s"]).to_pylist()

    def predict(error: Exception | None) -> pa.Table:
        """Predict where the second image alone meets an error, or gives no numbers."""

        def fail(module: torch.nn.Module, given: tuple[torch.Tensor, ...], logits: list[torch.Tensor]) -> Any:
            if not isinstance(module, SegmentationModel) or given[0].shape[-1] == given[0].shape[-2]:
                return None
            if error is not None:
                raise error
            return [one * float("nan") for one in logits]

        handle = register_module_forward_hook(fail)
        try:
            return actor(table)
        finally:
            handle.remove()

    for error, reason, message in (
        (ValueError("odd"), "internal_error", "ValueError: odd"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", "70x60 px does not fit into memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory", "70x60 px"),
        (None, "not_finite", "not finite"),
    ):
        found = predict(error).drop_columns(["predict_s"]).to_pylist()
        assert [found[0], found[2]] == [undisturbed[0], undisturbed[2]]
        assert found[1]["reason"] == reason and message in found[1]["message"]
    with pytest.raises(torch.AcceleratorError):  # the device is lost for all images: Ray starts another actor
        predict(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a node without a GPU")
def test_an_actor_never_takes_a_cpu_for_a_gpu(ensemble: str) -> None:
    models = Ensemble(tuple(ensembles.find_checkpoints(ensemble)), "", inferences.InferenceConfig(), True, 1)
    with pytest.raises(ResourceError, match=r"promises a GPU, but torch finds none .*gpus_per_actor=0"):
        ScoreActor(models, SaveConfig())


def test_the_gpu_is_watched_from_the_first_batch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 75)
    monkeypatch.setattr(GpuWatch, "INTERVAL_S", 0.01)
    watch, start = GpuWatch(torch.device("cuda")), time.monotonic()
    nothing = {"gpu_watched_s": 0, "gpu_busy_s": 0}
    time.sleep(0.05)
    assert watch.take() == nothing
    while not (seen := watch.take())["gpu_watched_s"]:
        time.sleep(0.01)
    assert seen["gpu_watched_s"] <= time.monotonic() - start
    assert seen["gpu_busy_s"] == pytest.approx(0.75 * seen["gpu_watched_s"])
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 1 / 0)  # no such counter
    time.sleep(0.05)
    while watch.take() != nothing:
        time.sleep(0.05)
    time.sleep(0.05)
    assert watch.take() == nothing
