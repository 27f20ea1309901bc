"""What a run folder is: where a run keeps its files, and how the next stage opens it."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from stas_core import config as configs
from stas_core import storage, tables
from stas_core.data import cohort as cohorts
from stas_core.data.cohort import CohortRow
from stas_core.data.reference import CohortReference, parse_reference
from stas_core.errors import CheckpointError, ConfigError
from stas_core.tables import Int32


@dataclass(frozen=True)
class OofScore:
    """A row of `oof.parquet`: an out-of-fold image, where its 8-bit map is, and how that scores at 0.5."""

    id: str
    fold: Int32
    map_uri: str
    """Relative to the table's folder."""
    dice: float
    precision: float
    recall: float
    tp: int
    """In px, like `fp` and `fn`."""
    fp: int
    fn: int


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """A row of `metrics.parquet`: an epoch of a fold; what is null was not validated."""

    fold: Int32
    epoch: Int32
    """From 1."""
    train_loss: float
    lr: float
    """Of the epoch's last step."""
    grad_norm: float
    """Before clipping, mean over steps."""
    images_per_s: float
    val_dice: float | None = None
    val_precision: float | None = None
    val_recall: float | None = None
    unix_time_s: float


@dataclass(frozen=True)
class FoldScores:
    """A row of `folds.parquet`: a finished fold over its out-of-fold images.

    `low` and `high` bound the 95 % bootstrap interval of the mean over images, or over groups where the cohort has
    several images of any; null where fewer than `bootstrap.MIN_RESAMPLED` are there to draw from. The two `val_dice`
    are scored alike (validation flips), so best - last is what choosing an epoch on the same images gains.
    """

    fold: Int32
    num_images: Int32
    dice_mean: float
    dice_sd: float
    dice_low: float | None
    dice_high: float | None
    precision_mean: float
    precision_sd: float
    precision_low: float | None
    precision_high: float | None
    recall_mean: float
    recall_sd: float
    recall_low: float | None
    recall_high: float | None
    last_val_dice: float
    best_val_dice: float
    best_epoch: Int32


@dataclass(frozen=True)
class FoldResult:
    """What a finished fold reports; per-image scores are in its out-of-fold index."""

    fold: int
    epochs: int
    dice: float
    precision: float
    recall: float
    last_val_dice: float
    best_val_dice: float
    best_epoch: int
    train_seconds: float
    images_per_s: float
    ran_on: Sequence[str]
    """What it was trained on, in turn; with more than one, its bytes are not those of an undisturbed run."""


@dataclass(frozen=True)
class RunFolder:
    """A folder of a run."""

    uri: str

    def path(self, name: str) -> str:
        """Return the path of a file or folder in it."""
        return storage.join(self.uri, name)


@dataclass(frozen=True)
class FoldFolder(RunFolder):
    """The folder of one fold of a training run."""

    DONE: ClassVar = "fold.json"
    """Written last, so that a fold that has it is whole."""
    METRICS: ClassVar = "metrics.parquet"
    OOF: ClassVar = "oof.parquet"
    PATTERNS: ClassVar = (
        *(DONE, METRICS, OOF, "oof/{id}.png", "examples/epoch_*/{id}.png", "tensorboard/events.out.tfevents.*"),
        *(f"checkpoints/*/{name}" for name in ("weights.safetensors", "trained_on.txt", "checkpoint.json")),
    )
    """All its files; `{id}` stands for an image's id."""
    EXAMPLES: ClassVar = "examples"
    """Folder of small maps of a few validation images, for each of a few epochs."""
    LAST: ClassVar = "last"
    """Name of the checkpoint folder of the weights that the fold ended with."""

    @property
    def last(self) -> str:
        """The checkpoint folder of those weights."""
        return self.path(f"checkpoints/{self.LAST}")

    def epoch(self, number: int) -> str:
        """Return the checkpoint folder of an epoch."""
        return self.path(f"checkpoints/epoch_{number:04d}")

    def checkpoints(self) -> list[str]:
        """Return the checkpoint folders that are whole."""
        return _checkpoints(self.path("checkpoints"), "")

    @property
    def is_done(self) -> bool:
        """Whether it was trained to its end, maps included."""
        return storage.exists(self.path(self.DONE))

    def finish(self, result: FoldResult, facts: Mapping[str, Any]) -> None:
        """Mark the fold as done."""
        storage.write_json(self.path(self.DONE), {"result": asdict(result), **facts})

    def facts(self) -> dict[str, Any]:
        """Return what the fold says of itself: `result`, and the time and resources that it took."""
        return storage.read_record(self.path(self.DONE), "result")

    def result(self) -> FoldResult:
        """Return the result of a finished fold."""
        return FoldResult(**self.facts()["result"])

    def write_map(self, image_id: str, png: bytes) -> str:
        """Write an out-of-fold map; return its path relative to the index."""
        name = f"oof/{image_id}.png"
        storage.write_bytes(self.path(name), png)
        return name

    def write_example(self, epoch: int, image_id: str, png: bytes) -> None:
        """Write the small map of a validation image after an epoch."""
        storage.write_bytes(self.path(f"{self.EXAMPLES}/epoch_{epoch:04d}/{image_id}.png"), png)

    def examples(self) -> dict[str, dict[int, str]]:
        """Return the paths of the small maps by image and epoch, both in order; none of a run of an earlier version."""
        uri = self.path(self.EXAMPLES)
        found: dict[str, dict[int, str]] = {}
        for file in sorted(storage.list_files(uri, (".png",)) if storage.exists(uri) else []):
            epoch = file.split("/")[-2].removeprefix("epoch_")
            if epoch.isdecimal():
                found.setdefault(storage.stem_of(file), {})[int(epoch)] = file
        return {name: dict(sorted(found[name].items())) for name in sorted(found)}

    def write_oof(self, rows: Sequence[OofScore]) -> None:
        """Write the index of out-of-fold maps, sorted by id."""
        tables.write_rows(self.path(self.OOF), OofScore, sorted(rows, key=lambda row: row.id))

    def oof(self) -> list[OofScore]:
        """Return the index of out-of-fold maps."""
        return tables.read_rows(self.path(self.OOF), OofScore)

    def write_metrics(self, history: Sequence[EpochMetrics]) -> None:
        """Write the metrics of the epochs so far."""
        tables.write_rows(self.path(self.METRICS), EpochMetrics, history)

    def metrics(self) -> list[EpochMetrics]:
        """Return the metrics of the epochs so far; none where none has ended."""
        uri = self.path(self.METRICS)
        return tables.read_rows(uri, EpochMetrics) if storage.exists(uri) else []


def _checkpoints(uri: str, below: str) -> list[str]:
    """Return the folders that match a pattern and hold a whole checkpoint: its record was written last."""
    records = f"{glob.escape(uri)}/{below}*/checkpoint.json"
    found = storage.list_files(records, (".json",)) if storage.exists(uri) else []
    return [record.rpartition("/")[0] for record in found]


@dataclass(frozen=True)
class OofMap:
    """An out-of-fold map and where its truth is found."""

    uri: str
    fold: int
    row: CohortRow


def write_ensemble(
    uri: str, members: Sequence[Mapping[str, Any]], cohort: CohortReference | None = None, **facts: Any
) -> None:
    """Write an ensemble file: its members, each with the `checkpoint` folder of its weights, and how it was made."""
    known = {} if cohort is None else {"cohort": asdict(cohort)}
    storage.write_json(uri, {"members": list(members), **facts, **known})


def read_reference(uri: str) -> CohortReference | None:
    """Return what an ensemble says of the cohort that it was trained on; None: it says nothing.

    Args:
        uri: as `ensemble.find_checkpoints` takes it: an ensemble file, or a folder, whose ensemble file is looked at.

    Raises:
        CheckpointError: what it says is damaged.
    """
    uri = uri if uri.endswith(".json") else TrainingRun(uri).path(TrainingRun.ENSEMBLE)
    content = storage.read_json(uri) if storage.exists(uri) else None
    known = content.get("cohort") if isinstance(content, dict) else None
    return None if known is None else parse_reference(known, uri)


def read_ensemble(uri: str) -> list[str]:
    """Return the checkpoint folders that an ensemble file names.

    Raises:
        CheckpointError: it names none, or one twice.
        StorageError: it names a relative path that leads out of its folder.
    """
    content = storage.read_json(uri)
    members = content.get("members") if isinstance(content, dict) else None
    if not isinstance(members, list) or not members:
        raise CheckpointError(f'{uri} names no members; expected {{"members": [{{"checkpoint": "<folder>"}}, ...]}}')
    for member in members:
        if not isinstance(member, dict) or not isinstance(member.get("checkpoint"), str) or not member["checkpoint"]:
            raise CheckpointError(f'{uri}: member {member} has no "checkpoint"; expected the folder of its weights')
    named: list[str] = [member["checkpoint"] for member in members]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise CheckpointError(f"{uri} names {twice[0]} twice, which would count double; keep one")
    folder = uri.rpartition("/")[0] or "."
    return [storage.resolve(name, folder, where=f"{uri}: checkpoint of member {n}") for n, name in enumerate(named)]


@dataclass(frozen=True)
class TrainingRun(RunFolder):
    """The output folder of train_folds, or of a trial of tune_training."""

    CONFIG: ClassVar = "config.resolved.yaml"
    FOLDS: ClassVar = "folds.parquet"
    ENSEMBLE: ClassVar = "ensemble.json"
    REVIEW: ClassVar = "review.parquet"
    REVIEW_TARGETS: ClassVar = "review_targets.parquet"
    PATTERNS: ClassVar = (
        *(REVIEW, REVIEW_TARGETS, "review/{id}.geojson"),
        *(FOLDS, ENSEMBLE, "state/**", "figures/fold_*.png", "figures/folds.png", "figures/oof_examples.png"),
        *(f"fold_*/{pattern}" for pattern in FoldFolder.PATTERNS),
    )
    """All its files, but those that every stage writes."""

    @classmethod
    def open(cls, key: str, uri: str) -> "TrainingRun":
        """Return the run in a folder; `key` is the setting that names it.

        Raises:
            ConfigError: it holds no fold of a training.
        """
        if not any(name.startswith("fold_") for name in storage.entries(uri)):
            raise ConfigError(
                f"{key} = {uri} holds no fold_<k>; give the out= of a train_folds run, or a trial of tune_training"
            )
        return cls(uri)

    def fold(self, number: int) -> FoldFolder:
        """Return the folder of a fold, which need not be there yet."""
        return FoldFolder(self.path(f"fold_{number}"))

    def checkpoints(self) -> list[list[str]]:
        """Return the checkpoint folders of each fold that has any."""
        by_fold: dict[str, list[str]] = {}
        for folder in _checkpoints(self.uri, "fold_*/checkpoints/"):
            by_fold.setdefault(folder.rpartition("/checkpoints/")[0], []).append(folder)
        return list(by_fold.values())

    def state(self, fold: int | None = None) -> str:
        """Return where Ray Train keeps what its runs, or one fold's, go on from."""
        return self.path("state" if fold is None else f"state/fold_{fold}")

    def write_folds(self, rows: Sequence[FoldScores], cohort: CohortReference | None = None) -> None:
        """Write the fold table, and the ensemble of the folds' last weights with what it was trained on."""
        tables.write_rows(self.path(self.FOLDS), FoldScores, rows)
        members: list[dict[str, Any]] = [
            {"fold": row.fold, "checkpoint": FoldFolder(f"fold_{row.fold}").last, "oof_dice": row.dice_mean}
            for row in rows
        ]
        write_ensemble(self.path(self.ENSEMBLE), members, cohort)

    def folds(self) -> list[FoldScores]:
        """Return the fold table."""
        return tables.read_rows(self.path(self.FOLDS), FoldScores)

    def trained_on(self) -> str:
        """Return the cohort that the run's config names.

        Raises:
            ConfigError: there is no such config, or it names none.
        """
        resolved = self.path(self.CONFIG)
        if not storage.exists(resolved):
            raise ConfigError(f"run = {self.uri}: no {self.CONFIG} there; give the out= of a train_folds run")
        values = configs.parse_yaml(storage.read_bytes(resolved).decode(), resolved)
        data = values.get("data") if isinstance(values, dict) else None
        cohort_uri = data.get("cohort") if isinstance(data, dict) else None
        if not isinstance(cohort_uri, str):
            raise ConfigError(f"{resolved} names no data.cohort; give the out= of a train_folds run, or set cohort=")
        return cohort_uri

    def maps(self, cohort_uri: str | None = None) -> list[OofMap]:
        """Return the out-of-fold maps with the rows of the cohort (null: where it was then), sorted by fold and id.

        Raises:
            ConfigError: the run has fewer than two folds with maps, or images that the cohort does not know.
        """
        cohort_uri = self.trained_on() if cohort_uri is None else cohort_uri
        rows = {row.id: row for row in cohorts.read_cohort(cohort_uri)}
        found = []
        for number in cohorts.folds_of(list(rows.values())):
            fold = self.fold(number)
            listed: set[str] = set()
            for index, oof in enumerate(fold.oof() if fold.is_done else []):
                where = f"{fold.path(fold.OOF)}: row {index} ({oof.id!r:.60})"
                if oof.id not in rows:
                    raise ConfigError(f"{where}: {cohort_uri} does not know this image; set cohort=")
                if oof.id in listed:
                    raise ConfigError(f"{where}: an earlier row has this image; train the fold again")
                listed.add(oof.id)
                uri = storage.resolve(oof.map_uri, fold.uri, where=f"{where}, column map_uri")
                found.append(OofMap(uri, number, rows[oof.id]))
        if (finished := len({oof.fold for oof in found})) < 2:
            raise ConfigError(
                f"run = {self.uri}: {finished} finished fold(s); a setting is chosen on some folds and judged on "
                "another, so train at least two"
            )
        return sorted(found, key=lambda oof: (oof.fold, oof.row.id))
