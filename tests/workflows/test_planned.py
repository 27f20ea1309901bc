"""What a plan foresaw, beside what came: `forecast` of a manifest."""

import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from stas_core import storage
from stas_core.config import Config
from stas_core.errors import WriteError
from workflows import lease, planned, progress
from workflows.out_folder import Outputs, claim_for_stage
from workflows.planned import Foreseen, Price

STAGE = Outputs("train", ("weights",))


class Settings(Config):
    lr: float = 1.0
    """A number."""


@pytest.fixture(autouse=True)
def _here(plans_kept_here: Path) -> None:
    """Keep plans apart from the user's."""


def run(out: Path, settings: Settings | None = None, *, gpus: float = 0.0, ends: bool = True) -> dict[str, Any]:
    """Run a stage that writes 1 kB; return the forecast in its manifest."""
    settings = settings or Settings()
    with planned.followed("train", str(out), settings), claim_for_stage(str(out), STAGE, force=False) as folder:
        folder.account.num_gpus = gpus
        storage.write_bytes(f"{out}/weights", bytes(1000))
        if not ends:
            return {}
        folder.write_manifest(settings, "", {"stage": "report"})
    found = storage.read_json(f"{out}/manifest.json")["forecast"]
    assert isinstance(found, dict)
    return found


def keep(out: Path, **values: Any) -> str | None:
    figures: dict[str, Any] = {"seconds": 7200.0, "gpu_hours": 8.0, "memory_bytes": 1e9, "disk_bytes": 2000.0}
    figures |= {"price": Price(2.5, of_gpus=True), **values}
    return planned.keep("train", str(out), Settings(), [Foreseen("train", str(out), "3 folds", "tried", **figures)])


def test_a_run_has_its_plan_beside_what_came_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keep(tmp_path / "out") is None
    found = run(tmp_path / "out", gpus=4.0)
    assert found["seconds"]["forecast"] == 7200 and found["seconds"]["actual"] < 60
    assert found["gpu_hours"]["forecast"] == 8 and found["gpu_hours"]["actual"] < 0.1
    assert found["cost"]["forecast"] == 20 and found["cost"]["actual"] < 1
    assert 1000 <= found["disk_bytes"]["actual"] < 2000 and found["missing"] == {}
    assert "plan -> run: time 2:00:00 -> 0:00; GPU-hours 8.0 -> 0.0; cost 20.00 -> 0.0" in capsys.readouterr().out
    again = run(tmp_path / "out")
    assert again["goes_on"] and again["missing"]["seconds.forecast"] == planned.NOT_PLANNED and "says" not in again
    assert again["seconds"]["actual"] is not None and "plan -> run" not in capsys.readouterr().out


def test_a_run_that_goes_on_counts_its_own_work_and_says_so(tmp_path: Path) -> None:
    keep(tmp_path / "out")
    run(tmp_path / "out", ends=False)
    assert run(tmp_path / "out")["says"].endswith("only its own work is counted")
    with claim_for_stage(str(tmp_path / "out"), STAGE, force=False) as folder:
        assert folder.account.goes_on
        folder.discard()  # as stages do that begin anew
        assert not folder.account.goes_on


def test_a_pipeline_has_the_gpu_hours_of_its_stages(tmp_path: Path) -> None:
    with claim_for_stage(str(tmp_path), Outputs("pipeline", ("out/**",)), force=False) as folder:
        within = [run(tmp_path / "out" / name, gpus=1e6)["gpu_hours"]["actual"] for name in ("a", "b")]
        assert folder.account.facts()["forecast"]["gpu_hours"]["actual"] >= sum(within) > 0


def test_the_plan_of_a_pipeline_goes_with_it(tmp_path: Path, plans_kept_here: Path) -> None:
    """Stages that had nothing to do, or that could not be planned yet, settle nothing themselves."""
    figures: dict[str, Any] = {
        "seconds": 60.0,
        "gpu_hours": 0.0,
        "memory_bytes": 1e9,
        "disk_bytes": 2000.0,
        "price": None,
    }
    names = {"pipeline": tmp_path, "train": tmp_path / "out", "evaluate": tmp_path / "evaluation"}
    stages = [Foreseen(name, str(out), "", "", **figures) for name, out in names.items()]
    planned.keep("pipeline", str(tmp_path), Settings(), stages)
    outputs = Outputs("pipeline", ("out/**",))
    with (
        planned.followed("pipeline", str(tmp_path), Settings()),
        claim_for_stage(str(tmp_path), outputs, force=False) as folder,
    ):
        with claim_for_stage(f"{tmp_path}/out", STAGE, force=False) as within:
            assert within.account.facts()["forecast"]["seconds"]["forecast"] == 60
            within.account.settle()
        assert len(list(plans_kept_here.iterdir())) == 1
        assert folder.account.facts()["forecast"]["disk_bytes"]["forecast"] == 2000
        folder.account.settle()
    assert not list(plans_kept_here.iterdir())


def test_what_was_not_foreseen_has_a_reason(tmp_path: Path, plans_kept_here: Path) -> None:
    keep(tmp_path / "out", disk_bytes=None, seconds=None, gpu_hours=None)
    other = run(tmp_path / "out", Settings(lr=2.0))
    assert other["missing"]["seconds.forecast"] == planned.OTHER_SETTINGS and other["seconds"]["forecast"] is None
    found = run(tmp_path / "out")["missing"]
    names = ("seconds", "gpu_hours", "disk_bytes", "cost")
    assert found == {f"{name}.forecast": "tried" for name in names}
    keep(tmp_path / "out", disk_bytes=None)
    assert run(tmp_path / "out")["missing"] == {"disk_bytes.forecast": planned.NOT_IN_PLAN}
    keep(tmp_path / "out")
    next(plans_kept_here.iterdir()).write_text("{")
    assert run(tmp_path / "out")["missing"]["seconds.forecast"].endswith(".json; plan again")


def test_a_price_of_gpus_stays_one_where_the_plan_has_no_time(tmp_path: Path) -> None:
    keep(tmp_path / "out", seconds=None, gpu_hours=None, price=Price(3600 * 2.5, of_gpus=True))
    found = run(tmp_path / "out", gpus=4.0)
    assert found["cost"]["actual"] == pytest.approx(4 * 2.5 * found["seconds"]["actual"], abs=4)
    assert found["cost"]["forecast"] is None and found["missing"]["cost.forecast"] == "tried"


def test_work_on_cpus_costs_nothing_of_the_price_of_gpus(tmp_path: Path) -> None:
    keep(tmp_path / "out", gpu_hours=0.0)
    assert run(tmp_path / "out")["cost"] == {"forecast": 0.0, "actual": 0.0}
    keep(tmp_path / "other", gpu_hours=0.0, price=Price(3.6e6, of_gpus=False))
    found = run(tmp_path / "other")
    assert found["cost"]["forecast"] == 7.2e6
    assert found["cost"]["actual"] == pytest.approx(1000 * found["seconds"]["actual"], abs=100)


def test_a_plan_is_not_of_what_is_run_after_the_run_that_finds_all_done(tmp_path: Path, plans_kept_here: Path) -> None:
    run(tmp_path / "out")
    keep(tmp_path / "out")  # on this machine; meanwhile another has done it
    with (
        planned.followed("train", str(tmp_path / "out"), Settings()),
        claim_for_stage(str(tmp_path / "out"), STAGE, force=False) as folder,
    ):
        assert folder.is_finished(Settings(), "")
    assert not list(plans_kept_here.iterdir())


def test_a_run_that_is_whole_does_not_fail_over_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(tmp_path / "out")

    def refuse(kept: planned.Kept) -> None:
        raise WriteError(f"cannot write {kept.uri}: read-only")

    monkeypatch.setattr(planned.Kept, "write", refuse)
    assert run(tmp_path / "out")["seconds"]["forecast"] == 7200
    assert "could not be taken away, and the next run may show it" in capsys.readouterr().out


def test_a_folder_of_very_many_files_is_not_counted_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "MOST_COUNTING_S", -1.0)
    found = run(tmp_path / "out")
    assert found["disk_bytes"]["actual"] is None and "could not be" in found["missing"]["disk_bytes.actual"]


def test_a_plan_that_cannot_be_kept_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(planned, "cache_folder", lambda: tmp_path / "file" / "plans")
    assert "cannot be kept" in (keep(tmp_path / "out") or "")


def test_of_a_cluster_memory_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "1.2.3.4:6379")
    found = run(tmp_path / "out")
    assert found["memory_bytes"]["actual"] is None and "memory_bytes.actual" in found["missing"]


def test_a_process_whose_name_is_cut_within_a_letter_ends_no_run(tmp_path: Path) -> None:
    """Linux keeps 15 bytes of a name."""
    sleep = str(shutil.which("sleep"))
    named = tmp_path / ("\u00e4" * 9)
    named.symlink_to(sleep)
    with subprocess.Popen([str(named), "30"]) as other:
        try:
            assert run(tmp_path / "out")["memory_bytes"]["actual"] > 0
            assert lease.process_start(other.pid) is not None
        finally:
            other.kill()


def test_a_terminal_that_takes_no_line_holds_up_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, goes_on = threading.Event(), threading.Event()

    def block() -> None:
        stopped.set()
        goes_on.wait(10)

    monkeypatch.setattr(planned, "TICK_S", 0.01)
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    monkeypatch.setattr(planned, "still", block)
    with claim_for_stage(str(tmp_path / "out"), STAGE, force=False), progress.doing("waiting"):
        assert stopped.wait(5)
        before = storage.read_json(f"{tmp_path}/out/lease.json")["renewed"]
        time.sleep(0.1)
        assert storage.read_json(f"{tmp_path}/out/lease.json")["renewed"] > before
        goes_on.set()


def test_no_thread_outlives_its_run(tmp_path: Path) -> None:
    run(tmp_path / "out")
    assert not {"watch", "lease"} & {thread.name for thread in threading.enumerate()}
