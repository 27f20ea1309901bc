"""The steps of score_slides in plain Python: the functions that its tasks call, about a network that is a formula."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stas_core import config, storage
from stas_core.arrays import ProbMapU8, RgbImage
from stas_core.slides.blocks import PROB, encode_block, page_box
from stas_core.slides.tiling import Box
from workflows import score_slides
from workflows.score_slides import ScoreSlidesConfig
from workflows.scoring import slide_tasks
from workflows.scoring.plan import Ensemble
from workflows.scoring.slide_list import GivenConfig, SlideSource, find_slides
from workflows.scoring.slide_plan import SlideItem, SlideTask
from workflows.scoring.slide_tasks import PREDICTED

EASY = {
    "step": {"drop": 100, "high": 130, "core": 120, "ratio": 0.1, "low": 110},
    "min_target_um2": 5,
    "closing_um": 1.5,
}
TILE = {"px": 256, "halo_px": 32, "block": 2}
ITEM = SlideItem(
    id="a",
    slide_uri="/a.svs",
    slide_stamp="1",
    stamp="1",
    mpp=None,
    tissue_uri=None,
    roi_uri=None,
    tumour_uri=None,
    tumour_stamp="",
)


def settings(slides: Path | str, ensemble: str, out: Path | str, **values: Any) -> ScoreSlidesConfig:
    """Return the settings of a run of small slides."""
    own = {
        "slides": str(slides),
        "out": str(out),
        "ensemble": {"uri": ensemble},
        "inference": {"flips": ["identity", "lr"]},
        "tile": TILE,
        "postprocess": EASY,
        "resources": {"cpus_per_task": 0.5},
        "max_failed_fraction": 1.0,
    }
    return config.build(ScoreSlidesConfig, config.merge(own, values))


def task_of(out: Path, **values: Any) -> SlideTask:
    """Return what the tasks of such a run know of it."""
    given = settings("/slides", "/run", out, **values)
    models = Ensemble(("a", "b"), "weights", given.inference, use_gpu=False, threads=1)
    return score_slides.make_task(given, str(out), models, frame_mpp=0.5)


def found(source: Path | str, **values: Any) -> list[SlideItem]:
    """Return the slides that are found somewhere."""
    given = {"mpp": None, "mpp_csv": None, "given": GivenConfig()} | values
    return find_slides(SlideSource(str(source), **given))[0]


def formula(pixels: RgbImage) -> ProbMapU8:
    """Return the map of an image."""
    return np.asarray(255 - pixels[..., 1])


def survey(task: SlideTask, item: SlideItem) -> dict[str, Any]:
    """Survey a slide; return the row of its outcome."""
    (row,) = slide_tasks.survey(task, pa.Table.from_pylist([item])).to_pylist()
    return dict(row)


def predict(task: SlideTask, item: SlideItem) -> list[dict[str, Any]]:
    """Read, predict and keep the blocks of a slide that was surveyed; return the rows of their outcomes."""
    blocks = slide_tasks.blocks_of(task, item, slide_tasks.Layout.of(task, item["id"]))
    read = slide_tasks.read(task, pa.Table.from_pylist(blocks)).to_pylist()
    rows = [_predicted(task, row) for row in read]
    return slide_tasks.keep(task, pa.Table.from_pylist(rows, schema=PREDICTED)).to_pylist()


def _predicted(task: SlideTask, row: dict[str, Any]) -> dict[str, Any]:
    shared = dict.fromkeys(PREDICTED.names) | {name: value for name, value in row.items() if name in PREDICTED.names}
    if row["reason"] is not None:
        return shared
    box, grid = Box(*row["box"]), task.tile.grid(row["frame_height"], row["frame_width"])
    levels = formula(np.frombuffer(row["image"], np.uint8).reshape(box.height, box.width, 3))
    tiles = [grid.tile(*at) for at in zip(row["tile_rows"], row["tile_cols"], strict=True)]
    held = {(one.row, one.col): page_box(one, blended=task.tile.blend).within(box) for one in tiles}
    return shared | {"file": encode_block({at: {PROB: levels[part.slices]} for at, part in held.items()})}


def damage(task: SlideTask, item: SlideItem) -> Path:
    """Cut a kept block of a slide short; return its file."""
    path = next(storage.local_path(task.blocks(item)).glob("*_*.tif"))
    path.write_bytes(path.read_bytes()[:200])
    return path
