"""The columns of every Parquet file that a stage writes, from the classes and schemas that write them."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stas_core import markdown
from stas_core.data.cohort import CohortRow
from stas_core.failures import Failure
from stas_core.predict.geoparquet import write_geoparquet
from stas_core.predict.onnx_export import ImageCheck
from stas_core.predict.placement import Placement, TargetFacts
from stas_core.predict.postprocess import Targets
from stas_core.review import ReviewField, ReviewTarget
from stas_core.runs import EpochMetrics, FoldScores, OofScore
from stas_core.scored_runs import ScoredImage, ScoredTarget
from stas_core.scores.detection import DetectionScore
from stas_core.scores.evaluation import Comparison, ImageScore, SubsetScore
from stas_core.search import verdicts
from stas_core.slides.evaluated import EvaluatedSlide, FrocRow, SlideSummary
from stas_core.slides.finish import slides_schema
from stas_core.tables import schema_of
from workflows.choose_ensemble import SizeRow
from workflows.folds.trial_tables import TrialEpoch, TrialRow
from workflows.scoring.tasks import STEPS

INTERNAL = ("parts/*/*.parquet", "records/part-*.parquet")
"""Files that a run goes on from, for no other program's eyes."""


@dataclass(frozen=True)
class Table:
    """A file and its columns."""

    name: str
    """As the stage's `Outputs` name it, or with a kind behind it: `scores.parquet (slides)`."""
    rows: str
    """What a row is."""
    columns: pa.Schema
    further: str = ""
    """Which columns follow, where these depend on the run."""

    @property
    def pattern(self) -> str:
        """Return its path below `out`."""
        return self.name.partition(" (")[0]

    def text(self, column: str) -> str:
        """Say what a column holds."""
        metadata: Mapping[bytes, bytes] = self.columns.field(column).metadata or {}
        return metadata[b"description"].decode() if b"description" in metadata else in_words(column)

    def markdown(self) -> str:
        """Return its columns as a table."""
        rows = [
            (f"`{field.name}`", _kind(field.type) + " or null" * field.nullable, self.text(field.name))
            for field in self.columns
        ]
        name = f"`{self.pattern}`{self.name.removeprefix(self.pattern)}"
        parts = [f"### {name}", self.rows, markdown.table(("column", "type", "what it holds"), rows)]
        return "\n\n".join(part for part in (*parts, self.further) if part)


WORDS: Sequence[tuple[str, str]] = (
    (r"id", "Of the image, or slide."),
    (r"trial", "Number of the trial, and name of its folder."),
    (r"(image|annotation|truth)_uri", r"Path or URI of the \1."),
    (r"message", "What was found, what was expected, and what to do."),
    (r"fold", "Number of the fold."),
    (r"group", "Patient or slide; without groups the image's own id."),
    (r"name", "Of the stratum or group."),
    (r"prediction", "What is scored: the masks, or the map cut at 0.5 (`raw`)."),
    (r"(first|second)", "Of the two predictions that are compared."),
    (r"raw_(\w+)", r"As `\1`, of the map cut at 0.5."),
    (r"against_(\w+)", r"As `\1`, of the other run."),
    (r"(\w+?)_low|low", "Lower end of the bootstrap interval."),
    (r"(\w+?)_high|high", "Upper end of the bootstrap interval."),
    (r"(?:(\w+)_)?sd", "Standard deviation over images, or slides."),
    (r"pooled_(dice|precision|recall)", r"Of all pixels of the images together."),
    (r"object_(f1|precision|recall)", r"Of targets, matched one to one at an IoU of at least 0.5."),
    (r"target_(f1|precision|recall)", r"Of targets, matched one to one at an IoU of at least 0.5."),
    (r"target_(tp|fp|fn)", "Targets that were found, found falsely, or missed."),
    (r"(?:first_|second_)?mean", "Mean over images, or slides."),
    (r"(\w+)_mean", r"Mean of the images' \1."),
    (r"(?:val_)?dice", "Dice coefficient of the pixels, 0 to 1."),
    (r"iou", "Intersection over union of the pixels, 0 to 1."),
    (r"(?:val_)?precision", "Share of the predicted pixels that are target."),
    (r"(?:val_)?recall", "Share of the target's pixels that are predicted."),
    (r"tp", "Pixels of targets that are predicted."),
    (r"fp", "Pixels that are predicted falsely."),
    (r"fn", "Pixels of targets that are missed."),
    (r"num_(positive|negative)", r"How many \1s there are."),
    (r"num_pred", "Predicted targets."),
    (r"num_truth", "True targets."),
    (r"num_matched", "True targets that a predicted one matches, at an IoU of at least 0.5."),
    (r"num_(\w+)", r"Number of \1."),
    (r"target_px", "Pixels of the truth."),
    (r"area_(px|um2)", r"Area in \1."),
    (r"(mean|peak)_prob", r"\1 probability of its pixels, 0 to 1."),
    (r"touches_border", "Whether it touches the border of the image."),
    (r"(?:frame_)?(width|height)(?:_px)?", r"\1 in px."),
    (r"centroid_(x|y)", r"\1 of its centroid."),
    (r"(x|y)0", "The first column or row inside."),
    (r"last_val_dice", "Of the last epoch, with the flips of validation."),
    (
        r"best_val_dice",
        "Of the best epoch, likewise; what it has above the last is what choosing it flatters.",
    ),
    (r"best_epoch", "Its number."),
    (r"train_loss", "Mean over the epoch."),
    (r"images_per_s", "Images trained on per second."),
    (r"unix_time_s", "When the epoch ended."),
    (r"share_(equal|worse)", r"Of the images, those on which the first is \1."),
    (r"sensitivity_at_(\w+)", r"At so many false targets per mm2."),
    (r"false_per_mm2", "False targets per mm2 of tissue."),
    (r"stain_max_c", "99th percentiles of the two stains' concentrations."),
    (r"sharpness", "As `brightness`, how sharp the image is."),
    (r"drift_of", "Which figure drifts most."),
    (r"seconds", "That it took."),
    (r"error", "Why it failed."),
    (r"members", "Its members."),
    (r"flips", "Its flips."),
    (r"(decode|predict|postprocess|write)_s", r"Seconds of this step."),
    (r"number", "Of the target, from 1."),
    (r"geometry", "Its outline as WKB, in pixels of level 0."),
    (r"edge_um", "Distance of its centroid from the section's edge."),
    (r"tumour_um", "Distance of its centroid from the tumour's outline, 0 inside."),
    (r"disagreement", "How far the members differ on it."),
    (r"study", "Folds that it searched: all, or all but one."),
    (r"tuned_(\w+)", r"Dice under the setting that was chosen on all folds: \1."),
    (r"nested_(\w+)", r"Dice under the setting that was chosen without the image's fold: \1."),
    (r"raw|default|reference", "Dice under this fixed setting (`raw`: a cut at 0.5)."),
)
"""What columns are called alike in many tables, where the class of the rows does not say it itself."""


def in_words(column: str) -> str:
    """Return what a column of a known name holds; "" where it has no such name."""
    for pattern, words in WORDS:
        if found := re.fullmatch(pattern, column):
            text = found.expand(words)
            return text[0].upper() + text[1:]
    return ""


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"list of {_kind(kind.value_type)}"
    if pa.types.is_struct(kind):
        return f"struct of {', '.join(f'`{kind.field(i).name}`' for i in range(kind.num_fields))}"
    return {"string": "text", "double": "float64"}.get(str(kind), str(kind))


def _slide_targets() -> pa.Schema:
    """Return the columns of a slide's targets, as they are written where there are none."""
    none, flags = np.zeros(0), np.zeros((0, 4), np.bool_)
    targets = Targets(none.astype(int), none, none, flags.astype(int), none, none, flags)
    columns = dict.fromkeys(("edge_um", "tumour_um", "disagreement"), none)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "targets.parquet"))
        write_geoparquet(path, [], TargetFacts("none", targets, Placement(mpp=0.5), columns))
        return pq.read_schema(path)


def _tuned_images() -> pa.Schema:
    """Return the columns of the images of a search of thresholds that has all picks."""
    image = verdicts.TunedImage("0007", 0, "0007", 0)
    nested = dict.fromkeys(verdicts.PICKS, np.zeros(1))
    return verdicts.images_table([image], {"nested": nested, "tuned": nested}).schema


def _seconds(steps: Sequence[str]) -> pa.Schema:
    columns: dict[str, pa.DataType] = {"id": pa.string()} | dict.fromkeys(steps, pa.float64())
    return pa.schema(columns)


STUDIES: dict[str, pa.DataType] = {"study": pa.string(), "dice": pa.float64()}
KEYS = "A column per key of the search space follows."


@cache
def tables_of(stage: str) -> tuple[Table, ...]:
    """Return the tables that a stage writes."""
    failures = Table("failures.parquet", "An input that could not be used.", schema_of(Failure))
    review = Table("review.parquet", "A field, the one to look at first on top.", schema_of(ReviewField))
    found: dict[str, tuple[Table, ...]] = {
        "prepare_data": (Table("cohort.parquet", "A usable image, sorted by id.", schema_of(CohortRow)), failures),
        "train_folds": (
            Table("folds.parquet", "A finished fold, over its out-of-fold images.", schema_of(FoldScores)),
            Table("fold_*/oof.parquet", "An out-of-fold image and its map's score at 0.5.", schema_of(OofScore)),
            Table("fold_*/metrics.parquet", "An epoch; null is what was not validated.", schema_of(EpochMetrics)),
            review,
            Table(
                "review_targets.parquet",
                "A place where map and annotation differ by more than an outline's doubt.",
                schema_of(ReviewTarget),
            ),
        ),
        "tune_postprocess": (
            Table("images.parquet", "An image of the folds.", _tuned_images()),
            Table("trials.parquet", "A setting that was tried.", pa.schema(STUDIES), KEYS),
        ),
        "tune_training": (
            Table("trials.parquet", "A trial, the best first.", schema_of(TrialRow), KEYS),
            Table("history.parquet", "An epoch that all folds of a trial had validated.", schema_of(TrialEpoch)),
        ),
        "choose_ensemble": (
            Table("sizes.parquet", "A number of members under a set of flips, the cheapest first.", schema_of(SizeRow)),
        ),
        "score_images": (
            Table("images.parquet", "A scored image, sorted by id.", schema_of(ScoredImage)),
            Table("targets.parquet", "A target of the masks.", schema_of(ScoredTarget)),
            failures,
            Table("timings.parquet", "An image, with the seconds of the run that did it.", _seconds(STEPS)),
            review,
        ),
        "score_slides": (
            Table("slides.parquet", "A scored slide.", slides_schema()),
            Table("targets/{id}.parquet", "A target; GeoParquet.", _slide_targets()),
            failures,
            Table(
                "timings.parquet",
                "A slide, with the seconds of each step, summed over its blocks.",
                _seconds(()),
                "A column per step follows. `idle_s` is how long actors waited for its blocks, `wait_s` how long the "
                "slide waited to be finished.",
            ),
        ),
        "evaluate": (
            Table("scores.parquet (of images)", "An image.", schema_of(ImageScore)),
            Table("summary.parquet (of images)", "A prediction over a set of images.", schema_of(SubsetScore)),
            Table("comparisons.parquet", "Two predictions on the images that have both.", schema_of(Comparison)),
            Table("detection.parquet", "How well positives are told from negatives.", schema_of(DetectionScore)),
            Table("scores.parquet (of slides)", "A slide.", schema_of(EvaluatedSlide)),
            Table("summary.parquet (of slides)", "A score over all slides.", schema_of(SlideSummary)),
            Table("froc.parquet", "A threshold of the targets' mean probability.", schema_of(FrocRow)),
            failures,
        ),
        "export": (failures,),
        "export_model": (Table("check.parquet", "An image that the file was checked on.", schema_of(ImageCheck)),),
    }
    return found.get(stage, ())
