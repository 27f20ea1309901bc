"""A whole threshold search on 1 and on 2 CPUs, and on up to 64 by simulation on what its steps cost.

    python -m tests.bench.shared_search [--maps 12] [--settings 96] [--turns 3]
    python -m tests.bench.shared_search --simulate [--maps 24] [--settings 400] [--batch 8]

The first runs `tune_postprocess` on maps that are made, once with one actor and once with two, turn about, and compares
every file of its studies to the byte; the baseline is one actor.

The second searches in this process by TPE, on full-sized maps, and records what each setting cost on each map and each
proposal at each length of the search. It then plays the search of 2,000 settings on 228 maps of four folds (five
studies) on 1 to 64 actors: each does what it is asked in turn, a study waits for its batch, a call takes 2 ms on its
way. Maps and settings beyond those recorded cost what recorded ones cost: maps drawn at random, of settings the last
hundred. The baseline is one actor; what is printed is the speed-up, and which share of their time the actors work.
"""

import argparse
import heapq
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cv2
import numpy as np
import numpy.typing as npt

from stas_core import config
from stas_core.data.cohort import CohortRow, read_cohort
from stas_core.data.phantom import PhantomConfig
from stas_core.search import space as spaces
from stas_core.search.level_sets import MapScorer, find_level_sets
from stas_core.search.threshold_search import Proposer, ScoredSetting, ThresholdSearchConfig, prepare_space
from tests import made_cohort
from tests.bench.threshold_search import make_pairs
from tests.conftest import ROOT
from tests.workflows.made import make_oof_run
from workflows import tune_postprocess
from workflows.cluster import Node, ray_session
from workflows.map_actors import deal
from workflows.tune_postprocess import TunePostprocessConfig

NUM_FOLDS, NUM_MAPS, NUM_SETTINGS, CALL_S = 4, 228, 2000, 0.002
Costs = npt.NDArray[np.float64]


def side_by_side(num_maps: int, num_settings: int, turns: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="stas-shared-search-"))
    (folder / "fields").mkdir()
    (folder / "cohort").mkdir()
    fields = made_cohort.write_fields(folder / "fields", PhantomConfig(num_images=num_maps, height=471, width=858))
    cohort_uri = made_cohort.prepare(fields, folder / "cohort")
    rows: list[CohortRow] = read_cohort(cohort_uri)
    run = make_oof_run(folder / "run", rows, cohort_uri)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    written: list[dict[str, bytes]] = []
    with ray_session(num_cpus=2):
        for turn in range(turns):
            for num_actors in (1, 2):
                out = folder / f"out_{turn}_{num_actors}"
                loaded = config.load_config(TunePostprocessConfig, ROOT / "configs" / "tune_postprocess.yaml")
                search = loaded.search.model_copy(update={"num_settings": num_settings})
                wanted = loaded.model_copy(update={"run": run, "out": str(out), "search": search})
                told = nullcontext([Node(float(num_actors))])
                with mock.patch.object(tune_postprocess, "ray_session", return_value=told):
                    start = time.perf_counter()
                    tune_postprocess.run(wanted, False)
                    seconds[num_actors].append(time.perf_counter() - start)
                written.append({path.name: path.read_bytes() for path in (out / "studies").iterdir()})
    assert all(files == written[0] for files in written), "studies differ"
    pairs = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    print(f"{num_maps} maps, {num_settings} settings, {turns} turns: every study equal byte for byte")
    print(
        f"1 actor {statistics.median(seconds[1]):.1f} s, 2 actors {statistics.median(seconds[2]):.1f} s, start included"
    )
    print(f"1 actor / 2 actors: {statistics.median(pairs):.2f} ({', '.join(f'{pair:.2f}' for pair in pairs)})")


def record(num_maps: int, num_settings: int) -> tuple[Costs, Costs]:
    """Return seconds of each setting on each map, and of each proposal."""
    cv2.setNumThreads(1)
    wanted = config.load_config(TunePostprocessConfig, ROOT / "configs" / "tune_postprocess.yaml")
    space, _ = prepare_space(wanted.space, wanted.default)
    scorers = [MapScorer(prob, truth, find_level_sets(prob)) for prob, truth in make_pairs(num_maps)]
    proposer, told = Proposer(space, wanted.search), list[ScoredSetting]()
    scoring, proposing = np.zeros((num_settings, num_maps)), np.zeros(num_settings)
    for number in range(num_settings):
        start = time.process_time()
        setting = proposer.propose(number, told)
        proposing[number] = time.process_time() - start
        chosen, dice = spaces.apply(wanted.default, setting), list[float]()
        for index, scorer in enumerate(scorers):
            start = time.process_time()
            dice.append(scorer.score(chosen).dice)
            scoring[number, index] = time.process_time() - start
        told.append(ScoredSetting(setting, float(np.mean(dice))))
    return scoring, proposing


def extend(scoring: Costs, proposing: Costs) -> tuple[Costs, Costs]:
    """Return costs of 2,000 settings on 228 maps, and of as many proposals: those of TPE grow along a line."""
    num_settings, num_maps = scoring.shape
    beyond = num_settings - 100 + np.arange(NUM_SETTINGS - num_settings) % 100
    rows = np.concatenate([np.arange(num_settings), beyond])
    random = ThresholdSearchConfig().num_random
    line = np.polynomial.Polynomial.fit(np.arange(random, num_settings), proposing[random:], 1)
    asked = np.where(np.arange(NUM_SETTINGS) < random, proposing[:random].mean(), line(np.arange(NUM_SETTINGS)))
    columns = np.random.default_rng(0).integers(num_maps, size=NUM_MAPS)
    return scoring[rows][:, columns], asked


def simulate(scoring: Costs, proposing: Costs, num_actors: int, batch_size: int) -> tuple[float, float]:
    """Return the seconds that the search takes, and the share of them that actors work."""
    maps: list[Any] = [
        SimpleNamespace(fold=image % NUM_FOLDS, row=SimpleNamespace(height=1, width=1)) for image in range(NUM_MAPS)
    ]
    folds, homes = np.array([found.fold for found in maps]), np.array(deal(maps, num_actors))
    free, work = np.zeros(num_actors), 0.0
    waiting = [(0.0, study, 0, False) for study in range(NUM_FOLDS + 1)]  # since when; settings done; proposed already?
    while waiting:
        now, study, done, proposed = heapq.heappop(waiting)
        batch = range(done, min(done + batch_size, NUM_SETTINGS))
        if proposed:
            shown = folds != study  # the last study sees all
            costs = np.bincount(homes[shown], scoring[batch][:, shown].sum(axis=0), num_actors)
        else:
            turns = [(study * batch_size + turn) % num_actors for turn in range(len(batch))]
            costs = np.bincount(turns, proposing[batch], num_actors)
        called = costs > 0
        free[called] = np.maximum(free[called], now + CALL_S) + costs[called]
        work, end = work + float(costs.sum()), float(free[called].max()) + CALL_S
        if not proposed:
            heapq.heappush(waiting, (end, study, done, True))
        elif batch.stop < NUM_SETTINGS:
            heapq.heappush(waiting, (end, study, batch.stop, False))
    end = float(free.max())
    return end, work / (end * num_actors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--maps", type=int)
    parser.add_argument("--settings", type=int)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch", type=int, default=ThresholdSearchConfig().batch_size)
    arguments = parser.parse_args()
    if not arguments.simulate:
        side_by_side(arguments.maps or 12, arguments.settings or 96, arguments.turns)
        return
    recorded = record(arguments.maps or 24, arguments.settings or 400)
    scoring, proposing = extend(*recorded)
    print(
        f"{1000 * scoring.mean():.2f} ms a setting and map, {1000 * proposing.mean():.0f} ms a proposal; "
        f"{NUM_SETTINGS} settings, {NUM_MAPS} maps, {NUM_FOLDS + 1} studies, batches of {arguments.batch}"
    )
    alone = simulate(scoring, proposing, 1, arguments.batch)[0]
    for num_actors in (1, 2, 4, 8, 16, 32, 64):
        seconds, busy = simulate(scoring, proposing, num_actors, arguments.batch)
        print(f"{num_actors:3d} actors: {seconds:7.0f} s, {alone / seconds:5.1f} x one actor; they work {busy:.0%}")


if __name__ == "__main__":
    main()
