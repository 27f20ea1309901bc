"""Kill actors, nodes and drivers of scoring runs at random moments; the outputs must not show it.

    python -m tests.workflows.chaos [--images 300] [--kills 12] [--seed 0]

A Ray head without CPUs, on which the driver runs, and two further nodes of this host with a logical CPU each: room for
an actor and a task. Runs are started until enough has been killed; each must end with the bytes of an undisturbed run.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import workflows  # noqa: F401 - before Ray: sets the environment that Ray reads when it is imported

from ray.cluster_utils import Cluster  # isort: skip

from stas_core.scored_runs import RECORDS, ScoredRun
from tests.conftest import ROOT

EXACT = sorted({folder for kind, (folder, _) in ScoredRun.KINDS.items() if kind != RECORDS})
TABLES = (ScoredRun.TABLE, ScoredRun.TARGETS, ScoredRun.FAILURES, ScoredRun.SEGMENTATION, ScoredRun.DETECTION)
SOON_NOTICED = {"health_check_period_ms": 500, "health_check_initial_delay_ms": 500}
"""A node is still lost after five checks in a row that fail, and one that is busy has as long for each as ever; a dead
one, which refuses them at once, is noticed in three seconds instead of 15."""
VICTIMS = ("actor", "node", "driver")
ALL_FIT = {"calibrate": False, "actors": None}
"""Resources of a run with as many actors as the cluster holds."""


def result(out: Path) -> dict[str, bytes]:
    """Return every file that must not depend on how the run went."""
    files = [path for folder in EXACT for path in (out / folder).glob("*")] + [out / name for name in TABLES]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def num_records(out: Path) -> int:
    return len(ScoredRun(str(out)).files(RECORDS))


@dataclass
class Chaos:
    """Owns the cluster and the driver of one scoring run after another."""

    config: Path
    rng: random.Random
    nodes: list[object] = field(default_factory=list)
    killed: Counter[str] = field(default_factory=Counter)
    kept: dict[Path, int] = field(default_factory=dict)
    """Records that were there when a driver died, with their times: the next run must leave them alone."""

    def __post_init__(self) -> None:
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": SOON_NOTICED}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            self._add_node()
        self.driver: subprocess.Popen[str] | None = None

    def close(self) -> None:
        if self.driver is not None and self.driver.poll() is None:
            os.killpg(self.driver.pid, signal.SIGKILL)
        self.cluster.shutdown()

    def run(self, out: Path, *, max_kills: int, num_images: int, timeout_s: float = 600) -> None:
        """Score into `out`, killing something now and then; start the command again whenever it ended unfinished."""
        end, kills_left = time.monotonic() + timeout_s, max_kills
        self._start()
        while True:
            goal = num_records(out) + self.rng.randint(1, max(2, num_images // (max_kills + 1)))
            self._wait(out, goal, end)
            assert self.driver is not None
            if self.driver.poll() is not None:
                if (out / "manifest.json").exists():
                    break
                self._start()
            elif kills_left and self._kill(VICTIMS[sum(self.killed.values()) % len(VICTIMS)]):
                kills_left -= 1
                if self.driver.poll() is not None:
                    assert not (out / "manifest.json").exists()
                    self.kept |= {path: path.stat().st_mtime_ns for path in (out / RECORDS).glob("*.json")}
        for path, written in self.kept.items():
            assert path.stat().st_mtime_ns == written, f"{path.name} was done, and done again"

    def _wait(self, out: Path, goal: int, end: float) -> None:
        """Wait until so many records are there, or the driver ended."""
        assert self.driver is not None
        while self.driver.poll() is None and num_records(out) < goal:
            assert time.monotonic() < end, f"hung at {num_records(out)} records after killing {dict(self.killed)}"
            time.sleep(0.02)

    def _start(self) -> None:
        while len(self.nodes) < 1:
            self._add_node()
        line = [sys.executable, str(ROOT / "workflows" / "score_images.py"), "--config", str(self.config)]
        env = os.environ | {"RAY_ADDRESS": str(self.cluster.address)}
        log = self.config.with_suffix(".log").open("a")
        self.driver = subprocess.Popen(line, env=env, start_new_session=True, stdout=log, stderr=log, text=True)

    def _kill(self, victim: str) -> bool:
        """Kill one; tell whether there was one."""
        assert self.driver is not None
        if victim == "driver":
            os.killpg(self.driver.pid, signal.SIGKILL)
            self.driver.wait()
        elif victim == "node":
            node = self.nodes.pop(self.rng.randrange(len(self.nodes)))
            os.kill(self._raylet(node), signal.SIGKILL)
            if not self.nodes:
                self._add_node()
        else:
            raylets = [psutil.Process(self._raylet(node)) for node in self.nodes]  # no other Ray's actors
            actors = [one for raylet in raylets for one in raylet.children(recursive=True) if _is_actor(one)]
            if not actors:
                return False
            self.rng.choice(actors).kill()
        self.killed[victim] += 1
        return True

    def _raylet(self, node: object) -> int:
        pid: int = node.all_processes["raylet"][0].process.pid  # type: ignore[attr-defined]
        return pid

    def _add_node(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1))


def _is_actor(process: psutil.Process) -> bool:
    try:
        line = process.cmdline()
    except psutil.NoSuchProcess:
        return False
    return bool(line) and "MapWorker(" in line[0]


def main() -> None:
    import ray

    from tests.workflows.made import make_ensemble, make_images, write_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    source, ensemble = make_images(folder / "images", arguments.images), make_ensemble(folder / "run")
    quiet = folder / "quiet"
    path = write_config(folder / "quiet.yaml", source, ensemble, quiet, resources=ALL_FIT)
    subprocess.run([sys.executable, str(ROOT / "workflows" / "score_images.py"), "--config", str(path)], check=True)
    expected, number, killed = result(quiet), 0, Counter[str]()
    while sum(killed.values()) < arguments.kills:
        out = folder / f"chaos_{number}"
        chaos = Chaos(
            write_config(folder / f"chaos_{number}.yaml", source, ensemble, out, resources=ALL_FIT),
            random.Random(arguments.seed + number),
        )
        start = time.monotonic()
        try:
            chaos.run(out, max_kills=6, num_images=arguments.images)
        finally:
            chaos.close()
        equal = result(out) == expected
        killed += chaos.killed
        print(
            f"run {number}: killed {dict(chaos.killed)}, {time.monotonic() - start:.0f} s, bytes equal: {equal}",
            flush=True,
        )
        assert equal and not list(out.rglob("*.tmp"))
        number += 1
    print(f"{len(expected)} files equal in {number} runs; killed {dict(killed)}")
    ray.shutdown()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
