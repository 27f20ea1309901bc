"""Settings of the cascade evaluated per second on out-of-fold maps: `MapScorer` against the plain definition.

    python -m tests.bench.threshold_search [--run RUN] [--maps 24] [--settings 60] [--plain 4]

Plain is what a person would write: the readable scikit-image and scipy definition of the tests, run on every map for
every setting, then Dice from the masks. Both are timed on one thread, in one process, on the same maps and settings;
`MapScorer` begins with nothing but its maps, and its level sets are timed too. Scores are compared to the last digit.
Without --run (a folder of train_folds) maps are made: blurred truths of phantom fields of 942 x 1716 px, with noise.

Settings are drawn at random from the space of configs/tune_postprocess.yaml: the hardest case, since a search that
learns comes back to values that it has seen. So the time of a whole search is better than what is printed.
"""

import argparse
import statistics
import time

import cv2
import numpy as np
import optuna
from scipy import ndimage

from stas_core import config, storage
from stas_core.data import images
from stas_core.data.fields import load_mask
from stas_core.data.phantom import PhantomConfig, make_phantom
from stas_core.predict.postprocess import PostprocessConfig
from stas_core.runs import TrainingRun
from stas_core.scores import metrics
from stas_core.search import space
from stas_core.search.level_sets import MapScorer, find_level_sets
from stas_core.search.threshold_search import prepare_space
from tests.conftest import ROOT
from tests.predict import postprocess_plain as plain
from workflows.tune_postprocess import TunePostprocessConfig

BAR = 50
Pair = tuple[np.ndarray, np.ndarray]


def read_pairs(run: str, num_maps: int) -> list[Pair]:
    found = TrainingRun(run).maps()
    chosen = [found[index] for index in np.linspace(0, len(found) - 1, num_maps).round().astype(int)]
    return [(images.decode_map(storage.read_bytes(m.uri), m.uri), load_mask(m.row)) for m in chosen]


def make_pairs(num_maps: int) -> list[Pair]:
    pairs = []
    for index in range(num_maps):
        truth = make_phantom(PhantomConfig(), index).mask
        rng = np.random.default_rng(index)
        noise = ndimage.zoom(rng.random((60, 108)), (942 / 60, 1716 / 108), order=1)
        prob = 0.9 * ndimage.gaussian_filter(truth.astype(np.float32), 4) + 0.35 * (noise > 0.93) * noise
        pairs.append(((255 * prob.clip(0, 1)).astype(np.uint8), truth))
    return pairs


def draw_settings(num_settings: int) -> list[PostprocessConfig]:
    searched = config.load_config(TunePostprocessConfig, ROOT / "configs" / "tune_postprocess.yaml")
    cascade, _ = prepare_space(searched.space, searched.default)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    distributions = {key: dimension.distribution() for key, dimension in cascade.items()}
    drawn = [study.ask(distributions).params for _ in range(num_settings)]
    return [space.apply(searched.default, setting) for setting in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder of train_folds")
    parser.add_argument("--maps", type=int, default=24)
    parser.add_argument("--settings", type=int, default=60)
    parser.add_argument("--plain", type=int, default=4, help="of the settings, how many the plain way evaluates")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pairs = read_pairs(arguments.run, arguments.maps) if arguments.run else make_pairs(arguments.maps)
    settings = draw_settings(arguments.settings)

    start = time.perf_counter()
    scorers = [MapScorer(prob, truth, find_level_sets(prob)) for prob, truth in pairs]
    level_sets_s = (time.perf_counter() - start) / len(pairs)
    ours, theirs, plain_s, fast_s = [], [], [], []
    for number, setting in enumerate(settings):
        start = time.perf_counter()
        ours.append([scorer.score(setting) for scorer in scorers])
        fast_s.append(time.perf_counter() - start)
        if number < arguments.plain:
            start = time.perf_counter()
            theirs.append([metrics.count(plain.postprocess(prob, setting)[0], truth) for prob, truth in pairs])
            plain_s.append(time.perf_counter() - start)
    assert ours[: arguments.plain] == theirs, "scores differ"
    per_map = 1000 * statistics.median(fast_s) / len(pairs)
    plain_per_map = 1000 * statistics.median(plain_s) / len(pairs)
    with_level_sets = per_map + 1000 * level_sets_s / 2000
    print(f"{len(pairs)} maps, {len(settings)} settings, {arguments.plain} of them both ways: equal scores")
    print(f"level sets, once per map: {1000 * level_sets_s:.0f} ms")
    print(f"a setting on a map, medians: plain {plain_per_map:.1f} ms, MapScorer {per_map:.2f} ms")
    print(f"MapScorer / plain, settings per second: {plain_per_map / per_map:.0f} x (bar: {BAR})")
    print(f"  level sets shared out over 2,000 settings: {plain_per_map / with_level_sets:.0f} x")


if __name__ == "__main__":
    main()
