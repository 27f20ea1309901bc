#!/usr/bin/env bash
# Runs and clusters on Kubernetes with the KubeRay operator, from the Kustomize files below cluster/kuberay.
#
#   cluster/kuberay.sh run OVERLAY CMD...     a run with a cluster of its own, which goes when it ends; prints its name
#   cluster/kuberay.sh logs NAME              follow what it prints
#   cluster/kuberay.sh stop NAME              stop it and its cluster; the same command again goes on where it was
#   cluster/kuberay.sh up OVERLAY             a cluster that stays, for many jobs
#   cluster/kuberay.sh submit CMD...          run this tree's code on it as a job, and follow its log
#   cluster/kuberay.sh dashboard [NAME]       open its dashboard, or a run's, on http://127.0.0.1:8265
#   cluster/kuberay.sh down                   take it away
#   cluster/kuberay.sh render OVERLAY [CMD...]    print what `run` or, without CMD, `up` would apply
#
# OVERLAY: cpu, gpu or spot. Environment: STAS_IMAGE, the image without its tag (`make image`; tags cpu and cuda);
# STAS_WORKERS, how many workers (1); STAS_NAME, the name of a run; STAS_COMPONENTS, any of "tls monitoring": to
# encrypt traffic, to let Prometheus in.
#
# Example: STAS_IMAGE=ghcr.io/me/stas STAS_WORKERS=4 cluster/kuberay.sh run gpu python workflows/train_folds.py
#              data.cohort=s3://my-bucket/cohort/cohort.parquet out=s3://my-bucket/run
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$PATH:$root/.venv/bin"
workers=${STAS_WORKERS:-1}
readonly SUBMITTER='{.items[*].status.containerStatuses[?(@.name=="ray-job-submitter")].state}'
grows_to=8 # maxReplicas of the manifests
work=$(realpath "$(mktemp -d)")
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$work"' EXIT

fail() {
    echo "$1" >&2
    exit 2
}

# Print one word of a command so that the submitter's shell gives it back. Ray joins the words anew for a second shell and
# quotes spaces alone: what that one would take for its own is refused.
word() {
    case $1 in
    *[\"\'\`\\\;\&\|\<\>\(\)\#\!]* | *\$* | *$'\n'*)
        fail "$1 has a character that a shell on the way takes for its own: set that key in a file of configs/ instead" ;;
    esac
    printf '%q' "$1"
}

# Print the manifests of an overlay: the cluster that stays or, with a command, a run with a cluster of its own.
render() {
    local overlay=$1 files component key
    shift
    [ -e "$root/cluster/kuberay/overlays/$overlay" ] || fail "there is no overlay $overlay, expected cpu, gpu or spot"
    [ -n "${STAS_IMAGE:-}" ] || fail "STAS_IMAGE is not set: the image without its tag, such as ghcr.io/me/stas"
    [[ $workers =~ ^[1-9][0-9]*$ ]] || fail "STAS_WORKERS = $workers, expected a number from 1"
    mkdir "$work/cluster" "$work/run"
    files=$(realpath --relative-to="$work/cluster" "$root/cluster/kuberay") # Kustomize takes no absolute paths
    {
        echo "resources: [$files/overlays/$overlay]"
        echo "images: [{name: registry.example/stas, newName: \"$STAS_IMAGE\"}]"
        [ -z "${STAS_COMPONENTS:-}" ] || echo "components:"
        for component in ${STAS_COMPONENTS:-}; do echo "  - $files/components/$component"; done
        echo "patches:"
        echo "  - target: {kind: RayCluster}"
        echo "    patch: |-"
        for key in minReplicas replicas; do
            echo "      - {op: replace, path: /spec/workerGroupSpecs/0/$key, value: $workers}"
        done
        # A run's workers are there from the start; a cluster that stays grows beyond them.
        [ $# = 0 ] && [ "$workers" -le "$grows_to" ] ||
            echo "      - {op: replace, path: /spec/workerGroupSpecs/0/maxReplicas, value: $workers}"
    } >"$work/cluster/kustomization.yaml"
    if [ $# = 0 ]; then
        kubectl kustomize "$work/cluster"
    else
        run_of "$@" >"$work/run/kustomization.yaml"
        kubectl kustomize "$work/run"
    fi
}

# Print the kustomization of a run: the cluster's, with a RayJob in place of the RayCluster.
run_of() {
    local command="python -m workflows.await_nodes $workers" part stage name
    for part in "$@"; do command+=" $(word "$part")"; done
    stage=$(basename "${2:-$1}" .py)
    name=${STAS_NAME:-stas-${stage//_/-}-$(date +%m%d-%H%M%S)}
    [[ $name =~ ^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$ ]] ||
        fail "the run's name is $name, expected at most 47 of a-z, 0-9 and - from a letter on; set STAS_NAME"
    cat <<PATCH
resources: [../cluster]
components: [$files/components/job]
patches:
  - patch: '{\$patch: delete, apiVersion: ray.io/v1, kind: RayCluster, metadata: {name: stas}}'
  - target: {kind: RayJob}
    patch: |-
      - {op: replace, path: /metadata/name, value: $name}
      - op: replace
        path: /spec/entrypoint
        value: |-
          $command
PATCH
}

# Run a command with the dashboard of a head at 127.0.0.1:8265, and its token in a file that only this user reads.
with_dashboard() {
    local service=$1 secret=$2
    shift 2
    kubectl get secret "$secret" --output 'go-template={{.data.auth_token | base64decode}}' >"$work/token"
    kubectl port-forward "service/$service" 8265:8265 >/dev/null & # on 127.0.0.1 alone
    RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$work/token "$@"
}

submit() {
    for _ in $(seq 30); do
        ! ray job list --address http://127.0.0.1:8265 >/dev/null 2>&1 || break
        sleep 1
    done
    ray job submit --address http://127.0.0.1:8265 --working-dir "$root" -- "$@"
}

# Follow what a run prints, from its first line, once its head has come.
follow() {
    local found name heads='' state='' told=''
    while true; do
        found=$(kubectl get "rayjob/$1" --output 'jsonpath={.status.rayClusterName}/{.status.jobDeploymentStatus}')
        name=${found%%/*}
        heads="ray.io/cluster=$name,ray.io/node-type=head"
        [ -z "$name" ] || state=$(kubectl get pods --selector "$heads" --output "jsonpath=$SUBMITTER")
        case $state in *running* | *terminated*) break ;; esac
        case $found in
        */Complete | */Failed) fail "$1 has ended (${found##*/}), and its cluster is gone; what it wrote is in its out=" ;;
        esac
        [ -n "$told" ] || echo "waiting for the head of $1 ..." >&2
        told=yes
        sleep "${STAS_POLL_S:-3}"
    done
    kubectl logs --follow --tail=-1 --container ray-job-submitter --selector "$heads"
}

show() {
    echo "http://127.0.0.1:8265; it asks for the token, which is in $RAY_AUTH_TOKEN_PATH until Ctrl-C"
    sleep infinity
}

action=${1:-}
[ $# = 0 ] || shift
case $action in
render) [ $# -gt 0 ] || fail "usage: cluster/kuberay.sh render OVERLAY [CMD...]" && render "$@" ;;
run)
    [ $# -gt 1 ] || fail "usage: cluster/kuberay.sh run OVERLAY CMD..."
    manifests=$(render "$@")
    kubectl apply --filename - <<<"$manifests" ;;
up)
    [ $# = 1 ] || fail "usage: cluster/kuberay.sh up OVERLAY"
    manifests=$(render "$@")
    kubectl apply --filename - <<<"$manifests"
    kubectl wait --for=condition=HeadPodReady --timeout=15m raycluster/stas ;;
submit) with_dashboard stas-head-svc stas submit "$@" ;;
dashboard)
    name=stas
    [ $# = 0 ] || name=$(kubectl get "rayjob/$1" --output 'jsonpath={.status.rayClusterName}')
    with_dashboard "$name-head-svc" "$name" show ;;
logs) follow "${1:?NAME of a run}" ;;
stop) kubectl delete "rayjob/${1:?NAME of a run}" ;;
down) kubectl delete raycluster/stas ;;
*) sed -n '2,17p' "$0" | cut -c3- >&2 && exit 2 ;;
esac
