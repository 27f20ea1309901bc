"""Slides of a run against their truth: scores of one slide, of all, and FROC curves.

`EvaluatedSlide`, `SlideSummary` and `FrocRow` are the contracts. Rows go in sorted by id, and equal rows give equal
tables: resampling is seeded.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stas_core import local_files, storage
from stas_core.data import images
from stas_core.data.annotations import AnnotationConfig
from stas_core.errors import InputError, NoTissue, SizeMismatch, WriteError, as_input_error
from stas_core.failures import Failure
from stas_core.scores import bootstrap
from stas_core.scores.bootstrap import MIN_RESAMPLED, BootstrapConfig
from stas_core.scores.evaluation import STAGE
from stas_core.scores.metrics import Counts
from stas_core.slides.evaluation import Band, Froc, SlideEvaluation, evaluate_slide, small_layers
from stas_core.slides.layers import compared_uri, small_size
from stas_core.slides.run import SlideRun
from stas_core.slides.slide_truth import open_truth
from stas_core.slides.stitching import MapSource
from stas_core.slides.survey import Survey
from stas_core.slides.truth_sources import OutlineSource, TiffMask
from stas_core.tables import Int32

FALSE_PER_MM2 = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False targets per mm2 of tissue at which sensitivity is stated."""


@dataclass(frozen=True)
class SlideFiles:
    """What is read of a slide."""

    id: str
    run_uri: str
    tissue_mm2: float
    """That was scored."""
    truth_uri: str
    mask_uri: str
    map_uri: str = ""
    """"": there is none."""
    layers_uri: str = ""
    """Folder of an evaluation, for the small layers that its page shows; "": none are wanted."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedSlide:
    """A row of `scores.parquet` of slides: a slide's mask against its truth.

    Pixels are counted by `tp`, `fp` and `fn`, in px of the maps' frame; targets (8-connected, matched one to one at an
    IoU of at least 0.5) by `target_tp`, `target_fp` and `target_fn`. Sensitivity is the largest share of the true
    targets that some threshold of the targets' mean probability finds at no more false targets per mm2 of tissue; null
    where the slide has no true target.
    """

    id: str
    truth_uri: str
    frame_height: int
    """Of map, mask and truth as they were compared, in px."""
    frame_width: int
    frame_mpp: float
    """um per pixel of the frame."""
    tissue_mm2: float
    """That was scored: what targets are counted per."""
    has_region: bool
    """Only a region of interest was scored: mask and truth are cut at its edge."""
    num_outside: Int32
    """True targets that lie wholly outside of it: neither found nor missed."""
    num_cut: Int32
    """True targets that its edge cuts: what lies inside counts."""
    has_map: bool
    """False: there are no probabilities, and all targets are found, or none."""
    target_px: int
    """Of the truth."""
    dice: float
    iou: float
    precision: float
    recall: float
    tp: int
    fp: int
    fn: int
    target_tp: Int32
    target_fp: Int32
    target_fn: Int32
    target_precision: float
    target_recall: float
    target_f1: float
    true_per_mm2: float
    """True targets per mm2 of tissue."""
    found_per_mm2: float
    """Found targets per mm2 of tissue."""
    sensitivity_at_1_4: float | None
    """At a quarter of a false target per mm2."""
    sensitivity_at_1_2: float | None
    sensitivity_at_1: float | None
    sensitivity_at_2: float | None
    sensitivity_at_4: float | None
    sensitivity_at_8: float | None
    sensitivity_mean: float | None
    """Of the six."""

    @property
    def pixels(self) -> Counts:
        """Return what is counted of its pixels."""
        return Counts(self.tp, self.fp, self.fn)

    @property
    def targets(self) -> Counts:
        """Return what is counted of its targets."""
        return Counts(self.target_tp, self.target_fp, self.target_fn)


SENSITIVITIES = tuple(f"sensitivity_at_{name}" for name in ("1_4", "1_2", "1", "2", "4", "8"))
"""Columns of sensitivity at `FALSE_PER_MM2`."""


@dataclass(frozen=True)
class SlideOutcome:
    """What comes of a slide: its scores, with the probabilities that curves of several slides are made of."""

    id: str
    score: EvaluatedSlide | None
    failure: Failure | None
    """Why there is no score."""
    matched_prob: list[float] = field(default_factory=list)
    """Mean probability of each found target that matches a true one, ascending."""
    missed_prob: list[float] = field(default_factory=list)
    """Of each that matches none."""

    def froc(self) -> Froc:
        """Return the slide's curve."""
        return pooled_froc([self])


@dataclass(frozen=True)
class FrocRow:
    """A row of `froc.parquet`: what a threshold of the targets' mean probability gives."""

    id: str | None
    """Null: all slides together."""
    threshold: float
    """Targets of at least this probability count as found."""
    sensitivity: float | None
    """Share of the true targets that are matched; null: there are none."""
    false_per_mm2: float


@dataclass(frozen=True)
class SlideSummary:
    """A row of `summary.parquet` of slides: a score over slides, and of all slides together.

    `low` and `high`, bounds of a bootstrap interval over slides, are null where fewer than `MIN_RESAMPLED` slides are
    there to draw from; those of pooled scores are there for ratios of counts only.
    """

    score: str
    """Column of `scores.parquet`."""
    num_slides: Int32
    """That have it."""
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    pooled: float | None
    """Of the summed counts, areas and targets."""
    pooled_low: float | None
    pooled_high: float | None


def evaluate_files(
    files: SlideFiles,
    annotation: AnnotationConfig | None = None,
    *,
    tile_px: int = 2048,
    most_px: float | None = None,
) -> SlideOutcome:
    """Score the files of one slide, or say why it cannot be scored.

    Args:
        files: of the slide.
        annotation: what the classes of its outlines mean; None: as by default.
        tile_px: side of what is read at once.
        most_px: score the rows in its middle alone, of so many pixels in the maps' frame, to see how long it takes.
    """
    try:
        run = SlideRun(files.run_uri)
        survey, _ = run.survey(files.id)
        region = run.region(files.id, survey)
        if files.tissue_mm2 <= 0:
            raise NoTissue(f"{files.run_uri} says that {files.id} has no tissue, which targets are counted per")
        within = math.inf if most_px is None else most_px
        found = _evaluate(files, annotation or AnnotationConfig(), survey, region, tile_px, within)
    except WriteError:
        raise  # what lies in the surroundings is no slide's fault
    except Exception as error:  # noqa: BLE001 - one slide must not end an evaluation of many
        return SlideOutcome(files.id, None, Failure.of(files.id, STAGE, as_input_error(error, files.id)))
    matches = found.partner >= 0
    matched, missed = (np.sort(found.mean_prob[which]).tolist() for which in (matches, ~matches))
    return SlideOutcome(files.id, _score(files, survey, found), None, matched, missed)


def _evaluate(
    files: SlideFiles,
    annotation: AnnotationConfig,
    survey: Survey,
    region: OutlineSource | None,
    tile_px: int,
    most_px: float,
) -> SlideEvaluation:
    frame = survey.frame_height, survey.frame_width
    cut: Callable[[MapSource], MapSource] = partial(Band.amid, most_px=most_px)
    if frame[0] * frame[1] <= most_px:
        cut = _whole
    with local_files.temporary_folder() as folder, ExitStack() as opened:
        copies = {uri: _at_hand(uri, Path(folder)) for uri in (files.truth_uri, files.mask_uri, files.map_uri) if uri}
        try:
            planes = []
            for uri in filter(None, (files.mask_uri, files.map_uri)):
                plane = TiffMask(copies[uri])
                opened.callback(plane.close)
                if plane.size != frame:
                    raise SizeMismatch(
                        f"{uri} has {plane.size[1]}x{plane.size[0]} px, and the survey of the slide "
                        f"{frame[1]}x{frame[0]}; score the slide again"
                    )
                planes.append(plane)
            file = copies[files.truth_uri]
            truth: MapSource = opened.enter_context(open_truth(file, files.truth_uri, survey, annotation))
            mask, truth = cut(planes[0]), cut(truth)
            prob = cut(planes[1]) if files.map_uri else None
            within = None if region is None else cut(region)
            found = evaluate_slide(mask, truth, area_mm2=files.tissue_mm2, prob=prob, region=within, tile_px=tile_px)
            if files.layers_uri:
                for kind, layer in small_layers(found, small_size((survey.height_px, survey.width_px))).items():
                    storage.write_bytes(compared_uri(files.layers_uri, files.id, kind), images.encode_mask(layer))
            return found
        except InputError as error:
            message = str(error)
            for uri, path in copies.items():
                message = message.replace(str(path), uri)  # where a copy lies differs
            raise type(error)(message) from error


def _whole(source: MapSource) -> MapSource:
    return source


def _at_hand(uri: str, folder: Path) -> Path:
    """Return a local file, or a copy of one that lies in an object store."""
    if storage.is_local(uri):
        return storage.local_path(uri)
    path = folder / f"{len(list(folder.iterdir()))}_{storage.name_of(uri)}"
    storage.fetch_file(uri, path)
    return path


def _score(files: SlideFiles, survey: Survey, found: SlideEvaluation) -> EvaluatedSlide:
    pixels, targets = found.pixels, found.targets
    sensitivities = sensitivities_of(found.froc(), len(found.truth))
    return EvaluatedSlide(
        id=files.id,
        truth_uri=files.truth_uri,
        frame_height=survey.frame_height,
        frame_width=survey.frame_width,
        frame_mpp=survey.frame_mpp,
        tissue_mm2=files.tissue_mm2,
        has_region=survey.roi_digest is not None,
        num_outside=found.num_outside,
        num_cut=found.num_cut,
        has_map=bool(files.map_uri),
        target_px=pixels.tp + pixels.fn,
        dice=pixels.dice,
        iou=found.iou,
        precision=pixels.precision,
        recall=pixels.recall,
        tp=pixels.tp,
        fp=pixels.fp,
        fn=pixels.fn,
        target_tp=targets.tp,
        target_fp=targets.fp,
        target_fn=targets.fn,
        target_precision=targets.precision,
        target_recall=targets.recall,
        target_f1=targets.dice,
        true_per_mm2=found.true_per_mm2,
        found_per_mm2=found.found_per_mm2,
        sensitivity_at_1_4=sensitivities[0],
        sensitivity_at_1_2=sensitivities[1],
        sensitivity_at_1=sensitivities[2],
        sensitivity_at_2=sensitivities[3],
        sensitivity_at_4=sensitivities[4],
        sensitivity_at_8=sensitivities[5],
        sensitivity_mean=sensitivities[6],
    )


def sensitivities_of(froc: Froc, num_true: int) -> list[float | None]:
    """Return the sensitivity at each of `FALSE_PER_MM2`, then their mean; None: there is no true target."""
    if not num_true:
        return [None] * (len(FALSE_PER_MM2) + 1)
    found = [froc.sensitivity_at(rate) for rate in FALSE_PER_MM2]
    return [*found, float(np.mean(found))]


def pooled_froc(outcomes: Sequence[SlideOutcome]) -> Froc:
    """Return the curve of all targets of the slides that have scores."""
    rows = [one.score for one in outcomes if one.score is not None]
    return Froc.of(
        [prob for one in outcomes for prob in one.matched_prob],
        [prob for one in outcomes for prob in one.missed_prob],
        num_true=sum(row.target_tp + row.target_fn for row in rows),
        area_mm2=sum(row.tissue_mm2 for row in rows),
    )


def froc_rows(slide_id: str | None, froc: Froc) -> list[FrocRow]:
    """Return a curve as rows, the highest threshold first."""
    points = zip(froc.threshold.tolist(), froc.sensitivity.tolist(), froc.false_per_mm2.tolist(), strict=True)
    return [FrocRow(slide_id, at, None if np.isnan(share) else share, false) for at, share, false in points]


def summarise_slides(outcomes: Sequence[SlideOutcome], config: BootstrapConfig) -> list[SlideSummary]:
    """Return each score over the slides that have scores, of which there must be one."""
    rows = [one.score for one in outcomes if one.score is not None]
    pooled, bounds = _pooled(rows, pooled_froc(outcomes)), _pooled_bounds(rows, config)
    table = []
    for name in SCORES:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        found = bootstrap.summarise(values, **_resampling(config)) if values else None
        low, high = (found.low, found.high) if found and len(values) >= MIN_RESAMPLED else (None, None)
        table.append(
            SlideSummary(
                score=name,
                num_slides=len(values),
                mean=found.mean if found else None,
                sd=found.sd if found and len(values) > 1 else None,
                low=low,
                high=high,
                pooled=pooled[name],
                pooled_low=bounds.get(name, (None, None))[0],
                pooled_high=bounds.get(name, (None, None))[1],
            )
        )
    return table


_OF_PIXELS: dict[str, Callable[[Counts], float]] = {
    "dice": lambda counts: counts.dice,
    "iou": lambda counts: counts.dice / (2 - counts.dice),
    "precision": lambda counts: counts.precision,
    "recall": lambda counts: counts.recall,
}
_OF_TARGETS: dict[str, Callable[[Counts], float]] = {
    "target_f1": lambda counts: counts.dice,
    "target_precision": lambda counts: counts.precision,
    "target_recall": lambda counts: counts.recall,
}
DENSITIES = ("true_per_mm2", "found_per_mm2")
SCORES = (*_OF_PIXELS, *_OF_TARGETS, *DENSITIES, *SENSITIVITIES, "sensitivity_mean")
"""Columns that are summarised, in the order of `summary.parquet`."""


def _pooled(rows: Sequence[EvaluatedSlide], froc: Froc) -> dict[str, float | None]:
    pixels, targets = _sum([row.pixels for row in rows]), _sum([row.targets for row in rows])
    area_mm2, num_true = sum(row.tissue_mm2 for row in rows), targets.tp + targets.fn
    found: dict[str, float | None] = {name: score(pixels) for name, score in _OF_PIXELS.items()}
    found |= {name: score(targets) for name, score in _OF_TARGETS.items()}
    found |= dict(zip(DENSITIES, (num_true / area_mm2, (targets.tp + targets.fp) / area_mm2), strict=True))
    return found | dict(zip((*SENSITIVITIES, "sensitivity_mean"), sensitivities_of(froc, num_true), strict=True))


def _sum(counts: Sequence[Counts]) -> Counts:
    return sum(counts, Counts(0, 0, 0))


def _pooled_bounds(rows: Sequence[EvaluatedSlide], config: BootstrapConfig) -> dict[str, tuple[float, float]]:
    if len(rows) < MIN_RESAMPLED:
        return {}
    pixels = bootstrap.pooled_intervals([row.pixels for row in rows], **_resampling(config))
    targets = bootstrap.pooled_intervals([row.targets for row in rows], **_resampling(config))
    named = {"target_f1": targets["dice"], "target_precision": targets["precision"], "target_recall": targets["recall"]}
    return pixels | named


def _resampling(config: BootstrapConfig) -> dict[str, Any]:
    return config.model_dump(exclude={"by"})
