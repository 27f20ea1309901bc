from collections.abc import Sequence

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core import config
from stas_core.errors import ConfigError
from stas_core.predict.postprocess import PostprocessConfig, cut_at
from stas_core.scores.bootstrap import BootstrapConfig
from stas_core.search import verdicts
from stas_core.search.level_sets import MapScorer, find_level_sets
from stas_core.search.space import Dimension, Setting, Space
from stas_core.search.threshold_search import (
    LocalWork,
    Proposer,
    ScoredSetting,
    Starts,
    Study,
    ThresholdSearchConfig,
    dice_of_maps,
    prepare_space,
    run_study,
    search,
    simplify,
)
from stas_core.search.verdicts import TunedImage

DEFAULT = config.build(
    PostprocessConfig,
    {
        "steps": [{"drop": 26, "high": 90, "core": 81, "ratio": 0.2, "low": 64}],
        "closing_count": 0,
        "min_target_px": 5,
        "min_foreground_px": 1,
    },
)
STARTS = Starts(DEFAULT, DEFAULT.model_copy(update={"border_fill": "first"}))
SPACE = {
    "steps.0.high": Dimension(low=30, high=250),
    "steps.0.low": Dimension(low=30, high=120),
    "min_target_px": Dimension(low=0, high=60),
}
LEVELS = list(range(20, 250, 10))


def make_map(seed: int, *, true_level: int, false_level: int, num_each: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return a map of round targets, all alike but for their peak, and the truth, which holds some of them."""
    rng = np.random.default_rng(seed)
    prob, truth = np.zeros((96, 128), np.uint8), np.zeros((96, 128), bool)
    places = [(y, x) for y in (16, 48, 80) for x in (16, 48, 80, 112)]
    y, x = np.ogrid[:96, :128]
    for number, place in enumerate(rng.permutation(places)[: 2 * num_each]):
        inside = (y - place[0]) ** 2 + (x - place[1]) ** 2 <= rng.integers(30, 90)
        level = true_level if number < num_each else false_level
        prob[inside] = level + rng.integers(-10, 11)
        truth |= inside & (number < num_each)
    return prob, truth


def make_noise(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a map of two round targets, one of them true, whose peaks say nothing of which it is."""
    rng = np.random.default_rng(seed)
    prob, truth = np.zeros((64, 96), np.uint8), np.zeros((64, 96), bool)
    y, x = np.ogrid[:64, :96]
    for number, place in enumerate(rng.permutation([(y, x) for y in (16, 48) for x in (16, 48, 80)])[:2]):
        inside = (y - place[0]) ** 2 + (x - place[1]) ** 2 <= rng.integers(30, 90)
        prob[inside] = rng.integers(100, 240)
        truth |= inside & (number == 0)
    return prob, truth


def scorers_of(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[MapScorer]:
    return [MapScorer(prob, truth, find_level_sets(prob)) for prob, truth in pairs]


def work_of(scorers: list[MapScorer], settings: ThresholdSearchConfig, space: Space = SPACE) -> LocalWork:
    return LocalWork(scorers, space, settings)


def nested(
    scorers: list[MapScorer], folds: list[int], num_settings: int, seed: int = 0, levels: Sequence[int] = LEVELS
) -> dict[str, Study]:
    names = ["all", *map(str, sorted(set(folds)))]
    settings = ThresholdSearchConfig(num_settings=num_settings, num_random=20, seed=seed)
    return {
        name: run_study(
            work_of(scorers, settings), [str(fold) != name for fold in folds], STARTS, SPACE, levels, settings
        )
        for name in names
    }


def advise(studies: dict[str, Study], folds: list[int]) -> verdicts.Recommendation:
    images = [TunedImage(str(number), fold, str(number), 100) for number, fold in enumerate(folds)]
    scores = verdicts.nest(images, {name: study.dice for name, study in studies.items()})
    judged = verdicts.judge(images, scores, BootstrapConfig())
    return verdicts.recommend(judged, DEFAULT, studies["all"].simplest, 0.95)


@pytest.mark.no_cover
def test_a_planted_best_setting_is_found_and_recommended() -> None:
    # Nothing above 150 is false, nothing below 190 true: a peak between them parts the two, the default's 90 does not.
    pairs = [make_map(seed, true_level=200, false_level=140) for seed in range(12)]
    folds = [seed % 3 for seed in range(12)]
    studies = nested(scorers_of(pairs), folds, 60)
    for study in studies.values():
        assert 150 < study.simplest.steps[0].high <= 190
        assert study.simplest.model_copy(update={"steps": DEFAULT.steps}) == DEFAULT  # all else is left alone
        assert study.dice["simplest"].min() > 0.99 > study.dice["default"].max()
    advice = advise(studies, folds)
    assert advice.choice == "tuned" and advice.config == studies["all"].simplest
    assert "use the tuned setting" in advice.reason
    assert advice.under("ok") == advice.under("look at this") == advice
    reason = advice.under("do not use").reason  # a large gain on nothing is nothing
    assert reason.startswith("do not use these maps with any setting (see the verdict)") and advice.reason in reason


@pytest.mark.no_cover
def test_noise_gives_keep_the_default() -> None:
    # There is nothing to learn, only chance to fit: on the images that were searched there is a gain, on others none.
    folds, kept, gains = [number % 3 for number in range(12)], 0, []
    for seed in range(6):
        scorers = scorers_of([make_noise(100 * seed + number) for number in range(12)])
        studies = nested(scorers, folds, 40, seed, levels=[])
        kept += advise(studies, folds).choice != "tuned"
        gains.append((studies["all"].dice["best"] - studies["all"].dice["default"]).mean())
    assert kept >= 5 and np.mean(gains) > 0.01


def test_the_left_out_fold_never_reaches_the_search() -> None:
    pairs = [make_map(seed, true_level=180, false_level=150) for seed in range(6)]
    seen = [True, True, True, True, False, False]
    settings = ThresholdSearchConfig(num_settings=30, num_random=10)
    tampered = [*pairs[:4], *((prob, ~truth) for prob, truth in pairs[4:])]
    trials: list[list[ScoredSetting]] = [[], []]
    studies = [
        run_study(work_of(scorers_of(data), settings), seen, STARTS, SPACE, LEVELS, settings, note=noted.extend)
        for data, noted in zip((pairs, tampered), trials, strict=True)
    ]
    assert trials[0] == trials[1]
    assert (studies[0].best, studies[0].simplest, studies[0].level) == (
        studies[1].best,
        studies[1].simplest,
        studies[1].level,
    )
    assert (studies[0].dice["best"][:4] == studies[1].dice["best"][:4]).all()
    assert (studies[0].dice["best"][4:] != studies[1].dice["best"][4:]).all()


def test_an_interrupted_study_ends_as_if_it_had_not_been() -> None:
    scorers = scorers_of([make_map(seed, true_level=180, false_level=150) for seed in range(4)])
    settings = ThresholdSearchConfig(num_settings=40, num_random=10)
    work = work_of(scorers, settings)
    whole: list[ScoredSetting] = []
    study = run_study(work, [True] * 4, STARTS, SPACE, LEVELS, settings, note=whole.extend)
    again: list[ScoredSetting] = []
    resumed = run_study(work, [True] * 4, STARTS, SPACE, LEVELS, settings, done=whole[:17], note=again.extend)
    assert again == whole
    assert (resumed.best, resumed.simplest, resumed.level) == (study.best, study.simplest, study.level)
    # What was done is taken as it is, not scored anew.
    marked = [ScoredSetting(trial.setting, trial.dice + 1e-9) for trial in whole[:17]]
    again.clear()
    run_study(work, [True] * 4, STARTS, SPACE, LEVELS, settings, done=marked, note=again.extend)
    assert again[:17] == marked


def test_levels_are_scored_one_by_one() -> None:
    scorers = scorers_of([make_map(seed, true_level=180, false_level=150) for seed in range(4)])
    settings = ThresholdSearchConfig(num_settings=1, num_random=1)
    study = run_study(work_of(scorers, settings), [True] * 4, STARTS, SPACE, LEVELS, settings)
    assert list(study.level_dice) == LEVELS
    assert study.level_dice[100] == dice_of_maps(scorers, [cut_at(100)]).mean()
    assert study.level is not None and study.level_dice[study.level] == max(study.level_dice.values())


def test_a_proven_loss_is_called_a_loss() -> None:
    images = [TunedImage(str(number), number % 2, str(number), 100) for number in range(20)]
    rng = np.random.default_rng(0)
    default = rng.uniform(0.7, 0.9, 20)
    dice = {"raw": default - 0.01, "default": default, "reference": default}
    worse = default - rng.uniform(0.02, 0.08, 20)
    other = DEFAULT.model_copy(update={"min_target_px": 9})
    for loss, why in ((worse, "a tuned setting is worse"), (default, "the interval of the gain includes zero")):
        studies = {name: dice | {"best": loss, "simplest": loss} for name in ("all", "0", "1")}
        judged = verdicts.judge(images, verdicts.nest(images, studies), BootstrapConfig())
        advice = verdicts.recommend(judged, DEFAULT, other, 0.95)
        assert advice.choice == "default" and f"keep the default: {why};" in advice.reason


def advise_on(**dice: float) -> verdicts.Recommendation:
    """Return the advice where each pick has one Dice, but for some noise that all share."""
    images = [TunedImage(str(number), number % 2, str(number), 100) for number in range(20)]
    noise = np.random.default_rng(0).uniform(-0.01, 0.01, 20)
    picks = {name: value + noise for name, value in dice.items()}
    studies = {name: picks | {"best": picks["simplest"], "reference": picks["default"]} for name in ("all", "0", "1")}
    judged = verdicts.judge(images, verdicts.nest(images, studies), BootstrapConfig(num_resamples=100))
    return verdicts.recommend(judged, DEFAULT, DEFAULT.model_copy(update={"min_target_px": 9}), 0.95)


def test_a_gain_counts_against_the_better_of_default_and_plain_cut() -> None:
    # Better than the default is not enough: the plain cut is better still.
    advice = advise_on(raw=0.8, default=0.5, simplest=0.7)
    assert advice.choice == "plain cut" and advice.config == cut_at(128)
    assert "the default does not beat it (Dice 0.5" in advice.reason and "-0.1000" in advice.reason
    assert config.build(PostprocessConfig, yaml.safe_load(verdicts.to_yaml(advice.config, ["why"]))) == cut_at(128)
    assert advise_on(raw=0.5, default=0.8, simplest=0.7).choice == "default"
    assert advise_on(raw=0.8, default=0.8, simplest=0.8).choice == "plain cut"  # the simpler of two alike
    for rivals in ({"raw": 0.5, "default": 0.8}, {"raw": 0.8, "default": 0.5}):
        assert advise_on(**rivals, simplest=0.9).choice == "tuned"


@settings(max_examples=30)
@given(st.tuples(*[st.floats(0.02, 0.98)] * 3))
def test_what_is_recommended_is_never_behind_the_plain_cut(dice: tuple[float, float, float]) -> None:
    raw, default, simplest = dice
    advice = advise_on(raw=raw, default=default, simplest=simplest)
    chosen = {"plain cut": raw, "default": default, "tuned": simplest}[advice.choice]
    assert chosen >= max(raw, default) - 1e-9


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_the_best_found_is_never_behind_default_and_reference(sampler: str) -> None:
    # A space that leads nowhere: every setting in it is worse than the default.
    scorers = scorers_of([make_map(seed, true_level=180, false_level=40) for seed in range(4)])
    bad = {"steps.0.high": Dimension(low=240, high=250)}
    settings = ThresholdSearchConfig(sampler=sampler, num_settings=5)
    study = run_study(work_of(scorers, settings, bad), [True] * 4, STARTS, bad, [], settings)
    assert study.best == DEFAULT == study.simplest
    assert study.level is None and "cut" not in study.dice


def test_the_rule_goes_back_to_the_default_where_that_costs_nothing() -> None:
    scorers = scorers_of([make_map(seed, true_level=200, false_level=140) for seed in range(6)])
    step = DEFAULT.steps[0].model_copy(update={"high": 170, "low": 40, "core": 20})
    best = DEFAULT.model_copy(update={"steps": (step,), "min_target_px": 11, "border_fill": "none"})
    simplest = simplify(best, DEFAULT, lambda candidates: dice_of_maps(scorers, candidates))
    assert simplest.steps[0] == DEFAULT.steps[0].model_copy(update={"high": 170})
    assert simplest.model_copy(update={"steps": DEFAULT.steps}) == DEFAULT


def test_cutting_at_a_level_is_a_setting_of_the_cascade() -> None:
    prob, truth = make_map(0, true_level=200, false_level=140)
    (scorer,) = scorers_of([(prob, truth)])
    for level in (0, 1, 128, 205, 255):
        cut = prob >= level
        assert scorer.score(cut_at(level)).tp == (cut & truth).sum()
        assert scorer.score(cut_at(level)).fp == (cut & ~truth).sum()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_known_settings_teach_the_sampler(batch_size: int) -> None:
    def score(settings: Sequence[Setting]) -> list[float]:
        return [-abs(setting["steps.0.high"] - 77) / 100 for setting in settings]  # type: ignore[operator]

    space = {"steps.0.high": Dimension(low=0, high=255)}
    points: list[Setting] = [{"steps.0.high": value} for value in range(0, 256, 11)]
    known = list(map(ScoredSetting, points, score(points)))
    work = LocalWork([], space, ThresholdSearchConfig(num_settings=20, num_random=1))
    batches = list(search(work, score, 20, batch_size, known=known))
    found = [trial.setting["steps.0.high"] for batch in batches for trial in batch]
    assert len(found) == 20 and np.median([abs(value - 77) for value in found]) < 20  # type: ignore[operator]


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_proposal_depends_on_its_number_and_what_is_told_alone(sampler: str) -> None:
    settings = ThresholdSearchConfig(sampler=sampler, num_settings=27, num_random=4)
    rng = np.random.default_rng(0)
    told: list[ScoredSetting] = []
    one = Proposer(SPACE, settings)
    for number in range(12):
        proposed = one.propose(number, told)
        told.append(ScoredSetting(proposed, float(rng.random())))
    other, forgetful = Proposer(SPACE, settings), Proposer(SPACE, settings)
    forgetful.propose(3, [ScoredSetting(told[5].setting, 0.1)])  # another search's
    for number in (20, 12, 20):
        wanted = one.propose(number, told)
        assert other.propose(number, told) == wanted == forgetful.propose(number, told)
    assert one.propose(20, told) != one.propose(21, told)


def test_a_threshold_that_is_no_level_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"space\.threshold.*grey levels.*integers from 0 to 255"):
        prepare_space({"threshold": Dimension(low=0.1, high=0.9), "closing_px": Dimension(choices=(1,))}, DEFAULT)
    with pytest.raises(ConfigError, match="space has threshold alone"):
        prepare_space({"threshold": Dimension(low=1, high=9)}, DEFAULT)
