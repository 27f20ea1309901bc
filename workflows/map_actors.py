"""Actors that share the maps of threshold studies: each holds some of them, and scores settings on its own.

All studies use the same actors. What comes back goes by image, so nothing depends on which actor holds what; an actor
that is lost, or not yet there, is stood in for by the others.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from stas_core import storage
from stas_core.data import images as image_files
from stas_core.data.fields import load_mask
from stas_core.errors import ConfigError, ResourceError
from stas_core.predict.postprocess import PostprocessConfig
from stas_core.runs import OofMap
from stas_core.search.level_sets import MapScorer, find_level_sets
from stas_core.search.space import Setting, Space
from stas_core.search.threshold_search import DiceTable, Proposer, ScoredSetting, ThresholdSearchConfig, dice_of_maps
from workflows.cluster import Node
from workflows.progress import Progress, doing

ACTOR_CPUS, STUDY_CPUS = 0.9, 0.01
"""What an actor and a study reserve: studies mostly wait for actors, and must always fit beside them."""
MAX_RESTARTS = 3
"""Of an actor; what ends it more often is not the cluster."""
START_S, FIRST_START_S = 10.0, 1800.0
"""How long a search waits for all actors, and for the first: an autoscaler may have to start a machine for it."""
AWAY_S = 10.0
"""How long an actor that failed is left alone."""
SILENCE_S = 60.0
"""How long a study waits where no actor answers."""


def load_scorer(found: OofMap) -> MapScorer:
    """Read a map and its truth, and find its level sets.

    Raises:
        ConfigError: the map is not of its image.
    """
    prob_u8 = image_files.decode_map(storage.read_bytes(found.uri), found.uri)
    truth = load_mask(found.row)
    if prob_u8.shape != truth.shape:
        raise ConfigError(
            f"{found.uri} is {prob_u8.shape} (height, width), its truth {truth.shape}: the cohort has changed since "
            "the run; set cohort= to the one it was trained on"
        )
    return MapScorer(prob_u8, truth, find_level_sets(prob_u8))


class MapActor:
    """Scores settings on maps, each read when it is first asked for; proposes settings, too."""

    def __init__(self, space: Space, search: ThresholdSearchConfig):
        import cv2

        cv2.setNumThreads(1)
        self._scorers: dict[int, MapScorer] = {}
        self._proposers = defaultdict[str, Proposer](lambda: Proposer(space, search))

    def prepare(self, images: Sequence[int], maps: Sequence[Any]) -> list[None]:
        """Read maps, by their numbers, and find their level sets; `maps` is a list of one reference to all of them."""
        import ray

        if new := [image for image in images if image not in self._scorers]:
            found: Sequence[OofMap] = ray.get(maps[0])
            self._scorers |= {image: load_scorer(found[image]) for image in new}
        return [None] * len(images)

    def dice(self, images: Sequence[int], maps: Sequence[Any], configs: Sequence[PostprocessConfig]) -> DiceTable:
        """Return the Dice of maps under settings: (maps, settings)."""
        self.prepare(images, maps)
        table: DiceTable = dice_of_maps([self._scorers[image] for image in images], configs).T
        return table

    def propose(self, numbers: Sequence[int], study: str, told: Sequence[ScoredSetting]) -> list[Setting]:
        """Return settings of a study by their numbers."""
        return [self._proposers[study].propose(number, told) for number in numbers]


@dataclass(frozen=True)
class MapActors:
    """The actors, and which of them each map is dealt to; studies in other processes are given it whole."""

    actors: list[Any]
    started: list[Any]
    """References, each ready when its actor is."""
    homes: list[int]
    """Of each map, the number of the actor that holds it."""
    maps: list[Any]
    """One reference to all maps; to the constructors, Ray would say that restarts may miss it."""

    @classmethod
    @contextmanager
    def started_for(
        cls, maps: Sequence[OofMap], nodes: Sequence[Node], *, space: Space, search: ThresholdSearchConfig
    ) -> Iterator["MapActors"]:
        """Start an actor per CPU, those that an autoscaler may add among them; yield once every map has been read.

        Raises:
            ConfigError: a map is not of its image.
            ResourceError: no actor could be started.
        """
        import ray

        num_actors = min(len(maps), max(1, sum(int(node.num_cpus) for node in nodes)))
        # No retries of calls: they would wait until an actor is back, where others can stand in for it.
        placed: Any = ray.remote(MapActor).options(
            num_cpus=ACTOR_CPUS, max_restarts=MAX_RESTARTS, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        actors = [placed.remote(space, search) for _ in range(num_actors)]
        try:
            shared = cls(
                actors,
                started=[actor.prepare.remote([], []) for actor in actors],
                homes=deal(maps, num_actors),
                maps=[ray.put(list(maps))],
            )
            shared.await_start()
            shared._prepare()
            yield shared
        finally:
            for actor in actors:
                ray.kill(actor)

    @doing("starting the processes that score maps")
    def await_start(self) -> None:
        """Wait for all actors for a while, for the first for longer; say which are not there.

        Raises:
            ResourceError: not one came.
        """
        import ray

        num_actors = len(self.started)
        ready, _ = ray.wait(self.started, num_returns=num_actors, timeout=START_S)
        if len(ready) < num_actors:
            print(
                f"{len(ready)} of {num_actors} processes that score maps have started, one per CPU of the cluster; the "
                "others are used from when they have room",
                flush=True,
            )
        if not ready and not ray.wait(self.started, timeout=FIRST_START_S)[0]:
            raise ResourceError(
                f"no process that scores maps could start within {FIRST_START_S / 60:.0f} min: each takes a CPU; "
                "see what else runs on the cluster (ray status), and run the same command again"
            )

    def _prepare(self) -> None:
        progress = Progress(len(self.homes), label="level sets: ")
        homes = dict(enumerate(self.homes))
        calls = SharedCalls(self)
        calls.gather("prepare", homes, self.maps, keys_per_call=1, note=lambda keys: progress.step(len(keys)))


def deal(maps: Sequence[OofMap], num_actors: int) -> list[int]:
    """Deal maps to actors, those of a fold evenly: a study leaves a fold out, and no actor should idle through it."""
    order = sorted(
        range(len(maps)), key=lambda image: (maps[image].fold, -maps[image].row.height * maps[image].row.width)
    )
    homes = [0] * len(maps)
    for rank, image in enumerate(order):
        homes[image] = rank % num_actors
    return homes


class Roster:
    """Which actors can be asked: all that have started, but for those that failed within the last `AWAY_S`."""

    def __init__(self, num_actors: int):
        self.starting = set(range(num_actors))
        """Those that may not have started yet."""
        self._numbers = range(num_actors)
        self._failed: dict[int, float] = {}

    def note_failed(self, number: int, now: float) -> None:
        """Leave an actor alone for a while."""
        self._failed[number] = now

    def present(self, now: float) -> list[int]:
        """Return the numbers of those that can be asked."""
        away = {number for number, when in self._failed.items() if now - when < AWAY_S}
        return [number for number in self._numbers if number not in away | self.starting]


def share_out(homes: Mapping[int, int], present: Sequence[int]) -> dict[int, list[int]]:
    """Return the keys of each actor: those that are at home there, and some of those whose actor is not present."""
    shares: dict[int, list[int]] = defaultdict(list)
    for key, home in homes.items():
        shares[home if home in present else present[key % len(present)]].append(key)
    return dict(shares)


def split(shares: Mapping[int, Sequence[int]], keys_per_call: int | None) -> list[tuple[int, Sequence[int]]]:
    """Return calls, an actor and keys each, in about the order in which they are answered."""
    calls = []
    for number, keys in shares.items():
        size = keys_per_call or len(keys)
        calls += [(first, number, keys[first : first + size]) for first in range(0, len(keys), size)]
    return [(number, keys) for _, number, keys in sorted(calls)]


class SharedCalls:
    """Calls on many actors at once, whose answers are put together by key."""

    def __init__(self, shared: MapActors):
        self._shared, self._roster = shared, Roster(len(shared.actors))
        # Asked anew: one that has started may since have lost its node, and a process that has not called it before
        # would wait for its answer until it has room on another.
        self._present_when = [actor.prepare.remote([], []) for actor in shared.actors]
        self._see_who_started(timeout_s=1)

    def gather(
        self,
        method: str,
        homes: Mapping[int, int],
        *args: Any,
        keys_per_call: int | None = None,
        note: Callable[[Sequence[int]], None] = lambda keys: None,
    ) -> list[Any]:
        """Return a method's answers to keys, in the order of `homes`, which gives the actor each key is meant for.

        Args:
            method: of `MapActor`; it takes keys and `args`, and returns an answer to each key.
            note: told of keys that are answered.

        Raises:
            ResourceError: no actor has answered for a while.
        """
        import ray

        lost = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError)
        found, answered = dict[int, Any](), time.monotonic()
        while left := {key: home for key, home in homes.items() if key not in found}:
            shares = share_out(left, self._present(answered))
            calls = [
                (number, keys, getattr(self._shared.actors[number], method).remote(keys, *args))
                for number, keys in split(shares, keys_per_call)
            ]
            for number, keys, call in calls:
                try:
                    found.update(zip(keys, ray.get(call), strict=True))
                    answered = time.monotonic()
                    note(keys)
                except lost:
                    self._roster.note_failed(number, time.monotonic())
        return [found[key] for key in homes]

    def _present(self, answered: float) -> list[int]:
        """Return the actors that can be asked; wait until there is one."""
        self._see_who_started(timeout_s=0)
        while not (present := self._roster.present(time.monotonic())):
            # Those not heard of yet may be busy with the calls of other studies, or wait for a node.
            most_s = FIRST_START_S if self._roster.starting else SILENCE_S
            if time.monotonic() - answered > most_s:
                raise ResourceError(
                    f"none of the {len(self._shared.actors)} processes that score maps has answered for "
                    f"{most_s:.0f} s; see that the cluster has memory and nodes, and run the same command again"
                )
            self._see_who_started(timeout_s=1)
        return present

    def _see_who_started(self, timeout_s: float) -> None:
        import ray

        numbers = {self._present_when[number]: number for number in self._roster.starting}
        if numbers:
            ready, _ = ray.wait(list(numbers), num_returns=len(numbers), timeout=timeout_s)
            self._roster.starting -= {numbers[reference] for reference in ready}  # an error is an answer: see gather
        else:
            time.sleep(timeout_s)


class SharedWork:
    """The work of a study (`StudyWork`), done by actors."""

    def __init__(self, shared: MapActors, study: str, first: int):
        """Let a study work; `first` is the actor its proposals begin with, so that studies spread over them."""
        self._calls, self._shared, self._study, self._first = SharedCalls(shared), shared, study, first

    def propose(self, numbers: Sequence[int], told: Sequence[ScoredSetting]) -> list[Setting]:
        """Return settings of the search by their numbers."""
        import ray

        # The same actors for every batch: each has learnt from most trials already.
        homes = {number: (self._first + turn) % len(self._shared.actors) for turn, number in enumerate(numbers)}
        return self._calls.gather("propose", homes, self._study, ray.put(list(told)))

    def dice(self, configs: Sequence[PostprocessConfig], images: Sequence[int]) -> DiceTable:
        """Return the Dice of images under each setting."""
        homes = {image: self._shared.homes[image] for image in images}
        rows = self._calls.gather("dice", homes, self._shared.maps, list(configs))
        return np.stack(rows, axis=1)
