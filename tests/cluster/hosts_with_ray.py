"""A Ray cluster over hosts of their own, an object store that they share, and stages that run on it."""

import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.faulty_store import FaultyStore
from tests.cluster.hosts import HOME, Host, Network
from tests.conftest import ROOT

HEAD, WORKERS = 1, (2, 3)
PORT = 6379
ENVIRONMENT = {
    "HOME": HOME,
    "LANG": "C.UTF-8",
    "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONPATH": str(ROOT),
    "PYTHONDONTWRITEBYTECODE": "1",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": f"{HOME}/token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "RAY_health_check_failure_threshold": "3",
    # What Ray notes of its processes, for pages that no test looks at.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "LOG_NAME_UPDATE_INTERVAL_S": "60",
    "METRICS_RECORD_INTERVAL_S": "60",
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "60",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
}
"""Of all programs on hosts: what the files in cluster/ set, and what leaves two cores to the work."""
RAYS_OWN = (
    "IDLE",
    "DashboardAgent",
    "RuntimeEnvAgent",
    "ActorLocationTracker",
    "_AutoscalingCoordinatorActor",
    "_StatsActor",
)
"""Processes of Ray that stay: those that wait for work, agents, and what Ray Data shares between runs."""
KEPT_FILES = ("ray", "_ray_", "pymp-", "torchinductor_", "stas-slides-")
"""Beginnings of the names of temporary files that stay: Ray's, its dashboard's and PyTorch's, and the bounded cache of
slides, which runs share."""


class Driver:
    """A stage that runs on the head."""

    def __init__(self, host: Host, line: Sequence[str]) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the driver
        self._host = host
        self._process = host.start(*line, output=self._output)

    @property
    def printed(self) -> str:
        """What it has printed so far."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    @property
    def status(self) -> int | None:
        """Its exit status; None: it runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> int:
        """Wait for its end; return its exit status."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended after {seconds:g} s:\n{self.printed[-4000:]}") from None

    def close(self) -> None:
        """End it, if it still runs."""
        self._process.kill()
        self._process.wait()
        self._output.close()


class HostsWithRay:
    """A head without CPUs, on which drivers run, and workers."""

    def __init__(self) -> None:
        environment = dict(ENVIRONMENT)
        self.network = Network(environment, {"token": secrets.token_hex(32).encode()})
        try:
            self.store = FaultyStore(self.network.listening)
        except BaseException:
            self.network.close()
            raise
        self.network.environment |= self.store.environment()
        self.drivers: list[Driver] = []

    @property
    def head(self) -> Host:
        return self.network.hosts[HEAD]

    @property
    def workers(self) -> list[Host]:
        return [host for number, host in self.network.hosts.items() if number != HEAD and host.is_on]

    def close(self) -> None:
        """End all of it."""
        for driver in self.drivers:
            driver.close()
        self.network.close()
        self.store.close()

    def start_head(self) -> Host:
        """Turn the head on anew, with an empty cluster on it."""
        host = self.network.host(HEAD)
        self._start_ray(host, "--head", f"--port={PORT}", "--num-cpus=0", f"--dashboard-host={host.address}")
        return host

    def start_worker(self, number: int, *, num_cpus: int = 1, **sizes: str) -> Host:
        """Turn a worker on anew, which joins the head."""
        host = self.network.host(number, **sizes)
        self._start_ray(host, f"--address={self.head.address}:{PORT}", f"--num-cpus={num_cpus}")
        return host

    def start_anew(self, hurt: Collection[int]) -> None:
        """Turn hosts on anew: with the head all of them; those that are none of the two workers stay off."""
        if HEAD in hurt:
            self.network.turn_off()
            self.start_head()
        for number in WORKERS if HEAD in hurt else sorted({*hurt} & {*WORKERS}):
            self.start_worker(number)
        for number in {*hurt} - {HEAD, *WORKERS}:
            self.network.hosts[number].run("ray", "stop")
            self.network.hosts[number].turn_off()

    def on_head(self, *line: str) -> str:
        """Run a program on the head, with the cluster's address in its environment; return what it prints."""
        return self.head.run("env", f"RAY_ADDRESS={self.head.address}:{PORT}", *line)

    def _start_ray(self, host: Host, *options: str) -> None:
        own = [f"--node-ip-address={host.address}", "--object-store-memory=100000000", "--disable-usage-stats"]
        host.run("ray", "start", *own, *options)

    def submit(self, stage: str, config: str) -> Driver:
        """Start a stage on the head with these settings (YAML)."""
        path = self.head.root / HOME.strip("/") / f"{stage}.yaml"
        path.write_text(config)
        script = str(ROOT / "workflows" / f"{stage}.py")
        address = f"RAY_ADDRESS={self.head.address}:{PORT}"
        line = ["env", address, "python", script, "--config", f"{HOME}/{stage}.yaml"]
        self.drivers.append(Driver(self.head, line))
        return self.drivers[-1]

    def tracebacks(self) -> str:
        """Return the tracebacks that stages kept on the head of what nobody foresaw."""
        return "\n".join(path.read_text() for path in sorted((self.head.root / "tmp").glob("*.log")))

    def left_behind(self, but: Collection[int] = ()) -> list[str]:
        """Return what a stage that has ended still holds on the hosts: processes, and files of its own.

        Args:
            but: hosts that hear of no end.
        """
        found = []
        for host in (host for host in (self.head, *self.workers) if host.number not in but):
            lines = [line for line in host.processes().values() if line.startswith("ray::") or "workflows" in line]
            found += [f"{host.name}: {line}" for line in lines if not line.removeprefix("ray::").startswith(RAYS_OWN)]
            for folder in ("tmp", "dev/shm", "var/tmp"):
                names = sorted(path.name for path in (host.root / folder).iterdir())
                found += [
                    f"{host.name}: /{folder}/{name}" for name in names if not name.startswith(host.shown + KEPT_FILES)
                ]
        return found


def wait_for(condition: Callable[[], Any], driver: Driver | None = None, *, seconds: float) -> None:
    """Wait until something holds, while a driver runs.

    Raises:
        AssertionError: it has not come in time, or the driver has ended.
    """
    end = time.monotonic() + seconds
    while not condition():
        told = "" if driver is None else driver.printed[-4000:]
        assert time.monotonic() < end, f"nothing happened in {seconds:g} s\n{told}"
        assert driver is None or driver.status is None, f"ended with {driver.status}\n{told}"
        time.sleep(0.1)
