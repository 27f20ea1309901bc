"""What every stage needs around its work: a Ray session, resources turned into a plan, manifests, progress."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

import stas_core
from stas_core import storage
from stas_core.config import Config, build
from stas_core.errors import ConfigError, ForeignOutputError, ResourceError, StaleOutputError, StasError, WriteError

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by `ray job submit` in the environment of the job's driver."""


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of one machine of the cluster."""

    num_cpus: float
    num_gpus: float = 0.0


@contextmanager
def ray_session(**local_options: Any) -> Iterator[list[Node]]:
    """Join the cluster this runs on (a Ray job, RAY_ADDRESS) or start a local one; give its nodes.

    `local_options` go to ray.init where a local Ray is started: num_cpus, num_gpus.

    Inside another session it is that one. An error of ours that comes back from a task leaves it as what it is, not in
    the wrappings that Ray puts round it.
    """
    if ray.is_initialized():
        with _unwrapped():
            yield cluster_nodes()
        return
    # The dashboard is not a luxury: Ray Train frees the resources of a stopped run through it.
    local = "RAY_ADDRESS" not in os.environ
    # "local", or a Ray that happens to run on this machine would be joined.
    own = {"address": "local", "include_dashboard": True, "dashboard_host": "127.0.0.1"}
    options = own | local_options if local else {}
    ray.init(logging_level="ERROR", log_to_driver=False, **options)
    try:
        if local:
            _protect_token()
        with _unwrapped():
            yield cluster_nodes()
    finally:
        ray.shutdown()


def own_error(error: BaseException) -> StasError | None:
    """Return the error of ours, or of Ray's full disk, that ended a task, which no retry mends; None: neither."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StasError) and not isinstance(cause, ray.exceptions.RayError):  # Ray's are of both kinds
            return cause
        if isinstance(cause, ray.exceptions.OutOfDiskError):
            return WriteError(f"Ray's disk is full: {cause}; free some space there, and run the same command again")
        cause = getattr(cause, "cause", None) or cause.__cause__
    return None


@contextmanager
def _unwrapped() -> Iterator[None]:
    try:
        yield
    except ray.exceptions.RayError as error:
        if (own := own_error(error)) is not None:
            raise own from None
        raise


def cluster_nodes() -> list[Node]:
    """Return the live nodes of the cluster this process is connected to."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in nodes]


def quieten_ray_data() -> None:
    """Turn off what Ray Data prints of its own accord: stages print their own progress."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # its own wrapping loses what it wraps on the way to the driver
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _protect_token() -> None:
    """Make Ray's authentication token readable by its owner only; Ray itself writes it for everyone."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if token.is_file():
        token.chmod(0o600)


@dataclass(frozen=True)
class Demand:
    """What a stage asks for: `num_groups` groups of `workers_per_group` workers; null sizes are worked out."""

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


def plan_groups(nodes: Sequence[Node], demand: Demand) -> Plan:
    """Work out how many groups run at once, and what each worker gets.

    A worker never straddles nodes; a group may. GPUs: one per worker where the cluster has any, else none. CPUs: an
    even share of each node for the workers that can run at once. A fixed `parallel_groups` is taken at its word
    where the cluster is still empty and grows later (autoscaling).

    Raises:
        ResourceError: the cluster cannot hold even one group; the message has the arithmetic.
    """
    gpus = demand.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.num_gpus >= 1 for node in nodes) else 0.0
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
        f"{_describe(nodes)}: {units} worker(s) of {cpus} CPU and {gpus:g} GPU fit, "
        f"{demand.workers_per_group} make a group"
    )
    slots = units // demand.workers_per_group
    if slots == 0 and demand.parallel_groups and not nodes:
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
    by_cpu = int(node.num_cpus // cpus)
    if gpus == 0:
        return by_cpu
    # Fractions must fit within single GPUs: 0.4 fits twice on one GPU, not five times on two.
    by_gpu = int(node.num_gpus) * int(1 / gpus + 1e-9) if gpus < 1 else int(node.num_gpus // gpus)
    return min(by_cpu, by_gpu)


def _describe(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.num_cpus for node in nodes), sum(node.num_gpus for node in nodes)
    return f"{len(nodes)} node(s) with {cpus:g} CPU and {gpus:g} GPU"


def code_version() -> dict[str, str]:
    """Return where the running code lies and which commit it is."""
    root = Path(stas_core.__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    # A Ray job runs an uploaded copy, without .git.
    return {"path": str(root), "commit": commit.stdout.strip() or "unknown (no git checkout)"}


def require_uri(key: str, value: str | None, example: str) -> str:
    """Return a data or output path that is safe to use, or say which key to set.

    Raises:
        ConfigError: the path is unset, or relative in a Ray job, whose working directory is a temporary copy.
    """
    command = f"python {' '.join([sys.argv[0], *sys.argv[1:]])} {key}={example}"
    if value is None:
        raise ConfigError(f"{key} is not set; give it in the config file, or run: {command}")
    if JOB_VARIABLE in os.environ and not storage.is_absolute(value):
        raise ConfigError(
            f"{key} = {value} is relative, but a Ray job works in a temporary copy that is deleted; give an absolute "
            f"path or URI that every node can reach, for example: {command}"
        )
    return storage.absolute(value)


MANIFEST, CLAIM = "manifest.json", "claim.json"


def is_finished(out: str, config: Config, inputs: str) -> bool:
    """Tell whether `out` holds a finished run of exactly this work: its config and its inputs' fingerprint."""
    uri = storage.join(out, MANIFEST)
    return storage.exists(uri) and not _changes(storage.read_json(uri), config, inputs)


def require_outside(out: str, inputs: Mapping[str, str | None]) -> None:
    """Refuse an output folder that is, or holds, what the stage reads (by key): it would be overwritten or deleted.

    Raises:
        ConfigError: naming both keys.
    """
    for key, uri in inputs.items():
        if uri is not None and storage.is_within(storage.absolute(uri), out):
            raise ConfigError(f"out = {out} holds {key} = {uri}, which is read; give out= a folder of its own")


def take(
    out: str, stage: str, *, force: bool, folders: Sequence[str] = (), work: Mapping[str, Any] | None = None
) -> None:
    """Mark `out` as a stage's, and `work` as what is done there; with `force`, delete what the stage left there.

    Raises:
        ForeignOutputError: it is another stage's, or another program's; `force` does not delete those.
        ConfigError: it is nobody's, and has one of the `folders` that the stage would tidy up, or would be deleted.
    """
    owner = _owner(out)
    if owner not in (None, stage):
        raise ForeignOutputError(f"{out} holds what {owner} made, not {stage}; use another out=")
    if owner is None:
        if force and storage.exists(out):
            raise ConfigError(
                f"--force would delete {out}, which holds none of this stage's outputs; give another out="
            )
        found = [name for name in folders if storage.exists(storage.join(out, name))]
        if found:
            raise ConfigError(f"{out} has {found[0]}/, which {stage} did not make and would change; give another out=")
    elif force:
        storage.remove(out)
    if not storage.exists(storage.join(out, CLAIM)):
        storage.write_json(storage.join(out, CLAIM), {"stage": stage, **(work or {})})


def _owner(out: str) -> str | None:
    """Return the stage whose marks a folder has; None: it has none."""
    for uri in (storage.join(out, CLAIM), storage.join(out, MANIFEST)):
        if storage.exists(uri):
            record = storage.read_json(uri)
            return str(record["stage"]) if isinstance(record, dict) and "stage" in record else "another program"
    return None


def claim(out: str, stage: str, config: Config, inputs: str, *, force: bool) -> None:
    """Take `out` for one piece of work, so that a later run resumes it and other work refuses it.

    Raises:
        StaleOutputError: it belongs to other work, naming the config keys that differ.
        ForeignOutputError: it belongs to another stage.
    """
    take(out, stage, force=force, work={"config": config.model_dump(mode="json"), "inputs": inputs})
    changes = _changes(storage.read_json(storage.join(out, CLAIM)), config, inputs)
    if changes:
        raise StaleOutputError(
            f"{out} holds a run that differs in: {', '.join(changes)}; use another out=, or --force to start over"
        )


def _changes(record: Mapping[str, Any], config: Config, inputs: str) -> list[str]:
    """Return what differs between recorded work and this work, in words.

    The recorded config is completed with today's defaults, so that an option added since does not count as a change.
    """
    try:
        old: Any = build(type(config), record["config"]).model_dump(mode="json")
    except ConfigError:
        old = record["config"]
    changes = _differences(old, config.model_dump(mode="json"))
    return changes if record["inputs"] == inputs else [*changes, "the input data"]


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(set(old) | set(new))
        return [line for k in keys for line in _differences(old.get(k), new.get(k), f"{path}.{k}" if path else str(k))]
    return [] if old == new else [f"{path} (was {old!r}, now {new!r})"]


def write_manifest(out: str, stage: str, *, config: Config, inputs: str, facts: Mapping[str, Any]) -> None:
    """Write a stage's manifest: the last file, so that its presence means the rest is whole."""
    record = {"stage": stage, "commit": code_version()["commit"], **facts}
    work = {"config": config.model_dump(mode="json"), "inputs": inputs}
    storage.write_json(storage.join(out, MANIFEST), record | work)


class Rate:
    """Counts items done, and says how fast and how long still."""

    def __init__(self, total: int):
        self._total = total
        self._done = 0
        self._first = 0
        self._start: float | None = None
        self._printed = 0.0

    def step(self, count: int = 1) -> str | None:
        """Count items that are done; return a line to print, at most every two seconds and at the end."""
        self._done += count
        now = time.monotonic()
        if self._start is None:  # workers start up before the first item; that is no measure of the rate
            self._first, self._start, self._printed = self._done, now, now
            return None
        if self._done < self._total and now - self._printed < 2:
            return None
        self._printed = now
        elapsed = now - self._start
        if elapsed < 1:  # items of a block come at once: over its first moments the rate would be fantastic
            return f"{self._done}/{self._total} images"
        rate = (self._done - self._first) / elapsed
        return (
            f"{self._done}/{self._total} images, {rate:.1f} images/s, ETA {duration((self._total - self._done) / rate)}"
        )


def duration(seconds: float) -> str:
    """Write a duration as h:mm:ss or m:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
