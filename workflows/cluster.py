"""The Ray session of every stage, and how its work is laid on the cluster's resources."""

import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stas_core.errors import ResourceError, StasError, WriteError
from workflows import planned
from workflows.address import JOB_VARIABLE, require_beyond_loopback, require_cluster
from workflows.progress import doing
from workflows.signals import kept_signals

MOST_NODES = 512
"""How many nodes of one kind a plan counts on where an autoscaler's limit is higher, or none."""
IDLE_ENDED = 4
"""Ray's reason for the end of a node that the autoscaler drained because it was idle (`NodeDeathInfo` in gcs.proto)."""
RAYS_ROOM = 2**20
"""Bytes that must be free for a local Ray's logs and sockets; it takes more as it runs."""
RAYS_WARNING = r"^\[[0-9-]+ [0-9:,]+ [DIW] [0-9]+ "
"""How lines of Ray's core below the level of errors begin: time, level, process."""


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of one machine of the cluster; without an id, of one that an autoscaler may add."""

    num_cpus: float
    num_gpus: float = 0.0
    node_id: str | None = field(default=None, compare=False)

    def fitting(self, gpus: float) -> int | None:
        """Return how many processes with `gpus` each fit by GPU; None: they need none, so CPUs alone decide.

        Fractions must fit within single GPUs: 0.4 fits twice on one GPU, not five times on two.
        """
        if gpus == 0:
            return None
        return int(self.num_gpus) * int(1 / gpus + 1e-9) if gpus < 1 else int(self.num_gpus // gpus)


def this_node() -> Any:
    """Return the scheduling strategy of actors and tasks that belong beside the process that starts them.

    Ray puts those without CPUs on any node: a machine that is lost would take them along, and with them the run.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextmanager
def ray_session(**local_options: Any) -> Iterator[list[Node]]:
    """Join the cluster this runs on (a Ray job, RAY_ADDRESS) or start a local Ray; yield its nodes.

    Reuses the session that is already open, if there is one. Errors of ours that come back from a task are raised as
    they are, without Ray's wrapping.

    Args:
        local_options: options of ray.init for a local Ray: num_cpus, num_gpus.
    """
    import ray  # imported in functions throughout: --help and wrong settings need not wait for it

    if ray.is_initialized():
        with _unwrapped():
            yield cluster_nodes()
        return
    # The dashboard is required: Ray Train frees the resources of a stopped run through it.
    local = "RAY_ADDRESS" not in os.environ
    # "local": else a Ray that happens to run on this machine would be joined.
    own: dict[str, Any] = {"address": "local", "include_dashboard": True, "dashboard_host": "127.0.0.1"}
    options = own | local_options if local else {}
    if local:
        _require_room()
        _provide_token()
    elif JOB_VARIABLE not in os.environ:  # a job's own cluster is there
        require_cluster(os.environ["RAY_ADDRESS"])
        require_beyond_loopback(os.environ["RAY_ADDRESS"], ray.util.get_node_ip_address())
    from workflows.ray_internals import quieten_full_clusters

    try:
        begun = "starting Ray on this machine" if local else "joining the cluster's Ray"
        quiet = nullcontext() if local else without_rays_warnings()
        with kept_signals(), doing(begun, at_once=True), quiet:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:  # a node that starts too slowly is a bare Exception of Ray's
        raise _not_joined(error) from error
    try:
        if local:
            _protect_token()
        quieten_full_clusters()
        nodes = cluster_nodes()
        live = [node for node in nodes if node.node_id]
        where = "a Ray of its own" if local else f"the Ray at {ray.get_runtime_context().gcs_address}"
        most = [Node(node.num_cpus, node.num_gpus) for node in nodes]
        grows = f", which may grow to {describe(most)}" if len(nodes) > len(live) else ""
        print(f"on {where}: {describe(live)}{grows}", flush=True)
        with _unwrapped():
            yield nodes
        planned.look()  # its workers end now
    finally:
        with doing("ending Ray"):
            ray.shutdown()


@contextmanager
def without_rays_warnings() -> Iterator[None]:
    """Suppress Ray's messages below the level of errors while it joins a cluster: it repeats them with every attempt.

    Ray's core writes to the descriptor itself, whatever the log level. The filter is a process of its own, so that the
    last words of a process that Ray aborts still come through.
    """
    grep = shutil.which("grep")
    if grep is None:
        yield
        return
    sys.stderr.flush()
    line = [grep, "--line-buffered", "-avE", RAYS_WARNING]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=2, start_new_session=True) as others:
        assert others.stdin is not None
        stderr = os.dup(2)
        os.dup2(others.stdin.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            others.stdin.close()


def own_error(error: BaseException) -> StasError | None:
    """Return the cause of a failure that no retry mends: an error of ours, or Ray's full disk; None: neither."""
    ray = sys.modules.get("ray")  # loaded, if the error is Ray's; for any other it need not be
    cause: BaseException | None = error
    while cause is not None:
        of_ray = ray is not None and isinstance(cause, ray.exceptions.RayError)
        if isinstance(cause, StasError) and not of_ray:  # errors from tasks are of both types
            return cause
        if ray is not None and isinstance(cause, ray.exceptions.OutOfDiskError):
            return WriteError(f"Ray's disk is full: {cause}; free some space there, and run the same command again")
        cause = getattr(cause, "cause", None) or cause.__cause__
    return None


@contextmanager
def _unwrapped() -> Iterator[None]:
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        if (own := own_error(error)) is not None:
            raise own from None
        raise


def cluster_nodes() -> list[Node]:
    """Return the live nodes of the cluster this process is connected to, and those that its autoscaler may add."""
    from workflows.autoscaling import node_groups

    nodes = live_nodes()
    counts = Counter(nodes)
    for resources, most in node_groups():
        kind = Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0))
        nodes += [kind] * (min(most, MOST_NODES) - counts[kind])
    return nodes


def live_nodes() -> list[Node]:
    """Return the live nodes of the cluster this process is connected to."""
    import ray

    nodes = [(node["Resources"], node["NodeID"]) for node in ray.nodes() if node["Alive"]]
    return [Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0), node_id) for resources, node_id in nodes]


def lost_nodes(before: Sequence[Node]) -> list[str]:
    """Return the addresses of nodes that are gone, but for those that an autoscaler ended because they were idle."""
    import ray

    found, ids = ray.nodes(), {node.node_id for node in before}
    gone = [node for node in found if node["NodeID"] in ids and not node["Alive"]]
    return [node["NodeManagerAddress"] for node in gone if node.get("DeathReason") != IDLE_ENDED]


def address_of(node_id: str) -> str:
    """Return the address of a node, for messages."""
    import ray

    return next((node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id), node_id)


def quieten_ray_data() -> None:
    """Silence Ray Data's own output: stages print their own progress."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # Ray Data's own wrapper loses the cause on the way to the driver
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _not_joined(error: Exception) -> ResourceError:
    import ray

    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    where = os.environ.get("RAY_ADDRESS")
    if where is None:
        return ResourceError(
            f"cannot start Ray on this machine: {reason.rstrip('.')}; it may be short of memory, disk or time: end "
            "other work, and run the same command again"
        )
    return ResourceError(
        f"cannot join the Ray at RAY_ADDRESS = {where}: {reason}; it must run Ray {ray.__version__} and this Python, "
        "and RAY_AUTH_MODE and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH must be the cluster's"
    )


def _require_room() -> None:
    """Check that a local Ray can write its logs and sockets: else it waits half a minute, and does not say for what.

    Raises:
        WriteError: it cannot, naming the folder.
    """
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray").absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(RAYS_ROOM))
    except OSError as error:
        raise WriteError(
            f"Ray cannot write its logs and sockets to {folder}: {os.strerror(error.errno or 0)}; free some space "
            "there, or set RAY_TMPDIR to a folder of a short path that has room and can be written, and run the same "
            "command again"
        ) from error


def _provide_token() -> None:
    """Give Ray a token in a private temporary folder if it cannot write one to the home folder."""
    if os.environ.get("RAY_AUTH_MODE") != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        return
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder / "auth_token", os.R_OK) or os.access(folder, os.W_OK):
            return
    except (OSError, RuntimeError):  # RuntimeError: there is no home at all
        pass  # no writable home: the case that the token below is for
    token = Path(tempfile.mkdtemp(prefix="ray_token_")) / "auth_token"  # mkdtemp: for this user only
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


def _protect_token() -> None:
    """Make Ray's authentication token readable by its owner only; Ray itself writes it for everyone."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if token.is_file():
        token.chmod(0o600)


@dataclass(frozen=True)
class Demand:
    """What a stage asks of the cluster: `num_groups` groups of `workers_per_group` workers; null sizes are derived."""

    num_groups: int
    workers_per_group: int = 1
    cpus_per_worker: int | None = None
    gpus_per_worker: float | None = None
    parallel_groups: int | None = None


@dataclass(frozen=True)
class Plan:
    """How groups of workers are laid on a cluster; `reason` is the arithmetic in words."""

    slots: int
    workers_per_group: int
    cpus_per_worker: int
    gpus_per_worker: float
    threads_per_worker: int
    reason: str

    @property
    def num_gpus(self) -> float:
        """GPUs that all groups hold."""
        return self.slots * self.workers_per_group * self.gpus_per_worker


def plan_groups(nodes: Sequence[Node], demand: Demand) -> Plan:
    """Plan how many groups run at once and what each worker gets.

    A worker never straddles nodes; a group may. GPUs: one per worker where the cluster has any, else none. CPUs: an
    even share of each node for the workers that can run at once. Where no node has a CPU yet, and no autoscaler tells
    what may come, a fixed `parallel_groups` is taken at its word.

    Raises:
        ResourceError: the cluster cannot hold even one group; the message has the arithmetic.
    """
    gpus = default_gpus(nodes) if demand.gpus_per_worker is None else demand.gpus_per_worker
    if 0 < gpus < 1 and demand.workers_per_group > 1:
        raise ResourceError(
            f"gpus_per_worker = {gpus} with workers_per_fold = {demand.workers_per_group}: workers of one fold cannot "
            "share a GPU; set workers_per_fold=1, or whole GPUs per worker"
        )
    wanted = demand.num_groups if demand.parallel_groups is None else min(demand.num_groups, demand.parallel_groups)
    cpus = demand.cpus_per_worker
    if cpus is None:
        cpus = _fair_cpus(nodes, gpus, wanted * demand.workers_per_group)
    units = sum(_units(node, cpus, gpus) for node in nodes)
    arithmetic = (
        f"{describe(nodes)}: {units} worker(s) of {cpus} CPU and {gpus:g} GPU fit, "
        f"{demand.workers_per_group} make a group"
    )
    slots = units // demand.workers_per_group
    if slots == 0 and demand.parallel_groups and not any(node.num_cpus for node in nodes):
        slots = wanted
    if slots == 0:
        raise ResourceError(
            f"{arithmetic}: no group can ever run; lower resources.workers_per_fold, resources.cpus_per_worker or "
            "resources.gpus_per_worker, or add nodes"
        )
    slots = min(slots, wanted)
    reason = f"{arithmetic}; {demand.num_groups} group(s) in {slots} slot(s)"
    return Plan(slots, demand.workers_per_group, cpus, gpus, cpus, reason)


def _fair_cpus(nodes: Sequence[Node], gpus: float, num_workers: int) -> int:
    """Return the largest CPU count per worker at which as many workers fit as at one CPU each."""
    able = min(num_workers, sum(_units(node, 1, gpus) for node in nodes))
    largest = max((int(node.num_cpus) for node in nodes), default=1) if able else 1
    for cpus in range(largest, 1, -1):
        if sum(_units(node, cpus, gpus) for node in nodes) >= able:
            return cpus
    return 1


def _units(node: Node, cpus: int, gpus: float) -> int:
    by_cpu, by_gpu = int(node.num_cpus // cpus), node.fitting(gpus)
    return by_cpu if by_gpu is None else min(by_cpu, by_gpu)


def default_gpus(nodes: Sequence[Node]) -> float:
    """Return the default GPUs of a process: one if the cluster has any, else none."""
    return 1.0 if any(node.num_gpus >= 1 for node in nodes) else 0.0


def describe(nodes: Sequence[Node]) -> str:
    """Describe the cluster's CPUs and GPUs in words, and how many of its nodes an autoscaler has yet to add."""
    cpus, gpus = sum(node.num_cpus for node in nodes), sum(node.num_gpus for node in nodes)
    to_come = sum(node.node_id is None for node in nodes)
    note = f" ({to_come} node(s) to come)" if 0 < to_come < len(nodes) else ""
    return f"{len(nodes)} node(s) with {cpus:g} CPU and {gpus:g} GPU{note}"
