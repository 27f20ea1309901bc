import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from stas_core import config, storage, tables
from stas_core.data.cohort import CohortRow
from stas_core.data.fields import load_image
from stas_core.errors import ConfigError, ResourceError, StaleOutputError
from stas_core.networks import checkpoints
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.checkpoints import CheckpointRecord
from stas_core.networks.model import build_model
from stas_core.predict import ensemble
from stas_core.predict.inference import InferenceConfig
from stas_core.predict.predictor import Predictor
from stas_core.runs import TrainingRun
from tests.conftest import TINY_MODEL
from tests.docs.documented import assert_documented
from tests.workflows.made import assert_foreseen, make_oof_run
from workflows import choose_ensemble
from workflows.choose_ensemble import ChooseEnsembleConfig
from workflows.cluster import Node
from workflows.forecast import Forecast
from workflows.member_maps import Predicting, predict_chunk
from workflows.node_faults import NodeFault


@pytest.fixture
def runs(tmp_path: Path, cohort_rows: list[CohortRow], cohort_uri: str) -> list[str]:
    """Return two untrained runs over the small cohort."""
    found = []
    for number, name in enumerate(("plain", "other")):
        run = make_oof_run(tmp_path / name, cohort_rows, cohort_uri)
        for fold in (0, 1):
            torch.manual_seed(10 * number + fold)
            model = config.build(ModelConfig, TINY_MODEL)
            record = CheckpointRecord(model.model_dump(mode="json"), 1.0, fold, 1, False, {"dice": 0.5}, {})
            uri = TrainingRun(run).fold(fold).last
            checkpoints.save_checkpoint(uri, build_model(model).state_dict(), record)
        found.append(run)
    return found


def settings(runs: list[str], out: Path, **values: Any) -> ChooseEnsembleConfig:
    return config.build(ChooseEnsembleConfig, {"runs": runs, "out": str(out), "accept_warnings": True, **values})


def test_members_and_flips_against_cost(ray_nodes: list[Node], tmp_path: Path, runs: list[str]) -> None:
    out = tmp_path / "out"
    (planned,) = choose_ensemble.plan(settings(runs, out), False)
    assert choose_ensemble.run(settings(runs, out), False) == 0
    assert_foreseen(planned, out)
    sizes = tables.read_table(str(out / "sizes.parquet")).to_pylist()
    assert [(row["num_members"], len(row["flips"])) for row in sizes if row["num_members"] == 1] == [
        (1, 1),
        (1, 2),
        (1, 4),
    ]
    assert len(sizes) == 6 and sum(row["is_knee"] for row in sizes) == 1
    chosen = next(row for row in sizes if row["is_knee"])
    members = storage.read_json(str(out / "ensemble.json"))["members"]
    assert len(members) == 2 * chosen["num_members"]
    assert_documented("choose_ensemble", out)
    found = ensemble.find_checkpoints(str(out / "ensemble.json"))
    assert sorted(found) == sorted(member["checkpoint"] for member in members)
    # A map is what the model of the image's own fold makes of it; maps that are there are kept.
    one = next((out / "maps" / "plain.last" / "lr").iterdir())
    before = {path: path.stat().st_mtime_ns for path in out.glob("maps/**/*.png")}
    assert len(before) == 2 * 4 * 8 and one in before
    assert storage.read_json(str(out / "manifest.json"))["report"] == ["report.html"]
    (out / "manifest.json").unlink()
    table = (out / "sizes.parquet").read_bytes()
    assert choose_ensemble.run(settings(runs, out), False) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("maps/**/*.png")} == before
    assert (out / "sizes.parquet").read_bytes() == table
    # Killed before the second member was done, or even before the first was timed: the rest is made, and costs known.
    for lost in ("other.last", "plain.last"):
        for path in (out / "manifest.json", out / "seconds.json", *(out / "maps" / lost / "ud").iterdir()):
            path.unlink()
        assert choose_ensemble.plan(settings(runs, out), False)[0].work.startswith("8 of 64 maps")
        assert choose_ensemble.run(settings(runs, out), False) == 0
        assert before.keys() == set(out.glob("maps/**/*.png"))
        assert all(row["relative_seconds"] > 0 for row in tables.read_table(str(out / "sizes.parquet")).to_pylist())


def test_maps_equal_the_predictor(
    ray_nodes: list[Node], tmp_path: Path, runs: list[str], cohort_rows: list[CohortRow]
) -> None:
    from stas_core.data import images

    out = tmp_path / "out"
    assert choose_ensemble.run(settings(runs, out, flip_sets=[["identity", "ud"]]), False) == 0
    row = cohort_rows[0]
    members = ensemble.load_members([f"{runs[1]}/fold_{row.fold}/checkpoints/last"], torch.device("cpu"))
    torch.set_num_threads(1)
    predictor = Predictor(members, device=torch.device("cpu"), config=InferenceConfig(flips=("ud",)))
    uri = str(out / "maps" / "other.last" / "ud" / f"{row.id}.png")
    assert (images.decode_map(storage.read_bytes(uri), uri) == predictor.predict_u8(load_image(row, 1.0))).all()


def test_maps_of_other_weights_under_one_name_are_not_taken_over(
    ray_nodes: list[Node], tmp_path: Path, runs: list[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    same = [shutil.move(run, tmp_path / name / "folds") for run, name in zip(runs, ("a", "b"), strict=True)]
    wanted = settings([str(run) for run in same], tmp_path / "out", flip_sets=[["identity"]])
    assert choose_ensemble.run(wanted, False) == 0
    turned = wanted.model_copy(update={"runs": wanted.runs[::-1]})
    with pytest.raises(StaleOutputError, match="the input data"):
        choose_ensemble.run(turned, False)


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, runs: list[str]) -> None:
    with pytest.raises(ConfigError, match="runs is empty"):
        choose_ensemble.run(settings([], tmp_path / "out"), False)
    with pytest.raises(ConfigError, match="one kind of member, plain/last"):
        choose_ensemble.run(settings(runs[:1], tmp_path / "out"), False)
    table = tables.read_table(f"{runs[1]}/fold_0/oof.parquet")
    tables.write_table(f"{runs[1]}/fold_0/oof.parquet", table.slice(1))
    with pytest.raises(ConfigError, match="different splits"):
        choose_ensemble.run(settings(runs, tmp_path / "out"), False)
    shutil.rmtree(f"{runs[1]}/fold_0")
    with pytest.raises(ConfigError, match=r"1 finished fold\(s\)"):
        choose_ensemble.run(settings(runs, tmp_path / "out"), False)


def test_a_choice_can_be_kept_from_gpus_that_do_not_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: list[str]
) -> None:
    def planned(**values: Any) -> Forecast:
        (forecast,) = choose_ensemble.plan(settings(runs, tmp_path / "out", **values), False)
        return forecast

    monkeypatch.setattr(choose_ensemble, "nodes_at_hand", lambda: [Node(4, 2)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert planned().num_gpus == 2 and "this machine has none" in planned().basis
    assert "4 task(s) at once" in planned(gpus_per_task=0.5).layout
    on_cpus = planned(gpus_per_task=0)
    assert on_cpus.num_gpus == 0 and on_cpus.seconds and "4 task(s) at once" in on_cpus.layout
    with pytest.raises(ResourceError, match="none has room for a prediction of maps, of 1 CPU and 3 GPU"):
        planned(gpus_per_task=3)
    (field, *_) = choose_ensemble.find_fields(runs, None, 0)
    how = Predicting(str(tmp_path), ("identity",), "auto", 1)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a"))
    with pytest.raises(NodeFault, match=r"torch finds none on this node; .* or set gpus_per_task=0"):
        predict_chunk("plain/last", [field], how, again=False)
