"""Search settings of the threshold cascade on maps with truth, choose one, and say honestly what it is worth.

A setting is judged by the mean over images of Dice. `run_study` searches on some images only, chooses by the
one-standard-error rule, and scores what it chose on the images left out: done once for each fold, this gives every
image a score by a setting that was chosen without it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import Field

from stas_core.errors import ConfigError
from stas_core.predict.postprocess import PostprocessConfig, cut_at
from stas_core.scores.metrics import ImageScores
from stas_core.search import space as spaces
from stas_core.search.level_sets import MapScorer
from stas_core.search.space import SearchConfig, Setting, Space

DiceTable = npt.NDArray[np.float64]
"""Dice of images (columns) under settings (rows)."""
THRESHOLD = "threshold"
"""Key of a space that is no key of the cascade: the one grey level at which maps are cut without a cascade."""


class ScoredSetting(NamedTuple):
    """A setting that was tried, and the mean Dice it reached."""

    setting: Setting
    dice: float


class Starts(NamedTuple):
    """Whole settings that are tried first: what a search must not fall behind."""

    default: PostprocessConfig
    reference: PostprocessConfig


class ThresholdSearchConfig(SearchConfig):
    """How settings of the cascade are proposed."""

    batch_size: int = Field(8, ge=1)
    """Settings proposed at a time, none of them knowing what the others score. What is found depends on it, and not on
    how many CPUs share the work."""


class Proposer:
    """Proposes settings, each a function of the seed, its number, and the trials that it may learn from.

    So any process can propose any of them. A proposer remembers what it was told, to learn only what is new.
    """

    def __init__(self, space: Space, config: SearchConfig):
        self._space, self._config = space, config
        self._points = spaces.grid_points(space, config)
        self._distributions = {key: dimension.distribution() for key, dimension in space.items()}
        self._study, self._told = spaces.empty_study(), list[ScoredSetting]()

    def propose(self, number: int, told: Sequence[ScoredSetting]) -> Setting:
        """Return setting `number` of the search."""
        from optuna.trial import TrialState

        if self._points:
            return self._points[number]
        self._learn(told)
        seed = int(np.random.SeedSequence([self._config.seed, number]).generate_state(1)[0])
        self._study.sampler = spaces.make_sampler(self._space, self._config.model_copy(update={"seed": seed}))
        asked = self._study.ask(self._distributions)
        self._study.tell(asked, state=TrialState.FAIL)  # samplers pass over it: its score comes with what is told
        return asked.params

    def _learn(self, told: Sequence[ScoredSetting]) -> None:
        from optuna.trial import create_trial

        if self._told != list(told[: len(self._told)]):  # a study that was interrupted begins anew
            self._study, self._told = spaces.empty_study(), []
        new = told[len(self._told) :]
        self._study.add_trials(
            [create_trial(params=dict(s), distributions=self._distributions, value=dice) for s, dice in new]
        )
        self._told += new


@runtime_checkable
class StudyWork(Protocol):
    """The work of a study, which processes may share: what it returns is the same however they do."""

    def propose(self, numbers: Sequence[int], told: Sequence[ScoredSetting]) -> list[Setting]:
        """Return settings of the search by their numbers, as a `Proposer` proposes them."""

    def dice(self, configs: Sequence[PostprocessConfig], images: Sequence[int]) -> DiceTable:
        """Return the Dice of images (by their numbers) under each setting: (settings, images)."""


class LocalWork:
    """The work of a study, done here."""

    def __init__(self, scorers: Sequence[MapScorer], space: Space, config: SearchConfig):
        self._scorers, self._proposer = scorers, Proposer(space, config)

    def propose(self, numbers: Sequence[int], told: Sequence[ScoredSetting]) -> list[Setting]:
        """Return settings of the search by their numbers."""
        return [self._proposer.propose(number, told) for number in numbers]

    def dice(self, configs: Sequence[PostprocessConfig], images: Sequence[int]) -> DiceTable:
        """Return the Dice of images under each setting."""
        return dice_of_maps([self._scorers[image] for image in images], configs)


def dice_of_maps(scorers: Sequence[MapScorer], configs: Sequence[PostprocessConfig]) -> DiceTable:
    """Return the Dice of maps under each setting: (settings, maps)."""
    table = np.empty((len(configs), len(scorers)))
    for column, scorer in enumerate(scorers):  # map after map: its rows stay in the processor's cache
        table[:, column] = [scorer.score(config).dice for config in configs]
    return table


def search(
    work: StudyWork,
    score: Callable[[Sequence[Setting]], Sequence[float]],
    num_settings: int,
    batch_size: int,
    *,
    known: Sequence[ScoredSetting] = (),
    done: Sequence[ScoredSetting] = (),
) -> Iterator[list[ScoredSetting]]:
    """Propose settings, score them, and yield them, batch by batch.

    Args:
        known: settings with their scores that proposals may learn from.
        done: what an interrupted search yielded; it is repeated without scoring anew, and the search goes on as if it
            had never ended.
    """
    trials: list[ScoredSetting] = []
    while len(trials) < num_settings:
        numbers = range(len(trials), min(len(trials) + batch_size, num_settings))
        proposed = work.propose(numbers, [*known, *trials])
        # A setting that differs is from another version of the sampler.
        old = [
            done[number] if number < len(done) and done[number].setting == setting else None
            for number, setting in zip(numbers, proposed, strict=True)
        ]
        new = [setting for setting, trial in zip(proposed, old, strict=True) if trial is None]
        scores = iter(score(new) if new else ())
        batch = [trial or ScoredSetting(setting, next(scores)) for setting, trial in zip(proposed, old, strict=True)]
        trials += batch
        yield batch


def simplify(
    best: PostprocessConfig, base: PostprocessConfig, score: Callable[[Sequence[PostprocessConfig]], DiceTable]
) -> PostprocessConfig:
    """Return the setting nearest to `base` that is no more than one standard error worse than the best.

    Breiman's one-standard-error rule with `base` as the simplest setting of all: value after value goes back to what it
    is there, at each step the one that costs least, as long as the mean loss against the best stays within the standard
    error of that mean. The loss is taken image by image, so that it is not drowned by how images differ.
    """
    top, chosen = score([best])[0], best
    while True:
        candidates = [spaces.apply(chosen, {key: value}) for key, value in _differing(chosen, base).items()]
        losses = list(top - score(candidates)) if candidates else []
        within = [index for index, loss in enumerate(losses) if loss.mean() <= _standard_error(loss)]
        if not within:
            return chosen
        chosen = candidates[min(within, key=lambda index: float(losses[index].mean()))]


def _differing(config: PostprocessConfig, base: PostprocessConfig) -> dict[str, Any]:
    """Return the base's values for the keys in which a setting differs from it."""
    here, there = spaces.flatten(config), spaces.flatten(base)
    differing = {key: value for key, value in there.items() if here.get(key, value) != value}
    if here.keys() != there.keys():  # another number of steps: all of them are reset at once
        differing = {key: value for key, value in differing.items() if not key.startswith("steps.")}
        differing["steps"] = base.model_dump(mode="json")["steps"]
    return differing


def _standard_error(values: ImageScores) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def prepare_space(space: Mapping[str, Any], base: PostprocessConfig) -> tuple[Space, list[int]]:
    """Check a space; split it into keys of the cascade and the grey levels to cut maps at.

    Raises:
        ConfigError: naming the key, its value, and what was expected.
    """
    cascade = {key: dimension for key, dimension in space.items() if key != THRESHOLD}
    if space and not cascade:
        raise ConfigError(
            f"space has {THRESHOLD} alone, which is searched beside the cascade; add one of its keys at least, for "
            "example min_target_px: {low: 0, high: 500}"
        )
    cascade = spaces.check_space(cascade, base)
    if THRESHOLD not in space:
        return cascade, []
    levels = space[THRESHOLD].grid(256)
    if not all(isinstance(level, int) and not isinstance(level, bool) and 0 <= level <= 255 for level in levels):
        raise ConfigError(
            f"space.{THRESHOLD} = {space[THRESHOLD]}: expected grey levels of the 8-bit map: integers from 0 to 255"
        )
    return cascade, levels


@dataclass(frozen=True)
class Study:
    """What a search on some images found, and its scores on all: `dice` has an entry per image for each pick."""

    best: PostprocessConfig
    """The best of all that was tried, the starts among it."""
    simplest: PostprocessConfig
    """What the one-standard-error rule makes of it: what this study recommends."""
    level: int | None
    """The best level to cut maps at without a cascade, if levels were searched."""
    level_dice: dict[int, float]
    """Of every level that was searched, the mean Dice of the images that may be seen."""
    dice: dict[str, ImageScores]
    """Under `best`, `simplest` and `cut`, and the fixed `raw` (cut at 0.5), `default` and `reference`; of images that
    the search saw and of the others alike."""


def run_study(
    work: StudyWork,
    seen: Sequence[bool],
    starts: Starts,
    space: Space,
    levels: Sequence[int],
    config: ThresholdSearchConfig,
    *,
    done: Sequence[ScoredSetting] = (),
    note: Callable[[Sequence[ScoredSetting]], None] = lambda batch: None,
) -> Study:
    """Search on the images that may be seen; score the choice on all images.

    Args:
        work: proposes and scores, on every image.
        seen: which images the search may learn from; the others are touched only when all is chosen.
        done: trials of this study before it was interrupted.
        note: told of every batch of trials.
    """
    shown = np.flatnonzero(seen).tolist()

    def mean_dice(configs: Sequence[PostprocessConfig]) -> list[float]:
        return [float(row.mean()) for row in work.dice(configs, shown)]

    def score(settings: Sequence[Setting]) -> list[float]:
        return mean_dice([spaces.apply(starts.default, setting) for setting in settings])

    started = list(zip(starts, mean_dice(starts), strict=True))
    known = [
        ScoredSetting(spaces.setting_of(start, space), dice)
        for start, dice in started
        if _lies_in(start, space, starts)
    ]
    trials: list[ScoredSetting] = []
    num_settings = len(spaces.grid_points(space, config)) or config.num_settings
    for batch in search(work, score, num_settings, config.batch_size, known=known, done=done):
        trials += batch
        note(batch)
    tried = started + [(spaces.apply(starts.default, trial.setting), trial.dice) for trial in trials]
    best = max(tried, key=lambda pair: pair[1])[0]
    simplest = simplify(best, starts.default, lambda candidates: work.dice(candidates, shown))
    level_dice = dict(zip(levels, mean_dice([cut_at(level) for level in levels]), strict=True)) if levels else {}
    level = max(level_dice, key=lambda level: level_dice[level], default=None)
    picks = {"raw": cut_at(128), **starts._asdict(), "best": best, "simplest": simplest}
    if level is not None:
        picks["cut"] = cut_at(level)
    table = work.dice(list(picks.values()), range(len(seen)))
    return Study(best, simplest, level, level_dice, dict(zip(picks, table, strict=True)))


def _lies_in(start: PostprocessConfig, space: Space, starts: Starts) -> bool:
    """Tell whether the search could have proposed a start: it differs from the default in searched keys only."""
    setting = spaces.setting_of(start, space)
    return all(space[key].holds(value) for key, value in setting.items()) and start == spaces.apply(
        starts.default, setting
    )
