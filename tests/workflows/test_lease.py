"""One run at a time in an output folder."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from stas_core import storage
from stas_core.errors import OccupiedOutputError
from workflows import lease
from workflows.out_folder import Outputs, claim_for_stage

STAGE = Outputs("score", ("masks/{id}.png",))


@pytest.fixture(params=["local", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else f"memory://{tmp_path}/out"


def altered(out: str, **values: object) -> None:
    """Make the lease somebody else's."""
    uri = f"{out}/lease.json"
    storage.write_json(uri, storage.read_json(uri) | values)


def test_a_second_run_is_refused_and_told_by_whom(out: str) -> None:
    with lease.hold(out, "score"):
        with (
            pytest.raises(
                OccupiedOutputError, match=rf"in use by another run \(score, process {os.getpid()} on .*since"
            ),
            claim_for_stage(out, STAGE, force=True),
        ):
            pass
        assert storage.exists(f"{out}/lease.json")
    assert not storage.exists(f"{out}/lease.json")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_lease_is_given_back_however_a_run_ends(out: str, error: type[BaseException]) -> None:
    with pytest.raises(error), claim_for_stage(out, STAGE, force=False):
        raise error
    with claim_for_stage(out, STAGE, force=False):
        pass


def test_the_lease_of_a_dead_process_is_taken_over_at_once(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid, process in ((ended.pid, "1"), (os.getpid(), "1")):  # gone; gone, and its id is another's now
        with lease.hold(out, "score"):
            altered(out, token="0" * 32, pid=pid, process=process)
        with lease.hold(out, "score"):
            pass
        assert f"taken over from a run that is gone: score, process {pid}" in capsys.readouterr().out
    assert storage.walk(out) == []


def test_a_process_that_nobody_has_waited_for_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.read() == b""
    time.sleep(0.2)
    assert lease.process_start(child.pid) is None
    child.wait()
    assert lease.process_start(os.getpid()) is not None


def test_a_suspended_process_of_this_machine_keeps_its_lease(tmp_path: Path) -> None:
    code = (
        "import sys, time; from workflows import lease\n"
        "with lease.hold(sys.argv[1], 'score'): print(1, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(lease.__file__).parents[1]) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        holder.send_signal(signal.SIGSTOP)
        altered(str(tmp_path), renewed=0.0)
        with pytest.raises(OccupiedOutputError, match=f"process {holder.pid}"), lease.hold(str(tmp_path), "score"):
            pass
        holder.kill()
        holder.wait()
    with lease.hold(str(tmp_path), "score"):  # at once
        pass


@pytest.mark.parametrize(("silent_s", "waited_s"), [(1000, 30), (20, 30), (5, 35), (-1000, 40)])
def test_a_holder_on_another_machine_is_waited_for_and_taken_over_if_it_stays_silent(
    out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], silent_s: float, waited_s: float
) -> None:
    """Its clock may be far behind or ahead: at least three renewals are waited for, and never more than 40 s."""
    with lease.hold(out, "score"):
        altered(out, token="0" * 32, machine="other", host="other", renewed=time.time() - silent_s)
    slept: list[float] = []
    began_s = time.monotonic()
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: began_s + sum(slept))
    lease.Lease(out, "score").acquire()
    told = capsys.readouterr().out
    assert "whether it still runs" in told and "taken over from a run that is gone" in told
    assert sum(slept) == pytest.approx(waited_s, abs=2)


def test_a_holder_is_not_silent_while_the_store_is_away(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with lease.hold(out, "score"):
        altered(out, token="0" * 32, machine="other", host="other", renewed=time.time() - 1000)
    passed: list[float] = []
    began_s, read = time.monotonic(), lease.read_holder
    monkeypatch.setattr(time, "sleep", passed.append)
    monkeypatch.setattr(time, "monotonic", lambda: began_s + sum(passed))

    def read_when_it_is_back(uri: str) -> lease.Holder | None:
        if sum(passed) >= 20 and 25.0 not in passed:
            passed.append(25.0)
        elif sum(passed) >= 60:  # the holder's next renewal gets through
            altered(out, renewed=time.time())
        return read(uri)

    monkeypatch.setattr(lease, "read_holder", read_when_it_is_back)
    with pytest.raises(OccupiedOutputError, match="wait until it ends"):
        lease.Lease(out, "score").acquire()


@pytest.mark.parametrize("behind_s", [0, 1000])
@pytest.mark.parametrize("is_alive", [True, False])
def test_a_holder_on_another_machine_that_renews_its_lease_is_left_alone_and_one_that_ends_is_followed(
    out: str, monkeypatch: pytest.MonkeyPatch, is_alive: bool, behind_s: float
) -> None:
    def act(_: float) -> None:
        if is_alive:
            altered(out, renewed=time.time() - behind_s)
        else:
            storage.remove(f"{out}/lease.json")

    with lease.hold(out, "score"):
        altered(out, token="0" * 32, machine="other", host="other", renewed=time.time() - behind_s - 5)
    monkeypatch.setattr(time, "sleep", act)
    with (
        pytest.raises(OccupiedOutputError, match=r"on other.*wait until it ends") if is_alive else nullcontext(),
        lease.hold(out, "score"),
    ):
        pass


def test_of_many_runs_one_takes_a_dead_lease_over(out: str) -> None:
    with lease.hold(out, "score"):
        altered(out, token="0" * 32, pid=2**22 + 1, process="1")

    def take(_: int) -> bool:
        try:
            lease.Lease(out, "score").acquire()
        except OccupiedOutputError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(8))) == 1


def test_a_run_that_lost_its_lease_ends_before_it_vouches_for_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was suspended on another machine, for so long that this one went on in its place, and ended."""
    from stas_core.config import Config

    monkeypatch.setattr(lease, "WATCHED_S", 0.0)
    with (
        pytest.raises(OccupiedOutputError, match=r"no longer this run's.* held by nobody"),
        claim_for_stage(str(tmp_path), STAGE, force=False) as folder,
    ):
        altered(str(tmp_path), machine="other", renewed=0.0)
        with claim_for_stage(str(tmp_path), STAGE, force=False):
            with pytest.raises(OccupiedOutputError, match="held by score, process"):
                folder.verify()
            with pytest.raises(OccupiedOutputError, match="held by score, process"):
                folder.write_manifest(Config(), "", {})
        folder.write_manifest(Config(), "", {})
    assert storage.walk(str(tmp_path)) == ["claim.json"]


def test_work_is_interrupted_when_the_lease_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    with pytest.raises(OccupiedOutputError, match="held by score, process 1 on"), lease.hold(str(tmp_path), "score"):
        time.sleep(0.2)
        assert storage.exists(f"{tmp_path}/lease.json")
        for _ in range(100):  # a renewal that was under way may still write over what is altered
            altered(str(tmp_path), token="0" * 32, pid=1)
            time.sleep(0.2)
    assert storage.read_json(f"{tmp_path}/lease.json")["pid"] == 1  # the other's stays


def test_trials_of_one_search_follow_each_other_on_any_machine(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    with lease.hold(out, "train_folds", within="/search"):
        altered(out, token="0" * 32, machine="other")
    with lease.hold(out, "train_folds", within="/search"):
        assert "waiting" not in capsys.readouterr().out


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"token": 3}'])
def test_what_is_no_lease_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "lease.json").write_bytes(data)
    with (
        pytest.raises(OccupiedOutputError, match=r"lease\.json is no lease \(.*delete it$"),
        lease.hold(str(tmp_path), "s"),
    ):
        pass
