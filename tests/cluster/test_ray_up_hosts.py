"""cluster/ray_up/onprem.yaml on hosts of this machine that are reached by ssh, as root (`make test-cluster`)."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.faulty_store import FaultyStore
from tests.cluster.hosts import HOME, Host, Network, why_no_hosts
from tests.cluster.hosts_with_ray import wait_for
from tests.cluster.stages import NUM_IMAGES, STAGES, Inputs
from tests.conftest import ROOT

DESK, HEAD, WORKERS = 4, 1, (2, 3)
"""The host on which a person sits, and the machines in the file."""
NEEDED = ("sshd", "ssh", "ssh-keygen", "rsync")
PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ALONE_S = 120
"""Within which a machine whose head is gone ends: Ray waits for a minute."""
FILE = f"{HOME}/onprem.yaml"


def why_not() -> str | None:
    """Return what this machine lacks for hosts with ssh."""
    if os.environ.get("STAS_TEST_CLUSTER", "short") == "short":
        return "minutes long: run by `make test-cluster`"
    if missing := [name for name in NEEDED if not shutil.which(name, path=PATHS)]:
        return f"{', '.join(missing)} not installed: apt-get install openssh-server rsync"
    return why_no_hosts()


def file_for(network: Network) -> str:
    """Return the file with what is the user's to set."""
    text = (ROOT / "cluster" / "ray_up" / "onprem.yaml").read_text()
    wanted = yaml.safe_load(text)
    wanted["provider"] |= {
        "head_ip": network.hosts[HEAD].address,
        "worker_ips": [network.hosts[number].address for number in WORKERS],
    }
    wanted["auth"]["ssh_user"] = "root"
    return yaml.safe_dump(wanted)


class Machines:
    """Machines with ssh and Python in `~/stas/.venv`, a desk with the key to them, and a bucket for all."""

    def __init__(self, folder: Path) -> None:
        key = folder / "id_ed25519"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        self.network = Network({"HOME": HOME, "LANG": "C.UTF-8", "PATH": PATHS, "TERM": "dumb"}, {})
        try:
            self.store = FaultyStore(self.network.listening)
        except BaseException:
            self.network.close()
            raise
        for number in (HEAD, *WORKERS, DESK):
            self._start(self.network.host(number), key)
        desk = self._home(self.desk)
        shutil.copy(key, desk / ".ssh")
        token = desk / ".ray" / "auth_token"
        token.parent.mkdir()
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        (desk / "onprem.yaml").write_text(file_for(self.network))

    def raylets(self) -> list[str]:
        """Return which machines still run Ray."""
        machines = [self.network.hosts[number] for number in (HEAD, *WORKERS)]
        return [host.name for host in machines if any("/raylet " in line for line in host.processes().values())]

    @property
    def desk(self) -> Host:
        return self.network.hosts[DESK]

    def ray(self, *words: str) -> str:
        """Run Ray's command in the checkout at the desk; return what it prints."""
        in_checkout = ["env", f"--chdir={ROOT}", "RAY_AUTH_MODE=token"]
        return self.desk.run(*in_checkout, str(Path(sys.prefix) / "bin" / "ray"), *words, timeout_s=300)

    def is_open(self, port: int) -> bool:
        """Return whether something listens on the desk's loopback."""
        line = f"import socket; socket.create_connection(('127.0.0.1', {port}))"
        return self.desk.start(sys.executable, "-c", line).wait() == 0

    def close(self) -> None:
        self.network.close()
        self.store.close()

    @staticmethod
    def _home(host: Host) -> Path:
        return host.root / HOME.strip("/")

    def _start(self, host: Host, key: Path) -> None:
        home = self._home(host)
        shutil.copytree("/etc/skel", home, dirs_exist_ok=True)
        for folder in ("stas", ".ssh"):
            (home / folder).mkdir()
        (home / "stas" / ".venv").symlink_to(sys.prefix)
        shutil.copy(f"{key}.pub", home / ".ssh" / "authorized_keys")
        shutil.copy(key, home / ".ssh" / "host_key")
        (host.root / "run" / "sshd").mkdir()
        options = [f"HostKey={HOME}/.ssh/host_key", "PasswordAuthentication=no", "UsePAM=no", "StrictModes=no"]
        server = shutil.which("sshd", path=PATHS)
        assert server is not None
        host.start(server, "-D", "-f", "/dev/null", *(f"-o{option}" for option in options))


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    if reason := why_not():
        pytest.skip(reason)
    machines = Machines(tmp_path)
    try:
        yield machines
    finally:
        machines.close()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_stage_runs_on_machines_that_ray_up_started(machines: Machines, tmp_path: Path) -> None:
    """`ray down` ends the head alone; that workers end is their own doing, as cluster/ray_up.md says."""
    machines.ray("up", "--yes", FILE)
    machines.desk.start("env", "RAY_AUTH_MODE=token", str(Path(sys.prefix) / "bin" / "ray"), "dashboard", FILE)
    wait_for(lambda: machines.is_open(8265), seconds=60)
    stage = STAGES[0]
    wanted = stage.settings(Inputs(machines.store, tmp_path), f"{machines.store.uri}/scores")
    settings = wanted.model_dump(mode="json", exclude_unset=True)
    machines.ray(
        "job", "submit", "--address=http://127.0.0.1:8265", "--working-dir=.",
        f"--runtime-env-json={json.dumps({'env_vars': machines.store.environment()})}", "--",
        "python", "-m", "workflows.await_nodes", "3", "python", f"workflows/{stage.script}.py",
        *(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()),
    )  # fmt: skip
    assert len(machines.store.names("scores/masks")) == NUM_IMAGES
    machines.ray("down", "--yes", FILE)
    assert machines.raylets() == [machines.network.hosts[number].name for number in WORKERS]
    wait_for(lambda: not machines.raylets(), seconds=ALONE_S)
