"""What scored images and slides are worth: whether what was found, and how they look, is like the training cohort."""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stas_core.data import appearance
from stas_core.data.reference import LARGE_SHARE, CohortReference
from stas_core.scored_runs import ScoredImage
from stas_core.verdicts import DO_NOT_USE, LOOK, Reason, Verdict, VerdictConfig, failed_reasons

NOT_SAID = (
    "masks, looks and disagreement against the training cohort, as the ensemble does not say what it was trained on "
    "(train it again, or give the ensemble.json of its run)"
)
SLIDES_NOT_SAID = (
    "stains against the training images, as the ensemble does not say what it was trained on (train it again, give the "
    "ensemble.json of its run, or set cohort)"
)
SLIDES_WITHOUT_STAIN = (
    "stains against the training images, as they could not be told apart on any slide, or on none of these images"
)
_REMEDIES = {
    "sharpness": "Are they blurred, or of another magnification (um per pixel) than the training images?",
    "brightness": "Another microscope or exposure? Look at the masks before you use them",
}
_STAIN_REMEDY = "Another laboratory's stain? Look at the masks, and train on some of these images"


def with_drift(images: Sequence[ScoredImage], reference: CohortReference | None) -> list[ScoredImage]:
    """Return the images with how far each looks from the training cohort."""
    found = []
    for one in images:
        far = None if one.look is None or reference is None else appearance.drift(one.look, reference.looks)
        drifted = {} if far is None else {"drift": round(far.score, 6), "drift_of": far.figure}
        found.append(replace(one, **drifted))  # type: ignore[arg-type]
    return found


def of_images(
    images: Sequence[ScoredImage],
    num_failed: int,
    reference: CohortReference | None,
    limits: VerdictConfig,
    *,
    unchecked: Sequence[str] = (),
) -> Verdict:
    """Judge scored images, which have their drift, by the training cohort of their ensemble.

    Args:
        images: what was scored.
        num_failed: images that could not be.
        reference: of the cohort; None: the ensemble does not say.
        limits: the limits.
        unchecked: what else could not be checked.
    """
    figures = ImageFigures(reference, limits)
    figures.add(images)
    return figures.verdict(num_failed, unchecked=unchecked)


class ImageFigures:
    """The figures of scored images that a verdict follows from, a few bytes an image."""

    def __init__(self, reference: CohortReference | None, limits: VerdictConfig):
        self._reference = reference
        self._limits = limits
        self.shares = array("d")
        """Foreground shares, in the order in which images were added."""
        self._unseen = self._num_with_drift = 0
        self._outside_of: Counter[str] = Counter()
        self._outside: dict[str, array[float]] = {name: array("d") for name in appearance.NAMES}
        self._farthest = ("", 0.0)
        self._disagreeing = array("d")

    def add(self, images: Iterable[ScoredImage]) -> None:
        """Count images, which have their drift."""
        usual = None if self._reference is None else self._reference.disagreement
        for one in images:
            self.shares.append(one.foreground_share)
            self._unseen += one.look is None
            if one.drift is not None and one.drift_of is not None:
                self._num_with_drift += 1
                if one.drift > self._limits.max_drift:
                    self._count_outside(one, one.drift, one.drift_of)
            if usual is not None and one.mean_disagreement > self._limits.max_disagreement * usual:
                self._disagreeing.append(one.mean_disagreement)

    def _count_outside(self, one: ScoredImage, drift: float, figure: str) -> None:
        self._outside_of[figure] += 1
        if not self._farthest[0] or drift > self._farthest[1]:
            self._farthest = (one.id, drift)
        for name, values in self._outside.items():
            if (value := getattr(one.look, name, None)) is not None:
                values.append(value)

    def verdict(self, num_failed: int, *, unchecked: Sequence[str] = ()) -> Verdict:
        """Judge the images by the training cohort of their ensemble; see `of_images`."""
        reference, limits, num = self._reference, self._limits, len(self.shares)
        reasons = failed_reasons(num_failed, num + num_failed, limits, "images")
        reasons += _mask_reasons(self.shares, reference, limits)
        unchecked = [*unchecked, *([NOT_SAID] if reference is None else [])]
        if reference is not None:
            reasons += self._drift_reasons(reference)
            reasons += self._disagreement_reasons(reference)
            if reference.disagreement is None:
                unchecked.append(
                    "disagreement of members: the cohort had no hold-out to compare with, or they are not two, or no "
                    "node could predict it"
                )
            if self._unseen:
                unchecked.append(f"the look of {self._unseen} images that an earlier version scored")
        return Verdict.of(reasons, unchecked)

    def _drift_reasons(self, reference: CohortReference) -> Iterable[Reason]:
        num, seen, limits = self._outside_of.total(), self._num_with_drift, self._limits
        if not (is_beyond(num, seen, 0.0, limits) or (num and num == seen)):
            return
        (figure, _), *_ = self._outside_of.most_common()
        low, high = reference.looks[figure]
        farthest, drift = self._farthest
        yield Reason(
            LOOK,
            "drift",
            f"{num} of {seen} images look unlike those of the training, mostly by their {appearance.NAMES[figure]}: "
            f"median {np.median(self._outside[figure]):.3g}, farthest {farthest} (drift {drift:.1f})",
            f"{low:.3g} to {high:.3g}, as in the training cohort, and a drift up to {limits.max_drift:g} "
            "(verdict.max_drift; column drift of images.parquet)",
            _REMEDIES.get(figure, _STAIN_REMEDY),
        )

    def _disagreement_reasons(self, reference: CohortReference) -> Iterable[Reason]:
        limits, num = self._limits, len(self._disagreeing)
        if reference.disagreement is None or not is_beyond(num, len(self.shares), 0.0, limits):
            return
        limit = limits.max_disagreement * reference.disagreement
        yield Reason(
            LOOK,
            "disagreement",
            f"the members disagree on {num} of {len(self.shares)} images (mean standard deviation of their "
            f"probabilities, median {np.median(self._disagreeing):.4f})",
            f"up to {limit:.4f}, {limits.max_disagreement:g} times that of hold-out images (verdict.max_disagreement)",
            "Look at these images first: the models guess there (column mean_disagreement of images.parquet)",
        )


def is_beyond(count: int, of: int, share: float, limits: VerdictConfig) -> bool:
    """Tell whether a count is beyond the share that training images have: by a margin, and not by chance.

    Example:
        >>> [is_beyond(count, 20, 0.1, VerdictConfig()) for count in (2, 4, 5)]
        [False, False, True]
    """
    chance = 2 * (of * share * (1 - share)) ** 0.5
    return count >= 2 and count > share * of + max(limits.max_unusual * of, chance)


def _mask_reasons(
    shares: Sequence[float], reference: CohortReference | None, limits: VerdictConfig
) -> Iterable[Reason]:
    num = len(shares)
    num_large, num_empty = sum(share > LARGE_SHARE for share in shares), sum(share == 0 for share in shares)
    usual_large = 0.0 if reference is None else reference.large_share
    if is_beyond(num_large, num, usual_large, limits) or (num_large == num and num and usual_large < LARGE_SHARE):
        yield Reason(
            DO_NOT_USE if num_large > LARGE_SHARE * num else LOOK,
            "large_masks",
            f"{num_large} of {num} masks cover more than {LARGE_SHARE:.0%} of their image",
            f"about {usual_large:.0%}, as in the training cohort (verdict.max_unusual)",
            "Look at contact_sheet.png: has the model learned anything, and are these images like its training's?",
        )
    if reference is not None and is_beyond(num_empty, num, reference.empty_share, limits):
        yield Reason(
            LOOK,
            "empty_masks",
            f"{num_empty} of {num} masks are empty",
            f"about {reference.empty_share:.0%}, as in the training cohort (verdict.max_unusual)",
            "Fine for images without targets; else look at maps/, and tune thresholds (tune_postprocess)",
        )


def of_slides(
    rows: Sequence[Mapping[str, Any]],
    num_failed: int,
    limits: VerdictConfig,
    *,
    assumed_mpp: float | None,
    unchecked: Sequence[str] = (),
) -> Verdict:
    """Judge scored slides.

    Args:
        rows: of `slides.parquet`, with their warnings.
        num_failed: slides that could not be scored.
        limits: the limits.
        assumed_mpp: um per pixel of the models, where no checkpoint says it.
        unchecked: what could not be judged, and why.
    """
    reasons = failed_reasons(num_failed, len(rows) + num_failed, limits, "slides")
    kinds = Counter(kind for row in rows for kind in {text.partition(":")[0] for text in row["warnings"]})
    for kind, count in kinds.most_common():
        first = next(text for row in rows for text in row["warnings"] if text.startswith(f"{kind}:"))
        reasons.append(
            Reason(
                LOOK,
                f"slides_{kind}",
                f"{count} of {len(rows)} slides have a warning of the kind `{kind}`, such as: {first}",
                "none",
                "See the warnings in this report, and the slides' overviews",
            )
        )
    if assumed_mpp is not None:
        reasons.append(
            Reason(
                LOOK,
                "assumed_mpp",
                f"the models' resolution is taken to be {assumed_mpp:g} um per pixel, as no checkpoint says it",
                "a resolution that somebody gave",
                "Set model_mpp, or train with data.mpp",
            )
        )
    return Verdict.of(reasons, unchecked)
