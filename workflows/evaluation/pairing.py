"""Which files of a run are scored against which of the truth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from stas_core import failures, storage
from stas_core.config import Config, Uri
from stas_core.data import listing
from stas_core.data.annotation_listing import SUFFIXES, AnnotationListing, Describe, find_annotations
from stas_core.data.annotations import AnnotationConfig
from stas_core.data.cohort import CohortRow, folds_of, read_cohort
from stas_core.data.truth import READ_AS
from stas_core.errors import ConfigError
from stas_core.failures import Failure
from stas_core.scored_runs import MAPS, MASKS, ScoredRun
from stas_core.scores.evaluation import AGAINST_STAGE, MASK_SUFFIXES, STAGE, PairedFiles, is_annotation
from stas_core.slides.run import SlideRun

NOT_SCORED = "not_scored"
"""Reason code of an image of the truth that the run neither scored nor reports as failed."""

KINDS_OF_TRUTH = ("cohort", "masks", "annotations", "slides")
"""Settings of `TruthConfig` that name a truth."""

OF_SLIDES = ("labels", "unknown_labels")
"""Settings of `AnnotationConfig` that the outlines of slides are read by."""


class TruthConfig(Config):
    """What the masks are scored against; give one of cohort, masks and annotations, or slides for whole slides."""

    cohort: Uri | None = None
    """cohort.parquet of prepare_data; path or URI."""
    split: Literal["all", "train", "hold-out"] = "all"
    """Which images of the cohort count."""
    folds: tuple[int, ...] | None = None
    """Only images of these folds of the cohort; null: of every fold."""
    masks: Uri | None = None
    """Folder of mask PNGs, named like the run's images."""
    annotations: Uri | None = None
    """Folder of annotations, as `prepare_data` reads them, named like the run's images, or a COCO file; drawn by the
    exact rule of the published masks."""
    annotation: AnnotationConfig = AnnotationConfig()
    """How annotations are read; of slides' outlines `labels` and `unknown_labels` say what the classes mean."""
    slides: Uri | None = None
    """For a run of score_slides: folder of GeoJSON outlines or masks named by the slides' ids, or a single file."""


@dataclass(frozen=True)
class Truth:
    """One image of the truth: the file that holds its target, a mark of its version, and what the cohort says of it."""

    id: str
    uri: str
    stamp: str
    group: str
    split: str | None = None
    fingerprint: str = ""
    """Of its pixels, where the cohort says."""


def require_truth_of_kind(run_uri: str, truth: TruthConfig, against: str | None) -> None:
    """Refuse a truth of images for a run of slides, and the other way round.

    Raises:
        ConfigError: naming the setting, and what to do.
    """
    run = SlideRun(run_uri)
    if not storage.exists(run.path(run.TABLE)):
        if truth.slides is not None and storage.exists(run.path(ScoredRun.TABLE)):
            raise ConfigError(
                f"truth.slides = {truth.slides} is the truth of slides, but run = {run_uri} is one of score_images; "
                "give truth.cohort, truth.masks or truth.annotations, or the run of score_slides"
            )
        return
    kind = f"run = {run_uri} is one of score_slides"
    for name in KINDS_OF_TRUTH:
        if name != "slides" and (value := getattr(truth, name)) is not None:
            raise ConfigError(
                f"truth.{name} = {value} is the truth of images, but {kind}; give truth.slides=<folder of "
                f"<id>.geojson or <id>.tif>, or the run of score_images"
            )
    if against is not None:
        raise ConfigError(
            f"against = {against} compares runs of score_images, but {kind}; evaluate each run, and compare their "
            "scores.parquet"
        )
    default = AnnotationConfig()
    for name in AnnotationConfig.model_fields.keys() - OF_SLIDES:
        if (value := getattr(truth.annotation, name)) != getattr(default, name):
            raise ConfigError(
                f"truth.annotation.{name} = {value} says how annotations of images are read, but {kind}; leave it out: "
                f"of slides {' and '.join(OF_SLIDES)} count"
            )


Found = tuple[list[Truth], list[Failure], dict[str, int]]
"""The truth's images, failure rows of what names none, and how many files of other suffixes were passed over."""


@dataclass(frozen=True)
class Scored:
    """A scored run's files and failures, by image id."""

    image_uris: dict[str, str]
    failures: dict[str, Failure]
    masks: dict[str, str]
    maps: dict[str, str]


@dataclass(frozen=True)
class ImagePairs:
    """The images of a run, of the truth, and of the run that it is compared with."""

    truths: list[Truth]
    scored: Scored
    items: list[PairedFiles]
    """Of the truth's images that have a score, sorted by id."""
    missing: list[Failure]
    """Of the truth's images that have none, or name no single file."""
    not_compared: list[Failure]
    passed_over: dict[str, int]
    """How many files of each other suffix the truth's folder has."""
    read_as: tuple[str, ...] = ()
    """Marks of how files are read, where it may change: evaluations of before are then made anew."""

    @property
    def num_truth(self) -> int:
        """Return how many images the truth has."""
        return len(self.items) + len(self.missing)

    def fingerprint(self) -> str:
        """Return a digest of everything that an evaluation reads."""
        names = ("mask_uri", "map_uri", "against_uri", "against_map_uri")
        read = [uri for item in self.items for name in names if (uri := getattr(item, name))]
        return storage.fingerprint(
            *self.read_as,
            *(f"{truth.id} {truth.group} {truth.split} {truth.stamp}" for truth in self.truths),
            *(f"{uri} {mark}" for uri, mark in zip(read, storage.stamps(read), strict=True)),
            *(f"{one.id} {one.stage} {one.reason} {one.message}" for one in (*self.missing, *self.not_compared)),
        )


def find_pairs(run_uri: str, config: TruthConfig, against: str | None, describe: Describe) -> ImagePairs:
    """Find the files of each image of the run, of the truth, and of a run that it is compared with.

    `describe` looks into an annotation.

    Raises:
        ConfigError: there is no run, or no truth, or a fold is unknown.
    """
    scored = read_run("run", run_uri)
    truths, refused, passed_over = find_truth(config, scored.image_uris, describe)
    other = None if against is None else read_run("against", against)
    items, missing = pair(truths, scored)
    not_compared: list[Failure] = []
    if other is not None:
        items, not_compared = pair_other(items, truths, other)
    annotated = any(is_annotation(one.uri, config.annotation, one.fingerprint) for one in truths)
    read_as = (READ_AS,) if annotated else ()
    return ImagePairs(truths, scored, items, [*missing, *refused], not_compared, passed_over, read_as)


def find_truth(config: TruthConfig, image_uris: Mapping[str, str], describe: Describe) -> Found:
    """Find the images of the truth.

    `image_uris` are those of the run: files are matched by their ids, and the files themselves are no masks.
    `describe` looks into an annotation.

    Returns these sorted by id, failure rows of ids that name no single file, and how many files of each other suffix
    were passed over.

    Raises:
        ConfigError: there is none, or a fold is unknown.
    """
    if config.cohort is not None:
        return _cohort_truth(config, config.cohort), [], {}
    found: listing.Listing | AnnotationListing
    if config.masks is not None:
        key, folder, suffixes = "truth.masks", config.masks, ", ".join(MASK_SUFFIXES)
        found = listing.find(folder, MASK_SUFFIXES).with_ids_of(image_uris.keys())
    else:
        key, folder, suffixes = "truth.annotations", str(config.annotations), ", ".join(SUFFIXES)
        found = find_annotations(folder, image_uris.keys(), image_uris=image_uris.values(), describe=describe)
    note = f"{key}: passed over {kinds}" if (kinds := listing.in_words(found.passed_over)) else ""
    jpeg = " (JPEG blurs masks: save them as PNG)" if config.masks is not None else ""
    refused = [Failure.of(image_id, STAGE, error) for image_id, error in found.refused]
    if not found.uris:
        for line in failures.lines(refused, "missing"):
            print(line)
        problem = f"; {found.refused[0][1]}" if found.refused else f"; {note}" if note else ""
        raise ConfigError(f"truth: {folder} holds no {suffixes} files; give the folder they are in{jpeg}{problem}")
    if note:
        print(note + (jpeg if {".jpg", ".jpeg"} & found.passed_over.keys() else ""))
    marks = storage.stamps(list(found.uris.values()))
    truths = [Truth(name, uri, mark, name) for (name, uri), mark in zip(found.uris.items(), marks, strict=True)]
    return truths, refused, found.passed_over


def _cohort_truth(config: TruthConfig, uri: str) -> list[Truth]:
    rows = read_cohort(uri)
    unknown = sorted(set(config.folds or ()) - set(folds_of(rows)))
    if unknown:
        raise ConfigError(f"truth.folds = {unknown}: the cohort has folds {folds_of(rows)}")
    chosen = [
        row for row in rows if config.split in ("all", row.split) and (config.folds is None or row.fold in config.folds)
    ]
    if not chosen:
        raise ConfigError(
            f"truth.split = {config.split} with truth.folds = {config.folds} leaves none of the {len(rows)} images of "
            f"{uri}; choose others"
        )
    return [_truth_of(row) for row in sorted(chosen, key=lambda row: row.id)]


def _truth_of(row: CohortRow) -> Truth:
    return Truth(row.id, row.mask_uri, row.content, row.group, row.split, row.mask_fingerprint)


def read_run(key: str, folder: str) -> Scored:
    """Read what a folder of score_images holds.

    Raises:
        ConfigError: it is no such folder.
    """
    run = ScoredRun.open(key, folder)
    failed = {failure.id: failure for failure in run.failures()}
    return Scored(run.image_uris(), failed, masks=run.files(MASKS), maps=run.files(MAPS))


def pair(truths: Sequence[Truth], scored: Scored) -> tuple[list[PairedFiles], list[Failure]]:
    """Match the truth with the run: items to score (an absent file is ""), and failure rows for what the run lacks."""
    items, missing = [], []
    for truth in truths:
        failure = _lacking(scored, truth.id, "the run")
        if failure is None:
            mask, found_map = scored.masks[truth.id], scored.maps.get(truth.id, "")
            items.append(PairedFiles(truth.id, truth.group, truth.uri, truth.fingerprint, mask, found_map))
        else:
            missing.append(failure)
    return items, missing


def pair_other(
    items: Sequence[PairedFiles], truths: Sequence[Truth], other: Scored
) -> tuple[list[PairedFiles], list[Failure]]:
    """Add the other run's files to the items; return these, and failure rows for what that run lacks of the truth."""
    lacking = {truth.id: _lacking(other, truth.id, "the other run") for truth in truths}
    paired = []
    for item in items:
        if lacking[item.id] is None:
            other_map = other.maps.get(item.id, "") if item.map_uri else ""  # maps are compared with maps
            item = replace(item, against_uri=other.masks[item.id], against_map_uri=other_map)
        paired.append(item)
    return paired, [replace(failure, stage=AGAINST_STAGE) for failure in lacking.values() if failure is not None]


def _lacking(scored: Scored, image_id: str, run_name: str) -> Failure | None:
    """Return why a run has no mask of an image; None: it has one."""
    if image_id in scored.image_uris and image_id in scored.masks:
        return None
    if image_id in scored.failures:
        return scored.failures[image_id]
    if image_id in scored.image_uris:
        return Failure(image_id, STAGE, NOT_SCORED, f"{run_name} lists {image_id} but has no masks/{image_id}.png")
    return Failure(image_id, STAGE, NOT_SCORED, f"{run_name} has no image {image_id}; score it, too")
