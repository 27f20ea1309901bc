"""Faults of a cluster while a stage runs: the bytes of a quiet run, and nothing left behind (`make test-cluster`)."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from stas_core import config
from tests.cluster.faults import FAULTS, HURT, SPARE, Fault, Scene
from tests.cluster.hosts import why_no_hosts
from tests.cluster.hosts_with_ray import HEAD, Driver, HostsWithRay, wait_for
from tests.cluster.stages import STAGES, Inputs, Stage

LEFT_WITHIN_S = 30
"""How soon after a run nothing of it may be left on hosts."""
PAUSE_AT_MOST_S = 90
"""Beyond the fault itself: a minute where nothing else runs, of which Ray takes 40 s to call a cut node dead."""
SHORT = {("score_images", "cable of a worker pulled")}
"""What STAS_TEST_CLUSTER=short runs."""


def why_not() -> str | None:
    """Return why there are no faults here."""
    if not os.environ.get("STAS_TEST_CLUSTER"):
        return "minutes long: run by `make test-cluster`"
    return why_no_hosts()


class Lab:
    """A cluster, and what stages gave on it while nothing happened."""

    def __init__(self, folder: Path) -> None:
        self.cluster = HostsWithRay()
        self.inputs = Inputs(self.cluster.store, folder)
        self._folder = folder
        self._quiet: dict[str, dict[str, bytes]] = {}
        self._num_runs = 0

    def submit(self, stage: Stage, out: str) -> Driver:
        """Start a stage on the head."""
        settings = stage.settings(self.inputs, f"{self.cluster.store.uri}/{out}")
        return self.cluster.submit(stage.script, config.dump(settings))

    def new_out(self, stage: Stage) -> str:
        """Return the name of an empty folder of outputs."""
        self._num_runs += 1
        return f"{stage.script}_{self._num_runs}"

    def results(self, stage: Stage, out: str) -> dict[str, bytes]:
        """Return what a stage gave, but for what may depend on how it went."""
        found = stage.results(self.cluster.store.download(out, self._folder / out))
        assert found
        return found

    def quiet(self, stage: Stage) -> dict[str, bytes]:
        """Return what a stage gives where nothing happens."""
        if stage.name not in self._quiet:
            out = self.new_out(stage)
            driver = self.submit(stage, out)
            assert driver.wait(stage.timeout_s) == 0, driver.printed
            self._quiet[stage.name] = self.results(stage, out)
        return self._quiet[stage.name]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if reason := why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="stas-faults-") as folder:
        lab = Lab(Path(folder))
        try:
            lab.cluster.start_anew({HEAD})
            yield lab
        finally:
            lab.cluster.close()


def longest_pause_s(marks: list[float], scene: Scene) -> float:
    """Return for how long nothing came from the fault on, less the fault itself."""
    gaps = [after - max(before, scene.ended_s) for before, after in pairwise(marks) if after > scene.began_s]
    return max([0.0, *gaps])


@pytest.mark.long
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_fault_changes_no_byte_and_leaves_nothing(
    lab: Lab, stage: Stage, fault: Fault, record_property: Callable[[str, object], None]
) -> None:
    if os.environ.get("STAS_TEST_CLUSTER") == "short" and (stage.name, fault.name) not in SHORT:
        pytest.skip("left to the long list: STAS_TEST_CLUSTER=yes")
    quiet, out, marks = lab.quiet(stage), lab.new_out(stage), lab.cluster.store.put_times
    pattern = f"{out}/{stage.marks}"
    driver = lab.submit(stage, out)
    outcome = {"stage": stage.name, "fault": fault.name, "outcome": "failed"}
    record_property("fault", outcome)
    now = time.monotonic()
    scene = Scene(lab.cluster, lambda: lab.submit(stage, out), driver, out, now, now)
    try:
        wait_for(lambda: len(marks(pattern)) >= stage.num_before, driver, seconds=stage.timeout_s)
        scene.began_s = scene.ended_s = time.monotonic()
        fault.happen(scene)
        if stage.needs_all and HURT in scene.hurt:
            lab.cluster.start_worker(SPARE)
            scene.hurt.add(SPARE)
        status = scene.driver.wait(stage.timeout_s)
        assert status == 0, scene.driver.printed + lab.cluster.tracebacks()
        pause_s = longest_pause_s(marks(pattern), scene)
        outcome["pause"] = f"{pause_s:.0f} s"
        assert pause_s <= PAUSE_AT_MOST_S, scene.driver.printed
        found = lab.results(stage, out)
        assert found.keys() == quiet.keys()
        different = [name for name, data in quiet.items() if found[name] != data]
        outcome["outcome"] = f"{len(different)} of {len(quiet)} files differ" if different else "equal bytes"
        assert not different
        left = [name for name in lab.cluster.store.names(out) if name.startswith("state/") or name.endswith(".tmp")]
        assert not left
        end = time.monotonic() + LEFT_WITHIN_S
        while (held := lab.cluster.left_behind(but=scene.hurt)) and time.monotonic() < end:
            time.sleep(1)
        assert not held, "\n".join(held)
    finally:
        scene.driver.close()
        lab.cluster.start_anew(scene.hurt)
