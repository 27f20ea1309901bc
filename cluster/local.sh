#!/usr/bin/env bash
# A one-machine Ray cluster to submit jobs to, with token authentication on and the dashboard on loopback.
#
#   cluster/local.sh start            start it (state below ~/.stas-ray, or STAS_RAY_DIR: keep that path short)
#   cluster/local.sh submit CMD...    run CMD on it as a job and follow its log; the exit status is the job's
#   cluster/local.sh stop             stop it, and nothing else: other Rays of this machine stay up
#
# Example: cluster/local.sh submit python workflows/train_folds.py data.cohort=/data/cohort/cohort.parquet out=/data/run
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
state=${STAS_RAY_DIR:-$HOME/.stas-ray}
port=${STAS_RAY_PORT:-6390}
dashboard=${STAS_RAY_DASHBOARD_PORT:-8290}
export PATH="$root/.venv/bin:$PATH" # jobs look `python` up on the cluster's PATH
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$state/token" RAY_USAGE_STATS_ENABLED=0
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.5
export RAY_idle_worker_killing_time_threshold_ms=60000 # or every short task starts a process of its own
# Despite its name this works everywhere: the node's address is the loopback one, and all servers listen there alone.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
unset RAY_ADDRESS

start() {
    mkdir -p "$state"
    chmod 700 "$state"
    if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
        (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
    fi
    cd "$root" # a job without --working-dir starts here
    local options
    read -ra options <<<"${STAS_RAY_OPTIONS:-}"
    STAS_RAY_CLUSTER="$state" ray start --head --port="$port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
        --dashboard-agent-listen-port=$((dashboard + 1)) --temp-dir="$state/ray" "${options[@]}" >"$state/start.log" 2>&1 ||
        { cat "$state/start.log" >&2; exit 1; }
    # The head answers before its job agent does; a job submitted in between is refused.
    for _ in $(seq 240); do
        if curl --silent --output /dev/null "http://127.0.0.1:$((dashboard + 1))/" &&
            curl --silent --fail --output /dev/null --header @<(printf 'Authorization: Bearer %s' "$(<"$state/token")") \
                "http://127.0.0.1:$dashboard/api/jobs/"; then
            echo "Ray is up: dashboard http://127.0.0.1:$dashboard (token in $RAY_AUTH_TOKEN_PATH)"
            return
        fi
        sleep 0.5
    done
    echo "Ray did not come up within two minutes; see $state/start.log and $state/ray/session_latest/logs" >&2
    exit 1
}

submit() {
    ray job submit --address "http://127.0.0.1:$dashboard" --working-dir "$root" -- "$@"
}

# Print the processes that belong to this cluster: those that carry its mark in their environment, as everything that
# `ray start` begins does. A command line that merely names its folder is no reason to end a process.
members() {
    grep -lzxF "STAS_RAY_CLUSTER=$state" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 || true
}

# The raylet ends the workers and jobs that it started, in order; what is left then holds nothing. Told to end before the
# raylet, or at the same time, it keeps the raylet waiting, and so does Ray's monitor in any case.
stop() {
    # Not `ray stop`: that ends every Ray of the machine.
    local raylets left
    mapfile -t raylets < <(for pid in $(members); do grep -qx raylet "/proc/$pid/comm" 2>/dev/null && echo "$pid"; done)
    [ ${#raylets[@]} = 0 ] || kill "${raylets[@]}" 2>/dev/null || true
    for _ in $(seq 40); do
        kill -0 "${raylets[@]}" 2>/dev/null || break
        sleep 0.25
    done
    mapfile -t left < <(members)
    [ ${#left[@]} = 0 ] || kill -9 "${left[@]}" 2>/dev/null || true
}

case ${1:-} in
start) start ;;
submit) shift && submit "$@" ;;
stop) stop ;;
*) sed -n '2,8p' "$0" | cut -c3- >&2 && exit 2 ;;
esac
