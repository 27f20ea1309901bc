"""Stages for a cluster of hosts: small inputs, what shows that they move, and what must come out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stas_core.config import Config
from stas_core.data import cohort
from stas_core.data.phantom import PhantomConfig
from tests import made_cohort
from tests.cluster.faulty_store import FaultyStore
from tests.workflows import chaos, made

NUM_IMAGES = 40


@dataclass(frozen=True)
class Stage:
    """A stage on inputs that are made for it."""

    name: str
    settings: Callable[["Inputs", str], Config]
    """From inputs and the URI of `out`."""
    marks: str
    """Pattern of the objects below `out` whose coming shows that it moves."""
    num_before: int
    """How many of them are there when a fault comes: in the middle."""
    results: Callable[[Path], dict[str, bytes]]
    """From its downloaded outputs, what must not depend on how it went."""
    timeout_s: float = 500


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


def _score_images(inputs: Inputs, out: str) -> Config:
    return made.settings(inputs.images, inputs.ensemble, out, resources={"calibrate": False})


STAGES = [
    Stage("score_images", _score_images, "records/", NUM_IMAGES // 5, chaos.result),
]
