from collections.abc import Sequence

import numpy as np

from stas_core.predict.inference import Flip
from stas_core.scores import metrics
from stas_core.scores.bootstrap import BootstrapConfig
from stas_core.scores.metrics import ImageScores
from stas_core.search import ensemble_choice
from stas_core.search.ensemble_choice import Subset


def test_a_subset_is_scored_as_its_mean_map() -> None:
    rng = np.random.default_rng(0)
    flips: tuple[Flip, ...] = ("identity", "lr")
    maps = {(name, flip): rng.integers(0, 256, (20, 30), dtype=np.uint8) for name in "ab" for flip in flips}
    truth = rng.random((20, 30)) > 0.5
    mean = np.mean([maps[key] for key in maps], axis=0)
    expected = metrics.count(np.floor(mean + 0.5) >= 128, truth)
    assert ensemble_choice.score_subset(maps, truth, Subset(("a", "b"), flips)) == expected
    single = ensemble_choice.score_subset(maps, truth, Subset(("a",), ("lr",)))
    assert single == metrics.count(metrics.is_target(maps["a", "lr"]), truth)


def planted(folds: np.ndarray) -> ensemble_choice.ScoreSubsets:
    """Dice by a formula: good and fair help each other, bad hurts; flips help a little."""
    noise = np.random.default_rng(1).normal(0, 0.02, len(folds))
    worth = {"good": 0.10, "fair": 0.05, "bad": -0.08}

    def score(subsets: Sequence[Subset]) -> list[ImageScores]:
        return [
            0.6 + sum(worth[name] for name in subset.members) + 0.001 * len(subset.flips) + noise for subset in subsets
        ]

    return score


def test_members_are_added_as_long_as_they_help_and_the_knee_is_the_cheapest_that_is_not_worse() -> None:
    folds = np.repeat([0, 1, 2], 10)
    score = planted(folds)
    everywhere = np.ones(30, bool)
    assert ensemble_choice.choose(["bad", "fair", "good"], ("identity",), everywhere, score) == ["good", "fair", "bad"]
    flips: tuple[Flip, ...] = ("identity", "lr")
    sizes = ensemble_choice.tabulate(
        {"bad": 1.0, "fair": 2.0, "good": 2.0}, [("identity",), flips], folds, score, BootstrapConfig(), [""] * 30
    )
    assert [size.cost for size in sizes] == sorted(size.cost for size in sizes) and len(sizes) == 6
    chosen = ensemble_choice.knee(sizes)
    assert set(chosen.members) == {"good", "fair"} and chosen.flips == flips and chosen.cost == 8.0
    assert "knee" in ensemble_choice.sizes_markdown(sizes, chosen, BootstrapConfig())


def test_the_left_out_fold_does_not_choose() -> None:
    # In fold 0 `odd` is best, elsewhere it is worst: only a choice that saw fold 0 would take it there.
    folds = np.repeat(range(5), 4)
    table = {"odd": np.where(folds == 0, 0.99, 0.1), "even": np.full(20, 0.5)}

    def score(subsets: Sequence[Subset]) -> list[ImageScores]:
        return [np.mean([table[name] for name in subset.members], axis=0) for subset in subsets]

    sizes = ensemble_choice.tabulate(
        {"odd": 1.0, "even": 1.0}, [("identity",)], folds, score, BootstrapConfig(), [""] * 12
    )
    assert sizes[0].nested == 0.5  # by `even` everywhere, fold 0 too
