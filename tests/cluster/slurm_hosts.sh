#!/usr/bin/env bash
# A Slurm cluster of two nodes on one machine, for tests: each node is a set of Linux namespaces with a network, a name,
# processes and a /tmp of its own; they share the other folders, as nodes of a cluster share a disk. Root only.
#
#   slurm_hosts.sh up FOLDER          start munged, slurmctld (on n1) and two slurmd; state in FOLDER, not below /tmp
#   slurm_hosts.sh in FOLDER CMD...   run CMD on n1
#   slurm_hosts.sh down FOLDER        end all of it
set -euo pipefail
action=$1 folder=$(realpath "$2")
shift 2
root=$(cd "$(dirname "$0")/../.." && pwd)
net=stas-$(printf %s "$folder" | cksum | cut -d' ' -f1) # names of namespaces and links are the folder's own

inside() { # NODE CMD...
    local node=$1
    shift
    nsenter --target "$(pgrep -P "$(cat "$folder/$node.unshare")")" --mount --uts --net --pid --wd="$PWD" \
        env SLURM_CONF="$folder/slurm.conf" "$@"
}

# shellcheck disable=SC2016 # what runs inside
boot() { # NODE: hold its namespaces open
    ip netns exec "$net-$1" unshare --mount --uts --pid --fork --kill-child bash -euc '
        mount --make-rprivate /
        hostname "$1"
        mount -t proc proc /proc
        mount -t tmpfs -o mode=1777 tmpfs /mnt
        for path in "${@:3}"; do # code that lies below the /tmp of this machine is still seen
            case $path in /tmp/*)
                mkdir -p "/mnt${path#/tmp}"
                mount --bind "$path" "/mnt${path#/tmp}"
            esac
        done
        mount --move /mnt /tmp
        mount -t tmpfs -o mode=1777 tmpfs /dev/shm
        mount --bind "$2/hosts" /etc/hosts
        mount -t tmpfs tmpfs /sys/fs/cgroup # slurmd does not start without, although nothing here is held by cgroups
        for controller in freezer memory cpuset devices cpuacct; do
            mkdir "/sys/fs/cgroup/$controller"
            mount -t cgroup -o "$controller" cgroup "/sys/fs/cgroup/$controller"
        done
        touch "$2/$1.booted"
        exec sleep infinity' boot "$1" "$folder" "$root" "${STAS_VENV:-}" </dev/null >"$folder/$1.boot.log" 2>&1 &
    echo $! >"$folder/$1.unshare"
    for _ in $(seq 200); do
        [ ! -e "$folder/$1.booted" ] || return 0
        sleep 0.1
    done
    cat "$folder/$1.boot.log" >&2
    exit 1
}

configure() {
    printf '127.0.0.1 localhost\n10.78.0.1 n1\n10.78.0.2 n2\n' >"$folder/hosts"
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    echo CgroupPlugin=cgroup/v1 >"$folder/cgroup.conf"
    echo "NodeName=n[1-2] Name=gpu File=/dev/null" >"$folder/gres.conf" # what Slurm counts, not what computes
    cat >"$folder/slurm.conf" <<CONF
ClusterName=stas
SlurmctldHost=n1
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=10
StateSaveLocation=$folder/ctld
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/ctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/ctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-2] CPUs=1 RealMemory=8000 Gres=gpu:1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10
CONF
}

up() {
    mkdir -p "$folder/ctld" "$folder/n1" "$folder/n2"
    configure
    ip netns add "$net-n1"
    ip netns add "$net-n2"
    ip link add eth0 netns "$net-n1" type veth peer name eth0 netns "$net-n2"
    for node in n1 n2; do
        ip -n "$net-$node" addr add "10.78.0.${node#n}/24" dev eth0
        ip -n "$net-$node" link set lo up
        ip -n "$net-$node" link set eth0 up
        boot "$node"
    done
    # In a namespace of n1, so that it ends with it.
    inside n1 munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    inside n1 slurmctld
    for node in n1 n2; do inside "$node" slurmd -N "$node"; done
    for _ in $(seq 60); do
        [ "$(inside n1 sinfo --noheader --states=idle --format=%D --partition=low || true)" != 2 ] || return 0
        sleep 1
    done
    tail -n 20 "$folder"/*.log >&2
    exit 1
}

down() {
    for node in n1 n2; do
        [ ! -e "$folder/$node.unshare" ] || kill -KILL "$(cat "$folder/$node.unshare")" 2>/dev/null || true
        ip netns del "$net-$node" 2>/dev/null || true
    done
}

case $action in
up) up ;;
in) inside n1 "$@" ;;
down) down ;;
esac
