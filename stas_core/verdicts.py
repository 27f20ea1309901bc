"""What a stage's result is worth: `ok`, `look at this` or `do not use`, and why.

Every check is a pure function of figures that the stage has anyway; each reason states the figure, the limit that it
passed and what to do about it. Limits are settings (`VerdictConfig`), the same ones for all stages.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError

from stas_core.config import Config
from stas_core.data.cohort import CohortRow
from stas_core.data.reference import LARGE_SHARE, SAME_MPP, is_same_mpp
from stas_core.runs import EpochMetrics, OofScore

Level = Literal["ok", "look at this", "do not use"]
OK: Level = "ok"
LOOK: Level = "look at this"
DO_NOT_USE: Level = "do not use"
LEVELS = (OK, LOOK, DO_NOT_USE)
"""From good to bad."""
MIN_JUDGED = 5
"""Fewer images than this are too few to condemn a result, or to say that a share of them is unusual."""
Shares = npt.NDArray[np.float64]


class VerdictConfig(Config):
    """Limits of the verdict that every stage ends with."""

    min_dice: float = Field(0.3, ge=0, le=1)
    """A mean Dice below this: do not use."""
    min_loss_drop: float = Field(0.05, ge=0, lt=1)
    """By how much of itself the training loss must fall from the first epoch to the last."""
    max_fold_gap: float = Field(0.1, ge=0, le=1)
    """How far the Dice of a fold may lie from that of the other folds, if chance does not explain it."""
    max_empty_maps: float = Field(0.2, ge=0, le=1)
    """Share of the images with targets whose prediction may be empty; beyond half of them: do not use."""
    max_false_alarms: float = Field(0.5, ge=0, le=1)
    """Share of the images without targets that may have a prediction."""
    min_precision: float = Field(0.4, ge=0, le=1)
    """Share of target among all pixels that are predicted with 50 % or more: with less, probabilities mean nothing."""
    max_optimism: float = Field(0.05, ge=0, le=1)
    """By how much a choice may look better on the images it was made on than on others, in Dice."""
    max_failed: float = Field(0.1, ge=0, le=1)
    """Share of the inputs that may fail."""
    max_drift: float = Field(1.5, ge=1)
    """How far the look of an image may lie from the middle of the training cohort's range, in half ranges."""
    max_disagreement: float = Field(2, ge=1)
    """How many times as much as on hold-out images members may disagree on an image."""
    max_unusual: float = Field(0.1, ge=0, le=1)
    """By how much the share of unusual images (a mask that is empty or large, a look unlike that of any training image)
    may exceed that of the training cohort."""


@dataclass(frozen=True)
class Reason:
    """Why a result is not simply ok."""

    level: Level
    check: str
    """Name of the check, for programs."""
    figure: str
    """What was found, as a phrase with its number."""
    limit: str
    """What was expected, as a phrase with its number."""
    remedy: str
    """What to do."""

    def __str__(self) -> str:
        return f"{self.figure}; expected {self.limit}. {self.remedy}"


@dataclass(frozen=True)
class Verdict:
    """A level with its reasons, worst first, and what could not be checked."""

    reasons: tuple[Reason, ...] = ()
    unchecked: tuple[str, ...] = ()
    """What no reason was looked for, and why not."""

    @classmethod
    def of(cls, reasons: Iterable[Reason], unchecked: Iterable[str] = ()) -> "Verdict":
        """Return the verdict that these reasons make."""
        return cls(tuple(sorted(reasons, key=lambda one: -LEVELS.index(one.level))), tuple(unchecked))

    @property
    def level(self) -> Level:
        """The worst level of its reasons."""
        return LEVELS[max((LEVELS.index(reason.level) for reason in self.reasons), default=0)]

    @property
    def lines(self) -> list[str]:
        """What the terminal shows."""
        reasons = [f"  {reason.level}: {reason}" for reason in self.reasons]
        return [f"VERDICT: {self.level}", *reasons, *(f"  not checked: {text}" for text in self.unchecked)]

    def markdown(self) -> str:
        """Return what stands at the top of a report."""
        reasons = [f"- {reason.level}: {reason}" for reason in self.reasons]
        notes = [f"- not checked: {text}" for text in self.unchecked]
        return "\n".join([f"**Verdict: {self.level}**", "", *reasons, *notes]).rstrip()

    def to_json(self) -> dict[str, Any]:
        """Return it as a manifest holds it."""
        return {"level": self.level, **asdict(self)}

    @classmethod
    def from_json(cls, values: Any) -> "Verdict | None":
        """Return the verdict of a manifest; None: it holds none that this version knows."""
        try:
            found = TypeAdapter(dict[str, Any]).validate_python(values)
            return TypeAdapter(Verdict).validate_python({key: found[key] for key in ("reasons", "unchecked")})
        except (ValidationError, KeyError):
            return None


def constant_dice(shares: Shares) -> Shares:
    """Return the Dice of a mask that looks at no image but is all foreground: the best there is where targets are.

    Args:
        shares: of each image the share that is target, 0 to 1.

    Example:
        >>> constant_dice(np.array([0.5, 0.2])).round(3).tolist()
        [0.667, 0.333]
    """
    return 2 * shares / (1 + shares)


def dice_reasons(
    dice: npt.ArrayLike, shares: Sequence[float], limits: VerdictConfig, what: str = "out-of-fold Dice"
) -> list[Reason]:
    """Judge the Dice of images with targets by what a mask that looks at no image reaches, and by the floor.

    Of fewer than `MIN_JUDGED` images it is only worth a look.

    Args:
        dice: of each image.
        shares: of each image the share that is target; without any, there is no Dice to judge.
        limits: the limits.
        what: what the figure is called.
    """
    real = np.asarray(shares, np.float64)
    found, constant = np.asarray(dice, np.float64)[real > 0], constant_dice(real[real > 0])
    if not len(found):
        return []
    gains = found - constant
    is_judged = len(gains) >= MIN_JUDGED
    level, error = (DO_NOT_USE, 2 * float(gains.std(ddof=1)) / len(gains) ** 0.5) if is_judged else (LOOK, 0.0)
    mean, gain = float(found.mean()), float(gains.mean())
    of = "" if (real > 0).all() else f" of the {len(found)} images with targets"
    if gain <= error:
        return [
            Reason(
                level,
                "no_better_than_constant",
                f"{what}{of} is {mean:.3f}, and that of a mask that is all foreground {constant.mean():.3f} "
                f"(difference {gain:+.3f} +- {error:.3f})",
                "a gain beyond chance",
                "Nothing was learned that holds on other images: check that annotations belong to their images "
                "(figures/), then train longer or with another optim.lr",
            )
        ]
    if mean < limits.min_dice:
        return [
            Reason(
                level,
                "dice_below_floor",
                f"{what}{of} is {mean:.3f}",
                f"{limits.min_dice:g} or more (verdict.min_dice)",
                "Train longer, on more images, or from pretrained weights (model.encoder_weights)",
            )
        ]
    return []


def of_cohort(rows: Sequence[CohortRow], num_failed: int, limits: VerdictConfig) -> Verdict:
    """Judge what images and annotations were found."""
    reasons = failed_reasons(num_failed, len(rows) + num_failed, limits)
    if not any(row.num_targets for row in rows):
        reasons.append(_without_target(LOOK, len(rows)))
    large = sum(row.foreground_share > LARGE_SHARE for row in rows)
    if large > LARGE_SHARE * len(rows):
        reasons.append(
            Reason(
                LOOK,
                "mostly_target",
                f"{large} of {len(rows)} images are more than {LARGE_SHARE:.0%} target",
                "targets that are smaller than what surrounds them",
                "Look at figures/contact_sheet.png: are masks inverted, or regions marked instead of targets?",
            )
        )
    sizes = sorted({row.mpp for row in rows if row.mpp is not None})
    if sizes and not is_same_mpp(sizes[0], sizes[-1]):
        reasons.append(
            Reason(
                LOOK,
                "mixed_mpp",
                f"images have {sizes[0]:g} to {sizes[-1]:g} um per pixel",
                f"one pixel size, to {SAME_MPP:.0%}",
                "Resample them to one, or give data.mpp where files state it wrongly: networks take no notice of it",
            )
        )
    blank = sum(row.stain is None for row in rows)
    if blank > limits.max_failed * len(rows):
        reasons.append(
            Reason(
                LOOK,
                "no_tissue",
                f"{blank} of {len(rows)} images have no tissue to estimate a stain from",
                f"at most {limits.max_failed:.0%} (verdict.max_failed)",
                "Look at them: are these H&E fields?",
            )
        )
    return Verdict.of(reasons)


def _without_target(level: Level, num_images: int) -> Reason:
    return Reason(
        level,
        "no_target",
        f"none of the {num_images} images has a target",
        "some with, or there is nothing to train on",
        "Check annotation.labels, and that the annotations mark targets",
    )


def of_folds(
    oof: Sequence[OofScore],
    histories: Mapping[int, Sequence[EpochMetrics]],
    rows: Sequence[CohortRow],
    limits: VerdictConfig,
) -> Verdict:
    """Judge a training by its out-of-fold maps and its course.

    Args:
        oof: the scores of all finished folds.
        histories: the epochs of each of these folds.
        rows: of the cohort.
        limits: the limits.
    """
    known = {row.id: row for row in rows}
    pairs = [(score, known[score.id]) for score in oof]
    reasons = dice_reasons([score.dice for score in oof], [row.foreground_share for _, row in pairs], limits)
    if not any(row.num_targets for _, row in pairs):
        reasons.append(_without_target(DO_NOT_USE, len(pairs)))
    reasons += _loss_reasons(histories, limits)
    reasons += _fold_reasons(oof, limits)
    reasons += map_reasons(
        [(score.tp + score.fp) / (row.height * row.width) for score, row in pairs],
        [row.foreground_share for _, row in pairs],
        limits,
    )
    reasons += precision_reasons(sum(score.tp for score in oof), sum(score.fp for score in oof), limits)
    return Verdict.of(reasons)


def of_choice(dice: npt.ArrayLike, shares: Sequence[float], optimism: float, limits: VerdictConfig) -> Verdict:
    """Judge what a search chose.

    Args:
        dice: of each image by what was chosen without its fold.
        shares: of each image the share that is target.
        optimism: how much higher the mean Dice is by what was chosen on all images.
        limits: the limits.
    """
    reasons = dice_reasons(dice, shares, limits, "Dice by what was chosen without an image's fold")
    return Verdict.of([*reasons, *optimism_reasons(optimism, limits)])


def of_evaluation(
    dice: Sequence[float],
    shares: Mapping[str, Sequence[float]],
    num_missing: int,
    limits: VerdictConfig,
    *,
    num_trained_on: int = 0,
) -> Verdict:
    """Judge a scored run by the truth.

    Args:
        dice: of each image or slide.
        shares: of each the share that is target (`truth`) and that is predicted (`found`).
        num_missing: images of the truth without a score.
        limits: the limits.
        num_trained_on: images that members of the ensemble were trained on.
    """
    reasons = dice_reasons(dice, shares["truth"], limits, "Dice")
    reasons += map_reasons(shares["found"], shares["truth"], limits)
    reasons += failed_reasons(num_missing, num_missing + len(dice), limits, "images of the truth")
    if num_trained_on:
        reasons.append(
            Reason(
                LOOK,
                "trained_on",
                f"{num_trained_on} of {len(dice)} images are of the training split",
                "images that no member was trained on",
                "These scores are better than on new images: evaluate the hold-out (truth.split=hold-out)",
            )
        )
    return Verdict.of(reasons)


def _loss_reasons(histories: Mapping[int, Sequence[EpochMetrics]], limits: VerdictConfig) -> Iterable[Reason]:
    for fold, history in histories.items():
        if len(history) < 2:
            continue
        first, last = history[0].train_loss, history[-1].train_loss
        if last > first * (1 - limits.min_loss_drop):
            yield Reason(
                LOOK,
                "loss_not_falling",
                f"training loss of fold {fold} went from {first:.3f} to {last:.3f} in {len(history)} epochs",
                f"a fall by {limits.min_loss_drop:.0%} or more (verdict.min_loss_drop)",
                "Train longer, or try another optim.lr (lower where it rose)",
            )


def _fold_reasons(oof: Sequence[OofScore], limits: VerdictConfig) -> Iterable[Reason]:
    for fold in sorted({score.fold for score in oof}):
        own = np.array([score.dice for score in oof if score.fold == fold])
        others = np.array([score.dice for score in oof if score.fold != fold])
        if min(len(own), len(others)) < MIN_JUDGED:
            continue
        gap = float(own.mean() - others.mean())
        error = 3 * float(np.sqrt(own.var(ddof=1) / len(own) + others.var(ddof=1) / len(others)))
        if abs(gap) > max(limits.max_fold_gap, error):
            yield Reason(
                LOOK,
                "fold_apart",
                f"fold {fold} has Dice {own.mean():.3f}, the others {others.mean():.3f}",
                f"at most {limits.max_fold_gap:g} between them (verdict.max_fold_gap), or what chance explains",
                f"Look at figures/fold_{fold}.png and at its images: another laboratory, or a training that failed?",
            )


def map_reasons(found: Sequence[float], truth: Sequence[float], limits: VerdictConfig) -> Iterable[Reason]:
    """Judge how much of images is predicted as target, against how much is.

    Args:
        found: of each image the share that is predicted.
        truth: of each image the share that is target.
        limits: the limits.
    """
    predicted, real = np.asarray(found), np.asarray(truth)
    with_target = real > 0
    empty = float((predicted[with_target] == 0).mean()) if with_target.any() else 0.0
    if empty > limits.max_empty_maps:
        yield Reason(
            DO_NOT_USE if empty > max(LARGE_SHARE, limits.max_empty_maps) else LOOK,
            "empty_maps",
            f"{empty:.0%} of the images with targets have an empty prediction",
            f"at most {limits.max_empty_maps:.0%} (verdict.max_empty_maps)",
            "Train longer, or tune thresholds (tune_postprocess): the maps may stay below 0.5",
        )
    if len(negative := predicted[~with_target]) and (alarms := float((negative > 0).mean())) > limits.max_false_alarms:
        yield Reason(
            LOOK,
            "false_alarms",
            f"{alarms:.0%} of the {len(negative)} images without targets have a prediction",
            f"at most {limits.max_false_alarms:.0%} (verdict.max_false_alarms)",
            "Train on more images without targets, or tune thresholds (tune_postprocess)",
        )
    large, real_large = float((predicted > LARGE_SHARE).mean()), float((real > LARGE_SHARE).mean())
    if len(real) and large > real_large + limits.max_unusual:
        yield Reason(
            DO_NOT_USE if large > LARGE_SHARE else LOOK,
            "full_maps",
            f"{large:.0%} of the predictions cover more than {LARGE_SHARE:.0%} of their image",
            f"at most {limits.max_unusual:.0%} more than of the truth, {real_large:.0%} (verdict.max_unusual)",
            "Look at the masks: has the model learned anything, and are these images like those of the training?",
        )


def precision_reasons(tp: int, fp: int, limits: VerdictConfig) -> Iterable[Reason]:
    """Judge calibration: of the pixels that are predicted with 50 % or more, half or more should be target."""
    if tp + fp and tp / (tp + fp) < limits.min_precision:
        yield Reason(
            LOOK,
            "uncalibrated",
            f"of the pixels with a probability of 0.5 or more {tp / (tp + fp):.0%} are target",
            f"{limits.min_precision:.0%} or more (verdict.min_precision)",
            "Do not read maps as probabilities; tune thresholds (tune_postprocess)",
        )


def optimism_reasons(optimism: float, limits: VerdictConfig) -> Iterable[Reason]:
    """Judge how much better a choice looks on the images it was made on, in Dice."""
    if optimism > limits.max_optimism:
        yield Reason(
            LOOK,
            "optimism",
            f"what was chosen looks {optimism:.3f} better in Dice on the images it was chosen on than on others",
            f"at most {limits.max_optimism:g} (verdict.max_optimism)",
            "Choose on more images, or among fewer settings",
        )


def failed_reasons(num_failed: int, num_inputs: int, limits: VerdictConfig, what: str = "inputs") -> list[Reason]:
    """Judge how many inputs could not be used."""
    if num_failed == 0 or num_failed <= limits.max_failed * num_inputs:
        return []
    return [
        Reason(
            LOOK,
            "failed",
            f"{num_failed} of {num_inputs} {what} could not be used",
            f"at most {limits.max_failed:.0%} (verdict.max_failed)",
            "See failures.parquet: what is left may not be typical",
        )
    ]
