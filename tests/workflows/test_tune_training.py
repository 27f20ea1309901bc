import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stas_core import config, tables
from stas_core.errors import ConfigError
from stas_core.train.recipe import FoldRecipe
from tests.conftest import ROOT
from tests.workflows.planted import plant_pickles
from workflows import tune_training
from workflows.cluster import Node
from workflows.tune_training import TuneTrainingConfig, plan_trials

SPACE: dict[str, dict[str, Any]] = {
    "optim.lr": {"low": 1e-5, "high": 1e-2, "log": True},
    "model.activation": {"choices": ["relu", "mish"]},
}


def settings(recipe: FoldRecipe, cohort_uri: str, out: Path, **values: Any) -> TuneTrainingConfig:
    train = recipe.model_dump(mode="json")
    train["data"]["cohort"] = cohort_uri
    train["training"] |= {"epochs": 3, "validate_every": 1, "save_state_every": 1}
    plain = {"out": str(out), "train": train, "space": SPACE, "search": {"num_settings": 4, "num_random": 2}}
    return config.build(TuneTrainingConfig, plain | values)


def test_a_killed_search_goes_on_and_repeats_no_finished_trial(
    driver_env: dict[str, str], tmp_path: Path, tiny_recipe: FoldRecipe, cohort_uri: str
) -> None:
    """It is killed when its second trial has begun, which in the next run ends by its setting: it diverges."""
    out = tmp_path / "out"
    wanted = settings(
        tiny_recipe,
        cohort_uri,
        out,
        stopping={"enabled": False},
        known=[{"optim.lr": 1e30}],
        space={"optim.lr": SPACE["optim.lr"] | {"high": 1e30}},
        search={"num_settings": 2, "num_random": 2},
    )
    wanted = wanted.model_copy(update={"train": wanted.train | {"folds": [0]}, "parallel_trials": 1})
    (tmp_path / "tune.yaml").write_text(config.dump(wanted))
    line = [sys.executable, str(ROOT / "workflows" / "tune_training.py"), "--config", str(tmp_path / "tune.yaml")]
    with subprocess.Popen(line, env=driver_env, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 280
        while not (list(out.glob("trials/*/manifest.json")) and len(list(out.glob("trials/*"))) > 1):
            assert process.poll() is None and time.monotonic() < deadline, "the first trial did not end"
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/manifest.json")}
    ran = tmp_path / "planted code ran"
    plant_pickles(out, ran)
    more = wanted.model_copy(update={"parallel_trials": None})  # how much at once may change on the way
    assert tune_training.run(more, False) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    trials = tables.read_table(str(out / "trials.parquet")).to_pylist()
    assert [row["state"] for row in trials] == ["done", "failed"]
    assert trials[0]["error"] is None and "lower optim.lr" in trials[1]["error"]
    assert {row["trial"] for row in trials} == {path.name for path in (out / "trials").iterdir()} == {"0000", "0001"}
    assert not ran.exists()


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
