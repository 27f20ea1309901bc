"""A head without CPUs on this machine, and Ray's autoscaler, which adds nodes of one CPU beside it and ends idle ones.

Ray's own `AutoscalingCluster` ends every Ray of the machine when it starts and stops, and lacks a file that is not
installed. This one uses the same provider of nodes, with ports, folders and processes of its own.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from workflows import ray_internals  # noqa: F401 - the package sets what Ray reads when it is imported

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD = "f" * 51 + "00000"
"""The id that the provider gives the head; those of other nodes count on from it."""
HEAD_KIND = "ray.head.default"
"""What the provider takes the head for."""
NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"
STORE_BYTES = 100_000_000
_START_S = 60.0


class AutoscalingRay:
    """A cluster that begins with a head alone; a context."""

    def __init__(self, *, most_nodes: int = 3, idle_s: float = 6.0, version: int = 2) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="stas-ray-"))  # the names of sockets have little room
        self.address = f"127.0.0.1:{_free_port()}"
        self._version = version
        self._config = _config(self.address, most_nodes, idle_s, version)
        token = self._folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))

    def __enter__(self) -> "AutoscalingRay":
        """Start the head."""
        config = self._folder / "autoscaler.json"
        config.write_text(json.dumps(self._config))
        own = {"STAS_RAY_CLUSTER": str(self._folder), "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        if self._version == 2:
            own |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD, NODE_ID: HEAD}
        own |= {f"RAY_health_check_{name}_ms": "500" for name in ("period", "initial_delay")}
        options = ["--head", f"--port={self.address.split(':')[1]}", "--num-cpus=0", f"--temp-dir={self._folder}/ray"]
        options += ["--include-dashboard=false", f"--object-store-memory={STORE_BYTES}"]
        line = [str(Path(sys.executable).parent / "ray"), "start", *options, f"--autoscaling-config={config}"]
        env = self.environment | own
        del env["RAY_ADDRESS"]
        try:
            with (self._folder / "start.log").open("w") as log:
                subprocess.run(
                    line, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, timeout=_START_S
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End all its processes, and no others."""
        end = time.monotonic() + 20
        while (left := self._processes()) and time.monotonic() < end:  # some start others until they end
            for pid in left:
                _kill(pid)
            time.sleep(0.2)
        shutil.rmtree(self._folder, ignore_errors=True)
        assert not left, f"processes that do not end: {left}"

    @property
    def environment(self) -> dict[str, str]:
        """What a driver of the cluster has in its environment."""
        return os.environ | {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._folder / "token"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }

    def nodes(self) -> list[str]:
        """Return the ids of the nodes that are there beside the head, in the order in which they came."""
        found = {node for node in self._processes(b"raylet").values() if node not in ("", HEAD)}
        return sorted(found)

    def working(self) -> set[str]:
        """Return the ids of the nodes on which actors or tasks of Ray Data are."""
        return {node for node in self._processes(b"ray::Map").values() if node != HEAD}

    def kill(self, node: str) -> None:
        """End a node at once and unannounced."""
        for pid, of in self._processes().items():
            if of == node:
                _kill(pid)

    def _processes(self, name: bytes = b"") -> dict[int, str]:
        """Return the processes of the cluster, all or those whose names begin so, and the node of each."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                is_named = (process / "comm").read_bytes().startswith(name)
            except OSError:  # it has ended, or is another user's
                continue
            if is_named and f"STAS_RAY_CLUSTER={self._folder}" in words:
                ids = [word.removeprefix(f"{NODE_ID}=") for word in words if word.startswith(f"{NODE_ID}=")]
                found[int(process.name)] = ids[0] if ids else ""
        return found


def _config(address: str, most_nodes: int, idle_s: float, version: int) -> dict[str, object]:
    provider = {"type": "external", "module": PROVIDER, "gcs_address": address, "disable_node_updaters": True}
    if version == 2:
        provider |= {"launch_multiple": True, "head_node_id": HEAD}
    else:
        provider |= {"use_node_id_as_ip": True}
    of_worker = {"resources": {"CPU": 1, "object_store_memory": STORE_BYTES}, "max_workers": most_nodes}
    return {
        "cluster_name": "test",
        "max_workers": most_nodes,
        "idle_timeout_minutes": idle_s / 60,
        "provider": provider,
        "available_node_types": {
            HEAD_KIND: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": of_worker | {"node_config": {}, "min_workers": 0},
        },
        "head_node_type": HEAD_KIND,
        "auth": {},
        "file_mounts": {},
        **{f"{of}setup_commands": [] for of in ("", "head_", "worker_")},
        **{f"{of}_start_ray_commands": [] for of in ("head", "worker")},
        **{name: [] for name in ("initialization_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")},
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself
        os.kill(pid, signal.SIGKILL)
