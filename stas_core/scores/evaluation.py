"""How good predictions are: scores of one image, and tables over images, strata and groups, also as Markdown.

`SCORES_SCHEMA`, `SUMMARY_SCHEMA` and `Comparison` are the contracts. Rows go in sorted by id, and equal rows
give equal tables: resampling is seeded.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stas_core import storage
from stas_core.arrays import Mask, ProbMapU8
from stas_core.data import images
from stas_core.data import truth as truths
from stas_core.data.annotations import AnnotationConfig
from stas_core.data.cohort import STRATUM_EDGES, require_mask, stratum_name, stratum_of
from stas_core.errors import SizeMismatch, as_input_error
from stas_core.scores import bootstrap, metrics
from stas_core.scores.bootstrap import MIN_RESAMPLED, BootstrapConfig
from stas_core.scores.metrics import Counts
from stas_core.tables import Int32

POSTPROCESSED, RAW = "post-processed", "raw 0.5"
"""The two predictions of an image: its mask, and its probability map cut at 0.5."""


_PREFIXES = {POSTPROCESSED: "", RAW: "raw_"}
_SCORES = ("dice", "precision", "recall")
_COUNTS = ("tp", "fp", "fn")
_OBJECT_COUNTS = ("num_matched", "num_pred", "num_truth")
_OBJECT_SCORES = {"f1": "dice", "precision": "precision", "recall": "recall"}
_COMPARED = (
    (POSTPROCESSED, RAW, "dice", "raw_dice"),
    ("run", "against", "dice", "against_dice"),
    (f"run, {RAW}", f"against, {RAW}", "raw_dice", "against_raw_dice"),
)
"""What is compared: names of first and second, and the columns of `SCORES_SCHEMA` that hold them."""

SCORES_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("stratum", pa.int8(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("target_px", pa.int64(), nullable=False),
        pa.field("num_truth", pa.int32(), nullable=False),
        *(
            pa.field(f"{prefix}{name}", kind, nullable=bool(prefix))
            for prefix in _PREFIXES.values()
            for names, kind in (
                (_SCORES, pa.float64()),
                (_COUNTS, pa.int64()),
                (("num_pred", "num_matched"), pa.int32()),
            )
            for name in names
        ),
        pa.field("against_dice", pa.float64()),
        pa.field("against_raw_dice", pa.float64()),
    ]
)
"""One row per scored image. `raw_` columns are null where the run has no map, `against_dice` where the other run has no
mask, `against_raw_dice` where one of the two runs has no map. `tp`, `fp`, `fn` and `target_px` are pixels; `num_truth`,
`num_pred` and `num_matched` are targets (8-connected, matched one to one at an IoU of at least 0.5). `stratum` is the
truth's."""

RESULT_SCHEMA = pa.schema(
    [
        *(field.with_nullable(True) for field in SCORES_SCHEMA),
        *(pa.field(name, pa.string()) for name in ("reason", "message", "against_reason", "against_message")),
        pa.field("findings", pa.list_(pa.string())),
        pa.field("levels", pa.list_(pa.int64())),
    ]
)
"""What `score_files` finds: scores or why there are none, the same of the other run, what is odd about the annotation
(in words), and the map's `GreyLevelCounts`."""

SUMMARY_SCHEMA = pa.schema(
    [
        pa.field("prediction", pa.string(), nullable=False),
        pa.field("subset", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("num_images", pa.int32(), nullable=False),
        pa.field("num_groups", pa.int32(), nullable=False),
        *(
            pa.field(f"{score}_{statistic}", pa.float64(), nullable=statistic != "mean")
            for score in _SCORES
            for statistic in ("mean", "sd", "low", "high")
        ),
        *(
            pa.field(f"pooled_{score}{bound}", pa.float64(), nullable=bool(bound))
            for score in _SCORES
            for bound in ("", "_low", "_high")
        ),
        *(pa.field(name, pa.int64(), nullable=False) for name in _COUNTS),
        *(
            pa.field(f"object_{score}{bound}", pa.float64(), nullable=bool(bound))
            for score in _OBJECT_SCORES
            for bound in ("", "_low", "_high")
        ),
        *(pa.field(name, pa.int64(), nullable=False) for name in _OBJECT_COUNTS),
    ]
)
"""One row per prediction and set of images; `subset` is overall, stratum or group. `pooled_` and `object_` scores are
those of the summed counts. `sd` is null for one image; `low` and `high`, the bounds of a score's bootstrap interval,
are null where fewer than `MIN_RESAMPLED` images, or groups when whole groups are resampled, are there to draw from."""


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


Row = Mapping[str, Any]


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


def score_image(truth: Mask, mask: Mask, prob_map: ProbMapU8 | None) -> dict[str, Any]:
    """Score the mask of one image, and its map at 0.5 where there is one: the values `SCORES_SCHEMA` names.

    Raises:
        ValueError: the arrays differ in shape.
    """
    height, width = truth.shape
    row = {"height": height, "width": width, "target_px": int(truth.sum()), "stratum": stratum_of(float(truth.mean()))}
    row |= _score(truth, mask, "")
    return row if prob_map is None else row | _score(truth, metrics.is_target(prob_map), "raw_")


def _score(truth: Mask, pred: Mask, prefix: str) -> dict[str, Any]:
    pixels, targets = metrics.count(pred, truth), metrics.count_targets(pred, truth)
    row: dict[str, Any] = {f"{prefix}{name}": getattr(pixels, name) for name in _SCORES + _COUNTS}
    row |= {f"{prefix}num_pred": targets.tp + targets.fp, f"{prefix}num_matched": targets.tp}
    return row | {"num_truth": targets.tp + targets.fn}


def score_files(files: PairedFiles, config: AnnotationConfig) -> dict[str, Any]:
    """Score the files of one image; return its row of `RESULT_SCHEMA`, with the reason where it cannot be scored."""
    row: dict[str, Any] = dict.fromkeys(RESULT_SCHEMA.names) | {"id": files.id, "group": files.group}
    try:
        mask = read_mask(files.mask_uri)
        truth, row["findings"] = read_truth(files.truth_uri, mask, config)
        if files.truth_fingerprint:
            require_mask(truth, files.truth_fingerprint, files.truth_uri)
        prob_map = None
        if files.map_uri:
            prob_map = _read_map(files.map_uri)
            _require_size(files.map_uri, prob_map.shape, truth)
    except Exception as error:  # noqa: BLE001 - one image must not end an evaluation of thousands
        failure = as_input_error(error, files.id)
        return row | {"reason": failure.reason, "message": str(failure)}
    row |= score_image(truth, mask, prob_map)
    if prob_map is not None:
        row["levels"] = metrics.count_grey_levels(prob_map, truth).ravel().tolist()
    return row | _score_against(files, truth)


def _score_against(files: PairedFiles, truth: Mask) -> dict[str, Any]:
    """Score what the other run has of an image; it is not compared at all where a file cannot be used."""
    scores: dict[str, Any] = {}
    try:
        for column, uri in (("against_dice", files.against_uri), ("against_raw_dice", files.against_map_uri)):
            if uri:
                mask = read_mask(uri) if column == "against_dice" else metrics.is_target(_read_map(uri))
                _require_size(uri, mask.shape, truth)
                scores[column] = metrics.count(mask, truth).dice
    except Exception as error:  # noqa: BLE001 - as in score_files
        failure = as_input_error(error, files.id)
        return {"against_reason": failure.reason, "against_message": str(failure)}
    return scores


def read_mask(uri: str) -> Mask:
    """Read the mask of a run, or of the truth."""
    return images.decode_mask(storage.read_bytes(uri), uri)


def _read_map(uri: str) -> ProbMapU8:
    return images.decode_map(storage.read_bytes(uri), uri)


def read_truth(uri: str, mask: Mask, config: AnnotationConfig) -> tuple[Mask, list[str]]:
    """Read the truth of the image whose predicted mask is given; return it, and what is odd about its annotation.

    Raises:
        SizeMismatch: they differ in size.
    """
    if uri.lower().endswith(".json"):
        data = truths.read_annotation_file(uri)
        found, findings, _ = truths.read_annotation(data, uri, mask.shape, config)
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


def summarise_scores(rows: Sequence[Row], config: BootstrapConfig) -> list[dict[str, Any]]:
    """Return the rows of `SUMMARY_SCHEMA`: overall, by stratum, and by group where a group has several images."""
    table = []
    for prediction, prefix in _PREFIXES.items():
        having = [row for row in rows if row[f"{prefix}dice"] is not None]
        for subset, name, chosen in _subsets(having):
            head = {"prediction": prediction, "subset": subset, "name": name}
            table.append(head | _summarise(chosen, prefix, config))
    return table


def _subsets(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    if not rows:
        return []
    subsets = [("overall", "all", list(rows))]
    for stratum in sorted({row["stratum"] for row in rows}):
        chosen = [row for row in rows if row["stratum"] == stratum]
        subsets.append(("stratum", stratum_name(stratum, STRATUM_EDGES), chosen))
    for group, num_images in sorted(Counter(row["group"] for row in rows).items()):
        if num_images > 1:
            subsets.append(("group", group, [row for row in rows if row["group"] == group]))
    return subsets


def _summarise(rows: Sequence[Row], prefix: str, config: BootstrapConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"num_images": len(rows), "num_groups": len({row["group"] for row in rows})}
    for score in _SCORES:
        summary = bootstrap.summarise([row[prefix + score] for row in rows], **_resampling(rows, config))
        sd = summary.sd if len(rows) > 1 else None
        values |= {f"{score}_mean": summary.mean, f"{score}_sd": sd}
        values |= _bounds(score, rows, config, summary.low, summary.high)
    pixels = [Counts(*(row[prefix + name] for name in _COUNTS)) for row in rows]
    targets = [_target_counts(row, prefix) for row in rows]
    values |= _pool("pooled", {score: score for score in _SCORES}, pixels, rows, config)
    values |= {name: sum(getattr(image, name) for image in pixels) for name in _COUNTS}
    values |= _pool("object", _OBJECT_SCORES, targets, rows, config)
    matched, wrong, missed = (sum(getattr(image, name) for image in targets) for name in _COUNTS)
    return values | {"num_matched": matched, "num_pred": matched + wrong, "num_truth": matched + missed}


def _target_counts(row: Row, prefix: str) -> Counts:
    matched = row[f"{prefix}num_matched"]
    return Counts(matched, fp=row[f"{prefix}num_pred"] - matched, fn=row["num_truth"] - matched)


def _pool(
    prefix: str, scores: Mapping[str, str], counts: Sequence[Counts], rows: Sequence[Row], config: BootstrapConfig
) -> dict[str, Any]:
    """Return scores of summed counts with their intervals; `scores` maps a score's name to that of `Counts`."""
    total = sum(counts, Counts(0, 0, 0))
    intervals = bootstrap.pooled_intervals(counts, **_resampling(rows, config))
    values: dict[str, Any] = {}
    for name, score in scores.items():
        values[f"{prefix}_{name}"] = getattr(total, score)
        values |= _bounds(f"{prefix}_{name}", rows, config, *intervals[score])
    return values


def _resampling(rows: Sequence[Row], config: BootstrapConfig) -> dict[str, Any]:
    groups = [row["group"] for row in rows] if config.by == "group" else None
    return {"groups": groups, **config.model_dump(exclude={"by"})}


def _bounds(name: str, rows: Sequence[Row], config: BootstrapConfig, low: float, high: float) -> dict[str, Any]:
    """Return the bounds of a score's interval as columns; null where too few images or groups were resampled."""
    units = {row["id" if config.by == "image" else "group"] for row in rows}
    enough = len(units) >= MIN_RESAMPLED
    return {f"{name}_low": low if enough else None, f"{name}_high": high if enough else None}


def compare_scores(rows: Sequence[Row], config: BootstrapConfig) -> list[Comparison]:
    """Compare the mask with the map at 0.5, and each with that of the other run."""
    table = []
    for first, second, column, other in _COMPARED:
        both = [row for row in rows if row[column] is not None and row[other] is not None]
        if not both:
            continue
        ours, theirs = [row[column] for row in both], [row[other] for row in both]
        found = bootstrap.compare(ours, theirs, **_resampling(both, config))
        bounds = _bounds("difference", both, config, found.low, found.high)
        table.append(
            Comparison(
                first,
                second,
                num_images=len(both),
                first_mean=sum(ours) / len(both),
                second_mean=sum(theirs) / len(both),
                difference=found.mean,
                low=bounds["difference_low"],
                high=bounds["difference_high"],
                share_better=found.num_better / len(both),
                share_equal=found.num_equal / len(both),
                share_worse=found.num_worse / len(both),
            )
        )
    return table
