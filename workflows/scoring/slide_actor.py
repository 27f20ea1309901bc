"""The actor of score_slides: an ensemble that stays on its device and predicts blocks of tiles."""

import time
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch

from stas_core import tables
from stas_core.predict.inference import InferenceConfig
from stas_core.slides import halo
from stas_core.slides.blocks import encode_block
from stas_core.slides.prediction import predict_tiles
from stas_core.slides.tiling import Box
from workflows.scoring.actor import GpuWatch, failure_of, load_predictor
from workflows.scoring.plan import Ensemble
from workflows.scoring.slide_plan import SlideItem, SlideTask
from workflows.scoring.slide_tasks import FoundBlock, Layout, Pixels, PredictedBlock, ReadRow
from workflows.scoring.tasks import Outcome, PredictTimes

_SEAM_MEMBERS = 2


class SlideActor:
    """Owns an ensemble on a device and predicts the blocks of rows that were read."""

    def __init__(self, ensemble: Ensemble, task: SlideTask):
        self._predictor, self._device = load_predictor(ensemble)
        self._task = task
        self._watch = GpuWatch(self._device) if self._device.type == "cuda" else None
        self._free_since = time.perf_counter()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Predict the blocks that did not fail."""
        pixels = table.column("image")
        rows: list[PredictedBlock] = []
        for index, row in enumerate(cast(list[ReadRow], table.drop_columns("image").to_pylist())):
            start = time.perf_counter()
            found: FoundBlock | Outcome = self._predict(row, pixels[index]) if row["reason"] is None else {}
            end = time.perf_counter()
            times: PredictTimes = {"predict_s": end - start}
            if self._watch is not None:
                seen = self._watch.take()
                times["gpu_watched_s"], times["gpu_busy_s"] = seen["gpu_watched_s"], seen["gpu_busy_s"]
            predicted = cast(PredictedBlock, row)  # what was read of it stays behind
            predicted["idle_s"] = start - self._free_since
            rows.append({**predicted, **found, **times})
            self._free_since = end
        return tables.to_table(PredictedBlock, rows)

    def _predict(self, row: ReadRow, pixels: Any) -> FoundBlock | Outcome:
        task, box = self._task, Box(*row["box"])
        image = np.frombuffer(pixels.as_buffer(), np.uint8).reshape(box.height, box.width, 3)
        grid = task.tile.grid(row["frame_height"], row["frame_width"])
        tiles = [grid.tile(*at) for at in zip(row["tile_rows"], row["tile_cols"], strict=True)]
        try:
            planes = predict_tiles(
                self._predictor, image, box, tiles, blended=task.tile.blend, with_members=task.save.members
            )
        except torch.AcceleratorError:
            raise  # the device is lost to this process, for every block to come: Ray starts another
        except Exception as error:  # noqa: BLE001 - one slide must not end a run of thousands
            size = f"a tile of {tiles[0].read.width}x{tiles[0].read.height} px of {row['slide_uri']}"
            failure = failure_of(error, size, "lower tile.px or inference.batch_size")
            where = f"{row['slide_uri']}, block {row['row']}, {row['col']}"
            failure["message"] = f"{where}: {failure['message']}"
        else:
            return {"file": encode_block(planes), "num_px": sum(t.core.height * t.core.width for t in tiles)}
        # Not in the handler: its traceback holds on to the tensors of the pass that failed.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return failure


def measure_seams(ensemble: Ensemble, task: SlideTask, item: SlideItem) -> list[halo.Seam]:
    """Measure on a surveyed slide how much halos are worth, for each width.

    Two members, without flips, are enough to tell whether networks see beyond a halo.
    """
    once = replace(
        ensemble,
        checkpoints=ensemble.checkpoints[:_SEAM_MEMBERS],
        inference=InferenceConfig(flips=("identity",), amp=ensemble.inference.amp),
    )
    predictor, _ = load_predictor(once)
    layout = Layout.of(task, item["id"])
    size = (layout.grid.height, layout.grid.width)
    place = halo.choose_place(layout.tissue, layout.mpp, size, task.tile.px)
    pixels = Pixels(task, item["slide_uri"], layout.survey)
    low = task.postprocess.step.low
    return halo.measure_seams(predictor, pixels.read, place, tile_px=task.tile.px, halo_px=task.tile.halo_px, low=low)
