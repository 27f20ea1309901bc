"""Write the masks of a scored run, or of a cohort, as annotations that a pathologist corrects in QuPath or labelme.

    python workflows/export.py run=/data/stas/scores out=/data/stas/to_correct
    python workflows/export.py run=/data/stas/runs/first review=true out=/data/stas/to_review
    python workflows/export.py cohort=/data/stas/cohort/cohort.parquet formats=coco out=/data/stas/as_coco

Writes <out>/geojson/<id>.geojson (QuPath), labelme/<id>.json, asap/<id>.xml, masks/<id>.png or coco/coco.json, as
`formats` asks, failures.parquet and, last, manifest.json. Read again by prepare_data, each gives the masks back to the
pixel. docs/qupath has scripts that import a folder into a project of QuPath, and export the corrections; labelme
corrects its files in place. With `review=true` the first images of a run's review queue are written, what a person is
to decide on in the classes `proposed` and `questioned`; of a training run the others go to geojson_rest/,
labelme_rest/ and so on, so that all together make a cohort again. Files that were corrected in place are never written
over.
"""

import sys

if __name__ == "__main__" and not (__package__ or getattr(sys.flags, "safe_path", False)):  # a script
    import environment  # noqa: F401 - ends where this Python lacks what follows

import functools
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
from pydantic import Field

from stas_core import failures, local_files, places, review, storage, tables
from stas_core.arrays import Mask, label_components
from stas_core.config import Config, Uri
from stas_core.data import coco, images
from stas_core.data.annotations import AnnotationConfig
from stas_core.data.cohort import CohortRow, folds_of, read_cohort, require_mask, typical_px
from stas_core.errors import ConfigError, InputError, SizeMismatch, StorageError, as_input_error
from stas_core.failures import Failure
from stas_core.predict.annotation_files import EXPORTED, Exported, coco_annotations, write_annotation
from stas_core.review import PROPOSED, QUESTIONED, ReviewField
from stas_core.runs import TrainingRun
from stas_core.scored_runs import MAPS, MASKS, ScoredRun, ScoredTarget
from workflows import next_step
from workflows.cli import main
from workflows.forecast import Forecast, begin, peak_bytes, shown_bytes, spread, try_out
from workflows.next_step import NextStep
from workflows.out_folder import (
    CLAIM,
    MANIFEST,
    OutFolder,
    Outputs,
    claim_for_stage,
    is_finished,
    require_apart,
    require_out,
    require_uri,
)

STAGE = "export"
FOLDERS: Mapping[Exported, str] = {form: "masks" if form == "mask" else form for form in EXPORTED}
COCO_FILE = "coco/coco.json"
REST = "_rest"
"""Behind the name of a folder: of the images that are not among the first of the review queue."""
OUTPUTS = Outputs(
    STAGE,
    (
        "failures.parquet",
        COCO_FILE,
        *(
            f"{folder}{rest}/{{id}}{EXPORTED[form]}"
            for form, folder in FOLDERS.items()
            for rest in ("", REST)
            if form != "coco" and not (form == "mask" and rest)
        ),
    ),
)
InCoco = tuple[str, tuple[int, int], list[dict[str, Any]]]
"""An image as `coco.to_coco` takes it: name, height and width, annotations."""
TRIED, LISTED_BYTES = 4, 110
"""Masks that are exported for a forecast; what the manifest says of a file."""
_AREAS = pa.schema([tables.schema_of(ScoredTarget).field("area_px")])
_THREADS = 8


class ExportConfig(Config):
    """Settings of export."""

    out: Uri | None = None
    """Folder of the outputs; path or URI."""
    run: Uri | None = None
    """Folder of score_images, whose masks are written; with `review` also of train_folds."""
    cohort: Uri | None = None
    """cohort.parquet of prepare_data, whose masks are written instead; with `review` and a training run: where its
    cohort is now."""
    review: bool = False
    """Write the first images of the run's review queue, with the classes `proposed` (the map is sure of a target that
    is not annotated, or that post-processing took away) and `questioned` (an annotated target in which it sees nothing,
    or a predicted one of which it is unsure): to be renamed to `label`, or deleted."""
    most_reviewed: int = Field(50, ge=1)
    """Images of the queue that are written with `review`."""
    formats: tuple[Exported, ...] = Field(("geojson", "labelme"), min_length=1)
    """Formats to write, each into a folder of its own."""
    label: str = Field("STAS", min_length=1)
    """Class of the targets; mask images have none."""
    max_failed_fraction: float = Field(0.0, ge=0, le=1)
    """Exit with status 1 when a larger share of the masks cannot be read."""


@dataclass(frozen=True)
class Item:
    """An image whose mask is written."""

    id: str
    image_uri: str
    mask_uri: str
    fingerprint: str = ""
    """Of the mask's pixels, where the cohort says."""
    queued: "Queued | None" = field(default=None, repr=False)
    """Where it is among the first of the review queue. Not in the text by which inputs count: exports of earlier
    versions, whose items had none, are still what they were."""


@dataclass(frozen=True)
class Queued:
    """What an image of the review queue is held against."""

    map_uri: str
    typical_px: float
    annotated: bool
    """Whether its mask is an annotation, not made of the map."""


def run(config: ExportConfig, force: bool) -> int:
    """Export the masks; return the exit status."""
    config, out, items, inputs = _opened(config, force)
    with claim_for_stage(out, OUTPUTS, force=force) as folder:
        return _export(config, folder, items, inputs)


def _opened(config: ExportConfig, force: bool) -> tuple[ExportConfig, str, list[Item], str]:
    """Find the masks; return settings with absolute paths, `out`, the images, and the fingerprint of their masks.

    Raises:
        ConfigError: a setting is wrong, there is no mask, or corrections would be written over.
    """
    out = require_out(config.out, "/data/to_correct")
    config = _with_absolute_paths(config)
    require_apart(out, {"run": config.run, "cohort": config.cohort}, listed=["run"])
    items = find_items(config)
    stamps = storage.stamps([item.mask_uri for item in items])
    queued = [item.queued for item in items if item.queued]
    of_maps = storage.stamps([one.map_uri for one in queued])
    texts = [f"{one} {stamp}" for one, stamp in zip([*items, *queued], [*stamps, *of_maps], strict=True)]
    inputs = storage.fingerprint(*texts)
    if force or not is_finished(out, config, inputs):  # else nothing is written
        _refuse_corrected(out)
    return config, out, items, inputs


def plan(config: ExportConfig, force: bool) -> list[Forecast]:
    """Say what the export would take, from a few masks that are exported here."""
    config, out, items, inputs = _opened(config, force)
    base = begin(out, OUTPUTS, (config, inputs), force=force, starts_over=True)
    if base.is_nothing:
        return [base]
    threads = min(_THREADS, os.cpu_count() or 1)
    in_coco, few = list[InCoco](), spread(items, TRIED)

    def export(item: Item, folder: str) -> None:
        done = export_item(item, folder, config)
        if isinstance(done, Done) and done.in_coco is not None:
            in_coco.append(done.in_coco)

    tried = try_out(export, few)
    memory_bytes = peak_bytes()
    each = tried.num_bytes + len(config.formats) * LISTED_BYTES
    each += len(_as_coco(in_coco, config)) / len(in_coco) if in_coco else 0.0
    forecast = replace(
        base,
        work=f"{len(items)} masks as {', '.join(config.formats)}",
        layout=f"this machine, {threads} threads",
        seconds=tried.seconds * len(items) / threads,
        basis=tried.basis("masks"),
        memory_bytes=memory_bytes,
        disk_bytes=each * len(items) + shown_bytes(0),
    )
    return [forecast]


def _with_absolute_paths(config: ExportConfig) -> ExportConfig:
    if config.review and config.run is None:
        raise ConfigError(
            "review=true takes the review queue of a run; give run=, a folder of train_folds or score_images"
        )
    if config.review and (plain := [form for form in config.formats if form == "mask"]):
        raise ConfigError(f"formats = {plain}: mask images have no classes for what is to be decided; take others")
    if not config.review and (config.run is None) == (config.cohort is None):
        raise ConfigError(f"give one of run and cohort; now: run = {config.run}, cohort = {config.cohort}")
    if config.label in review.UNDECIDED:
        raise ConfigError(f"label = {config.label} means targets that nobody has decided on; give the targets' own")
    given = {"run": config.run, "cohort": config.cohort}
    paths = {key: require_uri(key, value, "/data/scores") for key, value in given.items() if value is not None}
    return config.model_copy(update=paths)


def find_items(config: ExportConfig) -> list[Item]:
    """Return the images of the run or the cohort, sorted by id.

    Raises:
        ConfigError: there is no run, none of its images has a mask, or it has no review queue.
    """
    if config.review:
        items = _queued_items(str(config.run), config.cohort, config.most_reviewed)
    elif config.cohort is not None:
        items = [_item_of(row) for row in read_cohort(config.cohort)]
    else:
        items = list(_scored_items(ScoredRun.open("run", str(config.run))).values())
    if not items:
        raise ConfigError(f"{config.run or config.cohort} has no mask to export; score images first")
    return sorted(items, key=lambda item: item.id)


def _item_of(row: CohortRow, queued: Queued | None = None) -> Item:
    return Item(row.id, row.image_uri, row.mask_uri, row.mask_fingerprint, queued)


def _scored_items(scored: ScoredRun) -> dict[str, Item]:
    masks = scored.files(MASKS)
    return {name: Item(name, uri, masks[name]) for name, uri in scored.image_uris().items() if name in masks}


def _queued_items(run: str, cohort_uri: str | None, most: int) -> list[Item]:
    """Return the first images of a run's review queue; of a training run all others of its cohort, too.

    Raises:
        ConfigError: the run has no queue, or none of the maps that it came from, or the cohort is another.
    """
    uri = storage.join(run, TrainingRun.REVIEW)
    if not storage.exists(uri):
        raise ConfigError(
            f"run = {run} holds no {TrainingRun.REVIEW}; give a finished run of train_folds or score_images"
        )
    queue = [one for one in tables.read_rows(uri, ReviewField) if one.num_findings][:most]
    first = [one.id for one in queue]
    if not first:
        raise ConfigError(f"the review queue of run = {run} is empty: nothing is to be decided")
    if not storage.exists(storage.join(run, ScoredRun.TABLE)):
        training = TrainingRun.open("run", run)
        cohort_uri = cohort_uri or training.trained_on()
        rows = read_cohort(cohort_uri)
        maps = _out_of_fold(training, rows)
        if strange := sorted(set(first) - (maps.keys() & {row.id for row in rows})):
            raise ConfigError(
                f"{len(strange)} images of the review queue, such as {strange[0]}, are not in {cohort_uri}, or have no "
                f"map in run = {run}; set cohort= to the cohort of this run, or let train_folds finish its folds"
            )
        typical = typical_px(row for row in rows if row.id in maps)
        queued = {name: Queued(maps[name], typical, annotated=True) for name in first}
        return [_item_of(row, queued.get(row.id)) for row in rows]
    scored = ScoredRun.open("run", run)
    items, files = _scored_items(scored), scored.files(MAPS)
    if not files.keys() & set(first):
        raise ConfigError(f"run = {run} holds no maps, with which its masks are compared; score with save.maps=true")
    areas = tables.read_table(scored.path(scored.TARGETS), _AREAS)["area_px"]
    typical = review.typical_px(areas.to_numpy().tolist())
    # One whose map or mask is gone stays among them: reading it fails, and is told.
    listed = {one.id: Item(one.id, one.image_uri, scored.file(MASKS, one.id)) for one in queue} | items
    return [replace(listed[name], queued=Queued(scored.file(MAPS, name), typical, annotated=False)) for name in first]


def _out_of_fold(training: TrainingRun, rows: Sequence[CohortRow]) -> dict[str, str]:
    """Return the out-of-fold maps of the finished folds, by image."""
    folds = [fold for number in folds_of(rows) if (fold := training.fold(number)).is_done]
    return {
        score.id: storage.resolve(score.map_uri, fold.uri, where=fold.path(fold.OOF))
        for fold in folds
        for score in fold.oof()
    }


def _refuse_corrected(out: str) -> None:
    """Refuse to write over files that were changed, or put beside others, since the export: someone's corrections.

    Raises:
        ConfigError: naming one.
    """
    uri, claim = storage.join(out, MANIFEST), storage.join(out, CLAIM)
    if not storage.exists(uri):
        return
    written = storage.read_record(uri).get("files")
    if not isinstance(written, dict):
        return
    changed = [path for path, known in sorted(written.items()) if _has_changed(storage.join(out, str(path)), known)]
    ids = frozenset(storage.read_record(claim).get("ids", ()) if storage.exists(claim) else ())
    changed += sorted(path for path in storage.walk(out) if path not in written and _is_exported(path, ids))
    if changed:
        raise ConfigError(
            f"{len(changed)} file(s) in {out} were corrected or added since the export, such as {changed[0]}, and "
            "would be written over or deleted; use another out="
        )


def _is_exported(path: str, ids: frozenset[str]) -> bool:
    """Tell whether a file is named as the stage names those of an image."""
    folder, _, name = path.rpartition("/")
    is_whole = local_files.leftover_of(name) is None
    return folder.removesuffix(REST) in FOLDERS.values() and is_whole and OUTPUTS.owns(path, ids)


def _has_changed(uri: str, fingerprint: object) -> bool:
    return storage.exists(uri) and storage.fingerprint(storage.read_bytes(uri)) != fingerprint


def _export(config: ExportConfig, folder: OutFolder, items: Sequence[Item], inputs: str) -> int:
    out = folder.uri
    if folder.is_finished(config, inputs):
        print(f"nothing to do: {out} is up to date ({len(items)} images)")
        num_failed = len(tables.read_rows(storage.join(out, "failures.parquet"), Failure))
        return int(num_failed > config.max_failed_fraction * len(items))
    folder.discard()  # of other settings or masks; what was corrected was refused before
    folder.name_ids(item.id for item in items)
    print(f"{len(items)} masks as {', '.join(config.formats)}", flush=True)
    written: dict[str, str] = {}
    failed: list[Failure] = []
    undecided = Counter[str]()
    in_coco: list[InCoco] = []
    for item, done in zip(items, _export_all(items, out, config), strict=True):
        if isinstance(done, InputError):
            failed.append(Failure.of(item.id, STAGE, done))
            continue
        written |= done.files
        undecided.update(done.undecided)
        if done.in_coco is not None:
            in_coco.append(done.in_coco)
    if "coco" in config.formats:
        data = _as_coco(in_coco, config)
        storage.write_bytes(storage.join(out, COCO_FILE), data)
        written[COCO_FILE] = storage.fingerprint(data)
    for line in failures.lines(failed):
        print(line)
    tables.write_rows(storage.join(out, "failures.parquet"), Failure, failed)
    facts = {"num_images": len(items) - len(failed), "num_failures": len(failed), "files": written}
    if config.review:
        facts |= {"num_queued": sum(item.queued is not None for item in items), "undecided": dict(undecided)}
    folder.write_manifest(config, inputs, facts | next_step.recorded(_then(out, config, items)))
    _tell(out, config)
    if config.review:
        print(
            f"{facts['num_queued']} images of the review queue: {undecided[PROPOSED]} targets {PROPOSED}, "
            f"{undecided[QUESTIONED]} {QUESTIONED}; rename each to {config.label}, or delete it"
        )
    return int(len(failed) > config.max_failed_fraction * len(items))


def _as_coco(found: Sequence[InCoco], config: ExportConfig) -> bytes:
    return coco.to_coco(found, config.label, *([PROPOSED, QUESTIONED] if config.review else []))


@dataclass(frozen=True)
class Done:
    """What was written of an image."""

    files: dict[str, str]
    """Fingerprints of files, by path below the output folder."""
    in_coco: InCoco | None
    """What the COCO file is to say of it, as `coco.to_coco` takes it."""
    undecided: dict[str, int]
    """Targets on which a person is to decide, by class."""


def _export_all(items: Sequence[Item], out: str, config: ExportConfig) -> Iterator[Done | InputError]:
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(functools.partial(export_item, out=out, config=config), items)


def export_item(item: Item, out: str, config: ExportConfig) -> Done | InputError:
    """Write the files of one image; return what was written, or why its mask cannot be used."""
    try:
        mask = images.decode_mask(storage.read_bytes(item.mask_uri), item.mask_uri)
        if item.fingerprint:
            require_mask(mask, item.fingerprint, item.mask_uri)
        classes = classes_of(mask, item.queued, config.label)
    except (InputError, StorageError) as error:
        return as_input_error(error, item.mask_uri)
    name = storage.name_of(item.image_uri)
    files: dict[str, str] = {}
    for form in config.formats:
        if form == "coco":
            continue
        folder = FOLDERS[form] + (REST if config.review and item.queued is None else "")
        path = f"{folder}/{item.id}{EXPORTED[form]}"
        image_path = _path_from(storage.join(out, folder), item.image_uri)
        data = write_annotation(classes, form, image_id=item.id, image_path=image_path)
        storage.write_bytes(storage.join(out, path), data)
        files[path] = storage.fingerprint(data)
    size = mask.shape[0], mask.shape[1]
    undecided = {label: label_components(one)[0] - 1 for label, one in classes.items() if label in review.UNDECIDED}
    in_coco = (name, size, coco_annotations(classes.values())) if "coco" in config.formats else None
    return Done(files, in_coco, undecided)


def classes_of(mask: Mask, queued: Queued | None, label: str) -> dict[str, Mask]:
    """Return the masks of an image by class; what is to be decided stands in classes of its own.

    Raises:
        InputError: the map cannot be read, or is of another size.
    """
    if queued is None:
        return {label: mask}
    prob_u8 = images.decode_map(storage.read_bytes(queued.map_uri), queued.map_uri)
    if prob_u8.shape != mask.shape:
        raise SizeMismatch(f"{queued.map_uri} has {prob_u8.shape} px (y, x), its mask {mask.shape}; make the run again")
    found = review.to_decide(prob_u8, mask, queued.typical_px, annotated=queued.annotated)
    return {label: mask & ~found[QUESTIONED], **found}


def _path_from(folder: str, image_uri: str) -> str:
    """Return the path by which labelme opens an image from a folder; its name alone, where there is none."""
    if storage.is_local(folder) and storage.is_local(image_uri):
        return posixpath.relpath(places.absolute(image_uri), places.absolute(folder))
    return storage.name_of(image_uri)


def _then(out: str, config: ExportConfig, items: Sequence[Item]) -> NextStep:
    """Return the command that makes a cohort of the corrections."""
    form, queued = config.formats[0], [item for item in items if item.queued]
    of_training = config.review and any(item.queued is None or item.queued.annotated for item in items)
    folder = f"{FOLDERS[form]}*/*{EXPORTED[form]}" if of_training and form != "coco" else FOLDERS[form]
    images_folder = items[0].image_uri.rpartition("/")[0]
    is_known = form == "mask" or AnnotationConfig().meaning_of(config.label) == "target"  # masks have no classes
    label = None if is_known else config.label
    return next_step.after_export(out, folder, images_folder, label, partly=bool(queued) and not of_training)


def _tell(out: str, config: ExportConfig) -> None:
    for form in config.formats:
        how = {"labelme": f"; correct them in place: labelme {out}/labelme", "geojson": "; docs/qupath imports them"}
        print(f"{form}: {out}/{FOLDERS[form]}{how.get(form, '')}")


if __name__ == "__main__":
    main(STAGE, ExportConfig, run, __doc__ or "", plan=plan)
