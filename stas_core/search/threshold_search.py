"""Search settings of the threshold cascade on maps with truth, choose one, and say honestly what it is worth.

A setting is judged by the mean over images of Dice. `run_study` searches on some images only, chooses by the
one-standard-error rule, and scores what it chose on the images left out: done once for each fold, this gives every
image a score by a setting that was chosen without it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stas_core.errors import ConfigError
from stas_core.predict.postprocess import PostprocessConfig, cut_at
from stas_core.scores.metrics import ImageScores
from stas_core.search import space as spaces
from stas_core.search.level_sets import MapScorer
from stas_core.search.space import SearchConfig, Setting, Space

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


def dice_of_images(scorers: Sequence[MapScorer], config: PostprocessConfig) -> ImageScores:
    """Return the Dice of each image under a setting."""
    return np.array([scorer.score(config).dice for scorer in scorers])


def search(
    score: Callable[[Setting], float],
    space: Space,
    config: SearchConfig,
    *,
    known: Sequence[ScoredSetting] = (),
    done: Sequence[ScoredSetting] = (),
) -> Iterator[ScoredSetting]:
    """Propose settings, score them, and yield each.

    Args:
        known: settings with their scores that proposals may learn from.
        done: what an interrupted search yielded; it is repeated without scoring anew, and the search goes on as if it
            had never ended.
    """
    import optuna

    sampler, points = spaces.make_sampler(space, config)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {key: dimension.distribution() for key, dimension in space.items()}
    for setting, dice in known:
        study.add_trial(optuna.create_trial(params=dict(setting), distributions=distributions, value=dice))
    for point in points:
        study.enqueue_trial(dict(point))
    for number in range(len(points) or config.num_settings):
        proposed = study.ask(distributions)
        trial = done[number] if number < len(done) else None
        if trial is None or trial.setting != proposed.params:  # from another version of the sampler
            trial = ScoredSetting(dict(proposed.params), score(proposed.params))
        study.tell(proposed, trial.dice)
        yield trial


def simplify(
    best: PostprocessConfig, base: PostprocessConfig, score: Callable[[PostprocessConfig], ImageScores]
) -> PostprocessConfig:
    """Return the setting nearest to `base` that is no more than one standard error worse than the best.

    Breiman's one-standard-error rule with `base` as the simplest setting of all: value after value goes back to what it
    is there, at each step the one that costs least, as long as the mean loss against the best stays within the standard
    error of that mean. The loss is taken image by image, so that it is not drowned by how images differ.
    """
    top, chosen = score(best), best
    while True:
        candidates = [spaces.apply(chosen, {key: value}) for key, value in _differing(chosen, base).items()]
        losses = [top - score(candidate) for candidate in candidates]
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
    scorers: Sequence[MapScorer],
    seen: Sequence[bool],
    starts: Starts,
    space: Space,
    levels: Sequence[int],
    config: SearchConfig,
    *,
    done: Sequence[ScoredSetting] = (),
    note: Callable[[ScoredSetting], None] = lambda trial: None,
) -> Study:
    """Search on the images that may be seen; score the choice on all images.

    Args:
        scorers: of every image.
        seen: which images the search may learn from; the others are touched only when all is chosen.
        done: trials of this study before it was interrupted.
        note: told of every trial.
    """
    shown = [scorer for scorer, is_seen in zip(scorers, seen, strict=True) if is_seen]

    def mean_dice(setting: Setting) -> float:
        return float(dice_of_images(shown, spaces.apply(starts.default, setting)).mean())

    started = [(start, float(dice_of_images(shown, start).mean())) for start in starts]
    known = [
        ScoredSetting(spaces.setting_of(start, space), dice)
        for start, dice in started
        if _lies_in(start, space, starts)
    ]
    trials = []
    for trial in search(mean_dice, space, config, known=known, done=done):
        trials.append(trial)
        note(trial)
    tried = started + [(spaces.apply(starts.default, trial.setting), trial.dice) for trial in trials]
    best = max(tried, key=lambda pair: pair[1])[0]
    simplest = simplify(best, starts.default, lambda candidate: dice_of_images(shown, candidate))
    level_dice = {level: float(dice_of_images(shown, cut_at(level)).mean()) for level in levels}
    level = max(level_dice, key=lambda level: level_dice[level], default=None)
    picks = {"raw": cut_at(128), **starts._asdict(), "best": best, "simplest": simplest}
    if level is not None:
        picks["cut"] = cut_at(level)
    dice = {name: dice_of_images(scorers, pick) for name, pick in picks.items()}
    return Study(best, simplest, level, level_dice, dice)


def _lies_in(start: PostprocessConfig, space: Space, starts: Starts) -> bool:
    """Tell whether the search could have proposed a start: it differs from the default in searched keys only."""
    setting = spaces.setting_of(start, space)
    return all(space[key].holds(value) for key, value in setting.items()) and start == spaces.apply(
        starts.default, setting
    )
