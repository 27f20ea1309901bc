"""The manifests of cluster/kuberay.sh, as Kustomize renders them: their schemas, the operator's rules, our own."""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray._private import ray_constants  # private: the name of a variable that Ray reads

from tests.cluster import kuberay_rules
from tests.cluster.kuberay_rules import Manifest, broken_rules, cluster_spec, groups
from tests.cluster.tools import tool
from tests.conftest import ROOT
from workflows.console import STAGES
from workflows.scoring.slide_plan import CacheConfig

SCRIPT = ROOT / "cluster" / "kuberay.sh"
CRDS = ROOT.parent / "shared" / "cluster_drafts" / "crd"
KUBERNETES = "1.34"
OVERLAYS = ["cpu", "gpu", "spot"]
COMMAND = ["python", "workflows/train_folds.py", "data.cohort=s3://my-bucket/cohort.parquet", "out=s3://my-bucket/run"]


def render(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(tool('kubectl')).parent}:{os.environ['PATH']}"
    env = {"PATH": path, "HOME": "/nonexistent", "STAS_IMAGE": "ghcr.io/me/stas"} | settings
    line = [str(SCRIPT), "render", *arguments]
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=60, check=False)


@cache
def manifests(overlay: str, *command: str, workers: int = 1, components: str = "") -> list[Manifest]:
    done = render(overlay, *command, STAS_WORKERS=str(workers), STAS_COMPONENTS=components)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def one(kind: str, overlay: str, *command: str, **settings: Any) -> Manifest:
    found = [each for each in manifests(overlay, *command, **settings) if each["kind"] == kind]
    assert len(found) == 1
    return copy.deepcopy(found[0])


def both(overlay: str) -> list[Manifest]:
    return [one("RayCluster", overlay, components="tls"), one("RayJob", overlay, *COMMAND)]


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    if not CRDS.is_dir():
        pytest.skip(f"KubeRay's schemas are not at {CRDS}")
    return kuberay_rules.schemas(CRDS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_schemas_of_the_operator_hold(overlay: str, schemas: dict[str, Any]) -> None:
    for manifest in both(overlay):
        assert kuberay_rules.schema_errors(manifest, schemas) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rules_of_the_operator_hold(overlay: str) -> None:
    for manifest in both(overlay):
        assert broken_rules(manifest) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_and_guards_are_what_kubernetes_knows(overlay: str) -> None:
    for manifest in manifests(overlay):
        if manifest["kind"] != "RayCluster":
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    for group in groups(cluster_spec(one("RayCluster", overlay))):
        kubernetes_validate.validate(pod(group), KUBERNETES, strict=True)


def pod(group: dict[str, Any]) -> Manifest:
    template = group["template"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x", **template["metadata"]},
        "spec": template["spec"],
    }


# Where a typo is made, and what finds it.
TYPOS: dict[str, tuple[str, Callable[[Manifest], Any]]] = {
    "a field of the job": ("backofLimit", lambda job: job["spec"]),
    "a field of the cluster": ("rayversion", cluster_spec),
    "a field of a group": ("minreplicas", lambda job: groups(cluster_spec(job))[1]),
    "a field of a container": (
        "imagePulPolicy",
        lambda job: groups(cluster_spec(job))[1]["template"]["spec"]["containers"][0],
    ),
}


@pytest.mark.parametrize("what", TYPOS)
def test_a_typo_is_found_by_the_schema(what: str, schemas: dict[str, Any]) -> None:
    job = one("RayJob", "gpu", *COMMAND)
    name, place = TYPOS[what]
    place(job)[name] = "Always"
    (error,) = kuberay_rules.schema_errors(job, schemas)
    assert f"'{name}' was unexpected" in error
    job = one("RayJob", "gpu", *COMMAND)
    cluster_spec(job)["autoscalerOptions"]["version"] = "v3"
    assert "'v3' is not one of" in kuberay_rules.schema_errors(job, schemas)[0]


def test_a_typo_in_pods_and_guards_is_found() -> None:
    budget, policy = (one(kind, "gpu") for kind in ("PodDisruptionBudget", "NetworkPolicy"))
    budget["spec"]["minAvailible"] = budget["spec"].pop("minAvailable")
    policy["spec"]["ingress"][1]["ports"][0]["prot"] = 8265
    worker = pod(groups(cluster_spec(one("RayCluster", "gpu")))[1])
    worker["spec"]["containers"][0]["lifecycle"]["preStopp"] = worker["spec"]["containers"][0]["lifecycle"].pop(
        "preStop"
    )
    for wrong in (budget, policy, worker):
        with pytest.raises(kubernetes_validate.ValidationError, match=r"minAvailible|prot|preStopp"):
            kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def head(job: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = cluster_spec(job)["headGroupSpec"]
    return found


def worker(job: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = cluster_spec(job)["workerGroupSpecs"][0]
    return found


BROKEN: dict[str, Callable[[Manifest], Any]] = {
    "no DNS label": lambda job: job["metadata"].update(name="stas_run"),
    "at most 47 characters": lambda job: job["metadata"].update(name="s" * 48),
    "SidecarMode with clusterSelector": lambda job: job["spec"].update(clusterSelector={"ray.io/cluster": "stas"}),
    "SidecarMode with submitterPodTemplate": lambda job: job["spec"].update(submitterPodTemplate={"spec": {}}),
    "SidecarMode with submitterConfig": lambda job: job["spec"].update(submitterConfig={"backoffLimit": 1}),
    "SidecarMode with a head that restarts": lambda job: head(job)["template"]["spec"].update(restartPolicy="Always"),
    "pods that restart: workers": lambda job: worker(job)["template"]["spec"].update(restartPolicy="OnFailure"),
    "Sidecar is no submissionMode": lambda job: job["spec"].update(submissionMode="Sidecar"),
    "neither rayClusterSpec": lambda job: job["spec"].pop("rayClusterSpec"),
    "tokens need rayVersion": lambda job: cluster_spec(job).update(rayVersion="2.9.3"),
    "without enableInTreeAutoscaling": lambda job: cluster_spec(job).update(enableInTreeAutoscaling=False),
    "version twice": lambda job: head(job)["template"]["spec"]["containers"][0].update(
        env=[{"name": "RAY_enable_autoscaler_v2", "value": "1"}]
    ),
    "suspended group": lambda job: worker(job).update(suspend=True),
    "ttlSecondsAfterFinished without": lambda job: job["spec"].update(shutdownAfterJobFinishes=False),
    "with deletionStrategy": lambda job: job["spec"].update(deletionStrategy={"deletionRules": []}),
    "backoffLimit below 0": lambda job: job["spec"].update(backoffLimit=-1),
    "InteractiveMode with backoffLimit": lambda job: job["spec"].update(submissionMode="InteractiveMode"),
    "runtimeEnvYAML is no mapping": lambda job: job["spec"].update(runtimeEnvYAML="working_dir"),
    "head has resources and": lambda job: head(job).update(resources={"CPU": "0"}),
    "no strings": lambda job: head(job)["rayStartParams"].update({"num-cpus": 0}),
    "workers has labels": lambda job: worker(job)["rayStartParams"].update(labels="a=b"),
    "workers has no container": lambda job: worker(job)["template"]["spec"].update(containers=[]),
    "beyond minReplicas": lambda job: worker(job).update(replicas=9),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_rule_of_the_operator_is_found(message: str) -> None:
    job = one("RayJob", "gpu", *COMMAND)
    BROKEN[message](job)
    assert any(message in rule for rule in broken_rules(job)), broken_rules(job)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_run_is_restarted_with_a_new_cluster_and_leaves_nothing(overlay: str) -> None:
    job = one("RayJob", overlay, *COMMAND, workers=4)["spec"]
    assert job["submissionMode"] == "SidecarMode" and job["backoffLimit"] > 0
    assert job["shutdownAfterJobFinishes"] and job["ttlSecondsAfterFinished"] and job["activeDeadlineSeconds"]
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    workers = job["rayClusterSpec"]["workerGroupSpecs"][0]
    assert [workers[key] for key in ("minReplicas", "replicas", "maxReplicas")] == [4, 4, 4]
    assert "RayCluster" not in {each["kind"] for each in manifests(overlay, *COMMAND)}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_holds_for_every_pod(overlay: str) -> None:
    cluster = cluster_spec(one("RayCluster", overlay))
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert cluster["rayVersion"] == pins["ray"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in groups(cluster):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        assert container["image"] in ("ghcr.io/me/stas:cpu", "ghcr.io/me/stas:cuda")
        asked, most = ({**container["resources"][name]} for name in ("requests", "limits"))
        tmp = spec["volumes"][0]["emptyDir"]["sizeLimit"]
        assert most.pop("ephemeral-storage") == tmp and asked.pop("ephemeral-storage") and asked == most
        if "groupName" in group:  # besides slides: Ray's logs, and spill
            assert int(tmp.removesuffix("Gi")) * 2**30 > CacheConfig().max_gb * 1e9 + 20 * 2**30
        assert spec["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
        assert container["envFrom"] == [{"secretRef": {"name": "stas-s3"}}]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_worker_that_is_to_end_has_the_time_that_ray_takes(overlay: str) -> None:
    spec = worker(one("RayJob", overlay, *COMMAND))["template"]["spec"]
    (container,) = spec["containers"]
    assert hasattr(ray_constants, container["env"][0]["name"])
    assert int(container["env"][0]["value"]) < spec["terminationGracePeriodSeconds"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a namespace of processes needs root")
def test_the_hook_ends_ray_start_and_nothing_else(tmp_path: Path) -> None:
    container = worker(one("RayJob", "gpu", *COMMAND))["template"]["spec"]["containers"][0]
    hook = container["lifecycle"]["preStop"]["exec"]["command"][-1].split("; sleep")[0]
    (tmp_path / "ray").write_text("import time; time.sleep(60)")
    ray, other = f"{sys.executable} {tmp_path}/ray", f"{sys.executable} {tmp_path}/ray status"
    script = f"{ray} start --block & {other} & sleep 1; {hook}; sleep 1; jobs -r"
    line = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", script]
    left = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "status" in left and "start --block" not in left


def test_guards_mean_the_pods_of_the_cluster() -> None:
    cluster = cluster_spec(one("RayCluster", "cpu"))
    budget, policy = (one(kind, "cpu")["spec"] for kind in ("PodDisruptionBudget", "NetworkPolicy"))
    for group, node_type in zip(groups(cluster), ("head", "worker"), strict=True):
        labels = group["template"]["metadata"]["labels"] | {"ray.io/node-type": node_type}  # the operator adds this one
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()
        assert (budget["selector"]["matchLabels"].items() <= labels.items()) == (node_type == "head")
    assert policy["policyTypes"] == ["Ingress"]
    assert [rule.get("ports") for rule in policy["ingress"]] == [None, [{"protocol": "TCP", "port": 8265}]]


def test_prometheus_gets_in_where_the_exporters_listen_and_is_asked_for() -> None:
    (policy,) = (each for each in manifests("gpu", components="tls monitoring") if each["kind"] == "NetworkPolicy")
    (rule,) = (rule for rule in policy["spec"]["ingress"] if rule.get("ports", [{}])[0].get("port") == 8080)
    assert rule["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
    (container,) = groups(cluster_spec(one("RayCluster", "gpu")))[0]["template"]["spec"]["containers"]
    assert {"name": "metrics", "containerPort": 8080} in container["ports"]


@pytest.mark.parametrize(("workers", "most"), [(2, 8), (8, 8), (12, 12)])
def test_a_cluster_that_stays_may_have_the_workers_it_begins_with(workers: int, most: int) -> None:
    (cluster,) = (each for each in manifests("cpu", workers=workers) if each["kind"] == "RayCluster")
    group = worker(cluster)
    assert [group[key] for key in ("minReplicas", "replicas", "maxReplicas")] == [workers, workers, most]


KUBECTL = """#!/bin/bash
# Stands in for kubectl: a run whose cluster has no name at first, and whose head waits for its image.
echo "$*" >> "$LOG"
asked=$(wc -l < "$LOG")
case "$*" in
get\\ rayjob/gone*) echo -n stas-gone-abcde/Failed ;;
get\\ rayjob/*) [ $asked -lt 2 ] && echo -n / || echo -n stas-run-abcde/Initializing ;;
get\\ pods*gone*) ;;
get\\ pods*) [ $asked -lt 5 ] && echo -n '{"waiting":{"reason":"PodInitializing"}}' || echo -n '{"running":{}}' ;;
logs*) echo "all of it" ;;
esac
"""


def test_logs_of_a_run_are_whole_and_waited_for(tmp_path: Path) -> None:
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "STAS_POLL_S": "0"}

    def logs(run: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPT), "logs", run], env=env, capture_output=True, text=True, timeout=60, check=False
        )

    done = logs("stas-run")
    assert done.stdout == "all of it\n" and done.stderr == "waiting for the head of stas-run ...\n"
    selector = "--selector ray.io/cluster=stas-run-abcde,ray.io/node-type=head"
    asked = (tmp_path / "log").read_text().splitlines()
    assert asked[-1] == f"logs --follow --tail=-1 --container ray-job-submitter {selector}" and len(asked) == 6
    gone = logs("gone")
    assert gone.returncode == 2 and gone.stderr == (
        "gone has ended (Failed), and its cluster is gone; what it wrote is in its out=\n"
    )


def test_where_machines_may_be_taken_back_the_head_is_elsewhere() -> None:
    def wanted(group: dict[str, Any]) -> str:
        return json.dumps(group["template"]["spec"]["affinity"])

    first, workers = groups(cluster_spec(one("RayCluster", "spot")))
    labels = set(re.findall(r'"key": "(\S+)"', wanted(workers)))
    assert labels == set(re.findall(r'"key": "(\S+)"', wanted(first))) and "karpenter.sh/capacity-type" in labels
    assert '"In"' in wanted(workers) and '"NotIn"' not in wanted(workers) and '"In"' not in wanted(first)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_can_be_run(stage: str) -> None:
    job = one("RayJob", "cpu", "python", f"workflows/{stage}.py", "out=s3://my-bucket/run")
    assert broken_rules(job) == []
    assert job["metadata"]["name"].startswith(f"stas-{stage.replace('_', '-')}-")
    assert job["spec"]["entrypoint"] == (
        f"python -m workflows.await_nodes 1 python workflows/{stage}.py out=s3://my-bucket/run"
    )


def test_words_of_the_command_arrive_as_they_were() -> None:
    words = ["python", "workflows/score_slides.py", "slides=s3://my-bucket/a slide/*.svs", "phantom={num_slides: 3}"]
    entrypoint = one("RayJob", "cpu", *words)["spec"]["entrypoint"]
    given = subprocess.run(["bash", "-c", f"printf '%s\\n' {entrypoint}"], capture_output=True, text=True, check=True)
    assert given.stdout.splitlines() == ["python", "-m", "workflows.await_nodes", "1", *words]
    for wrong in ("out=s3://b/$HOME", "out=a;b", "a=(1)", "a='b'", "a=`b`", "a=b\nc"):
        refused = render("cpu", "python", "x.py", wrong)
        assert refused.returncode == 2 and "set that key in a file of configs/ instead" in refused.stderr


def test_what_is_missing_or_wrong_is_said() -> None:
    for arguments, settings, said in (
        (["tpu"], {}, "there is no overlay tpu, expected cpu, gpu or spot"),
        (["cpu"], {"STAS_IMAGE": ""}, "STAS_IMAGE is not set"),
        (["cpu"], {"STAS_WORKERS": "0"}, "STAS_WORKERS = 0, expected a number from 1"),
        (["cpu", "python", "x.py"], {"STAS_NAME": "My_run"}, "the run's name is My_run"),
        ([], {}, "usage: cluster/kuberay.sh render OVERLAY"),
    ):
        refused = render(*arguments, **settings)
        assert refused.returncode == 2 and said in refused.stderr and refused.stdout == ""


def test_no_secret_gets_into_a_manifest_or_lies_in_a_file() -> None:
    planted = {name: "planted-secret" for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "RAY_AUTH_TOKEN")}
    for arguments in (["gpu"], ["gpu", *COMMAND]):
        done = render(*arguments, **planted)
        assert done.returncode == 0 and "planted-secret" not in done.stdout + done.stderr
    assert "Secret" not in {each["kind"] for each in manifests("gpu")}
    given = re.compile(r"(?i)(?:secret|token|password|access_?key\w*)[\"']?\s*[:=]\s*[\"']?([\w+/-]{16,})")
    for path in (ROOT / "cluster").rglob("*"):
        assert path.is_dir() or not given.search(path.read_text()), path
