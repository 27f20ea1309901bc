"""Who scores which map, and what is done where an actor is away; `test_tune_postprocess.py` kills real ones."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from stas_core.errors import ResourceError
from workflows import map_actors
from workflows.map_actors import AWAY_S, MapActors, Roster, SharedCalls, deal, share_out, split


class FakeActor:
    """Answers with its number and the keys, here; a list beside it says how it stands."""

    def __init__(self, number: int, asked: list[tuple[int, Sequence[int]]], dead: set[int]):
        def call(keys: Sequence[int], *args: Any) -> Callable[[], list[Any]]:
            asked.append((number, keys))

            def answer() -> list[Any]:
                if number in dead:
                    raise ray.exceptions.ActorUnavailableError("killed", b"0" * 16)
                return [(key, *args) for key in keys]

            return answer

        self.dice = SimpleNamespace(remote=call)
        self.prepare = SimpleNamespace(remote=lambda *_: ("asked", number))


class Cluster:
    """Three fake actors: the `dead` fail, the `late` have not started, the `lost` started once and wait for a node."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.asked = 0.0, list[tuple[int, Sequence[int]]]()
        self.dead, self.late, self.lost = set[int](), set[int](), set[int]()

        def wait(references: list[tuple[str, int]], **options: Any) -> tuple[list[tuple[str, int]], list[Any]]:
            self.now += options["timeout"]
            silent = {"started": self.late, "asked": self.late | self.lost}
            return [(kind, number) for kind, number in references if number not in silent[kind]], []

        def sleep(seconds: float) -> None:
            self.now += seconds

        monkeypatch.setattr(ray, "get", lambda answer: answer())
        monkeypatch.setattr(ray, "wait", wait)
        monkeypatch.setattr(map_actors, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=sleep))
        actors = [FakeActor(number, self.asked, self.dead) for number in range(3)]
        self.shared = MapActors(actors, [("started", number) for number in range(3)], homes=[], maps=[])

    def gather(self, calls: SharedCalls) -> set[int]:
        """Ask about six keys; return whom it took."""
        self.asked.clear()
        assert calls.gather("dice", {key: key % 3 for key in range(6)}, "x") == [(key, "x") for key in range(6)]
        return {number for number, _ in self.asked}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_an_actor_that_failed_is_stood_in_for_and_asked_again_later(cluster: Cluster) -> None:
    calls = SharedCalls(cluster.shared)
    cluster.dead.add(1)
    assert cluster.gather(calls) == {0, 1, 2}
    cluster.dead.clear()
    assert cluster.gather(calls) == {0, 2}
    cluster.now += AWAY_S
    assert cluster.gather(calls) == {0, 1, 2}


def test_an_actor_that_starts_late_is_used_from_then_on(cluster: Cluster) -> None:
    cluster.late.add(2)
    calls = SharedCalls(cluster.shared)
    assert cluster.gather(calls) == {0, 1}
    cluster.late.clear()
    assert cluster.gather(calls) == {0, 1, 2}


def test_a_study_that_begins_anew_does_not_ask_an_actor_that_has_lost_its_node(cluster: Cluster) -> None:
    cluster.lost.add(1)
    calls = SharedCalls(cluster.shared)
    assert cluster.gather(calls) == {0, 2}
    cluster.lost.clear()
    assert cluster.gather(calls) == {0, 1, 2}


def test_actors_that_are_all_away_are_waited_for_but_not_for_ever(cluster: Cluster) -> None:
    calls = SharedCalls(cluster.shared)
    cluster.dead.update(range(3))
    with pytest.raises(ResourceError, match="none of the 3 processes that score maps has answered for 60 s"):
        cluster.gather(calls)
    assert 60 < cluster.now < 80
    cluster.dead.clear()
    cluster.now += AWAY_S
    assert cluster.gather(calls) == {0, 1, 2}


def test_actors_that_never_start_are_named(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.late.update((1, 2))
    cluster.shared.await_start()
    assert "1 of 3 processes that score maps have started" in capsys.readouterr().out
    cluster.late.add(0)
    with pytest.raises(ResourceError, match=r"could start within 30 min.*ray status"):
        cluster.shared.await_start()


@given(st.integers(1, 40), st.integers(1, 9), st.sets(st.integers(0, 8)), st.integers(1, 5) | st.none())
def test_every_key_is_asked_for_once_and_at_home_where_that_is_possible(
    num_keys: int, num_actors: int, failed: set[int], keys_per_call: int | None
) -> None:
    roster = Roster(num_actors)
    assert roster.present(0) == []  # nobody has started
    roster.starting.clear()
    for number in failed - {num_actors - 1}:
        roster.note_failed(number, 0)
    present = roster.present(1)
    homes = {key: key % num_actors for key in range(num_keys)}
    calls = split(share_out(homes, present), keys_per_call)
    assert sorted(key for _, keys in calls for key in keys) == list(range(num_keys))
    assert all(number == homes[key] for number, keys in calls for key in keys if homes[key] in present)
    assert {number for number, _ in calls} <= set(present)
    assert keys_per_call is None or all(len(keys) <= keys_per_call for _, keys in calls)


def test_maps_of_every_fold_are_dealt_evenly() -> None:
    rng = np.random.default_rng(0)
    maps: list[Any] = [
        SimpleNamespace(fold=int(fold), row=SimpleNamespace(height=int(height), width=10))
        for fold, height in zip(rng.integers(0, 4, 50), rng.integers(5, 90, 50), strict=True)
    ]
    homes = deal(maps, 6)
    for left_out in (None, 0, 1, 2, 3):
        held = np.bincount([home for home, found in zip(homes, maps, strict=True) if found.fold != left_out])
        assert held.max() - held.min() <= 4
    assert np.ptp(np.bincount(homes)) <= 1
