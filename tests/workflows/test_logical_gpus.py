"""Stages on a Ray that believes it has a GPU: fractions of it are shared, and given back."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stas_core import config, storage, tables
from stas_core.config import Config
from stas_core.data import images
from stas_core.data.cohort import CohortRow
from stas_core.predict import ensemble as ensembles
from stas_core.predict.predictor import Predictor
from stas_core.train.recipe import FoldRecipe
from tests.conftest import ROOT
from tests.folds.test_train_folds import artefacts, train_locally
from tests.workflows import made, test_tune_training
from workflows import tune_training
from workflows.folds.training import TrainFoldsConfig
from workflows.score_images import ScoreConfig
from workflows.tune_training import TuneTrainingConfig

pytestmark = pytest.mark.timeout(900)  # whichever test comes first waits for all the runs


class Runs:
    """What the stages printed, and the settings they had; each wrote below `folder`/<name>."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._printed: dict[str, str] = {}

    def start(self, wanted: dict[str, tuple[str, Config]]) -> None:
        """Run stages: of each, its name below the folder, the stage, and its settings."""
        arguments = []
        for name, (stage, settings) in wanted.items():
            path = self.folder / f"{name}.yaml"
            path.write_text(config.dump(settings))
            arguments += [stage, str(path)]
        line = [sys.executable, "-m", "tests.workflows.logical_gpus", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, timeout=800, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        for part in done.stdout.split("== ")[1:]:
            first, _, printed = part.partition("\n")
            self._printed[Path(first).stem] = printed

    def printed(self, name: str) -> str:
        """Return what a stage printed; it ended well, and what it held was free afterwards."""
        assert self._printed[name].endswith("ended with 0\nall free\n"), self._printed[name]
        return self._printed[name]


@pytest.fixture(scope="module")
def runs(search: TuneTrainingConfig) -> Runs:
    """Run all of them, one after the other, on one Ray."""
    found = Runs(Path(search.out or "").parent)
    source = made.make_images(found.folder / "images", 24)  # as many as a calibration pays for
    ensemble = made.make_ensemble(found.folder / "ensemble")
    on_gpu = {"gpus_per_actor": 1, "cpus_per_actor": 0.5, "cpus_per_task": 0.5, "logical_gpus": True}
    scores = made.settings(source, ensemble, found.folder / "scores", resources=on_gpu)
    found.start({"search": ("tune_training", search), "scores": ("score_images", scores)})
    return found


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: FoldRecipe, cohort_uri: str) -> TuneTrainingConfig:
    """Return a search whose first setting can learn; the second cannot, and is stopped."""
    fast = tiny_recipe.model_copy(update={"optim": tiny_recipe.optim.model_copy(update={"lr": 1e-2})})
    wanted = test_tune_training.settings(
        fast,
        cohort_uri,
        tmp_path_factory.mktemp("gpus") / "search",
        known=[{"optim.lr": 1e-5}],
        stopping={"grace_epochs": 2, "reduction_factor": 2},
        search={"num_settings": 2, "num_random": 2},
    )
    longer = wanted.train["training"] | {"epochs": 8}  # so that a stop comes before the end
    resources = {"max_restarts": 0, "gpus_per_worker": 0.5}
    return wanted.model_copy(update={"train": wanted.train | {"training": longer, "resources": resources}})


def test_folds_share_a_gpu(runs: Runs, tmp_path: Path, cohort_rows: list[CohortRow]) -> None:
    """Two folds of a trial with half a GPU each run to the bytes of plain Python."""
    assert "2 worker(s) of 1 CPU and 0.5 GPU fit" in runs.printed("search")
    trial = runs.folder / "search" / "trials" / "0000"
    recipe = config.load_config(TrainFoldsConfig, trial / "config.resolved.yaml").recipe
    local = train_locally(tmp_path, recipe, cohort_rows)
    for fold in ("fold_0", "fold_1"):
        assert artefacts(trial / fold) == artefacts(local / fold)
    assert storage.read_json(str(trial / "manifest.json"))["folds"]["0"]["gpu_hours"] > 0


def test_trials_are_runs_and_those_that_end_early_free_what_they_held(runs: Runs, search: TuneTrainingConfig) -> None:
    out = runs.folder / "search"
    trials = tables.read_table(str(out / "trials.parquet")).to_pylist()
    assert [(row["optim.lr"], row["state"]) for row in trials] == [(1e-2, "done"), (1e-5, "stopped")]
    assert {row["trial"] for row in trials} == {path.name for path in (out / "trials").iterdir()}
    done, stopped = trials
    folder = out / "trials" / done["trial"]
    assert (folder / "config.resolved.yaml").exists() and done["epoch"] == 8
    assert len(ensembles.find_checkpoints(str(folder), top_k=None)) == 2
    dice = [fold["last_val_dice"] for fold in tables.read_table(str(folder / "folds.parquet")).to_pylist()]
    assert done["dice"] == pytest.approx(sum(dice) / 2)
    folder = out / "trials" / stopped["trial"]
    assert stopped["epoch"] == 2 and not (folder / "manifest.json").exists()
    assert storage.read_json(str(folder / "stopped.json"))["seconds_until_freed"] >= 0
    best = config.load_config(TrainFoldsConfig, out / "train_folds.best.yaml")
    assert best.optim.lr == 1e-2 and best.folds is None
    history = tables.read_table(str(out / "history.parquet"))
    assert history.schema.equals(tables.schema_of(tune_training.TrialEpoch))
    assert history.num_rows == sum(row["epoch"] for row in trials)
    for name in ("score_over_time", "parallel_coordinates"):
        assert (out / "figures" / f"{name}.png").exists()
    stamp = (out / "manifest.json").stat().st_mtime_ns
    assert tune_training.run(search, False) == 0
    assert (out / "manifest.json").stat().st_mtime_ns == stamp


def test_actors_share_a_gpu_after_a_calibration(runs: Runs) -> None:
    """Their maps are those of plain Python."""
    printed, out = runs.printed("scores"), runs.folder / "scores"
    assert "calibrated: per image: decode" in printed
    assert "1 actor(s) of 0.5 CPU and 1 GPU fit beside tasks of 0.5 CPU" in printed
    assert "GPU busy n/a" in printed and "bottleneck: " in printed
    settled = storage.read_json(str(out / "plan.json"))
    assert (settled["batch_size"], settled["batch_px"]) == (1, None)
    cpu = torch.device("cpu")
    members = ensembles.load_members(ensembles.find_checkpoints(str(runs.folder / "ensemble")), cpu)
    predictor = Predictor(
        members, device=cpu, config=config.load_config(ScoreConfig, out / "config.resolved.yaml").inference
    )
    maps = sorted((out / "maps").iterdir())
    assert len(maps) == 24
    for path in maps[::5]:
        image = images.decode_image((runs.folder / "images" / f"{path.stem}.jpg").read_bytes(), path.stem)
        assert np.array_equal(images.decode_map(path.read_bytes(), path.name), predictor.predict_u8(image))
