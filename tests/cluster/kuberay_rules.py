"""What KubeRay 1.7's operator asks of RayJobs and RayClusters beyond their schemas, and how schemas are held to.

The API server takes what the schema admits; the operator then refuses what breaks its rules, and the resource hangs.
"""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Manifest = dict[str, Any]

TOKENS_SINCE = (2, 52)
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
MAX_NAME = {"RayJob": 47, "RayCluster": 53}
MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}


def cluster_spec(manifest: Manifest) -> dict[str, Any]:
    """Return the cluster of a RayJob or RayCluster; empty: it has none of its own."""
    spec: dict[str, Any] = manifest["spec"]
    return spec if manifest["kind"] == "RayCluster" else spec.get("rayClusterSpec", {})


def groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the head group, then the groups of workers."""
    return [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]


def broken_rules(manifest: Manifest) -> list[str]:
    """Return the operator's rules that a RayJob or RayCluster breaks, a sentence each."""
    found = [*_of_names(manifest)]
    if manifest["kind"] == "RayJob":
        found += _of_jobs(manifest["spec"])
    if cluster := cluster_spec(manifest):
        found += [*_of_groups(cluster), *_of_autoscaling(cluster), *_of_tokens(cluster)]
    return found


def _of_names(manifest: Manifest) -> Iterator[str]:
    name, limit = manifest["metadata"]["name"], MAX_NAME[manifest["kind"]]
    if len(name) > limit or not DNS_LABEL.fullmatch(name):
        yield f"{name} is no DNS label of at most {limit} characters"


def _of_jobs(spec: dict[str, Any]) -> Iterator[str]:
    mode, selects = spec.get("submissionMode", "K8sJobMode"), bool(spec.get("clusterSelector"))
    if not selects and "rayClusterSpec" not in spec:
        yield "neither rayClusterSpec nor clusterSelector"
    if mode not in MODES:  # the schema takes any text
        yield f"{mode} is no submissionMode"
    if mode == "SidecarMode":
        yield from _of_sidecars(spec)
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "InteractiveMode with backoffLimit"
    if not spec.get("shutdownAfterJobFinishes"):
        for key in ("suspend", "ttlSecondsAfterFinished"):
            if spec.get(key):
                yield f"{key} without shutdownAfterJobFinishes"
    elif "deletionStrategy" in spec:
        yield "shutdownAfterJobFinishes with deletionStrategy"
    for key, least in {"backoffLimit": 0, "ttlSecondsAfterFinished": 0, "activeDeadlineSeconds": 1}.items():
        if spec.get(key, least) < least:
            yield f"{key} below {least}"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"


def _of_sidecars(spec: dict[str, Any]) -> Iterator[str]:
    for key in ("clusterSelector", "submitterPodTemplate", "submitterConfig"):
        if spec.get(key):
            yield f"SidecarMode with {key}"
    if "rayClusterSpec" in spec and _restarts(spec["rayClusterSpec"]["headGroupSpec"]):
        yield "SidecarMode with a head that restarts"


def _restarts(group: dict[str, Any]) -> bool:
    return bool(group["template"]["spec"].get("restartPolicy", "Never") != "Never")


def _of_groups(cluster: dict[str, Any]) -> Iterator[str]:
    for group in groups(cluster):
        name, parameters = group.get("groupName", "head"), group.get("rayStartParams", {})
        if not group["template"]["spec"].get("containers"):
            yield f"{name} has no container"
        if RESOURCES & set(parameters) and group.get("resources"):
            yield f"{name} has resources and rayStartParams of them"
        if "labels" in parameters:
            yield f"{name} has labels in rayStartParams"
        if not all(isinstance(value, str) for value in parameters.values()):
            yield f"{name} has rayStartParams that are no strings"
        if not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 1):
            yield f"{name} has replicas beyond minReplicas and maxReplicas"


def _of_autoscaling(cluster: dict[str, Any]) -> Iterator[str]:
    v2 = cluster.get("autoscalerOptions", {}).get("version") == "v2"
    head = cluster["headGroupSpec"]["template"]["spec"]
    own = {entry["name"] for container in head.get("containers", [])[:1] for entry in container.get("env", [])}
    if not cluster.get("enableInTreeAutoscaling"):
        if v2 or "RAY_enable_autoscaler_v2" in own:
            yield "autoscaler v2 without enableInTreeAutoscaling"
        return
    if "version" in cluster.get("autoscalerOptions", {}) and "RAY_enable_autoscaler_v2" in own:
        yield "the autoscaler's version twice"
    for group in groups(cluster):
        if v2 and _restarts(group):
            yield f"autoscaler v2 with pods that restart: {group.get('groupName', 'head')}"
        if group.get("suspend"):
            yield "a suspended group with the autoscaler"


def _of_tokens(cluster: dict[str, Any]) -> Iterator[str]:
    if cluster.get("authOptions", {}).get("mode") == "token":
        version = tuple(int(part) for part in re.findall(r"\d+", cluster.get("rayVersion", ""))[:2])
        if version < TOKENS_SINCE:
            yield "tokens need rayVersion 2.52.0 or later"


def schemas(folder: Path) -> dict[str, Any]:
    """Return the schema of each kind from a folder of CRDs; fields that it does not know are errors."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        crd = yaml.load(path.read_text(), yaml.CSafeLoader)
        version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
        found[crd["spec"]["names"]["kind"]] = _strict(copy.deepcopy(version["schema"]["openAPIV3Schema"]))
    return found


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string"):
        made |= {"type": ["integer", "string"]}
        made.pop("anyOf", None)
        made.pop("pattern", None)
    open_ended = made.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in made
    if isinstance(made.get("properties"), dict) and not open_ended:
        made["additionalProperties"] = False
    return made


def schema_errors(manifest: Manifest, of_kind: dict[str, Any]) -> list[str]:
    """Return what the schema of its kind finds in a manifest: path and message."""
    schema = copy.copy(of_kind[manifest["kind"]])
    schema["properties"] = schema["properties"] | {"metadata": {"type": "object"}}
    found = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in found]
