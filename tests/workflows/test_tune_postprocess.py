import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml

from stas_core import config, storage, tables
from stas_core.data import images
from stas_core.data.cohort import CohortRow
from stas_core.errors import ConfigError, StaleOutputError
from stas_core.predict.postprocess import PostprocessConfig
from stas_core.runs import TrainingRun
from stas_core.search.threshold_search import LocalWork, ScoredSetting, Starts, prepare_space, run_study
from tests.conftest import ROOT
from tests.docs.documented import assert_documented
from tests.workflows.made import make_oof_run
from tests.workflows.planted import plant_pickles
from workflows import tune_postprocess
from workflows.cluster import Node
from workflows.map_actors import MapActors, load_scorer
from workflows.score_images import ScoreConfig
from workflows.tune_postprocess import TunePostprocessConfig

EASY = {
    "steps": [{"drop": 26, "high": 90, "core": 20, "ratio": 0.1, "low": 64}],
    "closing_count": 0,
    "min_target_px": 5,
    "min_foreground_px": 1,
}
SPACE = {
    "threshold": {"low": 40, "high": 240, "step": 20},
    "steps.0.high": {"low": 50, "high": 250},
    "min_target_px": {"low": 0, "high": 40},
    "border_fill": {"choices": ["each", "none"]},
}


def settings(oof_run: str, out: Path, **values: Any) -> TunePostprocessConfig:
    search = {"num_settings": 150, "num_random": 110}
    plain: dict[str, Any] = {"run": oof_run, "out": str(out), "default": EASY, "space": SPACE, "search": search}
    return config.build(TunePostprocessConfig, plain | values)


def results(out: Path) -> dict[str, bytes]:
    """Return what must not depend on how often a run was interrupted."""
    files = [*out.glob("studies/*"), *out.glob("candidates/*"), out / "report.md", out / "postprocess.tuned.yaml"]
    files += [out / "images.parquet", out / "trials.parquet", *out.glob("figures/*")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def oof_run(tmp_path_factory: pytest.TempPathFactory, cohort_rows: list[CohortRow], cohort_uri: str) -> str:
    return make_oof_run(tmp_path_factory.mktemp("oof"), cohort_rows, cohort_uri)


def kill_one(shared: MapActors) -> None:
    pid = ray.get(shared.actors[0].__ray_call__.remote(lambda actor: os.getpid()))
    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def tuned(ray_nodes: list[Node], tmp_path_factory: pytest.TempPathFactory, oof_run: str) -> Path:
    """Return the output of a search whose studies find one of two actors dead."""
    out = tmp_path_factory.mktemp("tuned")

    def await_start(shared: MapActors) -> None:
        start(shared)
        assert len(shared.actors) == 2
        kill_one(shared)

    start = MapActors.await_start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MapActors, "await_start", await_start)
        assert tune_postprocess.run(settings(oof_run, out), False) == 0
    return out


def test_studies_through_ray_equal_plain_python(tuned: Path, oof_run: str) -> None:
    wanted = settings(oof_run, tuned)
    maps = TrainingRun(oof_run).maps()
    space, levels = prepare_space(wanted.space, wanted.default)
    work = LocalWork([load_scorer(found) for found in maps], space, wanted.search)
    for name in ("all", "0", "1"):
        trials: list[ScoredSetting] = []
        seen = [str(found.fold) != name for found in maps]
        starts = Starts(wanted.default, wanted.reference)
        study = run_study(work, seen, starts, space, levels, wanted.search, note=trials.extend)
        written = storage.read_json(str(tuned / "studies" / f"{name}.json"))
        assert [ScoredSetting(*trial) for trial in written["trials"]] == trials
        assert written["simplest"] == study.simplest.model_dump(mode="json")
        assert {pick: dice.tolist() for pick, dice in study.dice.items()} == written["dice"]


def test_what_is_written_says_what_it_is_worth(tuned: Path, oof_run: str) -> None:
    manifest = storage.read_json(str(tuned / "manifest.json"))
    assert manifest["recommended"] == "tuned" and manifest["report"] == ["report.html"]
    text = (tuned / "postprocess.tuned.yaml").read_text()
    assert text.startswith("# Recommendation: use the tuned setting: ") and "nested" in text
    found = config.build(PostprocessConfig, yaml.safe_load(text))
    assert 140 < found.steps[0].high <= 200
    assert config.build(ScoreConfig, {"postprocess": str(tuned / "postprocess.tuned.yaml")}).postprocess == found
    table = tables.read_table(str(tuned / "images.parquet"))
    assert np.mean(table["nested_simplest"]) > np.mean(table["default"])
    assert manifest["nested_dice"]["simplest"] == pytest.approx(np.mean(table["nested_simplest"]), abs=1e-6)
    assert tables.read_table(str(tuned / "trials.parquet")).num_rows == 3 * 150
    assert_documented("tune_postprocess", tuned)
    report = (tuned / "report.md").read_text()
    for name in ("partial_dependence", "importance", "global_threshold", "optimism", "dice_by_size"):
        assert f"figures/{name}.png" in report and (tuned / "figures" / f"{name}.png").exists()
    stamp = (tuned / "manifest.json").stat().st_mtime_ns
    assert tune_postprocess.run(settings(oof_run, tuned), False) == 0
    assert (tuned / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(StaleOutputError, match=r"search\.seed"):
        tune_postprocess.run(settings(oof_run, tuned, search={"num_settings": 150, "seed": 5}), False)


@pytest.mark.long
def test_a_killed_search_goes_on_where_it_was(
    driver_env: dict[str, str], tmp_path: Path, oof_run: str, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One search is stopped by Ctrl-C, which Tune would take for its end, loses its driver, and ends on one CPU."""
    out = tmp_path / "out"
    (tmp_path / "tune.yaml").write_text(config.dump(settings(oof_run, out)))
    line = [sys.executable, str(ROOT / "workflows" / "tune_postprocess.py"), "--config", str(tmp_path / "tune.yaml")]

    def saved() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.glob("studies/*.trials.json")}

    for how in (signal.SIGINT, signal.SIGKILL):
        before = saved()
        with subprocess.Popen(
            line, env=driver_env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        ) as process:
            deadline = time.monotonic() + 280
            while saved() == before:
                assert process.poll() is None and time.monotonic() < deadline, "no study saved its trials"
                time.sleep(0.01)
            found = saved()
            os.killpg(process.pid, how)
            if how is signal.SIGINT:
                assert b"interrupted; the same command again goes on" in process.communicate(timeout=120)[1]
                assert process.returncode == 130
        assert not (out / "manifest.json").exists()
        # What a study had tried, or, where it ended before its process did, what it found.
        assert all(path.exists() or (path.parent / path.name.replace(".trials", "")).exists() for path in found)
    ran = tmp_path / "planted code ran"
    plant_pickles(out, ran)
    monkeypatch.setattr(tune_postprocess, "ray_session", lambda: nullcontext([Node(1.0)]))
    assert tune_postprocess.run(settings(oof_run, out), False) == 0
    assert results(out) == results(tuned)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"space": {"steps.0.hihg": {"low": 1, "high": 2}}}, r"space\.steps\.0\.hihg: no such key; did you mean"),
        ({"space": {}}, "space is empty"),
        ({"space": {"closing_px": {"low": 1, "high": 5}}}, "closing_px 2 is even"),
        ({"search": {"sampler": "grid", "num_settings": 3}}, "a grid of at most num_settings = 3 has room for one"),
        ({"run": "/nowhere"}, r"run = /nowhere holds no fold_"),
        ({"cohort": "/nowhere/cohort.parquet"}, "there is no cohort table"),
    ],
)
def test_wrong_settings_are_named_before_anything_runs(
    tmp_path: Path, oof_run: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        tune_postprocess.run(settings(oof_run, tmp_path / "out", **values), False)
    assert not (tmp_path / "out").exists()


def test_one_fold_alone_is_refused(tmp_path: Path, cohort_rows: list[CohortRow], cohort_uri: str) -> None:
    run = make_oof_run(tmp_path / "run", [row for row in cohort_rows if row.fold == 0], cohort_uri)
    with pytest.raises(ConfigError, match=r"1 finished fold\(s\).*train at least two"):
        tune_postprocess.run(settings(run, tmp_path / "out"), False)


def test_a_map_that_is_not_of_its_image_is_named(tmp_path: Path, cohort_rows: list[CohortRow], cohort_uri: str) -> None:
    run = make_oof_run(tmp_path / "run", cohort_rows, cohort_uri)
    found = TrainingRun(run).maps()[0]
    Path(found.uri).write_bytes(images.encode_map(np.zeros((10, 10), np.uint8)))
    with pytest.raises(ConfigError, match=rf"{Path(found.uri).name} is \(10, 10\).*set cohort="):
        load_scorer(found)
