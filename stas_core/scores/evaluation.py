"""How good predictions are: scores of one image, and tables over images, strata and groups, also as Markdown.

`ImageScore`, `SubsetScore` and `Comparison` are the contracts. Rows go in sorted by id, and equal rows give equal
tables: resampling is seeded.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from stas_core import storage
from stas_core.arrays import Mask, ProbMapU8
from stas_core.data import images
from stas_core.data import truth as truths
from stas_core.data.annotation_listing import TEXT_SUFFIXES
from stas_core.data.annotations import AnnotationConfig
from stas_core.data.cohort import STRATUM_EDGES, require_mask, stratum_name, stratum_of, target_areas
from stas_core.errors import SizeMismatch, as_input_error
from stas_core.failures import Failure
from stas_core.scores import bootstrap, metrics
from stas_core.scores.bootstrap import MIN_RESAMPLED, BootstrapConfig
from stas_core.scores.detection import LARGEST, PEAK, TOTAL, Case
from stas_core.scores.metrics import Counts
from stas_core.tables import Int8, Int32

POSTPROCESSED, RAW = "post-processed", "raw 0.5"
"""The two predictions of an image: its mask, and its probability map cut at 0.5."""
WITH_TARGETS = "with targets"
_PREFIXES = {POSTPROCESSED: "", RAW: "raw_"}
STAGE, AGAINST_STAGE = "evaluate", "evaluate against"
"""What failure rows name where an image has no score, and where it is not compared with the other run."""
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
"""Of masks that are a truth: JPEG blurs them."""
ANNOTATION_KEY = "truth.annotation"
"""What errors call the settings of labels."""


@dataclass(frozen=True, kw_only=True)
class ImageScore:
    """A row of `scores.parquet`: the scores of an image.

    Pixels are counted by `tp`, `fp`, `fn` and `target_px`, targets (8-connected, matched one to one at an IoU of at
    least 0.5) by `num_truth`, `num_pred` and `num_matched`. `raw_` is of the map, null where the run has none.
    """

    id: str
    group: str
    stratum: Int8
    """Of the truth."""
    height: Int32
    """In px, like `width`."""
    width: Int32
    target_px: int
    num_truth: Int32
    dice: float
    precision: float
    recall: float
    tp: int
    fp: int
    fn: int
    num_pred: Int32
    num_matched: Int32
    raw_dice: float | None = None
    raw_precision: float | None = None
    raw_recall: float | None = None
    raw_tp: int | None = None
    raw_fp: int | None = None
    raw_fn: int | None = None
    raw_num_pred: Int32 | None = None
    raw_num_matched: Int32 | None = None
    against_dice: float | None = None
    """Null where the other run has no mask."""
    against_raw_dice: float | None = None
    """Null where one of the two runs has no map."""
    largest_px: int = 0
    """Area of the largest predicted target."""
    peak_prob: float | None = None
    """Highest probability of the map, 0 to 1."""

    def counts(self, prediction: str) -> "ImageCounts | None":
        """Return what is counted of one of the two predictions; None: there is no map."""
        names = ("tp", "fp", "fn", "num_pred", "num_matched")
        tp, fp, fn, pred, matched = (getattr(self, _PREFIXES[prediction] + name) for name in names)
        if tp is None:
            return None
        return ImageCounts(Counts(tp, fp, fn), Counts(matched, fp=pred - matched, fn=self.num_truth - matched))


class ImageCounts(NamedTuple):
    """What is counted of a prediction of an image."""

    pixels: Counts
    targets: Counts


@dataclass(frozen=True)
class Outcome:
    """What `score_files` finds of an image."""

    id: str
    score: ImageScore | None
    failure: Failure | None
    """Why there is no score."""
    not_compared: Failure | None
    """Why what the other run has of the image cannot be used."""
    findings: list[str]
    """What is odd about the annotation, in words."""
    levels: list[int] | None
    """The map's `GreyLevelCounts`, row-major; None: there is no map."""


@dataclass(frozen=True)
class SubsetScore:
    """A row of `summary.parquet`: the scores of one prediction over a set of images.

    `pooled_` and `object_` scores are those of the summed counts of pixels and of targets. `low` and `high`, the bounds
    of a score's bootstrap interval, are null where fewer than `MIN_RESAMPLED` images, or groups when whole groups are
    resampled, are there to draw from; `sd` is null for one image.
    """

    prediction: str
    subset: str
    """overall, with targets (where some images have none), stratum or group."""
    name: str
    num_images: Int32
    num_groups: Int32
    dice_mean: float
    dice_sd: float | None
    dice_low: float | None
    dice_high: float | None
    precision_mean: float
    precision_sd: float | None
    precision_low: float | None
    precision_high: float | None
    recall_mean: float
    recall_sd: float | None
    recall_low: float | None
    recall_high: float | None
    pooled_dice: float
    pooled_dice_low: float | None
    pooled_dice_high: float | None
    pooled_precision: float
    pooled_precision_low: float | None
    pooled_precision_high: float | None
    pooled_recall: float
    pooled_recall_low: float | None
    pooled_recall_high: float | None
    tp: int
    fp: int
    fn: int
    object_f1: float
    object_f1_low: float | None
    object_f1_high: float | None
    object_precision: float
    object_precision_low: float | None
    object_precision_high: float | None
    object_recall: float
    object_recall_low: float | None
    object_recall_high: float | None
    num_matched: int
    num_pred: int
    num_truth: int


@dataclass(frozen=True)
class Comparison:
    """Dice per image of two predictions, on the images that have both."""

    first: str
    second: str
    num_images: Int32
    first_mean: float
    second_mean: float
    difference: float
    """First minus second, mean over images."""
    low: float | None
    """Bounds of its bootstrap interval; None: too few images or groups."""
    high: float | None
    share_better: float
    """Of the images, those on which the first is better, 0 to 1."""
    share_equal: float
    share_worse: float


@dataclass(frozen=True)
class PairedFiles:
    """Files of one image that are scored against each other; "": there is none."""

    id: str
    group: str
    truth_uri: str
    truth_fingerprint: str
    """Of the truth's pixels, where it is known."""
    mask_uri: str
    map_uri: str = ""
    against_uri: str = ""
    """The other run's mask."""
    against_map_uri: str = ""


def score_image(image_id: str, group: str, truth: Mask, mask: Mask, prob_map: ProbMapU8 | None) -> ImageScore:
    """Score the mask of one image, and its map at 0.5 where there is one.

    Raises:
        ValueError: the arrays differ in shape.
    """
    pixels, targets = _count(mask, truth)
    score = ImageScore(
        id=image_id,
        group=group,
        stratum=stratum_of(float(truth.mean())),
        height=truth.shape[0],
        width=truth.shape[1],
        target_px=int(truth.sum()),
        num_truth=targets.tp + targets.fn,
        dice=pixels.dice,
        precision=pixels.precision,
        recall=pixels.recall,
        tp=pixels.tp,
        fp=pixels.fp,
        fn=pixels.fn,
        num_pred=targets.tp + targets.fp,
        num_matched=targets.tp,
        largest_px=max(target_areas(mask), default=0),
    )
    if prob_map is None:
        return score
    pixels, targets = _count(metrics.is_target(prob_map), truth)
    return replace(
        score,
        raw_dice=pixels.dice,
        raw_precision=pixels.precision,
        raw_recall=pixels.recall,
        raw_tp=pixels.tp,
        raw_fp=pixels.fp,
        raw_fn=pixels.fn,
        raw_num_pred=targets.tp + targets.fp,
        raw_num_matched=targets.tp,
        peak_prob=int(prob_map.max()) / 255,
    )


def _count(pred: Mask, truth: Mask) -> ImageCounts:
    return ImageCounts(metrics.count(pred, truth), metrics.count_targets(pred, truth))


def score_files(files: PairedFiles, config: AnnotationConfig) -> Outcome:
    """Score the files of one image, or say why it cannot be scored."""
    findings: list[str] = []
    try:
        mask = read_mask(files.mask_uri)
        truth, findings = read_truth(
            files.truth_uri, mask, config, image_id=files.id, fingerprint=files.truth_fingerprint
        )
        if files.truth_fingerprint:
            require_mask(truth, files.truth_fingerprint, files.truth_uri)
        prob_map = None
        if files.map_uri:
            prob_map = _read_map(files.map_uri)
            _require_size(files.map_uri, prob_map.shape, truth)
    except Exception as error:  # noqa: BLE001 - one image must not end an evaluation of thousands
        failure = Failure.of(files.id, STAGE, as_input_error(error, files.id))
        return Outcome(files.id, None, failure, None, findings, None)
    score = score_image(files.id, files.group, truth, mask, prob_map)
    levels = None if prob_map is None else metrics.count_grey_levels(prob_map, truth).ravel().tolist()
    try:
        score = replace(
            score,
            against_dice=_other_dice(files.against_uri, read_mask, truth),
            against_raw_dice=_other_dice(files.against_map_uri, _read_raw, truth),
        )
    except Exception as error:  # noqa: BLE001 - as above; it is not compared at all where a file cannot be used
        failure = Failure.of(files.id, AGAINST_STAGE, as_input_error(error, files.id))
        return Outcome(files.id, score, None, failure, findings, levels)
    return Outcome(files.id, score, None, None, findings, levels)


def _other_dice(uri: str, read: Callable[[str], Mask], truth: Mask) -> float | None:
    """Return the Dice of what the other run has of an image; None: it has no such file."""
    if not uri:
        return None
    mask = read(uri)
    _require_size(uri, mask.shape, truth)
    return metrics.count(mask, truth).dice


def read_mask(uri: str) -> Mask:
    """Read the mask of a run, or of the truth."""
    return images.decode_mask(storage.read_bytes(uri), uri)


def _read_map(uri: str) -> ProbMapU8:
    return images.decode_map(storage.read_bytes(uri), uri)


def _read_raw(uri: str) -> Mask:
    return metrics.is_target(_read_map(uri))


def is_annotation(uri: str, config: AnnotationConfig, fingerprint: str) -> bool:
    """Tell whether a file of the truth is read as an annotation, not as a plain mask; a mask of a cohort never is."""
    return uri.lower().endswith(TEXT_SUFFIXES) or (not fingerprint and config.lists_values)


def read_truth(
    uri: str,
    mask: Mask,
    config: AnnotationConfig,
    *,
    image_id: str,
    fingerprint: str,
    read: Callable[[str], bytes] = truths.read_annotation_file,
) -> tuple[Mask, list[str]]:
    """Read the truth of the image whose predicted mask is given; return it, and what is odd about its annotation.

    What has a fingerprint is a mask of a cohort. `read` reads a file of annotations.

    Raises:
        SizeMismatch: they differ in size.
    """
    if is_annotation(uri, config, fingerprint):
        data = read(uri)
        found, findings, _ = truths.read_annotation(data, uri, mask.shape, config, image_id, ANNOTATION_KEY)
        return found, [truths.in_words(finding) for finding in findings]
    found = read_mask(uri)
    _require_size("the run's mask", mask.shape, found)
    return found, []


def _require_size(name: str, size: tuple[int, ...], truth: Mask) -> None:
    if size != truth.shape:
        raise SizeMismatch(
            f"{name} has {size[1]}x{size[0]} px, the truth {truth.shape[1]}x{truth.shape[0]}; "
            "score the image again at its own size, or pair it with its own truth"
        )


def cases_of(rows: Sequence[ImageScore]) -> list[Case]:
    """Return each image as found or not: what it is, and what its mask and map say."""
    cases = []
    for row in rows:
        ranks = {LARGEST: float(row.largest_px), TOTAL: float(row.tp + row.fp)}
        ranks |= {} if row.peak_prob is None else {PEAK: row.peak_prob}
        false_share = row.fp / (row.height * row.width)
        cases.append(Case(row.group, row.target_px > 0, row.num_pred > 0, ranks, false_share))
    return cases


def summarise_scores(rows: Sequence[ImageScore], config: BootstrapConfig) -> list[SubsetScore]:
    """Return the scores overall, by stratum, and by group where a group has several images."""
    table = []
    for prediction in (POSTPROCESSED, RAW):
        having = [row for row in rows if row.counts(prediction) is not None]
        for subset, name, chosen in _subsets(having):
            table.append(_summarise(prediction, subset, name, chosen, config))
    return table


def _subsets(rows: Sequence[ImageScore]) -> list[tuple[str, str, list[ImageScore]]]:
    if not rows:
        return []
    subsets = [("overall", "all", list(rows))]
    with_targets = [row for row in rows if row.target_px]
    if 0 < len(with_targets) < len(rows):
        subsets.append((WITH_TARGETS, WITH_TARGETS, with_targets))
    for stratum in sorted({row.stratum for row in rows}):
        chosen = [row for row in rows if row.stratum == stratum]
        subsets.append(("stratum", stratum_name(stratum, STRATUM_EDGES), chosen))
    for group, num_images in sorted(Counter(row.group for row in rows).items()):
        if num_images > 1:
            subsets.append(("group", group, [row for row in rows if row.group == group]))
    return subsets


def _summarise(
    prediction: str, subset: str, name: str, rows: Sequence[ImageScore], config: BootstrapConfig
) -> SubsetScore:
    counted = [found for row in rows if (found := row.counts(prediction)) is not None]
    pixels, targets = [image.pixels for image in counted], [image.targets for image in counted]
    all_pixels, all_targets = sum(pixels, Counts(0, 0, 0)), sum(targets, Counts(0, 0, 0))
    pooled, pooled_targets = (
        bootstrap.pooled_intervals(counts, **_resampling(rows, config)) for counts in (pixels, targets)
    )
    return SubsetScore(
        prediction,
        subset,
        name,
        len(rows),
        len({row.group for row in rows}),
        *_mean([image.dice for image in pixels], rows, config),
        *_mean([image.precision for image in pixels], rows, config),
        *_mean([image.recall for image in pixels], rows, config),
        all_pixels.dice,
        *_bounds(*pooled["dice"], rows, config),
        all_pixels.precision,
        *_bounds(*pooled["precision"], rows, config),
        all_pixels.recall,
        *_bounds(*pooled["recall"], rows, config),
        all_pixels.tp,
        all_pixels.fp,
        all_pixels.fn,
        all_targets.dice,
        *_bounds(*pooled_targets["dice"], rows, config),
        all_targets.precision,
        *_bounds(*pooled_targets["precision"], rows, config),
        all_targets.recall,
        *_bounds(*pooled_targets["recall"], rows, config),
        num_matched=all_targets.tp,
        num_pred=all_targets.tp + all_targets.fp,
        num_truth=all_targets.tp + all_targets.fn,
    )


Bounds = tuple[float | None, float | None]
"""Low and high end of a score's interval."""


def _mean(
    scores: Sequence[float], rows: Sequence[ImageScore], config: BootstrapConfig
) -> tuple[float, float | None, float | None, float | None]:
    """Return the mean of scores per image, their deviation, and the bounds of the mean."""
    found = bootstrap.summarise(scores, **_resampling(rows, config))
    return found.mean, found.sd if len(rows) > 1 else None, *_bounds(found.low, found.high, rows, config)


def _resampling(rows: Sequence[ImageScore], config: BootstrapConfig) -> dict[str, Any]:
    groups = [row.group for row in rows] if config.by == "group" else None
    return {"groups": groups, **config.model_dump(exclude={"by"})}


def _bounds(low: float, high: float, rows: Sequence[ImageScore], config: BootstrapConfig) -> Bounds:
    """Return the bounds of a score's interval; None where too few images or groups were resampled."""
    units = {row.id if config.by == "image" else row.group for row in rows}
    return (low, high) if len(units) >= MIN_RESAMPLED else (None, None)


Dice = Callable[[ImageScore], float | None]
_COMPARED: tuple[tuple[str, str, Dice, Dice], ...] = (
    (POSTPROCESSED, RAW, lambda row: row.dice, lambda row: row.raw_dice),
    ("run", "against", lambda row: row.dice, lambda row: row.against_dice),
    (f"run, {RAW}", f"against, {RAW}", lambda row: row.raw_dice, lambda row: row.against_raw_dice),
)
"""What is compared: the names of first and second, and the scores."""


def compare_scores(rows: Sequence[ImageScore], config: BootstrapConfig) -> list[Comparison]:
    """Compare the mask with the map at 0.5, and each with that of the other run."""
    table = []
    for first, second, dice, other_dice in _COMPARED:
        both, ours, theirs = [], [], []
        for row in rows:
            our, their = dice(row), other_dice(row)
            if our is not None and their is not None:
                both.append(row)
                ours.append(our)
                theirs.append(their)
        if not both:
            continue
        found = bootstrap.compare(ours, theirs, **_resampling(both, config))
        low, high = _bounds(found.low, found.high, both, config)
        table.append(
            Comparison(
                first,
                second,
                num_images=len(both),
                first_mean=sum(ours) / len(both),
                second_mean=sum(theirs) / len(both),
                difference=found.mean,
                low=low,
                high=high,
                share_better=found.num_better / len(both),
                share_equal=found.num_equal / len(both),
                share_worse=found.num_worse / len(both),
            )
        )
    return table
