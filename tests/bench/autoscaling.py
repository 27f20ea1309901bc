"""Score 400 fields from a head alone, on Ray's autoscaler: when nodes come, work, are lost, replaced and let go.

    python -m tests.bench.autoscaling [--images 400] [--version 2] [--kill 100]

Nodes are processes of this machine, of a CPU each, at most three, ended once they idle for 12 seconds. One is killed
when so many images are finished (0: none). Fields of 96 x 128 px, an untrained tiny network. Against the same run on a
Ray of this machine with two CPUs.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster.autoscaling import AutoscalingRay
from tests.conftest import ROOT
from tests.workflows.chaos import ALL_FIT, num_records, result
from tests.workflows.made import make_ensemble, make_images, write_config

IDLE_S = 12.0


def follow(cluster: AutoscalingRay, config: Path, out: Path, kill_at: int) -> float:
    """Run the stage on the cluster and print what becomes of its nodes; return how long it takes."""
    began, there, worked = time.monotonic(), set[str](), set[str]()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {what}, {num_records(out)} images", flush=True)

    def look() -> None:
        nodes, working = {*cluster.nodes()}, cluster.working()
        for words, found in (("came", nodes - there), ("went", there - nodes), ("works", working - worked)):
            for node in sorted(found):
                say(f"node {node[-2:]} {words}")
        there.intersection_update(nodes)
        there.update(nodes)
        worked.update(working)

    line = [sys.executable, str(ROOT / "workflows" / "score_images.py"), "--config", str(config)]
    with (
        config.with_suffix(".log").open("w") as log,
        subprocess.Popen(line, env=cluster.environment, stdout=log, stderr=log) as stage,
    ):
        while stage.poll() is None:
            look()
            if kill_at and num_records(out) >= kill_at and there:
                say(f"node {min(there)[-2:]} is killed")
                cluster.kill(min(there))
                kill_at = 0
            time.sleep(0.2)
        seconds = time.monotonic() - began
        assert stage.returncode == 0, config.with_suffix(".log").read_text()
    say("the run has ended")
    while there:
        look()
        time.sleep(0.2)
    print(config.with_suffix(".log").read_text().count("interrupted ("), "pipelines were started anew")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--version", type=int, choices=(1, 2), default=2)
    parser.add_argument("--kill", type=int, default=100)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the cluster does not end by itself
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, ensemble = make_images(folder / "images", arguments.images), make_ensemble(folder / "run")
        paths = {
            kind: write_config(folder / f"{kind}.yaml", source, ensemble, folder / kind, resources=ALL_FIT)
            for kind in ("quiet", "growing")
        }
        line = [sys.executable, str(ROOT / "workflows" / "score_images.py"), "--config", str(paths["quiet"])]
        env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        start = time.monotonic()
        subprocess.run(line, env=env, check=True, capture_output=True)
        quiet_s = time.monotonic() - start
        with AutoscalingRay(version=arguments.version, idle_s=IDLE_S) as cluster:
            seconds = follow(cluster, paths["growing"], folder / "growing", arguments.kill)
        expected, found = result(folder / "quiet"), result(folder / "growing")
        print(f"{len(expected)} files, equal: {found == expected}")
        print(f"quiet {quiet_s:.0f} s, from a head alone {seconds:.0f} s: {seconds / quiet_s:.2f} times as long")


if __name__ == "__main__":
    main()
