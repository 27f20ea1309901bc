"""What happens to clusters, each as something that is done to one on which a stage runs."""

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from tests.cluster.faulty_store import Failure
from tests.cluster.hosts_with_ray import HEAD, WORKERS, Driver, HostsWithRay

HURT = WORKERS[0]
"""The worker that faults happen to."""
SPARE = 4
"""The worker that joins in the middle, or in place of one that was lost."""
SPOILED_S = 40
"""For how long a cable is a poor one."""
AWAY_S = 25
"""For how long the object store is away."""
DRAINED_WITHIN_S = 20
"""Between the notice of a spot machine's end and that end."""


@dataclass
class Scene:
    """A stage that runs on a cluster."""

    cluster: HostsWithRay
    submit: Callable[[], Driver]
    """Starts the same command on the head."""
    driver: Driver
    """The one that runs now."""
    out: str
    """Where it writes, below the bucket."""
    began_s: float
    """When the fault began, by the monotonic clock."""
    ended_s: float
    """Until when the fault itself kept the stage from going on; as it began, where it needs no time."""
    hurt: set[int] = field(default_factory=set)
    """Hosts that are to be started anew before the next fault."""

    def over(self) -> None:
        """Note that the fault is over: the pause is counted from now."""
        self.ended_s = time.monotonic()


@dataclass(frozen=True)
class Fault:
    """Something that happens to a cluster."""

    name: str
    happen: Callable[[Scene], None]
    """Lets it happen; what passes by itself has passed when this returns."""


def _pull_cable(scene: Scene) -> None:
    scene.hurt.add(HURT)
    scene.cluster.network.hosts[HURT].cut()


def _pull_cable_for_a_while(scene: Scene, seconds: float) -> None:
    _pull_cable(scene)
    time.sleep(seconds)
    scene.cluster.network.hosts[HURT].mend()
    scene.over()


def _spoil_cable(scene: Scene, **cable: float) -> None:
    host = scene.cluster.network.hosts[HURT]
    scene.hurt.add(HURT)
    host.spoil(**cable)
    try:
        time.sleep(SPOILED_S)
    finally:
        host.repair()
    scene.over()


def _power_off(scene: Scene) -> None:
    scene.hurt.add(HURT)
    scene.cluster.network.hosts[HURT].turn_off()


def _lose_head(scene: Scene) -> None:
    """Lose the head, and the driver with it; start a cluster anew, and the same command on it."""
    scene.hurt.add(HEAD)
    scene.cluster.head.turn_off()
    scene.driver.close()
    scene.cluster.start_anew({HEAD})
    scene.over()
    scene.hurt.clear()
    scene.driver = scene.submit()


def _lose_store(scene: Scene, failure: Failure) -> None:
    scene.cluster.store.failure = failure
    try:
        time.sleep(AWAY_S)
    finally:
        scene.cluster.store.failure = None
    scene.over()


def _fill(scene: Scene, folder: str) -> None:
    """Fill a disk of a worker to the last byte."""
    scene.hurt.add(HURT)
    path = scene.cluster.network.hosts[HURT].root / folder / "full"
    with path.open("wb") as file:
        while free := os.fstatvfs(file.fileno()).f_bavail:
            with suppress(OSError):  # the stage, too, takes and gives back room: look again at how much there is
                os.posix_fallocate(file.fileno(), path.stat().st_size, free * os.fstatvfs(file.fileno()).f_bsize)


def _join(scene: Scene) -> None:
    scene.cluster.start_worker(SPARE)
    scene.hurt.add(SPARE)


def _drain(scene: Scene) -> None:
    """Give notice of a worker's end, as clouds do of a spot machine's, and end it."""
    cluster, host = scene.cluster, scene.cluster.network.hosts[HURT]
    scene.hurt.add(HURT)
    listed = cluster.on_head("python", "-c", "import ray; ray.init(logging_level='ERROR'); print(ray.nodes())")
    found = re.findall(rf"'NodeID': '(\w+)', 'Alive': True, 'NodeManagerAddress': '{re.escape(host.address)}'", listed)
    reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
    cluster.on_head(
        "ray", "drain-node", f"--node-id={found[0]}", *reason, f"--deadline-remaining-seconds={DRAINED_WITHIN_S}"
    )
    time.sleep(DRAINED_WITHIN_S)
    host.turn_off()


def _stop_worker(scene: Scene) -> None:
    """Stop all processes of a worker for a while, as a suspended virtual machine has them."""
    host = scene.cluster.network.hosts[HURT]
    scene.hurt.add(HURT)
    host.signal(signal.SIGSTOP)
    time.sleep(20)
    host.signal(signal.SIGCONT)
    scene.over()


def _delete_out(scene: Scene) -> None:
    """Delete the outputs; the stage ends with that reason, and the same command starts anew."""
    scene.cluster.store.remove(scene.out)
    status = scene.driver.wait(60)
    printed = scene.driver.printed
    assert status == 2 and "was deleted while this run worked there" in printed and "Traceback" not in printed, printed
    assert not scene.cluster.store.names(scene.out)
    scene.over()
    scene.driver = scene.submit()


STORE_FAILURES: list[tuple[str, Failure]] = [("answers 503", "503"), ("hangs", "hang"), ("resets", "reset")]
FAULTS = [
    Fault("cable of a worker pulled", _pull_cable),
    Fault("cable pulled for 20 s", partial(_pull_cable_for_a_while, seconds=20)),
    Fault("packets of a worker 50 ms late, 5 % lost, for 40 s", partial(_spoil_cable, latency_ms=50, lost_share=0.05)),
    Fault("cable of a worker carries 200 KB/s for 40 s", partial(_spoil_cable, kb_per_s=200)),
    Fault("worker powered off", _power_off),
    Fault("head lost, same command on a new one", _lose_head),
    *(Fault(f"object store {told} for {AWAY_S} s", partial(_lose_store, failure=one)) for told, one in STORE_FAILURES),
    Fault("full disk of a worker", partial(_fill, folder="tmp")),
    Fault("full /dev/shm of a worker", partial(_fill, folder="dev/shm")),
    Fault("worker joins", _join),
    Fault(f"worker drained, ends after {DRAINED_WITHIN_S} s", _drain),
    Fault("worker stopped for 20 s", _stop_worker),
    Fault("outputs deleted, same command again", _delete_out),
]
