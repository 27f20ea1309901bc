"""Stages for a cluster of hosts: small inputs, what shows that they move, and what must come out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stas_core import config
from stas_core.config import Config
from stas_core.data import cohort
from stas_core.data.phantom import PhantomConfig
from tests import made_cohort
from tests.cluster.faulty_store import FaultyStore
from tests.conftest import TINY_MODEL
from tests.folds import test_train_folds
from tests.scoring import slide_steps, test_score_slides
from tests.slides.made import stained, write_pyramid
from tests.workflows import chaos, made, test_tune_postprocess
from workflows.folds.training import TrainFoldsConfig
from workflows.tune_training import TuneTrainingConfig

NUM_IMAGES = 40


@dataclass(frozen=True)
class Stage:
    """A stage on inputs that are made for it."""

    name: str
    script: str
    settings: Callable[["Inputs", str], Config]
    """From inputs and the URI of `out`."""
    marks: str
    """Pattern of the objects below `out` whose coming shows that it moves."""
    num_before: int
    """How many of them are there when a fault comes: in the middle."""
    results: Callable[[Path], dict[str, bytes]]
    """From its downloaded outputs, what must not depend on how it went."""
    timeout_s: float = 500
    needs_all: bool = False
    """It has no use for fewer workers than there are: one that is lost is replaced, as an autoscaler would."""


class Inputs:
    """What stages start from, made when it is first asked for, in an object store."""

    def __init__(self, store: FaultyStore, folder: Path) -> None:
        self._store, self._folder = store, folder
        self._made: dict[str, str] = {}

    def _upload(self, name: str, make: Callable[[Path], Any]) -> str:
        if name not in self._made:
            make(self._folder / name)
            self._made[name] = self._store.upload(self._folder / name, name)
        return self._made[name]

    @property
    def images(self) -> str:
        """A folder of fields, twenty of them distinct."""
        return self._upload("images", lambda folder: made.make_images(folder, NUM_IMAGES))

    @property
    def ensemble(self) -> str:
        """A run of two untrained folds."""
        return self._upload("ensemble", made.make_ensemble)

    @property
    def slides(self) -> str:
        """A folder of two slides."""
        return self._upload("slides", _make_slides)

    @property
    def training(self) -> str:
        """A run with out-of-fold maps of the cohort."""
        return self._upload("training", self._make_training)

    def _make_training(self, folder: Path) -> None:
        uri = self.cohort
        made.make_oof_run(folder, cohort.read_cohort(str(self._folder / "cohort" / "cohort.parquet")), uri)

    @property
    def cohort(self) -> str:
        """A cohort of eight fields in two folds."""
        return f"{self._upload('cohort', _make_cohort)}/cohort.parquet"


def _make_cohort(folder: Path) -> None:
    folder.mkdir()
    made_cohort.write_fields(folder, PhantomConfig(num_images=8, height=96, width=128, seed=3))
    table = Path(made_cohort.prepare(folder, folder))
    rows = pq.read_table(table).to_pylist()
    for row in rows:  # the folder goes elsewhere
        row |= {name: row[name].removeprefix(f"{folder}/") for name in ("image_uri", "annotation_uri")}
    cohort.write_cohort(str(table), rows)


def _make_slides(folder: Path) -> None:
    folder.mkdir()
    for seed, (name, size) in enumerate({"a": (700, 520), "b": (530, 1100)}.items()):
        write_pyramid(folder / f"{name}.tif", stained(*size, seed), mpp=0.5, num_levels=2)


def _artefacts_of_folds(run: Path) -> dict[str, bytes]:
    """Return checkpoints, maps and indices of all folds below a folder: a training, or a search."""
    folds = sorted(path for path in run.rglob("fold_*") if path.is_dir())
    found = {fold: test_train_folds.artefacts(fold) for fold in folds}
    return {f"{fold.relative_to(run)}/{name}": data for fold, files in found.items() for name, data in files.items()}


def _training(inputs: Inputs, num_epochs: int) -> dict[str, Any]:
    return {
        "data": {"cohort": inputs.cohort, "crop_px": 64, "num_loader_workers": 0},
        "model": TINY_MODEL,
        "optim": {"batch_size": 2, "micro_batch_size": 2},
        "schedule": {"warmup_epochs": 1},
        "training": {"epochs": num_epochs, "top_k": 1, "validate_every": 1, "save_state_every": 1},
    }


def _train_folds(inputs: Inputs, out: str) -> Config:
    return config.build(TrainFoldsConfig, {"out": out, "accept_warnings": True, **_training(inputs, 12)})


def _train_over_hosts(inputs: Inputs, out: str) -> Config:
    wanted = _training(inputs, 8) | {"optim": {"batch_size": 2, "micro_batch_size": 1}}
    return config.build(
        TrainFoldsConfig, {"out": out, "accept_warnings": True, "resources": {"workers_per_fold": 2}, **wanted}
    )


def _tune_training(inputs: Inputs, out: str) -> Config:
    wanted = {
        "train": _training(inputs, 4),
        "space": {"optim.lr": {"low": 1e-5, "high": 1e-2, "log": True}},
        "search": {"num_settings": 3, "num_random": 3},
        "stopping": {"enabled": False},
        "parallel_trials": 1,
    }
    return config.build(TuneTrainingConfig, {"out": out, "accept_warnings": True, **wanted})


def _score_images(inputs: Inputs, out: str) -> Config:
    return made.settings(inputs.images, inputs.ensemble, out, resources={"calibrate": False})


def _score_slides(inputs: Inputs, out: str) -> Config:
    small = {"px": 128, "halo_px": 32, "block": 1, "measure": False}
    return slide_steps.settings(
        inputs.slides, inputs.ensemble, out, tile=small, resources={"cpus_per_task": 0.25}, accept_warnings=True
    )


def _tune_postprocess(inputs: Inputs, out: str) -> Config:
    search = {"num_settings": 600, "num_random": 400}
    return test_tune_postprocess.settings(inputs.training, Path("out"), search=search).model_copy(update={"out": out})


STAGES = [
    Stage("score_images", "score_images", _score_images, "records/", NUM_IMAGES // 5, chaos.result),
    Stage("train_folds", "train_folds", _train_folds, r"fold_\d/metrics.parquet", 5, _artefacts_of_folds),
    Stage(
        "train_folds, two hosts a fold", "train_folds", _train_over_hosts, r"fold_\d/metrics.parquet", 3,
        _artefacts_of_folds, needs_all=True,
    ),
    Stage("score_slides", "score_slides", _score_slides, "blocks/", 8, test_score_slides.result),
    Stage(
        "tune_postprocess", "tune_postprocess", _tune_postprocess, r"studies/.*\.trials\.json", 2,
        test_tune_postprocess.results,
    ),
    Stage("tune_training", "tune_training", _tune_training, r"trials/.*/metrics.parquet", 5, _artefacts_of_folds),
]  # fmt: skip
