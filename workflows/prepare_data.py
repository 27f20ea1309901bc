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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from stas_core.errors import TRY_AGAIN, ConfigError
from stas_core.failures import Failure
from stas_core.verdicts import VerdictConfig
from workflows import next_step, tracking
from workflows.cli import main
from workflows.cluster import describe, quieten_ray_data, ray_session
from workflows.conclusion import conclude, conclude_again, recorded
from workflows.field_inputs import Inputs, Item, Unannotated, find_inputs, phantom_item, write_phantom
from workflows.forecast import (
    DRIVER_BYTES,
    FIGURE_BYTES,
    RECORDS_BYTES,
    START_S,
    Forecast,
    doubled,
    nodes_at_hand,
    num_cpus,
    peak_bytes,
    sheet_bytes,
    short_of_disk,
    spread,
    try_out,
)
from workflows.measuring import PART_SCHEMA, measure_item
from workflows.out_folder import (
    OutFolder,
    Outputs,
    claim_for_stage,
    require_apart,
    require_claimable,
    require_out,
    require_uri,
)
from workflows.progress import Progress, doing, told
from workflows.scoring.guarded_reader import MeasureLimits, reader
from workflows.tracking import TrackingConfig

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
    out, given, known = opened.out, opened.given, opened.known
    require_claimable(out, OUTPUTS, force=force)
    pictures: list[RgbImage] = []
    refused: list[Failure] = []

    def measure(item: Item, folder: str) -> None:
        row = measure_item(item, folder, config.annotation, config.limits)
        if row["reason"]:
            refused.append(Failure(row["id"], STAGE, row["reason"], row["message"]))
        else:
            pictures.append(overlay.thumbnail(images.read_image(item["image_uri"]), width_px=SHEET_WIDTH_PX))

    if (phantom := config.phantom) is not None:
        tried = try_out(lambda index, folder: measure(phantom_item(phantom, index, folder), folder), range(TRIED))
        num, todo, notes = phantom.num_images, phantom.num_images, list[str]()
        work = f"{num} phantom fields to make and measure"
    else:
        with local_files.temporary_folder() as folder:
            # The annotation of images without targets is the run's own, if there is one: its mark tells what is done.
            items = _find(config, out if storage.exists(storage.join(out, NEGATIVE)) else folder, known).items
            ids = [item["id"] for item in items]
            done = {} if force else {row["id"]: row for row in _read_parts(out, config.annotation)}
            stale = items if force else _stale(items, done, out, config.limits)
            tried = try_out(measure, spread(stale, TRIED))
        num, todo, notes = len(items), len(stale), [*given.check(ids), *known.notes(ids)]
        work = f"{num} images with annotations, {todo} to measure"
    memory_bytes = peak_bytes() + DRIVER_BYTES  # before torch is loaded to look for GPUs: no process of the run does
    figures = sheet_bytes(pictures, min(num, SHEET_IMAGES)) + FIGURE_BYTES * (len(FIGURES) - 1)
    nodes = nodes_at_hand()
    forecast = Forecast(
        STAGE,
        out,
        work,
        f"{describe(nodes)}, an image per CPU",
        seconds=tried.seconds * todo / num_cpus(nodes) + START_S * bool(todo),
        basis=tried.basis("images"),
        memory_bytes=memory_bytes,
        disk_bytes=(tried.num_bytes + ROW_BYTES) * todo + (figures + RECORDS_BYTES) * bool(todo),
        faster=doubled(nodes) if todo else "",
        notes=[*notes, *failures.lines(refused, "refused of those tried")],
    )
    return [short_of_disk(forecast)]


def expected_rows(config: PrepareConfig, opened: Opened, folder: str) -> list[CohortRow]:
    """Return rows like those of the cohort that is to be made: as many, in as many folds, each one of a few images.

    The few are measured into `folder`; where none can be used there are no rows.
    """
    split, phantom = config.split, config.phantom
    if phantom is not None:
        few = [phantom_item(phantom, index, folder) for index in range(min(TRIED, phantom.num_images))]
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
        config = _make_phantom_inputs(config, config.phantom, out)
        given = cohort.read_given_split(config.split)
    found = _find(config, out, known)
    items, failed = found.items, found.failed
    ids = [item["id"] for item in items]
    for note in [*given.check(ids), *known.notes(ids)]:
        print(note)
    sizes = known.mpp_of(ids)
    done = {row["id"]: row for row in _read_parts(out, config.annotation)}
    stale = _stale(items, done, out, config.limits)
    folder.name_ids(ids)
    stamps = (item["stamp"] for item in items)
    said = (*(failure.message for failure in failed), *given.fingerprints, *known.fingerprints)
    inputs = storage.fingerprint(*stamps, *said)
    identity = config.model_copy(update={"accept_warnings": False})
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
    failed += [Failure(row["id"], STAGE, row["reason"], row["message"]) for row in rows if row["reason"]]
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


def _given_mpp(mpp: float | None) -> dict[str, Any]:
    return {} if mpp is None else {"mpp": mpp, "mpp_source": "given"}


def _negative(out: str) -> str:
    """Return the annotation that says that its image has no target, written once."""
    uri = storage.join(out, NEGATIVE)
    if not storage.exists(uri):  # another time of writing would count as another annotation
        storage.write_bytes(uri, b'{"shapes": []}')
    return uri


def _stale(items: Sequence[Item], done: Mapping[str, Mapping[str, Any]], out: str, limits: MeasureLimits) -> list[Item]:
    """Return the items to measure: new, changed, without a mask, over a limit, or worth another try."""
    masks = storage.join(out, "masks")
    written = {storage.stem_of(uri) for uri in storage.list_files(masks, (".png",))} if storage.exists(masks) else set()

    def holds(row: Mapping[str, Any]) -> bool:
        if row["reason"] is None:
            return row["id"] in written and row["height"] * row["width"] <= limits.max_pixels
        return row["reason"] not in TRY_AGAIN and row["limits"] == limits.key

    up_to_date = {row["stamp"] for row in done.values() if holds(row)}
    return [item for item in items if item["stamp"] not in up_to_date]


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
        progress.step()
        if len(unsaved) == PART_ROWS:
            _write_part(out, unsaved, config)
            unsaved = []
    if unsaved:
        _write_part(out, unsaved, config)


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
        yield from found.map_batches(step, batch_size=8, batch_format="numpy").iter_rows()


def _part_folder(out: str, config: AnnotationConfig) -> str:
    # Other annotation settings make other masks, other versions other columns: their parts are kept apart.
    return storage.join(out, "parts", storage.fingerprint(config.model_dump_json(), *PART_SCHEMA.names))


def _write_part(out: str, rows: Sequence[dict[str, Any]], config: AnnotationConfig) -> None:
    name = f"{time.time_ns():020d}.parquet"  # later parts replace earlier rows of the same id
    table = pa.Table.from_pylist(list(rows), schema=PART_SCHEMA)
    tables.write_table(storage.join(_part_folder(out, config), name), table)


def _read_parts(out: str, config: AnnotationConfig) -> list[dict[str, Any]]:
    folder = _part_folder(out, config)
    if not storage.exists(folder):
        return []
    parts = (tables.read_table(uri, PART_SCHEMA) for uri in storage.list_files(folder, (".parquet",)))
    return [row for part in parts for row in part.to_pylist()]


def _make_phantom_inputs(config: PrepareConfig, phantom: PhantomConfig, out: str) -> PrepareConfig:
    """Make the phantom images that are not there yet, as Ray tasks; return the config that reads them."""
    import ray

    folder = storage.join(out, "phantom", storage.fingerprint(phantom.model_dump_json()))

    def make(index: int) -> str:
        return write_phantom(phantom, index, folder)

    groups = storage.join(folder, "groups.csv")
    if not storage.exists(groups):  # written last
        print(f"making {phantom.num_images} phantom fields of {phantom.width}x{phantom.height} px")
        with ray_session():
            lines = ray.get([ray.remote(make).remote(index) for index in range(phantom.num_images)])
        storage.write_bytes(groups, "\n".join(["image_id,group", *lines, ""]).encode())
    places = {"images": storage.join(folder, "images"), "annotations": storage.join(folder, "annotations")}
    sources = config.data.model_copy(update=places)
    split = config.split.model_copy(update={"groups_csv": groups}) if phantom.num_groups > 1 else config.split
    return config.model_copy(update={"data": sources, "split": split})


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
