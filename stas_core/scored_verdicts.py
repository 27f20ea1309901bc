"""What scored images and slides are worth: whether what was found, and how they look, is like the training cohort."""

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
    reasons = failed_reasons(num_failed, len(images) + num_failed, limits, "images")
    reasons += _mask_reasons([one.foreground_share for one in images], reference, limits)
    unchecked = [*unchecked, *([NOT_SAID] if reference is None else [])]
    if reference is not None:
        reasons += _drift_reasons(images, reference, limits)
        reasons += _disagreement_reasons(images, reference, limits)
        if reference.disagreement is None:
            unchecked.append("disagreement of members: the cohort had no hold-out to compare with, or they are not two")
        if unseen := sum(one.look is None for one in images):
            unchecked.append(f"the look of {unseen} images that an earlier version scored")
    return Verdict.of(reasons, unchecked)


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


def _drift_reasons(
    images: Sequence[ScoredImage], reference: CohortReference, limits: VerdictConfig
) -> Iterable[Reason]:
    seen = [one for one in images if one.drift is not None and one.drift_of is not None]
    outside = [one for one in seen if one.drift is not None and one.drift > limits.max_drift]
    if not (is_beyond(len(outside), len(seen), 0.0, limits) or (outside and len(outside) == len(seen))):
        return
    (figure, _), *_ = Counter(one.drift_of for one in outside if one.drift_of is not None).most_common()
    low, high = reference.looks[figure]
    values = [value for one in outside if (value := getattr(one.look, figure)) is not None]
    worst = max(outside, key=lambda one: one.drift or 0.0)
    yield Reason(
        LOOK,
        "drift",
        f"{len(outside)} of {len(seen)} images look unlike those of the training, mostly by their "
        f"{appearance.NAMES[figure]}: median {np.median(values):.3g}, farthest {worst.id} (drift {worst.drift:.1f})",
        f"{low:.3g} to {high:.3g}, as in the training cohort, and a drift up to {limits.max_drift:g} "
        "(verdict.max_drift; column drift of images.parquet)",
        _REMEDIES.get(figure, _STAIN_REMEDY),
    )


def _disagreement_reasons(
    images: Sequence[ScoredImage], reference: CohortReference, limits: VerdictConfig
) -> Iterable[Reason]:
    if reference.disagreement is None:
        return
    limit = limits.max_disagreement * reference.disagreement
    beyond = [one for one in images if one.mean_disagreement > limit]
    if is_beyond(len(beyond), len(images), 0.0, limits):
        yield Reason(
            LOOK,
            "disagreement",
            f"the members disagree on {len(beyond)} of {len(images)} images (mean standard deviation of their "
            f"probabilities, median {np.median([one.mean_disagreement for one in beyond]):.4f})",
            f"up to {limit:.4f}, {limits.max_disagreement:g} times that of hold-out images (verdict.max_disagreement)",
            "Look at these images first: the models guess there (column mean_disagreement of images.parquet)",
        )


def of_slides(
    rows: Sequence[Mapping[str, Any]], num_failed: int, limits: VerdictConfig, *, assumed_mpp: float | None
) -> Verdict:
    """Judge scored slides.

    Args:
        rows: of `slides.parquet`, with their warnings.
        num_failed: slides that could not be scored.
        limits: the limits.
        assumed_mpp: um per pixel of the models, where no checkpoint says it.
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
    return Verdict.of(reasons)
