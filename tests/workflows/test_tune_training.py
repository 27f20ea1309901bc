import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from stas_core import config, storage, tables
from stas_core.data import cohort
from stas_core.errors import ConfigError
from stas_core.networks import checkpoints
from stas_core.networks.checkpoints import CheckpointRecord
from stas_core.networks.model import build_model
from stas_core.predict import ensemble as ensembles
from stas_core.train.recipe import FoldRecipe
from tests.conftest import ROOT
from tests.docs.documented import assert_documented
from tests.workflows.planted import plant_pickles
from workflows import tune_training
from workflows.cluster import Node
from workflows.folds import estimate
from workflows.folds.training import TrainFoldsConfig
from workflows.folds.trial import joint_epochs
from workflows.folds.trial_tables import TrialEpoch
from workflows.tune_training import TuneTrainingConfig, plan_trials

SPACE: dict[str, dict[str, Any]] = {
    "optim.lr": {"low": 1e-5, "high": 1e-2, "log": True},
    "model.activation": {"choices": ["relu", "mish"]},
}


def settings(recipe: FoldRecipe, cohort_uri: str, out: Path, **values: Any) -> TuneTrainingConfig:
    train = recipe.model_dump(mode="json")
    train["data"]["cohort"] = cohort_uri
    train["training"] |= {"epochs": 3, "validate_every": 1, "save_state_every": 1}
    search = {"num_settings": 4, "num_random": 2}
    plain = {"out": str(out), "train": train, "space": SPACE, "search": search, "accept_warnings": True}
    return config.build(TuneTrainingConfig, plain | values)


@dataclass(frozen=True)
class Searched:
    """A search that was killed when its second trial had begun, and then went on to its end."""

    wanted: TuneTrainingConfig
    out: Path
    finished: dict[Path, int]
    """Manifests of trials that had ended before, with their times."""
    planted: Path
    """What code in pickles that lay in the folder would have made."""
    planned: list[str]
    """What there was to do, as `--plan` said before it went on, and at the end."""


@pytest.fixture(scope="module")
def searched(
    driver_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory, tiny_recipe: FoldRecipe, cohort_uri: str
) -> Searched:
    """Search three settings: the first can learn; the second cannot, and is stopped; the third diverges."""
    folder = tmp_path_factory.mktemp("search")
    out, planted = folder / "out", folder / "planted code ran"
    wanted = settings(
        tiny_recipe.model_copy(update={"optim": tiny_recipe.optim.model_copy(update={"lr": 1e-2})}),
        cohort_uri,
        out,
        known=[{"optim.lr": 1e-5}, {"optim.lr": 1e30}],
        space={"optim.lr": SPACE["optim.lr"] | {"high": 1e30}},
        search={"num_settings": 3, "num_random": 3},
        stopping={"grace_epochs": 2, "reduction_factor": 2},
        parallel_trials=1,
    )
    longer = wanted.train["training"] | {"epochs": 8}  # so that a stop comes before the end
    wanted = wanted.model_copy(update={"train": wanted.train | {"folds": [0], "training": longer}})
    path = folder / "tune.yaml"
    path.write_text(config.dump(wanted))
    line = [sys.executable, str(ROOT / "workflows" / "tune_training.py"), "--config", str(path)]
    with subprocess.Popen(line, env=driver_env, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 280
        while not (list(out.glob("trials/*/manifest.json")) and len(list(out.glob("trials/*"))) > 1):
            assert process.poll() is None and time.monotonic() < deadline, "the first trial did not end"
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/manifest.json")}
    plant_pickles(out, planted)
    more = wanted.model_copy(update={"parallel_trials": None})  # how many at once may change on the way
    pace = estimate.Pace(1.0, 2.0, 10, 10, 10.0, 1.0, 1e9, "a test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "try_training", lambda *_: pace)
        planned = [tune_training.plan(more, False)[0].work]
        assert tune_training.run(more, False) == 0
        planned.append(tune_training.plan(more, False)[0].work)
    return Searched(more, out, finished, planted, planned)


@pytest.mark.long
def test_a_killed_search_goes_on_and_repeats_no_finished_trial(searched: Searched) -> None:
    assert len(searched.finished) == 1
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in searched.finished.items())
    assert not searched.planted.exists()
    before, after = searched.planned
    assert before.startswith("2 of 3 trials, ") and after == "nothing: it is up to date"


@pytest.mark.long
def test_trials_are_runs_and_those_that_end_early_free_what_they_held(searched: Searched) -> None:
    out = searched.out
    trials = tables.read_table(str(out / "trials.parquet")).to_pylist()
    assert [(row["optim.lr"], row["state"]) for row in trials] == [(1e-2, "done"), (1e-5, "stopped"), (1e30, "failed")]
    assert {row["trial"] for row in trials} == {path.name for path in (out / "trials").iterdir()}
    done, stopped, failed = trials
    assert done["error"] is None and "lower optim.lr" in failed["error"]
    folder = out / "trials" / done["trial"]
    assert (folder / "config.resolved.yaml").exists() and done["epoch"] == 8
    assert len(ensembles.find_checkpoints(str(folder), top_k=None)) == 1
    (fold,) = tables.read_table(str(folder / "folds.parquet")).to_pylist()
    assert done["dice"] == fold["last_val_dice"]
    assert {path.parent.name for path in out.glob("trials/*/state")} <= {failed["trial"]}
    folder = out / "trials" / stopped["trial"]
    assert stopped["epoch"] == 2 and not (folder / "manifest.json").exists()
    assert storage.read_json(str(folder / "stopped.json"))["seconds_until_freed"] >= 0
    best = config.load_config(TrainFoldsConfig, out / "train_folds.best.yaml")
    assert best.optim.lr == 1e-2 and best.folds is None
    history = tables.read_table(str(out / "history.parquet"))
    assert history.schema.equals(tables.schema_of(TrialEpoch))
    assert history.num_rows == done["epoch"] + stopped["epoch"]
    assert_documented("tune_training", out)
    for name in ("score_over_time", "parallel_coordinates"):
        assert (out / "figures" / f"{name}.png").exists()


@pytest.mark.long
def test_a_finished_search_is_not_done_again(searched: Searched) -> None:
    manifest = searched.out / "manifest.json"
    assert storage.read_json(str(manifest))["report"] == ["report.html"]
    stamp = manifest.stat().st_mtime_ns
    assert tune_training.run(searched.wanted, False) == 0
    assert manifest.stat().st_mtime_ns == stamp


def test_a_trial_is_as_far_as_all_its_folds() -> None:
    assert joint_epochs([{1: 0.1, 2: 0.2, 4: 0.4}, {4: 0.6, 2: 0.4}]) == {2: [0.2, 0.4], 4: [0.4, 0.6]}
    assert joint_epochs([{1: 0.1}, {}]) == {}


def test_trials_at_once_follow_from_the_cluster(tiny_recipe: FoldRecipe, cohort_uri: str, tmp_path: Path) -> None:
    wanted = settings(tiny_recipe, cohort_uri, tmp_path, search={"num_settings": 20})
    base = wanted.base_config()
    for nodes, folds, expected in (
        ([Node(2)], 2, (2, 1)),
        ([Node(1)], 2, (1, 1)),  # the folds take turns
        ([Node(64, 8)], 2, (2, 4)),
        ([Node(64, 8)], 4, (4, 2)),
        ([Node(16, 1)], 2, (1, 1)),
        ([Node(8)] * 4, 2, (2, 16)),
    ):
        plan, parallel = plan_trials(nodes, base, folds, wanted)
        assert (plan.slots, parallel) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"space": {"optim.learning_rate": {"low": 0.1, "high": 1.0}}}, r"space\.optim\.learning_rate: no such key"),
        ({"space": {"model.activation": {"choices": ["tanh"]}}}, r"space\.model\.activation.*tanh"),
        ({"known": [{"optim.weight_decay": 0.1}]}, r"known: optim\.weight_decay is not searched"),
        ({"known": [{"optim.lr": 5.0}]}, r"known: optim\.lr = 5\.0 lies outside"),
        ({"base": "no_such.yaml"}, r"cannot read config file .*no_such\.yaml"),
        (
            {"space": {"training.epochs": {"low": 2, "high": 9}}},
            r"space\.training\.epochs: .* set train\.training\.epochs",
        ),
        (
            {"space": {"model.init_from": {"choices": ["/runs/a", "/runs/b"]}}},
            r"space\.model\.init_from: .*from the same models.* set train\.model\.init_from instead",
        ),
        (
            {"space": {"resources.workers_per_fold": {"low": 1, "high": 2}}},
            r"space\.resources\.workers_per_fold: trials",
        ),
        ({"search": {"sampler": "grid", "num_settings": 3}}, "a grid of at most num_settings = 3 has room for one"),
    ],
)
def test_wrong_settings_are_named_before_anything_runs(
    tmp_path: Path, tiny_recipe: FoldRecipe, cohort_uri: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tune_training.run(settings(tiny_recipe, cohort_uri, tmp_path / "out", **values), False)
    assert not (tmp_path / "out").exists()


def test_a_search_holds_the_scale_of_its_images_against_that_of_the_models(
    tmp_path: Path, tiny_recipe: FoldRecipe, cohort_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [replace(row, mpp=0.5) for row in cohort.read_cohort(cohort_uri)]
    monkeypatch.setattr(cohort, "read_cohort", lambda uri: rows)
    before = str(tmp_path / "before")
    model, scale = tiny_recipe.model, tiny_recipe.data.scale
    record = CheckpointRecord(model.model_dump(mode="json", exclude={"init_from"}), scale, 0, 1, False, {}, {}, 0.25)
    checkpoints.save_checkpoint(before, build_model(model).state_dict(), record)
    recipe = tiny_recipe.model_copy(update={"model": model.model_copy(update={"init_from": before})})
    space = {"optim.lr": SPACE["optim.lr"]}
    opened = tune_training._opened(settings(recipe, cohort_uri, tmp_path / "out", space=space))
    assert opened.start is not None and "saw images at" in " ".join(opened.start.notes)
    assert opened.work[0].train["data"]["mpp"] is None  # the same search as before, whose cohort states it


def test_known_settings_are_tried_once_and_as_their_keys_mean(
    tmp_path: Path, tiny_recipe: FoldRecipe, cohort_uri: str
) -> None:
    space = {"optim.weight_decay": {"low": 0, "high": 2}, "model.activation": {"choices": ["relu", "mish"]}}
    known = [
        {"optim.weight_decay": 1},
        {"optim.weight_decay": 1.0, "model.activation": "relu"},
        {"model.activation": "mish"},
    ]
    wanted = settings(tiny_recipe, cohort_uri, tmp_path, space=space, known=known)
    base = wanted.base_config()
    checked = wanted.model_copy(update={"space": tune_training._checked_space(wanted, base)})
    own = tiny_recipe.optim.weight_decay
    found = [tuple(one.values()) for one in tune_training.first_settings(checked, base)]
    assert found == [(own, "relu"), (1.0, "relu"), (own, "mish")]
    assert all(isinstance(decay, float) for decay, _ in found)


def test_the_shipped_spaces_are_valid() -> None:
    for name in ("tune_training.yaml", "tune_training_cpu.yaml"):
        shipped = config.load_config(TuneTrainingConfig, ROOT / "configs" / name)
        from stas_core.search import space

        space.check_space(shipped.space, shipped.base_config())
