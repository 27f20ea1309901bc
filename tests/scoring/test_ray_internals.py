"""What we use of Ray beyond its public interface is still there and does what we use it for."""

import importlib
import inspect
import logging
import re
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.data
from packaging.requirements import Requirement
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator
from ray.data._internal.execution import backpressure_policy

from stas_core import storage
from stas_core.errors import StaleOutputError
from tests.conftest import ROOT
from workflows import ray_internals

CHANGED = "Ray has changed: mend workflows/ray_internals.py, and the range of ray in pyproject.toml"


def test_only_one_module_uses_private_parts_of_ray() -> None:
    private = ("._internal", "ray._private")
    found = {
        path.name: line.strip()
        for folder in ("workflows", "stas_core")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if any(mark in line for mark in private) and path.name != "ray_internals.py"
    }
    assert not found


def test_worker_processes_are_told_by_their_script() -> None:
    """`workflows` has those end that hang in their exit, where it finds itself in one."""
    from ray._private.workers import default_worker

    assert Path(default_worker.__file__).name == "default_worker.py", "mend workflows/__init__.py"


def test_the_admitted_versions_include_the_tested_one() -> None:
    (line,) = re.findall(r'"(ray\[.*)"', (ROOT / "pyproject.toml").read_text())
    ray_range = Requirement(line).specifier
    assert version("ray") in ray_range and "2.99" not in ray_range


def test_a_pipelines_ray_data_asks_for_no_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its autoscalers register what they would ask for by the call that is replaced, with these words."""
    registered: list[object] = []

    class Coordinator:
        def register(self, **words: object) -> None:
            registered.append(words["resources"])

    actor = SimpleNamespace(request_resources=SimpleNamespace(remote=lambda **words: Coordinator().register(**words)))
    kind = default_autoscaling_coordinator.DefaultAutoscalingCoordinator
    monkeypatch.setattr(kind, "request_resources", kind.request_resources)  # put back
    ray_internals.ask_for_no_nodes.__wrapped__()
    kind("one", actor).request_resources(resources=[{"CPU": 1.0}], expire_after_s=180, request_remaining=["CPU"])
    assert registered == [[]], CHANGED
    for name in ("rate_based_cluster_autoscaler", "default_cluster_autoscaler_v2"):
        module = importlib.import_module(f"ray.data._internal.cluster_autoscaler.{name}")
        assert "self._autoscaling_coordinator.request_resources(\n            resources=" in inspect.getsource(
            module
        ), CHANGED


def test_what_is_no_news_of_nodes_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray._private import worker

    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)  # put back
    ray_internals.quieten_full_clusters.__wrapped__()
    said = [
        "There are tasks with infeasible resource requests that",
        "Raylet is dead. Last 20 lines of the Raylet logs: x",
    ]
    for line in [*said, "other news"]:
        worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=True)
    out = capsys.readouterr().out
    assert "infeasible" not in out and "Raylet is dead." in out and "logs" not in out and "other news" in out


def test_ray_data_takes_our_backpressure_policy(ray_nodes: object) -> None:
    """A pipeline built with the settings asks the policy, which finds what it reads of Ray's books."""
    context = ray.data.DataContext.get_current().copy()
    ray_internals.limit_run_ahead(context, 2**20)
    asked: list[object] = []

    class Asked(ray_internals.RunAhead):
        def can_add_input(self, op: object) -> bool:
            asked.append(super().can_add_input(op))
            return True

    key = backpressure_policy.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY
    policies = context.get_config(key)
    assert policies[-1] is ray_internals.RunAhead, CHANGED
    context.set_config(key, [*policies[:-1], Asked])
    with ray.data.DataContext.current(context):
        rows = ray.data.range(4, override_num_blocks=4).map_batches(lambda batch: batch).take_all()
    assert len(rows) == 4
    assert asked and all(isinstance(answer, bool) for answer in asked), CHANGED


def test_ray_train_logs_reports_under_its_files_name() -> None:
    context = importlib.import_module("ray.train.v2._internal.execution.context")
    source = inspect.getsource(context)
    assert "getLogger(__file__)" in source and "logger.info" in source, CHANGED
    logger = logging.getLogger(context.__file__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, "level", logging.INFO)
        ray_internals.quieten_train_reports()
        assert logger.level == logging.WARNING and context.logger is logger, CHANGED


def test_saved_states_of_ray_train_lie_in_their_folder(tmp_path: Path) -> None:
    """It deletes the state before the latest, wherever its list says that lies."""
    from ray.train.v2._internal import constants

    assert ray_internals.SNAPSHOT == constants.CHECKPOINT_MANAGER_SNAPSHOT_FILENAME, CHANGED
    ray_internals.require_own_states(str(tmp_path))
    for name, is_own in (("epoch_0003", True), ("../../photos", False), ("/photos", False), ("epoch_1/../..", False)):
        state = {"checkpoint_dir_name": name, "metrics": {}}
        for listed in ({"checkpoint_results": [state]}, {"latest_checkpoint_result": state}):
            storage.write_json(str(tmp_path / ray_internals.SNAPSHOT), listed)
            refused = nullcontext() if is_own else pytest.raises(StaleOutputError, match=re.escape(name))
            with refused:
                ray_internals.require_own_states(str(tmp_path))


def test_ray_train_starts_no_process_for_datasets_that_there_are_not() -> None:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(print, scaling_config=ScalingConfig(num_workers=1))

    def names() -> list[str]:
        return [type(one).__name__ for one in trainer._create_default_callbacks()]

    all_names, left = names(), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "fit", lambda: left.extend(names()))
        ray_internals.fit_without_datasets(trainer)
    assert left == [name for name in all_names if name != "DatasetsCallback"] != all_names, CHANGED
