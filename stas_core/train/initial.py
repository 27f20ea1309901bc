"""What a training goes on from: whole models (`model.init_from`), in place of an encoder's weights alone.

Of an ensemble every fold takes the member of its own number, which has not seen its validation images if the split is
the same; whether it has is told by content, from what a checkpoint says that it was trained on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from stas_core import config as configs
from stas_core import storage
from stas_core.data import appearance
from stas_core.data.cohort import CohortRow
from stas_core.data.reference import is_same_mpp, look_of
from stas_core.errors import CheckpointError, ConfigError, StorageError
from stas_core.networks import checkpoints
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.checkpoints import CheckpointRecord
from stas_core.networks.model import SegmentationModel
from stas_core.predict import ensemble
from stas_core.runs import FoldFolder, read_reference
from stas_core.train.recipe import DataConfig, FoldRecipe


@dataclass(frozen=True)
class Start:
    """The checkpoints that folds go on from."""

    by_fold: Mapping[int, str]
    """Checkpoint folder of each fold."""
    fingerprint: str
    """Of all models that `model.init_from` names, wherever they lie."""
    notes: tuple[str, ...]
    """What a user should know before the start."""
    unchecked: tuple[str, ...]
    """What nobody can tell."""


def checkpoint_of(uri: str, fold: int) -> str:
    """Return the checkpoint folder that a fold goes on from.

    Args:
        uri: `model.init_from`: an ensemble.json or a training run's folder, or one checkpoint, which serves all folds.
        fold: its number.

    Raises:
        ConfigError: there is no checkpoint, or none or several of this fold.
    """
    members = _members(uri)
    return next(iter(members)) if _is_single(uri) else _own_member(uri, members, fold)


def _own_member(uri: str, members: Mapping[str, CheckpointRecord], fold: int) -> str:
    own = [folder for folder, record in members.items() if record.fold == fold]
    if len(own) != 1:
        found = ", ".join(str(record.fold) for record in members.values())
        raise ConfigError(
            f"model.init_from = {uri} has {len(own) or 'no'} models of fold {fold} (its members are of the folds "
            f"{found}): each fold goes on from the one model of its own number, which has not seen its images; give "
            "the ensemble.json of a training with the same folds, or one checkpoint folder for all of them"
        )
    return own[0]


def load(model: SegmentationModel, folder: str) -> None:
    """Copy the weights of a checkpoint folder into a model.

    Raises:
        CheckpointError: they do not fit it, are damaged, or not finite.
    """
    weights = storage.read_bytes(storage.join(folder, checkpoints.WEIGHTS))
    checkpoints.load_weights(model, checkpoints.load_tensors(weights, folder), folder)


def trained_on(rows: Iterable[CohortRow], origin: str | None) -> frozenset[str] | None:
    """Return the fingerprints of all images that a model has seen: of these rows, and of what it went on from.

    None: what it went on from does not say.
    """
    before = frozenset[str]() if origin is None else checkpoints.read_trained_on(origin)
    return None if before is None else before | {row.image_fingerprint for row in rows}


def require_same_architecture(model: ModelConfig) -> None:
    """Check that the models of `init_from` are of the architecture that is trained.

    Raises:
        ConfigError: naming the first setting that differs, and how to set all of them.
    """
    _refuse_other_architecture(model, _members(str(model.init_from)))


def _refuse_other_architecture(model: ModelConfig, members: Mapping[str, CheckpointRecord]) -> None:
    ours = model.architecture()
    for folder, record in members.items():
        try:
            theirs = configs.build(ModelConfig, record.model).architecture()
        except ConfigError as error:
            raise ConfigError(
                f"model.init_from: {folder} has a model that this version does not know: {error}"
            ) from error
        if different := [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]:
            key = different[0]
            there, here = (_as_typed(values.get(key)) for values in (theirs, ours))
            wanted = " ".join(f"model.{key}={_as_typed(theirs[key])}" for key in different if key in theirs)
            raise ConfigError(
                f"model.{key} is {there} in {folder}, which model.init_from names, and {here} here: weights go with "
                f"their architecture; to go on from them set {wanted}"
            )


def check_start(
    recipe: FoldRecipe,
    rows: Sequence[CohortRow],
    folds: Sequence[int],
    max_drift: float,
    *,
    tell: Callable[[str], None] = lambda text: None,
) -> Start:
    """Check that folds can go on from `model.init_from`, and that their scores would be honest.

    Args:
        recipe: with `model.init_from` set.
        rows: of the cohort.
        folds: those to train.
        max_drift: how far the look of an image may lie from that of the images that the models know, in half ranges.
        tell: told how far it is.

    Raises:
        ConfigError: nothing usable is there, it is of another architecture or other folds, or a model has seen images
            that it is to be scored on.
        CheckpointError, StorageError: a model's list of what it has seen is damaged.
    """
    uri = str(recipe.model.init_from)
    members, is_single = _members(uri, tell), _is_single(uri)
    _refuse_other_architecture(recipe.model, members)
    by_fold = {fold: next(iter(members)) if is_single else _own_member(uri, members, fold) for fold in folds}
    tell("what they were trained on")
    seen = {folder: checkpoints.read_trained_on(folder) for folder in sorted(set(by_fold.values()))}
    for fold, folder in by_fold.items():
        _refuse_leaks(fold, folder, [row for row in rows if row.fold in (fold, None)], seen[folder] or frozenset())
    unknown = [folder for folder, images in seen.items() if images is None]
    what = f"all folds go on from {next(iter(members))}" if is_single else f"each fold goes on from its model of {uri}"
    honest = "that has seen no image that it is scored on (compared by content)"
    if unknown:
        honest = "out-of-fold scores are only honest if no image that is scored was in its training"
    unchecked = [
        f"whether {folder}, from which training went on, has seen images that it is scored on: it does not say what it "
        "was trained on"
        for folder in unknown
    ]
    records = {folder: members[folder] for folder in seen}
    return Start(
        by_fold=by_fold,
        fingerprint=_fingerprint(members, is_single, tell),
        notes=(f"{what}: {honest}", *_scale_notes(records, recipe.data), *_look_notes(uri, rows, max_drift)),
        unchecked=tuple(unchecked),
    )


def _members(uri: str, tell: Callable[[str], None] = lambda text: None) -> dict[str, CheckpointRecord]:
    """Return the checkpoint folders that are named, with their records."""
    try:
        found, records = ensemble.find_checkpoints(uri), dict[str, CheckpointRecord]()
        for folder in found:
            tell(f"{len(records)} of {len(found)} records read")
            records[folder] = checkpoints.read_record(folder)
        return records
    except (CheckpointError, StorageError) as error:
        raise ConfigError(
            f"model.init_from = {uri}: {error}. A run that went on from models asks for them whenever its command is "
            "given, even if it is finished: put them back, or give their new place (they count by content); what it "
            "wrote is whole without them"
        ) from error


def _is_single(uri: str) -> bool:
    """Tell whether one checkpoint is named, or its fold's folder; a run of one fold has models for this fold alone."""
    if uri.endswith(".json"):
        return False
    return storage.exists(storage.join(uri, checkpoints.RECORD)) or bool(FoldFolder(uri).checkpoints())


def _fingerprint(members: Mapping[str, CheckpointRecord], is_single: bool, tell: Callable[[str], None]) -> str:
    marks = list[str]()
    for folder, record in members.items():
        tell(f"{len(marks)} of {len(members)} models read")
        mark = ensemble.checkpoint_fingerprint(folder)
        marks.append(f"{'' if is_single else record.fold} {mark} {record.trained_on}")
    return storage.fingerprint(*sorted(marks))


def _refuse_leaks(fold: int, folder: str, scored: Sequence[CohortRow], seen: frozenset[str]) -> None:
    leaked = [row for row in scored if row.image_fingerprint in seen]
    if leaked:
        held_out = sum(row.fold is None for row in leaked)
        raise ConfigError(
            f"model.init_from: {folder} was trained on {len(leaked)} of the {len(scored)} images that fold {fold} is "
            f"scored on or holds out ({held_out} of the hold-out), such as {leaked[0].id}: scores would flatter it. "
            "Give the ensemble.json of a training with the same split; or make the cohort with split.published_csv, in "
            "which images keep the folds that they had then; or go on from a model of other images"
        )


def _scale_notes(records: Mapping[str, CheckpointRecord], data: DataConfig) -> list[str]:
    """Say where images are shown to the network at another scale than those it knows."""
    notes = []
    for folder, record in records.items():
        if record.mpp is None or data.mpp is None:
            if record.scale != data.scale:
                notes.append(
                    f"{folder} was trained at data.scale = {record.scale:g}, this is data.scale = {data.scale:g}"
                )
            continue
        theirs, ours = record.mpp / record.scale, data.mpp / data.scale
        if not is_same_mpp(theirs, ours):
            same = data.mpp / theirs
            remedy = f"; data.scale={same:.3g} would show them alike" if 1 / 64 <= same <= 1 else ""
            notes.append(f"{folder} saw images at {theirs:.3g} um per pixel, and is shown these at {ours:.3g}{remedy}")
    return notes[:1]


def _look_notes(uri: str, rows: Sequence[CohortRow], max_drift: float) -> list[str]:
    """Say how many images look unlike those that the models were trained on, where that is known."""
    reference = read_reference(uri)
    if reference is None:
        return []
    drifts = [found for row in rows if (found := appearance.drift(look_of(row), reference.looks)) is not None]
    far = [drift for drift in drifts if drift.score > max_drift]
    if not far:
        return []
    worst = max(far, key=lambda drift: drift.score)
    return [
        f"{len(far)} of {len(drifts)} images look unlike those that the models know (most of all in {worst.figure}: "
        f"{worst.score:.1f} half ranges from their middle)"
    ]


def _as_typed(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple | list) else str(value)
