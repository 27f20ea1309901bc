"""What a nested search of thresholds is worth: tables, the recommendation and its grounds, also as Markdown.

Every image has two scores under what was searched: one by the setting chosen on all folds, its own among them (tuned),
and one by the setting chosen without its fold (nested). Their difference is the optimism of judging a choice by the
data that it was made on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from stas_core import config as configs
from stas_core import markdown
from stas_core.config import Config
from stas_core.predict.postprocess import PostprocessConfig, cut_at
from stas_core.scores import bootstrap
from stas_core.scores.bootstrap import BootstrapConfig, Difference
from stas_core.scores.metrics import ImageScores
from stas_core.search.space import Space
from stas_core.verdicts import DO_NOT_USE, Level

ALL = "all"
"""Name of the study on all folds; the others are named by the fold they never see."""

PLAIN = cut_at(128)
"""The setting that does least: the map cut at 0.5."""
PICKS = {
    "raw": "plain cut at 0.5",
    "cut": "map cut at the best level",
    "default": "default",
    "reference": "reference",
    "best": "best found",
    "simplest": "simplest within one standard error",
}
"""What is compared: key and name in words. The search chose `cut`, `best` and `simplest`; the others are fixed."""
SEARCHED = ("cut", "best", "simplest")
RIVALS = ("raw", "default", "reference")
"""The fixed settings that every pick is compared with."""


@dataclass(frozen=True)
class TunedImage:
    """An image whose map was searched on."""

    id: str
    fold: int
    group: str
    target_px: int


@dataclass(frozen=True)
class Verdict:
    """One pick's Dice over all images, and what it gains (nested, image by image) on each of `RIVALS`."""

    name: str
    tuned: float
    nested: float
    low: float
    high: float
    over: Mapping[str, Difference]

    @property
    def optimism(self) -> float:
        """How much better it looks on the data it was chosen on: tuned - nested."""
        return self.tuned - self.nested


def nest(
    images: Sequence[TunedImage], studies: Mapping[str, Mapping[str, ImageScores]]
) -> dict[str, dict[str, ImageScores]]:
    """Return each pick's scores, `tuned` and `nested`, of images in their order.

    Args:
        studies: of each study (`all` and every fold) the Dice of every image under every pick.
    """
    own = [studies[str(image.fold)] for image in images]
    return {
        "tuned": {name: np.asarray(studies[ALL][name]) for name in studies[ALL]},
        "nested": {name: np.array([scores[name][index] for index, scores in enumerate(own)]) for name in studies[ALL]},
    }


def resampling(images: Sequence[TunedImage], config: BootstrapConfig) -> dict[str, Any]:
    """Return the keyword arguments of `metrics` that resample these images as the config says."""
    groups = [image.group for image in images] if config.by == "group" else None
    return {"groups": groups, **config.model_dump(exclude={"by"})}


def judge(
    images: Sequence[TunedImage], scores: Mapping[str, Mapping[str, ImageScores]], config: BootstrapConfig
) -> dict[str, Verdict]:
    """Judge every pick by its nested scores."""
    verdicts = {}
    how = resampling(images, config)
    for name in (name for name in PICKS if name in scores["nested"]):
        nested = scores["nested"][name]
        summary = bootstrap.summarise(nested, **how)
        over = {rival: bootstrap.compare(nested, scores["nested"][rival], **how) for rival in RIVALS}
        tuned = float(scores["tuned"][name].mean())
        verdicts[name] = Verdict(PICKS[name], tuned, summary.mean, summary.low, summary.high, over)
    return verdicts


def baseline(verdicts: Mapping[str, Verdict]) -> Literal["raw", "default"]:
    """Return what a tuned setting must beat: the default, or the plain cut where the default does not beat it."""
    return "default" if verdicts["default"].nested > verdicts["raw"].nested else "raw"


@dataclass(frozen=True)
class Recommendation:
    """What to use, and why."""

    choice: Literal["tuned", "default", "plain cut"]
    config: PostprocessConfig
    reason: str

    def under(self, level: Level) -> "Recommendation":
        """Return the recommendation as it reads beside a verdict: of worthless maps, none is good."""
        if level != DO_NOT_USE:
            return self
        return replace(
            self, reason=f"do not use these maps with any setting (see the verdict); had they to be used, {self.reason}"
        )


def recommend(
    verdicts: Mapping[str, Verdict], default: PostprocessConfig, simplest: PostprocessConfig, confidence: float
) -> Recommendation:
    """Recommend the simplest setting within one standard error of the best, if choosing so is proven to gain.

    The gain is that on the better of the default and the plain cut at 0.5, which is recommended where none is proven.
    """
    rival = baseline(verdicts)
    gain = verdicts["simplest"].over[rival]
    evidence = (
        f"chosen without its fold, the tuned setting changes Dice by {gain.mean:+.4f} ({gain.low:+.4f} to "
        f"{gain.high:+.4f}, {100 * confidence:g} % interval) against the {_short(rival)}"
    )
    if simplest != default and gain.low > 0:
        return Recommendation("tuned", simplest, f"use the tuned setting: {evidence}")
    why = "a tuned setting is worse" if gain.high < 0 else "the interval of the gain includes zero"
    if rival == "default":
        if simplest == default:
            why = "it is within one standard error of the best"
        return Recommendation("default", default, f"keep the default: {why}; {evidence}")
    if simplest == default:
        why = "the search found nothing better than the default"
    published = f"the default does not beat it (Dice {verdicts['default'].nested:.4f}, {verdicts['raw'].nested:.4f})"
    return Recommendation("plain cut", PLAIN, f"use the plain cut at 0.5: {published}; {why}; {evidence}")


def _short(rival: str) -> str:
    return "plain cut" if rival == "raw" else rival


def verdicts_markdown(verdicts: Mapping[str, Verdict], config: BootstrapConfig) -> str:
    """Write the verdicts as a Markdown table with what it means."""
    interval = f"{config.confidence * 100:g} % interval"
    gains_on = [f"Gain on {_short(rival)} ({interval})" for rival in RIVALS]
    columns = ["Setting", "Tuned on all", f"Nested ({interval})", "Optimism", *gains_on]
    rows = []
    for key, verdict in verdicts.items():
        optimism = f"{verdict.optimism:+.4f}" if key in SEARCHED else "fixed"
        gains = [
            "" if key == rival else f"{gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"
            for rival, gain in verdict.over.items()
        ]
        nested = f"{verdict.nested:.4f} ({verdict.low:.4f} to {verdict.high:.4f})"
        rows.append([verdict.name, f"{verdict.tuned:.4f}", nested, optimism, *gains])
    text = (
        "Mean over images of Dice. *Tuned on all*: by the setting chosen on these same images. *Nested*: each image by "
        "the setting that was chosen without its fold; only this says what to expect of new images. *Optimism* is "
        f"their difference. Gains are nested, image by image; intervals are of {config.num_resamples} bootstrap "
        f"resamples of {config.by}s (seed {config.seed}). An interval that holds 0 leaves open which is better."
    )
    return f"{text}\n\n{markdown.table(columns, rows)}"


def settings_markdown(default: Config, chosen: Mapping[str, PostprocessConfig]) -> str:
    """Write the values in which settings differ from the default, as a Markdown table."""
    from stas_core.search.space import flatten

    base = flatten(default)
    flat = {name: flatten(config) for name, config in chosen.items()}
    differing = sorted({key for values in flat.values() for key in values if values[key] != base.get(key)})
    rows = []
    for key in differing:
        cells = ["" if values.get(key) == base.get(key) else _cell(values.get(key)) for values in flat.values()]
        rows.append([f"`{key}`", _cell(base.get(key)), *cells])
    return markdown.table(["Key", "default", *chosen], rows)


def _cell(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_yaml(config: PostprocessConfig, header: Sequence[str]) -> str:
    """Write a setting as YAML for score_images, with its evidence as comments above."""
    return "".join(f"# {line}\n" for line in header) + configs.dump(config)


def images_table(images: Sequence[TunedImage], scores: Mapping[str, Mapping[str, ImageScores]]) -> pa.Table:
    """Return one row per image: Dice under each pick; `tuned_` as chosen on all folds, `nested_` without its own.

    No class of rows: the columns are the picks, which follow from what was searched.
    """
    columns: dict[str, Any] = {
        name: [getattr(image, name) for image in images] for name in ("id", "group", "target_px")
    }
    columns["fold"] = pa.array([image.fold for image in images], pa.int32())
    for name, values in scores["nested"].items():
        if name in SEARCHED:
            columns |= {f"tuned_{name}": scores["tuned"][name], f"nested_{name}": values}
        else:
            columns[name] = values
    return pa.table(columns)


def trials_table(space: Space, found: Mapping[str, Any]) -> pa.Table:
    """Return one row per trial; values of a key that are not all of one kind are written as JSON.

    No class of rows: the columns are the keys of the space.
    """
    trials = [(name, setting, dice) for name, study in found.items() for setting, dice in study["trials"]]
    columns: dict[str, Any] = {"study": [name for name, _, _ in trials], "dice": [dice for _, _, dice in trials]}
    for key in space:
        values = [setting[key] for _, setting, _ in trials]
        one_kind = len({type(value) for value in values if value is not None}) <= 1
        columns[key] = values if one_kind else [json.dumps(value) for value in values]
    return pa.table(columns)
