"""Turn a folder of H&E images with annotations into a cohort: masks, folds, stain, figures.

    python workflows/prepare_data.py data.images=/data/stas/Train_Images \\
        data.annotations=/data/stas/Train_Annotations out=/data/stas/cohort

Writes <out>/cohort.parquet (one row per image), masks/<id>.png (1-bit), failures.parquet, split.json, figures/*.png
and, last, manifest.json. Annotations are labelme, GeoJSON of QuPath, COCO, ASAP XML or mask images, told by their
content (docs/annotations.md), and matched with images by file name; a COCO file names its images itself. Run again, it
measures only what is new or changed, and draws the split and figures anew if anything did.
"""

import sys

if __name__ == "__main__" and not (__package__ or getattr(sys.flags, "safe_path", False)):  # a script
    import environment  # noqa: F401 - ends where this Python lacks what follows

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
from pydantic import Field

from stas_core import failures, local_files, storage, tables, verdicts
from stas_core.arrays import RgbImage
from stas_core.config import Config, Uri
from stas_core.data import cohort, images, overlay, truth
from stas_core.data.annotation_labels import summarise_labels
from stas_core.data.annotations import AnnotationConfig
from stas_core.data.cohort import HOLD_OUT, SCHEMA, STRATUM_EDGES, TRAIN, CohortRow, GivenSplit, SplitConfig
from stas_core.data.image_tables import ImageTables, read_image_tables
from stas_core.data.images import COARSEST_MPP, FINEST_MPP
from stas_core.data.phantom import PhantomConfig
from stas_core.errors import ConfigError
from stas_core.failures import Failure
from stas_core.verdicts import VerdictConfig
from workflows import next_step, run_metrics, tracking
from workflows.cli import main
from workflows.cluster import quieten_ray_data, ray_session
from workflows.conclusion import conclude, conclude_again, recorded
from workflows.field_inputs import Inputs, Item, Unannotated, find_inputs
from workflows.forecast import (
    DRIVER_BYTES,
    Failing,
    Forecast,
    Sheet,
    Tried,
    begin,
    bytes_there,
    nodes_at_hand,
    on_all_cpus,
    peak_bytes,
    shown_bytes,
    spread,
    try_out,
)
from workflows.measuring import PART_SCHEMA, mask_name, measure_item, read_parts, stale_items, write_part
from workflows.out_folder import (
    OutFolder,
    Outputs,
    claim_for_stage,
    is_finished,
    require_apart,
    require_out,
    require_uri,
)
from workflows.phantom_fields import PhantomFields
from workflows.progress import Progress, doing, told
from workflows.scoring.guarded_reader import MeasureLimits, reader
from workflows.tracking import TrackingConfig
from workflows.waiting import Need, streamed

STAGE = "prepare_data"
FIGURES = ("targets_per_image", "target_areas", "strata", "contact_sheet")
NEGATIVE = "no_targets.json"
"""The annotation of images without one, where these count as images without targets."""
OUTPUTS = Outputs(
    STAGE,
    (
        *(NEGATIVE, "cohort.parquet", "failures.parquet", "split.json", "masks/{id}.png", "parts/*/*.parquet"),
        *(f"figures/{name}.png" for name in FIGURES),
        *("phantom/*/groups.csv", "phantom/*/images/phantom_*.jpg", "phantom/*/annotations/phantom_*.json"),
    ),
)

SHEET_IMAGES, SHEET_WIDTH_PX = 24, 480
"""Of the contact sheet."""
TRIED = 6
"""Images that are measured for a forecast."""
ROW_BYTES = 800.0
"""Of an image in tables, an estimate of columns of numbers and two paths."""
PART_ROWS = 200
"""Rows between saves of the work done so far."""


class InputConfig(Config):
    """Where the images and annotations are."""

    images: Uri | None = None
    """Folder, glob or file of images (JPEG, PNG, TIFF, BMP, WebP, JPEG 2000); path or URI."""
    annotations: Uri | None = None
    """Folder, glob or file of annotations: labelme, GeoJSON, COCO, ASAP XML or masks, told by their content."""
    mpp: float | None = Field(None, ge=FINEST_MPP, le=COARSEST_MPP)
    """um per pixel of all images, whatever their files state; null: what each states."""
    mpp_csv: Uri | None = None
    """CSV with columns image_id and mpp: um per pixel of single images, before `mpp` and what their files state."""
    negatives: Uri | None = None
    """CSV with a column image_id: images that hold no target, and need no annotation."""
    unannotated: Unannotated = "refuse"
    """What an image without an annotation is: a failure, none of the inputs (`leave_out`, of a folder of which a part
    is annotated), or an image without targets. An annotation without shapes says so of its image."""


class PrepareConfig(Config):
    """Settings of prepare_data."""

    out: Uri | None = None
    """Folder of the outputs; path or URI."""
    data: InputConfig = InputConfig()
    phantom: PhantomConfig | None = None
    """Make this phantom cohort below `out` and prepare it, instead of reading `data`."""
    annotation: AnnotationConfig = AnnotationConfig()
    split: SplitConfig = SplitConfig()
    limits: MeasureLimits = MeasureLimits()
    max_failed_fraction: float = Field(0.0, ge=0, le=1)
    """Exit with status 1 when a larger share of the inputs failed."""
    verdict: VerdictConfig = VerdictConfig()
    """Limits of the verdict that the stage ends with."""
    accept_warnings: bool = False
    """Exit with status 0 even where the verdict is `do not use`."""
    tracking: TrackingConfig = TrackingConfig()
    """Whether MLflow is told of the run."""


def run(config: PrepareConfig, force: bool) -> int:
    """Prepare the cohort; return the exit status."""
    opened = open_cohort(config)
    with claim_for_stage(opened.out, OUTPUTS, force=force) as folder:
        return _prepare(config, folder, opened)


@dataclass(frozen=True)
class Opened:
    """A cohort that could be begun."""

    out: str
    given: GivenSplit
    known: ImageTables


def open_cohort(config: PrepareConfig) -> Opened:
    """Return the output folder, and what CSVs say; before anything is written, or an image read.

    Raises:
        ConfigError: a setting or a CSV is wrong.
    """
    out = require_out(config.out, "/data/cohort")
    read = {"data.images": config.data.images, "data.annotations": config.data.annotations}
    csvs = {"split.groups_csv": config.split.groups_csv, "split.published_csv": config.split.published_csv}
    csvs |= {"data.mpp_csv": config.data.mpp_csv, "data.negatives": config.data.negatives}
    require_apart(out, csvs if config.phantom is not None else read | csvs, listed=read)
    known = read_image_tables(config.data.mpp_csv, config.data.negatives)
    return Opened(out, cohort.read_given_split(config.split), known)


def plan(config: PrepareConfig, force: bool) -> list[Forecast]:
    """Say what preparing the cohort would take, from a few images that are measured here."""
    return plan_opened(config, open_cohort(config), force)


def plan_opened(config: PrepareConfig, opened: Opened, force: bool) -> list[Forecast]:
    """As `plan`, of a cohort that was opened."""
    out, known = opened.out, opened.known
    base = begin(out, OUTPUTS, force=force)
    with local_files.temporary_folder() as folder:
        if config.phantom is not None and (force or not PhantomFields(config.phantom, out).are_made()):
            return [_plan_phantoms(config, config.phantom, base, folder)]
        if config.phantom is not None:
            config = _of_phantoms(config, PhantomFields(config.phantom, out))
            opened = replace(opened, given=cohort.read_given_split(config.split))
        # The annotation of images without targets is the run's own, if there is one: its mark tells what is done.
        found = _find(config, out if storage.exists(storage.join(out, NEGATIVE)) else folder, known)
        done = {} if force else {row["id"]: row for row in read_parts(out, config.annotation)}
        stale = found.items if force else stale_items(found.items, done, out, config.limits)
        ids, num = [item["id"] for item in found.items], len(found.items)
        held = [done[name] for name in sorted(set(ids) - {item["id"] for item in stale})]
        failing = _failing(config, [*found.failed, *_failed(held)], num + len(found.failed))
        if not (stale or force) and is_finished(out, _identity(config), _fingerprint(found, opened)):
            base = replace(base, seconds=0.0, disk_bytes=0.0, notes=failing.notes())
            return [replace(base, work=f"nothing: it is up to date ({num} images)")]
        written = [*(storage.join(out, mask_name(item["id"])) for item in stale), *_of_all(out)]
        notes = [*opened.given.check(ids), *known.notes(ids)]
        work = f"{num} images with annotations, {len(stale)} to measure"
        base = replace(base, work=work, notes=notes).in_place_of(bytes_there(written))
        return [_plan_measuring(config, base, stale, spread(found.items, TRIED), failing)]


def _plan_phantoms(config: PrepareConfig, phantom: PhantomConfig, base: Forecast, folder: str) -> Forecast:
    """Forecast the making and measuring of phantom fields, of which a few are made in `folder`."""
    num, made = phantom.num_images, list[Item]()

    def measure(index: int, to: str) -> None:
        made.append(PhantomFields(phantom, folder).item(index))
        measure_item(made[-1], to, config.annotation, config.limits)

    tried = try_out(measure, range(min(TRIED, num)))
    each = tried.num_bytes + local_files.bytes_below(folder) / len(made)
    base = replace(base, work=f"{num} phantom fields to make and measure")
    return _forecast(base, replace(tried, num_bytes=each), made, num, num)


def _plan_measuring(
    config: PrepareConfig, base: Forecast, stale: Sequence[Item], shown: Sequence[Item], failing: Failing
) -> Forecast:
    """Forecast the measuring of images, and what is drawn of those that are left, of which some are `shown`."""
    measured: list[dict[str, Any]] = []
    failing.notes()  # before any is tried: it refuses where none is left

    def measure(item: Item, to: str) -> None:
        measured.append(measure_item(item, to, config.annotation, config.limits))

    tried = try_out(measure, spread(stale, TRIED))
    base = replace(base, notes=[*base.notes, *failing.notes(_failed(measured))])
    return _forecast(base, tried, shown, failing.num_inputs - len(failing.known), len(stale))


def _failed(rows: Iterable[Mapping[str, Any]]) -> list[Failure]:
    """Return those of the measured images that cannot be used."""
    return [Failure(row["id"], STAGE, row["reason"], row["message"]) for row in rows if row["reason"]]


def _failing(config: PrepareConfig, failed: Sequence[Failure], num: int) -> Failing:
    return Failing(failed, num, config.max_failed_fraction, refusal=f"none of the {num} inputs can be used")


def _forecast(base: Forecast, tried: Tried, shown: Sequence[Item], num: int, todo: int) -> Forecast:
    memory_bytes = peak_bytes() + DRIVER_BYTES
    sheet = Sheet([item["image_uri"] for item in shown], min(num, SHEET_IMAGES), SHEET_WIDTH_PX)
    disk_bytes = tried.num_bytes * todo + ROW_BYTES * (num + todo) + shown_bytes(len(FIGURES) - 1, sheet)
    base = replace(base, basis=tried.basis("images"), memory_bytes=memory_bytes, disk_bytes=disk_bytes)
    return on_all_cpus(base, nodes_at_hand(), "an image per CPU", tried.seconds * todo)


def expected_rows(config: PrepareConfig, opened: Opened, folder: str) -> list[CohortRow]:
    """Return rows like those of the cohort that is to be made: as many, in as many folds, each one of a few images.

    The few are measured into `folder`; where none can be used there are no rows.
    """
    split, phantom = config.split, config.phantom
    if phantom is not None:
        few = [PhantomFields(phantom, folder).item(index) for index in range(min(TRIED, phantom.num_images))]
        folds: list[int | None] = [None] * phantom.num_images
    else:
        items = _find(config, folder, opened.known).items
        few, folds = spread(items, TRIED), [None] * len(items)
        if (given := opened.given.folds) is not None:
            folds = given.values_of([item["id"] for item in items])
    if split.published_csv is None:
        num_trained = round(len(folds) * (1 - split.hold_out_fraction))
        folds = [number % split.num_folds if number < num_trained else None for number in range(len(folds))]
    measured = [measure_item(item, folder, config.annotation, config.limits) for item in few]
    good = [row | {"mask_uri": storage.join(folder, row["mask_uri"])} for row in measured if row["reason"] is None]
    values = [{name: row[name] for name in SCHEMA.names if name in row} for row in good]
    return [
        CohortRow(**values[number % len(values)] | {"id": str(number), "group": str(number), "fold": fold}, split=TRAIN)
        for number, fold in enumerate(folds if values else [])
    ]


def _find(config: PrepareConfig, out: str, known: ImageTables) -> Inputs:
    """Find the images and their annotations; one that says that there are no targets is written to `out`."""
    may_be_negative = config.data.unannotated == "negative" or known.negatives is not None
    return find_inputs(
        STAGE,
        require_uri("data.images", config.data.images, "/data/images"),
        require_uri("data.annotations", config.data.annotations, "/data/annotations"),
        lambda uri: reader().describe(uri, None, config=config.annotation, limits=config.limits),
        unannotated=config.data.unannotated,
        negative=_negative(out) if may_be_negative else None,
        negatives=known.negatives,
    )


def _prepare(config: PrepareConfig, folder: OutFolder, opened: Opened) -> int:
    out, given, known, start = folder.uri, opened.given, opened.known, time.monotonic()
    if config.phantom is not None:
        fields = PhantomFields(config.phantom, out)
        if not fields.are_made():
            fields.make()
        config = _of_phantoms(config, fields)
        given = cohort.read_given_split(config.split)
    found = _find(config, out, known)
    items, failed = found.items, found.failed
    ids = [item["id"] for item in items]
    for note in [*given.check(ids), *known.notes(ids)]:
        print(note)
    sizes = known.mpp_of(ids)
    done = {row["id"]: row for row in read_parts(out, config.annotation)}
    stale = stale_items(items, done, out, config.limits)
    folder.name_ids(ids)
    identity, inputs = _identity(config), _fingerprint(found, replace(opened, given=given))
    if not stale and folder.is_finished(identity, inputs):
        print(f"nothing to do: {out} is up to date ({len(items)} images)")
        num_failed = len(tables.read_rows(storage.join(out, "failures.parquet"), Failure))
        worthless = conclude_again(out, accept_warnings=config.accept_warnings)
        return worthless or _status(config, num_failed, len(items))
    print(f"{len(items)} images with annotations, {len(items) - len(stale)} already measured, {len(stale)} to do")
    tracking.begin()
    if stale:
        done |= {row["id"]: row for row in _measure(stale, out, config.annotation, config.limits)}
    rows = [done[item["id"]] for item in items]
    failed += _failed(rows)
    good = [row | _given_mpp(sizes.get(row["id"], config.data.mpp)) for row in rows if not row["reason"]]
    for line in failures.lines(failed) if good else []:  # else the error says it
        print(line)
    contents = summarise_labels(rows, config.annotation)
    for line in contents.lines():
        print(line)
    folder.verify()
    _write_cohort(out, good, failed, config.split, given)
    findings = {row["id"]: row["findings"] for row in good if row["findings"]}
    seconds = round(time.monotonic() - start, 1)
    facts: dict[str, Any] = {"num_images": len(good), "num_failures": len(failed), "seconds": seconds}
    facts |= {"findings": truth.count_findings(findings), "passed_over": found.passed_over}
    facts |= {"annotation_formats": contents.formats, "labels": contents.labels}
    prepared = cohort.read_cohort(storage.join(out, "cohort.parquet"))
    verdict = verdicts.of_cohort(prepared, len(failed), config.verdict)
    then = next_step.recorded(next_step.after_prepare(out))
    folder.write_manifest(identity, inputs, facts | recorded(verdict, config.verdict) | then)
    print(f"{len(good)} images in {out}/cohort.parquet, {len(failed)} failures in {out}/failures.parquet")
    print(f"look at {out}/figures: contact_sheet.png, strata.png, targets_per_image.png, target_areas.png")
    for line in truth.findings_lines(findings):
        print(line)
    worthless = conclude(verdict, accept_warnings=config.accept_warnings)
    return worthless or _status(config, len(failed), len(items) + len(failed))


def _of_phantoms(config: PrepareConfig, fields: PhantomFields) -> PrepareConfig:
    """Return the config that reads the phantom fields."""
    sources = config.data.model_copy(update={"images": fields.images, "annotations": fields.annotations})
    update = {"groups_csv": fields.groups_csv} if fields.phantom.num_groups > 1 else {}
    return config.model_copy(update={"data": sources, "split": config.split.model_copy(update=update)})


def _given_mpp(mpp: float | None) -> dict[str, Any]:
    return {} if mpp is None else {"mpp": mpp, "mpp_source": "given"}


def _negative(out: str) -> str:
    """Return the annotation that says that its image has no target, written once."""
    uri = storage.join(out, NEGATIVE)
    if not storage.exists(uri):  # another time of writing would count as another annotation
        storage.write_bytes(uri, b'{"shapes": []}')
    return uri


def _identity(config: PrepareConfig) -> PrepareConfig:
    return config.model_copy(update={"accept_warnings": False})


def _fingerprint(found: Inputs, opened: Opened) -> str:
    """Return the fingerprint of what a cohort is made of."""
    said = (*(failure.message for failure in found.failed), *opened.given.fingerprints, *opened.known.fingerprints)
    return storage.fingerprint(*(item["stamp"] for item in found.items), *said)


def _status(config: PrepareConfig, num_failed: int, num_inputs: int) -> int:
    return int(num_failed > config.max_failed_fraction * num_inputs)


def _measure(
    items: Sequence[Item], out: str, config: AnnotationConfig, limits: MeasureLimits
) -> Iterator[dict[str, Any]]:
    """Stream the items through CPU tasks; save what is done every `PART_ROWS` rows."""
    progress = Progress(len(items))
    unsaved: list[dict[str, Any]] = []
    for row in stream(items, out, config, limits):
        yield row
        unsaved.append(row)
        if row["reason"]:
            run_metrics.count("stas_items_failed", reason=row["reason"])
        progress.step()
        if len(unsaved) == PART_ROWS:
            write_part(out, unsaved, config)
            unsaved = []
    if unsaved:
        write_part(out, unsaved, config)


def stream(
    items: Sequence[Item], out: str, config: AnnotationConfig, limits: MeasureLimits
) -> Iterator[dict[str, Any]]:
    """Yield the measured rows of items as Ray Data finishes them."""
    import ray.data

    def measure_batch(batch: dict[str, np.ndarray]) -> pa.Table:
        rows = (dict(zip(batch, map(str, values), strict=True)) for values in zip(*batch.values(), strict=True))
        measured = [measure_item(cast(Item, row), out, config, limits) for row in rows]
        return pa.Table.from_pylist(measured, schema=PART_SCHEMA)

    with ray_session():
        quieten_ray_data()
        found = ray.data.from_items(list(items), override_num_blocks=max(1, len(items) // 8))
        step: Any = measure_batch  # Ray declares a batch as any of its formats
        measured = found.map_batches(step, batch_size=8, batch_format="numpy")
        yield from streamed(measured, Need("the measuring of fields").look)


def _of_all(out: str) -> list[str]:
    """Return the files of all images together."""
    return [storage.join(out, "cohort.parquet"), *(storage.join(out, "figures", f"{name}.png") for name in FIGURES)]


def _write_cohort(
    out: str, rows: list[dict[str, Any]], failed: list[Failure], split: SplitConfig, given: GivenSplit
) -> None:
    ordered = sorted(failed, key=lambda failure: (failure.id, failure.message))
    tables.write_rows(storage.join(out, "failures.parquet"), Failure, ordered)
    if not rows:
        why = "".join(f"\n  {line}" for line in failures.kinds(failed))
        raise ConfigError(f"none of the {len(failed)} inputs can be used; see {out}/failures.parquet:{why}")
    ids = [row["id"] for row in rows]
    groups = ids if given.groups is None else given.groups.values_of(ids)  # else every image is its own group
    if given.folds is not None:
        folds, summary = given.folds.values_of(ids), {"source": split.published_csv}
    else:
        strata = [row["stratum"] for row in rows]
        assignment = cohort.draw_split(strata, None if given.groups is None else groups, split)
        folds, summary = assignment.folds, {"max_stratum_deviation": f"{assignment.max_deviation:.2f}"}
        print(f"largest deviation of a stratum from its even share: {assignment.max_deviation:.2f} images")
    for row, group, fold in zip(rows, groups, folds, strict=True):
        row |= {"group": group, "fold": fold, "split": HOLD_OUT if fold is None else TRAIN}
    storage.write_json(storage.join(out, "split.json"), {"config": split.model_dump(mode="json"), **summary})
    values = [{name: row[name] for name in SCHEMA.names} for row in rows]
    cohort.write_cohort(storage.join(out, "cohort.parquet"), values)
    _write_figures(out, cohort.read_cohort(storage.join(out, "cohort.parquet")))


@doing("drawing the figures")
def _write_figures(out: str, rows: Sequence[CohortRow]) -> None:
    """Draw the figures of the paper, and a contact sheet spread over the range of foreground shares."""
    from stas_core.figures import cohort as cohort_figures
    from stas_core.figures import contact_sheet

    parts = [HOLD_OUT if row.fold is None else f"fold {row.fold}" for row in rows]
    areas: dict[str, list[int]] = {}
    for row in sorted(rows, key=lambda row: row.stratum):
        areas.setdefault(cohort.stratum_name(row.stratum, STRATUM_EDGES), []).extend(row.target_areas_px)
    by_share = sorted(rows, key=lambda row: row.foreground_share)
    chosen = spread(by_share, SHEET_IMAGES)
    tiles = [contact_sheet.Tile(*_tile(row)) for row in told(chosen, "images of the contact sheet")]
    title = f"{len(chosen)} of {len(rows)} images, by foreground share"
    figures = {
        "targets_per_image": cohort_figures.targets_histogram([row.num_targets for row in rows]),
        **({"target_areas": cohort_figures.target_area_boxplot(areas)} if any(areas.values()) else {}),
        "strata": cohort_figures.strata_figure([row.stratum for row in rows], parts, edges=STRATUM_EDGES),
        "contact_sheet": contact_sheet.contact_sheet(tiles, columns=4, title=title),
    }
    for name in FIGURES:
        uri = storage.join(out, "figures", f"{name}.png")
        if name in figures:
            storage.write_bytes(uri, figures[name])
        else:
            storage.remove(uri)  # an earlier run's


def _tile(row: CohortRow) -> tuple[RgbImage, str]:
    image = images.read_image(row.image_uri)
    mask = images.decode_mask(storage.read_bytes(row.mask_uri), row.mask_uri)
    outlined = overlay.draw(image, truth=mask, prediction=None)
    return overlay.thumbnail(outlined, width_px=SHEET_WIDTH_PX), f"{row.id}  {row.foreground_share:.2%}"


if __name__ == "__main__":
    main(STAGE, PrepareConfig, run, __doc__ or "", plan=plan)
