from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stas_core.config import Config
from stas_core.errors import ConfigError, ResourceError, StaleOutputError
from workflows import runtime
from workflows.runtime import Demand, Node, Plan, plan_groups

LAPTOP = [Node(2)]
GPU_BOX = [Node(16, 1)]
DGX = [Node(64, 8)]
PAIR = [Node(16, 4), Node(16, 4)]


@pytest.mark.parametrize(
    ("nodes", "demand", "slots", "cpus", "gpus"),
    [
        (LAPTOP, Demand(4), 2, 1, 0),
        (LAPTOP, Demand(1), 1, 2, 0),
        (LAPTOP, Demand(4, workers_per_group=2), 1, 1, 0),
        (LAPTOP, Demand(4, parallel_groups=1), 1, 2, 0),
        (GPU_BOX, Demand(5), 1, 16, 1),
        (GPU_BOX, Demand(5, gpus_per_worker=0.25), 4, 4, 0.25),
        (GPU_BOX, Demand(5, gpus_per_worker=0), 5, 3, 0),
        (DGX, Demand(5), 5, 12, 1),
        (DGX, Demand(5, workers_per_group=2), 4, 8, 1),
        (DGX, Demand(5, workers_per_group=8), 1, 8, 1),
        (PAIR, Demand(2, gpus_per_worker=3), 2, 16, 3),
        (PAIR, Demand(5, gpus_per_worker=0.4), 5, 5, 0.4),
        ([Node(0), *PAIR], Demand(8), 8, 4, 1),  # a head node without CPUs
    ],
)
def test_plans(nodes: list[Node], demand: Demand, slots: int, cpus: int, gpus: float) -> None:
    plan = plan_groups(nodes, demand)
    assert (plan.slots, plan.cpus_per_worker, plan.gpus_per_worker) == (slots, cpus, gpus)
    assert plan.threads_per_worker == cpus and plan.workers_per_group == demand.workers_per_group


@given(
    st.lists(st.builds(Node, st.integers(0, 64), st.integers(0, 8)), max_size=4),
    st.builds(
        Demand, st.integers(1, 8), st.integers(1, 4), st.none() | st.integers(1, 8), st.sampled_from([None, 0, 1])
    ),
)
def test_a_plan_always_fits_or_is_refused(nodes: list[Node], demand: Demand) -> None:
    try:
        plan = plan_groups(nodes, demand)
    except ResourceError as error:
        assert "fit" in str(error) and "lower resources." in str(error)
        return
    assert 1 <= plan.slots <= demand.num_groups
    assert fits(nodes, plan)


def fits(nodes: list[Node], plan: Plan) -> bool:
    """Lay the workers of all slots on the nodes one by one."""
    left = plan.slots * plan.workers_per_group
    for node in nodes:
        cpus, gpus = node.num_cpus, node.num_gpus
        while left and cpus >= plan.cpus_per_worker and gpus >= plan.gpus_per_worker:
            cpus, gpus, left = cpus - plan.cpus_per_worker, gpus - plan.gpus_per_worker, left - 1
    return left == 0


def test_what_can_never_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(
        ResourceError, match=r"1 node\(s\) with 2 CPU and 0 GPU: 2 worker\(s\) of 1 CPU and 0 GPU fit, 3"
    ):
        plan_groups(LAPTOP, Demand(1, workers_per_group=3))
    with pytest.raises(ResourceError, match=r"0 worker\(s\) of 1 CPU and 1 GPU fit"):
        plan_groups(LAPTOP, Demand(1, gpus_per_worker=1))
    with pytest.raises(ResourceError, match=r"gpus_per_worker = 0\.5 with workers_per_fold = 2"):
        plan_groups(DGX, Demand(1, workers_per_group=2, gpus_per_worker=0.5))


def test_an_empty_cluster_that_grows_needs_its_slots_given() -> None:
    with pytest.raises(ResourceError):
        plan_groups([], Demand(5))
    assert plan_groups([], Demand(5, parallel_groups=3)).slots == 3


class Settings(Config):
    lr: float = 1.0
    """A number."""


class LaterSettings(Settings):
    momentum: float = 0.9
    """An option that a later version has."""


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    for _ in range(2):
        runtime.claim(out, "train", Settings(), "input", force=False)
    with pytest.raises(StaleOutputError, match=r"differs in: lr \(was 1\.0, now 2\.0\); use another out=, or --force"):
        runtime.claim(out, "train", Settings(lr=2.0), "input", force=False)
    with pytest.raises(StaleOutputError, match="differs in: the input data"):
        runtime.claim(out, "train", Settings(), "other input", force=False)
    runtime.claim(out, "train", LaterSettings(), "input", force=False)
    with pytest.raises(StaleOutputError, match=r"differs in: momentum \(was 0\.9, now 0\.5\)"):
        runtime.claim(out, "train", LaterSettings(momentum=0.5), "input", force=False)
    (tmp_path / "run" / "old").write_text("")
    runtime.claim(out, "train", Settings(lr=2.0), "input", force=True)
    assert not (tmp_path / "run" / "old").exists()
    with pytest.raises(StaleOutputError, match="run holds what train made, not tune; use another out="):
        runtime.claim(out, "tune", Settings(lr=2.0), "input", force=True)


def test_a_folder_belongs_to_one_stage(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    for _ in range(2):
        runtime.take(out, "score", force=False, folders=("masks",))
    (tmp_path / "run" / "masks").mkdir()
    runtime.take(out, "score", force=False, folders=("masks",))  # its own
    runtime.take(out, "score", force=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["claim.json"]
    strange = tmp_path / "strange"
    (strange / "masks").mkdir(parents=True)
    runtime.take(str(strange), "tune", force=False, folders=("maps",))
    (strange / "claim.json").unlink()
    with pytest.raises(ConfigError, match=r"strange has masks/, which score did not make and would change"):
        runtime.take(str(strange), "score", force=False, folders=("masks",))
    with pytest.raises(ConfigError, match=r"--force would delete .*strange, which holds none of this stage's outputs"):
        runtime.take(str(strange), "score", force=True)
    (strange / "manifest.json").write_text("[]")
    with pytest.raises(StaleOutputError, match="holds what another program made, not score"):
        runtime.take(str(strange), "score", force=True)
    assert (strange / "masks").exists()


def test_outputs_never_hold_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"holds data.images = cohort/images, which is read"):
        runtime.require_outside(str(tmp_path / "cohort"), {"data.images": "cohort/images"})
    runtime.require_outside("/data/out", {"run": "/data/runs/a", "cohort": None, "other": "/data/out2/cohort.parquet"})
    for inside in ("/data/out", "/data/out/", "/data/out/cohort/cohort.parquet"):
        with pytest.raises(ConfigError, match=f"out = /data/out holds run = {inside}, which is read"):
            runtime.require_outside("/data/out", {"run": inside})


def test_a_manifest_stands_for_exactly_its_work(tmp_path: Path) -> None:
    out = str(tmp_path)
    assert not runtime.is_finished(out, Settings(), "input")
    runtime.write_manifest(out, "stage", config=Settings(), inputs="input", facts={"num_images": 1})
    assert runtime.is_finished(out, Settings(), "input")
    assert not runtime.is_finished(out, Settings(lr=3.0), "input")
    assert not runtime.is_finished(out, Settings(), "other input")


def test_paths_that_would_be_lost_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["workflows/x.py", "--config", "a.yaml"])
    with pytest.raises(
        ConfigError, match=r"out is not set; .*run: python workflows/x\.py --config a\.yaml out=/data/o"
    ):
        runtime.require_uri("out", None, "/data/o")
    monkeypatch.delenv(runtime.JOB_VARIABLE, raising=False)
    assert runtime.require_uri("out", "here", "/data/o") == str(Path("here").absolute())
    monkeypatch.setenv(runtime.JOB_VARIABLE, "{}")
    with pytest.raises(ConfigError, match=r"out = here is relative, but a Ray job works in a temporary copy"):
        runtime.require_uri("out", "here", "/data/o")
    assert runtime.require_uri("out", "s3://b/o", "/data/o") == "s3://b/o"


def test_durations() -> None:
    assert [runtime.duration(s) for s in (5, 65, 3700)] == ["0:05", "1:05", "1:01:40"]
