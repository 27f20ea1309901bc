"""What a run of score_slides comes to: records gathered into tables and a report, and stale files deleted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from stas_core import failures, scored_verdicts, storage, tables
from stas_core.errors import ConfigError
from stas_core.failures import Failure
from stas_core.scored_runs import RECORDS
from stas_core.slides.run import REGIONS, SURVEYS, TISSUE, SlideRecord, SlideRun
from stas_core.verdicts import VerdictConfig
from workflows.conclusion import recorded
from workflows.progress import doing
from workflows.scoring.slide_list import STAGE
from workflows.scoring.slide_plan import SlideItem, SlideTask, must_score

if TYPE_CHECKING:
    from stas_core.data.appearance import Ranges


@dataclass(frozen=True)
class Judge:
    """What slides are judged by."""

    limits: VerdictConfig
    assumed_mpp: float | None
    """um per pixel of the models, where no checkpoint says it."""
    looks: "Ranges | None"
    """How the images of the training look; None: nothing says it."""


def usual_looks(cohort: str | None, ensemble_uri: str) -> "Ranges | None":
    """Return how the images look that slides are held against: of a cohort, else of the ensemble's training.

    None: nothing says it.

    Raises:
        ConfigError: none of the cohort's images has a stain.
        CheckpointError: what the ensemble says of its cohort is damaged.
    """
    from stas_core.data import appearance
    from stas_core.data.cohort import read_cohort
    from stas_core.data.reference import look_of
    from stas_core.runs import read_reference

    if cohort is None:
        reference = read_reference(ensemble_uri)
        return None if reference is None else reference.looks
    rows = read_cohort(cohort)
    if all(row.stain is None for row in rows):
        raise ConfigError(f"cohort = {cohort}: none of its images has a stain; give that of prepare_data, or none")
    return appearance.ranges([look_of(row) for row in rows])


@doing("gathering the results, writing the tables")
def write_results(
    task: SlideTask, items: Sequence[SlideItem], refused: Sequence[Failure], *, own: frozenset[str], judge: Judge
) -> dict[str, Any]:
    """Gather the records into tables; delete stale files of the run's `own` ids."""
    from stas_core.slides.finish import slides_schema
    from stas_core.slides.report import write_report

    records = gather_records(task, items)
    good = [record for record in records if record.found is not None]
    failed = [Failure(r.id, STAGE, r.reason, r.message) for r in records if r.reason is not None]
    failed = sorted([*failed, *refused], key=lambda failure: failure.id)
    for line in failures.lines(failed):
        print(line)
    _prune(task, {item["id"]: item for item in items}, {record.id for record in good}, own)
    run = task.run
    rows = [_with_drift(record.found or {}, judge) for record in good]
    tables.write_table(run.path(run.TABLE), pa.Table.from_pylist(rows, schema=slides_schema()))
    tables.write_rows(run.path(run.FAILURES), Failure, failed)
    steps = sorted({step for record in good for step in record.seconds})
    columns: list[pa.Field[Any]] = [pa.field("id", pa.string()), *(pa.field(step, pa.float64()) for step in steps)]
    seconds = [{"id": record.id, **record.seconds} for record in good]
    table = pa.Table.from_pylist(seconds, schema=pa.schema(columns))
    tables.write_table(run.path(run.TIMINGS), table)
    unchecked = [] if not rows or any(row.get("drift") is not None for row in rows) else [_not_judged(judge)]
    verdict = scored_verdicts.of_slides(
        rows, len(failed), judge.limits, assumed_mpp=judge.assumed_mpp, unchecked=unchecked
    )
    text = write_report(rows, failed, _seam_lines(task), verdict)
    storage.write_bytes(run.path(run.REPORT), text.encode())
    return {"num_slides": len(good), "num_failures": len(failed), **recorded(verdict, judge.limits)}


def _not_judged(judge: Judge) -> str:
    """Return why no slide was held against the stains of the training."""
    return scored_verdicts.SLIDES_NOT_SAID if judge.looks is None else scored_verdicts.SLIDES_WITHOUT_STAIN


def _with_drift(found: Mapping[str, Any], judge: Judge) -> dict[str, Any]:
    """Return a row of `slides.parquet` with how far its stains lie from those of the training, and a warning if far."""
    from stas_core.data import appearance
    from stas_core.slides import quality

    row = dict(found)
    look = appearance.Look(**{name: row.get(name) for name in appearance.NAMES})
    far = None if judge.looks is None else appearance.drift(look, judge.looks)
    if far is not None and judge.looks is not None:
        row |= {"drift": round(far.score, 6), "drift_of": far.figure}
        if far.score > judge.limits.max_drift:
            row["warnings"] = [*row["warnings"], quality.stain_warning(far, judge.looks)]
    return row


def _seam_lines(task: SlideTask) -> list[str]:
    """Return the seam table in lines; none if it was not measured."""
    from stas_core.slides import halo

    uri = task.run.path(SlideRun.SEAMS)
    if not task.tile.measure or not storage.exists(uri):
        return []
    found = storage.read_record(uri, "key", "slide", "rows")
    if found["key"] != task.seams_key:
        return []
    lines = halo.describe([halo.Seam(**row) for row in found["rows"]], task.tile.halo_px, blended=task.tile.blend)
    return [f"measured on {found['slide']}", *lines]


def gather_records(task: SlideTask, items: Sequence[SlideItem]) -> list[SlideRecord]:
    """Return the record of every slide, sorted by id.

    Raises:
        ConfigError, OccupiedOutputError: as `ScoredFolder.records_of`.
    """
    by_id = {item["id"]: item for item in items}
    there = {kind: task.run.files(kind) for kind in task.save.kinds()}

    def holds(record: SlideRecord) -> bool:
        return not must_score(task, by_id[record.id], _settled(record), there)

    return task.run.records_of(by_id.keys(), holds)


def _settled(record: SlideRecord) -> SlideRecord:
    """Return a record whose failure counts as final: this run has just met it."""
    return record if record.found is not None else replace(record, reason="settled")


def _prune(task: SlideTask, items: Mapping[str, SlideItem], good: set[str], own: frozenset[str]) -> None:
    """Delete files of slides that were removed or failed since, of kinds no longer wanted, and blocks of other keys.

    Files of ids that are not the run's `own` are somebody else's, and stay.
    """
    of_all = {kind: set(items) for kind in (RECORDS, TISSUE, SURVEYS, REGIONS)}
    wanted = {kind: good for kind in task.save.kinds()} | of_all
    for kind in task.run.KINDS:
        for slide_id in (task.run.files(kind).keys() & own) - wanted.get(kind, set()):
            storage.remove(task.run.file(kind, slide_id))
    for slide_id in own:  # of a slide that failed, too: the next run goes on from them
        kept = task.blocks(items[slide_id]) if slide_id in items and task.save.blocks else None
        for folder in task.run.block_folders(slide_id):
            if folder != kept:
                storage.remove(folder)
    storage.sweep(task.out)
