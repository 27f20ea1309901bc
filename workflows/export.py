"""Write the masks of a scored run, or of a cohort, as annotations that a pathologist corrects in QuPath or labelme.

    python workflows/export.py run=/data/stas/scores out=/data/stas/to_correct
    python workflows/export.py cohort=/data/stas/cohort/cohort.parquet formats=coco out=/data/stas/as_coco

Writes <out>/geojson/<id>.geojson (QuPath), labelme/<id>.json, asap/<id>.xml, masks/<id>.png or coco/coco.json, as
`formats` asks, failures.parquet and, last, manifest.json. Read again by prepare_data, each gives the masks back to the
pixel. docs/qupath has scripts that import a folder into a project of QuPath, and export the corrections; labelme
corrects its files in place. Files that were corrected in place are never written over.
"""

import functools
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from stas_core import failures, storage, tables
from stas_core.config import Config, Uri
from stas_core.data import coco, images
from stas_core.data.cohort import read_cohort, require_mask
from stas_core.errors import ConfigError, InputError, StorageError, as_input_error
from stas_core.failures import Failure
from stas_core.predict.annotation_files import EXPORTED, Exported, coco_annotations, write_annotation
from stas_core.scored_runs import MASKS, ScoredRun
from workflows import next_step
from workflows.cli import main
from workflows.forecast import Forecast, short_of_disk, spread, try_out, up_to_date
from workflows.out_folder import (
    MANIFEST,
    OutFolder,
    Outputs,
    claim_for_stage,
    is_finished,
    require_apart,
    require_claimable,
    require_out,
    require_uri,
)

STAGE = "export"
FOLDERS: Mapping[Exported, str] = {form: "masks" if form == "mask" else form for form in EXPORTED}
COCO_FILE = "coco/coco.json"
OUTPUTS = Outputs(
    STAGE,
    (
        "failures.parquet",
        COCO_FILE,
        *(f"{folder}/{{id}}{EXPORTED[form]}" for form, folder in FOLDERS.items() if form != "coco"),
    ),
)
_THREADS = 8


class ExportConfig(Config):
    """Settings of export."""

    out: Uri | None = None
    """Folder of the outputs; path or URI."""
    run: Uri | None = None
    """Folder of score_images, whose masks are written."""
    cohort: Uri | None = None
    """cohort.parquet of prepare_data, whose masks are written instead."""
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


def run(config: ExportConfig, force: bool) -> int:
    """Export the masks; return the exit status."""
    config, out, items, inputs = _opened(config)
    with claim_for_stage(out, OUTPUTS, force=force) as folder:
        return _export(config, folder, items, inputs)


def _opened(config: ExportConfig) -> tuple[ExportConfig, str, list[Item], str]:
    """Find the masks; return settings with absolute paths, `out`, the images, and the fingerprint of their masks.

    Raises:
        ConfigError: a setting is wrong, there is no mask, or corrections would be written over.
    """
    out = require_out(config.out, "/data/to_correct")
    config = _with_absolute_paths(config)
    require_apart(out, {"run": config.run, "cohort": config.cohort}, listed=["run"])
    items = find_items(config)
    stamps = storage.stamps([item.mask_uri for item in items])
    inputs = storage.fingerprint(*(f"{item} {stamp}" for item, stamp in zip(items, stamps, strict=True)))
    _refuse_corrected(out, config, inputs)
    return config, out, items, inputs


def plan(config: ExportConfig, force: bool) -> list[Forecast]:
    """Say what the export would take, from a few masks that are exported here."""
    config, out, items, inputs = _opened(config)
    require_claimable(out, OUTPUTS, force=force)
    if not force and is_finished(out, config, inputs):
        return [up_to_date(STAGE, out)]
    threads = min(_THREADS, os.cpu_count() or 1)
    tried = try_out(lambda item, folder: export_item(item, folder, config), spread(items, 4))
    forecast = Forecast(
        STAGE,
        out,
        f"{len(items)} masks as {', '.join(config.formats)}",
        f"this machine, {threads} threads",
        seconds=tried.seconds * len(items) / threads,
        basis=tried.basis("masks"),
        disk_bytes=tried.num_bytes * len(items),
    )
    return [short_of_disk(forecast)]


def _with_absolute_paths(config: ExportConfig) -> ExportConfig:
    if (config.run is None) == (config.cohort is None):
        raise ConfigError(f"give one of run and cohort; now: run = {config.run}, cohort = {config.cohort}")
    if config.run is not None:
        return config.model_copy(update={"run": require_uri("run", config.run, "/data/scores")})
    return config.model_copy(update={"cohort": require_uri("cohort", config.cohort, "/data/cohort/cohort.parquet")})


def find_items(config: ExportConfig) -> list[Item]:
    """Return the images of the run or the cohort, sorted by id.

    Raises:
        ConfigError: there is no run, or none of its images has a mask.
    """
    if config.cohort is not None:
        rows = read_cohort(config.cohort)
        items = [Item(row.id, row.image_uri, row.mask_uri, row.mask_fingerprint) for row in rows]
    else:
        scored = ScoredRun.open("run", str(config.run))
        masks = scored.files(MASKS)
        items = [Item(name, uri, masks[name]) for name, uri in scored.image_uris().items() if name in masks]
    if not items:
        raise ConfigError(f"{config.run or config.cohort} has no mask to export; score images first")
    return sorted(items, key=lambda item: item.id)


def _refuse_corrected(out: str, config: ExportConfig, inputs: str) -> None:
    """Refuse to write over files that were changed since they were exported: someone's corrections.

    Raises:
        ConfigError: naming one.
    """
    uri = storage.join(out, MANIFEST)
    if not storage.exists(uri):
        return
    record = storage.read_record(uri)
    written = record.get("files")
    if not isinstance(written, dict) or _is_same_work(record, config, inputs):
        return
    changed = [path for path, known in sorted(written.items()) if _has_changed(storage.join(out, str(path)), known)]
    if changed:
        raise ConfigError(
            f"{len(changed)} file(s) in {out} were corrected since they were exported, such as {changed[0]}, and would "
            "be written over; use another out="
        )


def _is_same_work(record: Mapping[str, Any], config: ExportConfig, inputs: str) -> bool:
    return bool(record.get("inputs") == inputs and record.get("config") == config.model_dump(mode="json"))


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
    in_coco: list[tuple[str, tuple[int, int], list[dict[str, Any]]]] = []
    for item, done in zip(items, _export_all(items, out, config), strict=True):
        if isinstance(done, InputError):
            failed.append(Failure.of(item.id, STAGE, done))
            continue
        written |= done.files
        if done.in_coco is not None:
            in_coco.append(done.in_coco)
    if "coco" in config.formats:
        data = coco.to_coco(in_coco, config.label)
        storage.write_bytes(storage.join(out, COCO_FILE), data)
        written[COCO_FILE] = storage.fingerprint(data)
    for line in failures.lines(failed):
        print(line)
    tables.write_rows(storage.join(out, "failures.parquet"), Failure, failed)
    facts = {"num_images": len(items) - len(failed), "num_failures": len(failed), "files": written}
    then = next_step.after_export(out, FOLDERS[config.formats[0]], items[0].image_uri.rpartition("/")[0])
    folder.write_manifest(config, inputs, facts | next_step.recorded(then))
    _tell(out, config)
    return int(len(failed) > config.max_failed_fraction * len(items))


@dataclass(frozen=True)
class Done:
    """What was written of an image."""

    files: dict[str, str]
    """Fingerprints of files, by path below the output folder."""
    in_coco: tuple[str, tuple[int, int], list[dict[str, Any]]] | None
    """What the COCO file is to say of it, as `coco.to_coco` takes it."""


def _export_all(items: Sequence[Item], out: str, config: ExportConfig) -> Iterator[Done | InputError]:
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(functools.partial(export_item, out=out, config=config), items)


def export_item(item: Item, out: str, config: ExportConfig) -> Done | InputError:
    """Write the files of one image; return what was written, or why its mask cannot be used."""
    try:
        mask = images.decode_mask(storage.read_bytes(item.mask_uri), item.mask_uri)
        if item.fingerprint:
            require_mask(mask, item.fingerprint, item.mask_uri)
    except (InputError, StorageError) as error:
        return as_input_error(error, item.mask_uri)
    name = storage.name_of(item.image_uri)
    files: dict[str, str] = {}
    for form in config.formats:
        if form == "coco":
            continue
        path = f"{FOLDERS[form]}/{item.id}{EXPORTED[form]}"
        image_path = _path_from(storage.join(out, FOLDERS[form]), item.image_uri)
        data = write_annotation(mask, form, image_id=item.id, image_path=image_path, label=config.label)
        storage.write_bytes(storage.join(out, path), data)
        files[path] = storage.fingerprint(data)
    size = mask.shape[0], mask.shape[1]
    return Done(files, (name, size, coco_annotations(mask)) if "coco" in config.formats else None)


def _path_from(folder: str, image_uri: str) -> str:
    """Return the path by which labelme opens an image from a folder; its name alone, where there is none."""
    if storage.is_local(folder) and storage.is_local(image_uri):
        return posixpath.relpath(storage.absolute(image_uri), storage.absolute(folder))
    return storage.name_of(image_uri)


def _tell(out: str, config: ExportConfig) -> None:
    for form in config.formats:
        how = {"labelme": f"; correct them in place: labelme {out}/labelme", "geojson": "; docs/qupath imports them"}
        print(f"{form}: {out}/{FOLDERS[form]}{how.get(form, '')}")


if __name__ == "__main__":
    main(STAGE, ExportConfig, run, __doc__ or "", plan=plan)
