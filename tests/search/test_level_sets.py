import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core.predict.postprocess import PostprocessConfig, postprocess
from stas_core.scores import metrics
from stas_core.search.level_sets import MapScorer, find_level_sets
from tests.predict.test_postprocess import configs, maps


def make_truth(shape: tuple[int, int], seed: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).random(shape) > 0.6)


@settings(max_examples=300, deadline=None)
@given(maps(), st.lists(configs(), min_size=1, max_size=4), st.integers(0, 100))
def test_scores_equal_those_of_the_masks(prob_u8: np.ndarray, settings_: list[PostprocessConfig], seed: int) -> None:
    truth = make_truth(prob_u8.shape, seed)
    scorer = MapScorer(prob_u8, truth, find_level_sets(prob_u8))
    # That `postprocess` equals the plain definition is a property test of its own, on the same maps and settings.
    expected = [metrics.count(postprocess(prob_u8, config), truth) for config in settings_]
    for _ in range(2):  # the second time from what is kept
        assert [scorer.score(config) for config in settings_] == expected
