"""Wait until a cluster has so many nodes that work, then become the command.

    python -m workflows.await_nodes 4 python workflows/train_folds.py data.cohort=s3://my-bucket/c.parquet out=s3://...

Most stages plan with the nodes that are there when they begin, and those of a cluster that was just started come one
after the other. A head without CPUs is no node that works. After --within seconds the command begins with those that
came; if none came, it does not begin, and the exit status is 1.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from stas_core.errors import ResourceError, StasError
from workflows.cluster import Node, describe, live_nodes, ray_session

WITHIN_S = 900.0
"""What machines of a cloud take to come, with an image of some GB to fetch."""
_LOOK_S = 2.0


def await_nodes(
    wanted: int,
    nodes: Callable[[], Sequence[Node]],
    *,
    within_s: float = WITHIN_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Node]:
    """Return the nodes that work, as soon as there are `wanted` of them or `within_s` seconds have passed.

    Args:
        wanted: how many nodes with a CPU to wait for.
        nodes: tells which nodes the cluster has now.

    Raises:
        ResourceError: there is none by then.
    """
    end = clock() + within_s
    while True:
        working = [node for node in nodes() if node.num_cpus >= 1]
        if len(working) >= wanted or (working and clock() >= end):
            return working
        if clock() >= end:
            raise ResourceError(
                f"no node that works joined the cluster within {within_s:g} s, expected {wanted}; look why its "
                "machines do not come, and run the same command again"
            )
        sleep(_LOOK_S)


def main(arguments: Sequence[str]) -> None:
    """Wait, then replace this process by the command."""
    parser = argparse.ArgumentParser(prog="python -m workflows.await_nodes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("nodes", type=int, help="how many nodes with CPUs to wait for")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what then runs in this process")
    parser.add_argument("--within", type=float, default=WITHIN_S, help="seconds after which fewer do (%(default)g)")
    options = parser.parse_args(arguments)
    if not options.command or options.nodes < 1:
        parser.error("expected a number of nodes from 1, and a command")
    try:
        if "RAY_ADDRESS" not in os.environ:
            raise ResourceError("RAY_ADDRESS is not set, so there is no cluster to wait for; a job has it set")
        there = _joined(options.nodes, options.within)
    except StasError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    short = "" if len(there) >= options.nodes else f", expected {options.nodes} within {options.within:g} s: going on"
    print(f"cluster: {describe(there)}{short}", flush=True)
    os.execvp(options.command[0], options.command)


def _joined(wanted: int, within_s: float) -> list[Node]:
    end = time.monotonic() + within_s  # its address answers before all of its servers do
    with ExitStack() as session:
        while True:
            try:
                session.enter_context(ray_session())
                break
            except ResourceError:
                if time.monotonic() > end:
                    raise
            time.sleep(_LOOK_S)
        return await_nodes(wanted, live_nodes, within_s=within_s)


if __name__ == "__main__":
    main(sys.argv[1:])
