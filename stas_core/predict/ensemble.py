"""Which checkpoints make an ensemble, and how they are loaded as its members."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stas_core import storage
from stas_core.data.reference import is_same_mpp
from stas_core.errors import CheckpointError, ConfigError
from stas_core.networks import checkpoints
from stas_core.predict.inference import InferenceConfig
from stas_core.predict.predictor import Member, Predictor
from stas_core.runs import FoldFolder, TrainingRun, read_ensemble

ASSUMED_MPP = 0.5
"""um per pixel of fields that nobody gave a resolution: 20x, at which nuclei of the STAS fields have 12 to 15 px."""


def find_checkpoints(uri: str, *, top_k: int | None = None) -> list[str]:
    """Return the checkpoint folders an ensemble is made of.

    Args:
        uri: an ensemble.json; a checkpoint folder; a fold's folder; or a run's folder with `fold_*` in it.
        top_k: of every fold take the best epochs that were kept, instead of the weights it ended with. They were
            chosen on their fold's validation images, so scores there flatter them.

    Raises:
        CheckpointError: nothing is there, or too few epochs were kept.
        StorageError: an ensemble.json names a relative path that leads out of its folder.
    """
    if uri.endswith(".json"):
        if top_k is not None:
            raise CheckpointError(f"top_k = {top_k} with {uri}, which names its members itself: give the run's folder")
        return read_ensemble(uri)
    if storage.exists(storage.join(uri, checkpoints.RECORD)):
        return [uri]
    own = FoldFolder(uri).checkpoints()
    folds = [own] if own else TrainingRun(uri).checkpoints()
    chosen = [member for kept in folds for member in _of_fold(kept, top_k)]
    if not chosen:
        raise CheckpointError(
            f"{uri} holds no checkpoints; give an ensemble.json, a checkpoint folder, or the folder of a training run"
        )
    return sorted(chosen)


def _of_fold(folders: Sequence[str], top_k: int | None) -> list[str]:
    last = [folder for folder in folders if storage.name_of(folder) == FoldFolder.LAST]
    if not last:
        raise CheckpointError(
            f"{folders[0].rpartition('/checkpoints/')[0]} has no checkpoints/last: its training has not ended; finish "
            "it, or name the checkpoints to use in an ensemble.json"
        )
    if top_k is None:
        return last
    epochs = [folder for folder in folders if folder not in last]
    if len(epochs) < top_k:
        raise CheckpointError(
            f"top_k = {top_k}, but {len(epochs)} epoch(s) were kept beside {folders[0]}; train with training.top_k="
            f"{top_k} or more, or lower it"
        )
    return sorted(epochs, key=lambda folder: (-_val_dice(folder), folder))[:top_k]


def _val_dice(folder: str) -> float:
    scores = checkpoints.read_record(folder).scores
    if "val_dice" not in scores:
        raise CheckpointError(f"{folder}/{checkpoints.RECORD} has no val_dice to rank it by, only {sorted(scores)}")
    return scores["val_dice"]


def load_members(folders: Sequence[str], device: torch.device) -> list[Member]:
    """Load checkpoint folders as ensemble members, named by a fingerprint of their weights.

    The name makes the order of summation, and with it every bit of the result, independent of the folders' order.

    Raises:
        CheckpointError: a folder is incomplete, or does not fit its record.
    """
    members = []
    for folder in folders:
        model, record = checkpoints.load_checkpoint(folder, device)
        members.append(Member(checkpoint_fingerprint(folder), model, record.scale))
    return members


def load_ensemble(
    uri: str,
    *,
    config: InferenceConfig | None = None,
    device: torch.device | str | None = None,
    top_k: int | None = None,
) -> Predictor:
    """Load a trained ensemble, ready to predict whole images.

    Args:
        uri: an ensemble.json, a checkpoint folder, a fold's folder or a training run's folder; path or URI.
        config: flips, batches and arithmetic; None: the defaults, which scoring has too.
        device: None: a GPU if there is one, else the CPU.
        top_k: of every fold of a run the best kept epochs, instead of the weights it ended with.

    Raises:
        CheckpointError: there is no ensemble, or one of its members is damaged.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    members = load_members(find_checkpoints(uri, top_k=top_k), device)
    return Predictor(members, device=device, config=config or InferenceConfig())


@dataclass(frozen=True)
class ModelMpp:
    """The resolution that models were trained at."""

    value: float
    """um per pixel, at native size."""
    is_assumed: bool
    """No checkpoint says it."""


def resolution_of(folders: Sequence[str], override: float | None = None) -> ModelMpp:
    """Return the resolution of an ensemble: what the user says, else its checkpoints, else that of a 20x objective.

    Raises:
        CheckpointError: the members were trained at different resolutions.
    """
    if override is not None:
        return ModelMpp(override, is_assumed=False)
    by_mpp: dict[float, str] = {}
    for folder in folders:
        if (mpp := checkpoints.read_record(folder).mpp) is not None:
            by_mpp.setdefault(mpp, folder)
    if len(by_mpp) > 1:
        (one, first), (other, second) = list(by_mpp.items())[:2]
        raise CheckpointError(
            f"{first} was trained at {one:g} um/px and {second} at {other:g}: a slide is read at one resolution; score "
            "with the members of one, or set model_mpp"
        )
    return ModelMpp(next(iter(by_mpp), ASSUMED_MPP), is_assumed=not by_mpp)


def check_mpp(folders: Sequence[str], mpp: float | None) -> tuple[str, ...]:
    """Hold the pixel size of images against that of the models; return what cannot be told, in words.

    Raises:
        CheckpointError: the members were trained at different resolutions.
        ConfigError: the images are of another pixel size.
    """
    trained = resolution_of(folders)
    if mpp is None or trained.is_assumed:
        lacking = [] if mpp is not None else ["data.mpp is not given"]
        lacking += ["no checkpoint states what its models were trained at"] if trained.is_assumed else []
        return (f"the pixel size of images against that of the training: {', and '.join(lacking)}",)
    if not is_same_mpp(mpp, trained.value):
        raise ConfigError(
            f"data.mpp = {mpp:g}: the models were trained at {trained.value:g} um per pixel, and know targets of that "
            "scale alone; resample the images to it, or score them with score_slides (mpp=), which reads any resolution"
        )
    return ()


def checkpoint_fingerprint(folder: str) -> str:
    """Return the digest of a checkpoint's weights and of what its record says about their use."""
    record = checkpoints.read_record(folder)
    weights = storage.read_bytes(storage.join(folder, checkpoints.WEIGHTS))
    return storage.fingerprint(weights, str(record.model), str(record.scale))
