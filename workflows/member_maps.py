"""Out-of-fold maps of every kind of member, made in tasks where they are not there, and what each takes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stas_core import storage
from stas_core.data import images
from stas_core.data.cohort import CohortRow
from stas_core.data.fields import load_image
from stas_core.predict import inference as inferences
from stas_core.predict.inference import InferenceConfig
from stas_core.search.ensemble_choice import Flips
from workflows.node_faults import naming_this_node
from workflows.progress import Progress
from workflows.waiting import Need, first_of

IMAGES_PER_TASK = 8


@dataclass(frozen=True)
class OofField:
    """An image with the checkpoints of its fold, by member."""

    row: CohortRow
    fold: int
    checkpoints: Mapping[str, str]


@dataclass(frozen=True)
class Predicting:
    """How maps are made, and where they go."""

    out: str
    flips: Flips
    amp: inferences.Amp
    gpus: float
    """Of each task; 0: they predict on CPUs."""

    @property
    def need(self) -> Need:
        """What each task asks for."""
        return Need("a prediction of maps", gpus=self.gpus)


def map_name(member: str, flip: str, image_id: str) -> str:
    """Return the path of a map within the folder of the choice."""
    return f"maps/{member.replace('/', '.')}/{flip}/{image_id}.png"


def map_uri(out: str, member: str, flip: str, image_id: str) -> str:
    """Return where a map lies."""
    return storage.join(out, map_name(member, flip, image_id))


def predict_maps(fields: Sequence[OofField], members: Sequence[str], how: Predicting) -> dict[str, float]:
    """Predict the missing maps of every member, image and flip; return each member's seconds per pass.

    Raises:
        NodeFault: nodes lack the GPU that they promise, and no other is left.
        ResourceError: nodes were lost, and what is left has no room for a task.
    """
    import ray

    chunks = []
    for fold in sorted({field.fold for field in fields}):
        own = [field for field in fields if field.fold == fold]
        chunks += [own[start : start + IMAGES_PER_TASK] for start in range(0, len(own), IMAGES_PER_TASK)]
    need = how.need
    timings, on_gpu = storage.join(how.out, "seconds.json"), how.gpus > 0
    known = storage.read_json(timings) if storage.exists(timings) else {}
    # Members are held against each other: those that were timed on another device are timed again.
    is_alike = known.get("on_gpu", on_gpu) == on_gpu
    seconds: dict[str, list[float]] = {member: known.get(member, []) if is_alike else [] for member in members}

    def start(member: str, chunk: Sequence[OofField], again: bool) -> Any:
        return need.task(predict_chunk).remote(member, chunk, how, again=again)

    # A member that was never timed, for a run ended before that was written, does its first chunk again.
    work = [(member, chunk, not seconds[member] and chunk is chunks[0]) for member in members for chunk in chunks]
    waiting = {start(*one): one for one in work}
    label = f"maps, {len(how.flips)} flips, {len(members)} members: "
    progress = Progress(sum(len(chunk) for _, chunk, _ in work), label=label)
    while waiting:
        ready = first_of(list(waiting), need.look)
        member, chunk, again = waiting.pop(ready)
        try:
            took = ray.get(ready)
        except ray.exceptions.RayError as error:
            need = need.on_other_nodes(error)
            waiting[start(member, chunk, again)] = member, chunk, again
            continue
        if took:
            seconds[member] += took
            storage.write_json(timings, seconds | {"on_gpu": on_gpu})
        progress.step(len(chunk))
    return {member: float(np.median(seconds[member])) for member in members}


def predict_chunk(member: str, chunk: Sequence[OofField], how: Predicting, *, again: bool) -> list[float]:
    """Predict a member's missing maps of some images, or all of them `again`; return the seconds of each pass.

    Raises:
        NodeFault: it was given a GPU that torch does not find.
    """
    import torch

    from stas_core import process
    from stas_core.predict import ensemble, predictor

    torch.set_num_threads(1)
    process.keep_freed_memory()
    todo = [
        (field, flip)
        for field in chunk
        for flip in how.flips
        if again or not storage.exists(map_uri(how.out, member, flip, field.row.id))
    ]
    if not todo:
        return []
    with naming_this_node():
        device = process.device(on_gpu=how.gpus > 0, remedy="set gpus_per_task=0 to predict on CPUs")
    loaded = ensemble.load_members([chunk[0].checkpoints[member]], device)
    predictors = {
        flip: predictor.Predictor(loaded, device=device, config=InferenceConfig(flips=(flip,), amp=how.amp))
        for flip in how.flips
    }
    took = []
    for field, flip in todo:
        image = load_image(field.row, 1.0)
        start = time.perf_counter()
        prob_u8 = predictors[flip].predict_u8(image)
        took.append(time.perf_counter() - start)
        storage.write_bytes(map_uri(how.out, member, flip, field.row.id), images.encode_map(prob_u8))
    return took[1:] or took  # the first pass allocates
