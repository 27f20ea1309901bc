"""What the cluster's autoscaler may add, and how it is asked for nodes.

Ray's own autoscalers (of `ray up` and of KubeRay) tell the cluster nothing of their limits, and version 2 answers a
request that goes beyond them with not one node. So the limits are read where the autoscaler reads them; that is on the
head, where drivers run.
"""

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

NodeGroup = tuple[dict[str, float], int]
"""Resources of a kind of node, and how many of them there may be at most."""


def node_groups() -> list[NodeGroup]:
    """Return the kinds of nodes that the cluster's autoscaler may add; none where there is no autoscaler.

    A limit that is none is a very large number.
    """
    import ray

    from workflows.ray_internals import reported_groups

    return reported_groups() or groups_of(config_of(ray.get_runtime_context().gcs_address))


def groups_of(config: Mapping[str, Any]) -> list[NodeGroup]:
    """Return the kinds of nodes in an autoscaler's configuration, those with GPUs first, within its limit for all."""
    kinds = config.get("available_node_types", {})
    left = config.get("max_workers", sys.maxsize)
    groups = list[NodeGroup]()
    workers = [kinds[name] for name in kinds if name != config.get("head_node_type")]
    for kind in sorted(workers, key=lambda kind: -float(kind.get("resources", {}).get("GPU", 0))):
        resources = {name: float(kind["resources"][name]) for name in ("CPU", "GPU") if name in kind["resources"]}
        most = min(left, kind.get("max_workers", left))
        left -= most
        groups += [(resources, most)] if most and resources else []
    return groups


def ask_for(shapes: Sequence[Mapping[str, float]]) -> None:
    """Ask the autoscaler that the cluster have nodes of these resources, instead of all that was asked for before."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(shape) for shape in shapes])


@contextmanager
def asking_for_nodes() -> Iterator[None]:
    """Let the block ask for nodes; however it ends, none are asked for after it.

    What was asked for outlives the process that did: its nodes would never idle long enough to be ended. To be held
    round all that asks while Ray runs, as a generator that asks may be closed only after Ray is.
    """
    import ray

    try:
        yield
    finally:
        if ray.is_initialized() and node_groups():
            ask_for([])


@functools.lru_cache(maxsize=8)
def config_of(address: str) -> Mapping[str, Any]:
    """Return the configuration of the cluster's autoscaler; empty: it has none, or none that is read from here."""
    path = config_file(address)
    if path is None:
        from workflows.ray_internals import kuberay_config

        return kuberay_config()
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        print(f"what the autoscaler may add is not known, as {path} cannot be read: {error}", flush=True)
        return {}
    return found if isinstance(found, dict) else {}


def config_file(address: str) -> Path | None:
    """Return what the autoscaler of the cluster at this address was given, if it runs on this machine."""
    flag = b"--autoscaling-config="
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if f"--gcs-address={address}".encode() in words:
            for word in words:
                if word.startswith(flag):
                    return Path(word.removeprefix(flag).decode())
    return None
