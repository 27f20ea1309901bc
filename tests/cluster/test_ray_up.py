"""The files of `ray up`: Ray's own check of them, and what holds for each."""

import copy
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema.exceptions import ValidationError
from ray.autoscaler._private.local import node_provider
from ray.autoscaler._private.util import prepare_config, validate_config  # private: what `ray up` checks with

from tests.conftest import ROOT

FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "cluster" / "ray_up").glob("*.yaml"))}
CLOUDS = ["aws", "gcp"]


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """Return what Ray makes of a file, or raise what it has against it."""
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_there_is_one_for_each_way() -> None:
    assert set(FILES) == {*CLOUDS, "onprem"}


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_it(name: str) -> None:
    prepared = checked(FILES[name])
    assert prepared["head_node_type"] in prepared["available_node_types"]


TYPOS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "max_wrokers": lambda config: config.update(max_wrokers=8),
    "setup_comands": lambda config: config.update(setup_comands=[]),
    "min_worker": lambda config: config["available_node_types"]["gpu"].update(min_worker=1),
}


@pytest.mark.parametrize("typo", TYPOS)
def test_a_typo_is_found(typo: str) -> None:
    config = copy.deepcopy(FILES["aws"])
    TYPOS[typo](config)
    with pytest.raises(ValidationError, match=typo):
        checked(config)


@pytest.mark.parametrize("name", FILES)
def test_tokens_are_on_and_in_no_file_and_the_dashboard_listens_on_loopback(name: str) -> None:
    config = FILES[name]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    starts = [config[f"{part}_start_ray_commands"][-1] for part in ("head", "worker")]
    assert "--dashboard-host=127.0.0.1" in starts[0]
    if "docker" not in config:  # the image sets it
        assert all("RAY_AUTH_MODE=token" in start for start in starts)
    else:
        assert "RAY_AUTH_MODE=token" in (ROOT / "cluster" / "Dockerfile").read_text()


@pytest.mark.parametrize("name", CLOUDS)
def test_a_head_does_no_work_and_machines_that_idle_go(name: str) -> None:
    config = FILES[name]
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert config["available_node_types"]["gpu"]["min_workers"] >= 1
    assert config["idle_timeout_minutes"] <= 10 and config["provider"]["cache_stopped_nodes"] is False


def test_ray_makes_no_security_group_on_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that it makes admits ssh from everywhere, whatever rules the file has."""
    aws = pytest.importorskip("ray.autoscaler._private.aws.config", reason="needs boto3")

    def refuse(*_: Any) -> None:
        raise AssertionError("Ray would make one")

    monkeypatch.setattr(aws, "_upsert_security_groups", refuse)
    config = checked(FILES["aws"])
    kinds = aws._configure_security_group(config)["available_node_types"]
    assert {kind["node_config"]["SecurityGroupIds"][0] for kind in kinds.values()} == {"sg-0123456789abcdef0"}
    del kinds["gpu"]["node_config"]["SecurityGroupIds"]
    with pytest.raises(AssertionError, match="Ray would make one"):
        aws._configure_security_group(config)


def test_rays_provider_ends_nothing_on_machines_of_ones_own_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it reaches the machine: then ray_up.md says too little of `ray down`")

    for name in ("lock", "state"):
        monkeypatch.setattr(node_provider, f"get_{name}_path", lambda _, name=name: str(tmp_path / name))
    config = checked(FILES["onprem"])
    provider = node_provider.LocalNodeProvider(config["provider"], config["cluster_name"])
    (worker, *_) = config["provider"]["worker_ips"]
    for owner, called in ((subprocess, "Popen"), (socket, "socket")):
        monkeypatch.setattr(owner, called, refuse)
    provider.terminate_node(worker)
    assert worker not in provider.non_terminated_nodes({})
    page = " ".join((ROOT / "cluster" / "ray_up.md").read_text().split())
    assert "`ray down` stops Ray on the head alone. Workers end within a minute or two of the head" in page
