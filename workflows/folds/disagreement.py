"""How far the members of an ensemble disagree on images that none of them has seen: what later images are held to."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from stas_core.data.cohort import CohortRow
from stas_core.predict.inference import InferenceConfig
from workflows.cluster import Plan
from workflows.node_faults import NodeFault, naming_this_node
from workflows.progress import doing
from workflows.waiting import Need, results

MOST_IMAGES = 8
"""Predicted by every member; they are spread over the hold-out."""


@doing("predicting hold-out images with every model, to know how far they disagree")
def on_hold_out(
    checkpoints: Sequence[str],
    rows: Sequence[CohortRow],
    config: InferenceConfig,
    plan: Plan,
    avoid: Collection[str],
    *,
    on_gpu: bool,
) -> float | None:
    """Return the highest mean disagreement of the members on hold-out images, measured in a task with a fold's share.

    None: there is no hold-out, or there are not two members, or no node that has room for the task can do it.

    Args:
        avoid: ids of the nodes that could not train.

    Raises:
        ResourceError: nodes were lost, and what is left has no room for the task.
    """
    held_out = [row for row in rows if row.fold is None]
    if not is_measurable(len(checkpoints), rows):
        return None
    chosen = np.unique(np.linspace(0, len(held_out) - 1, min(MOST_IMAGES, len(held_out))).astype(int))
    need = Need("a prediction of hold-out images", 0.9 * plan.cpus_per_worker, plan.gpus_per_worker, frozenset(avoid))
    work = (checkpoints, [held_out[index] for index in chosen], config, plan.threads_per_worker, on_gpu)
    try:
        return float(np.max(_measured(need, work)))
    except NodeFault as fault:  # the folds are trained: their scores are not to be lost for this
        print(f"how far the models disagree on hold-out images is not known: {fault}", flush=True)
        return None


def _measured(need: Need, work: tuple[Any, ...]) -> list[float]:
    """Return what `measure_members` does, from a node that can do it.

    Raises:
        NodeFault: there is none.
    """
    import ray

    while True:
        try:
            (disagreements,) = results([need.task(measure_members).remote(*work)], need.look)
        except ray.exceptions.RayError as error:
            need = need.on_other_nodes(error)
        else:
            return list(disagreements)


def is_measurable(num_members: int, rows: Sequence[CohortRow]) -> bool:
    """Tell whether there is a hold-out, and members that can disagree on it."""
    return num_members >= 2 and any(row.fold is None for row in rows)


def measure_members(
    checkpoints: Sequence[str], rows: Sequence[CohortRow], config: InferenceConfig, num_threads: int, on_gpu: bool
) -> list[float]:
    """Return of each image the members' standard deviation, mean over pixels.

    Raises:
        NodeFault: it was given a GPU that torch does not find.
    """
    import torch

    from stas_core import process
    from stas_core.data.fields import load_image
    from stas_core.predict.ensemble import load_members
    from stas_core.predict.predictor import Predictor

    torch.set_num_threads(num_threads)
    with naming_this_node():
        device = process.device(on_gpu=on_gpu, remedy="set resources.gpus_per_worker=0")
    predictor = Predictor(load_members(checkpoints, device), device=device, config=config)
    return [float(predictor.predict([load_image(row, 1.0)])[0].std.mean(dtype=torch.float64)) for row in rows]
