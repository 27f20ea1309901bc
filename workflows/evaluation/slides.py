"""A run of score_slides against the truth: which files belong together, a task per slide, and what is written."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from stas_core import failures, storage, tables, verdicts
from stas_core.data import listing
from stas_core.data.annotations import AnnotationConfig
from stas_core.errors import ConfigError
from stas_core.failures import Failure
from stas_core.scored_runs import MAPS, MASKS
from stas_core.scores import detection
from stas_core.scores.bootstrap import BootstrapConfig
from stas_core.scores.detection import TOTAL, Case, DetectionScore
from stas_core.scores.evaluation import STAGE
from stas_core.slides import evaluated, evaluation_report
from stas_core.slides.evaluated import EvaluatedSlide, FrocRow, SlideFiles, SlideOutcome, SlideSummary
from stas_core.slides.run import REGIONS, SURVEYS, SlideRun
from stas_core.slides.slide_truth import SUFFIXES
from stas_core.verdicts import Verdict, VerdictConfig
from workflows.cluster import quieten_ray_data, ray_session
from workflows.conclusion import recorded
from workflows.evaluation.pairing import NOT_SCORED
from workflows.progress import Progress, doing
from workflows.waiting import Need, streamed

READ_AS = "classes of outlines count, no empty geometry is dropped"
"""Changes where the same files are read as another truth: evaluations of before are made anew."""
NO_TRUTH = "no_truth"
"""Reason code of a slide that was scored and that the truth has no file for."""


@dataclass(frozen=True)
class _ScoredSlide:
    """What is read of a row of `slides.parquet`."""

    id: str
    tissue_mm2: float


@dataclass(frozen=True)
class SlidePairs:
    """The slides of a run and of the truth."""

    run: str
    truth: str
    items: list[SlideFiles]
    """That have both, sorted by id."""
    missing: list[Failure]
    """Slides of the truth that have no score."""
    without_truth: list[Failure]
    passed_over: dict[str, int]
    """How many files of each other suffix the truth's folder has."""

    @property
    def num_truth(self) -> int:
        """Return how many slides the truth has."""
        return len(self.items) + len(self.missing)

    def fingerprint(self) -> str:
        """Return a digest of everything that an evaluation reads."""
        run = SlideRun(self.run)
        regions = run.files(REGIONS)
        files = [[one.truth_uri, one.mask_uri, one.map_uri, run.file(SURVEYS, one.id)] for one in self.items]
        read = [uri for group in files for uri in group if uri]
        read += [regions[one.id] for one in self.items if one.id in regions]
        return storage.fingerprint(
            READ_AS,
            *(f"{uri} {mark}" for uri, mark in zip(read, storage.stamps(read), strict=True)),
            *(f"{one.id} {one.tissue_mm2!r}" for one in self.items),
            *(f"{one.id} {one.stage} {one.reason} {one.message}" for one in (*self.missing, *self.without_truth)),
        )


def find_pairs(run_uri: str, truth_uri: str) -> SlidePairs:
    """Find the files of each slide of the run and of the truth.

    Raises:
        ConfigError: there is no run, no truth, or a single file for several slides.
    """
    run = SlideRun.open("run", run_uri)
    tissue = {row.id: row.tissue_mm2 for row in tables.read_rows(run.path(run.TABLE), _ScoredSlide)}
    failed = {failure.id: failure for failure in run.failures()}
    found = _find_truth(truth_uri, sorted({*tissue, *failed}))
    masks, maps = run.files(MASKS), run.files(MAPS)
    items, missing = [], [Failure.of(slide_id, STAGE, error) for slide_id, error in found.refused]
    for slide_id, uri in found.uris.items():
        if slide_id in masks and slide_id in tissue:
            map_uri = run.file(MAPS, slide_id) if slide_id in maps else ""
            mask_uri = run.file(MASKS, slide_id)
            items.append(SlideFiles(slide_id, run_uri, tissue[slide_id], uri, mask_uri, map_uri))
        elif slide_id in failed:
            missing.append(failed[slide_id])
        elif slide_id in tissue:
            message = f"the run lists {slide_id} but has no masks/{slide_id}.tif; score it with save.masks=true"
            missing.append(Failure(slide_id, STAGE, NOT_SCORED, message))
        else:
            missing.append(Failure(slide_id, STAGE, NOT_SCORED, f"the run has no slide {slide_id}; score it, too"))
    known = {*found.uris, *(slide_id for slide_id, _ in found.refused)}
    alone = [
        Failure(slide_id, STAGE, NO_TRUTH, f"truth.slides = {truth_uri} has no {slide_id}{SUFFIXES[0]}; outline it")
        for slide_id in sorted(tissue.keys() - known)
    ]
    return SlidePairs(run_uri, truth_uri, items, missing, alone, found.passed_over)


def _find_truth(uri: str, ids: Sequence[str]) -> listing.Listing:
    if uri.lower().endswith(SUFFIXES):
        name = storage.stem_of(uri)
        if name not in ids and len(ids) != 1:
            raise ConfigError(
                f"truth.slides = {uri} is one file, and the run has {len(ids)} slides; give a folder of files named "
                f"by their ids, such as {', '.join(ids[:2]) or 'none'}"
            )
        return listing.Listing({name if name in ids else ids[0]: uri}, [], {})
    found = listing.find(uri, SUFFIXES).with_ids_of(ids)
    if note := found.describe("truth.slides"):
        print(note)
    if not found.uris and not found.refused:
        raise ConfigError(
            f"truth.slides = {uri} holds no {', '.join(SUFFIXES)} files; give the folder of files named by the slides' "
            f"ids, such as {ids[0] if ids else '<id>'}.geojson"
        )
    return found


def score(items: Sequence[SlideFiles], annotation: AnnotationConfig) -> list[SlideOutcome]:
    """Score all slides, their outlines read as `annotation` says; return the outcomes sorted by id."""
    outcomes = []
    progress = Progress(len(items), "slides")
    for outcome in stream(items, annotation):
        outcomes.append(outcome)
        progress.step()
    return sorted(outcomes, key=lambda outcome: outcome.id)


def stream(items: Sequence[SlideFiles], annotation: AnnotationConfig) -> Iterator[SlideOutcome]:
    """Yield the outcomes of slides as Ray Data finishes them; each is a task of one CPU."""
    import ray.data

    def evaluate_batch(batch: pa.Table) -> pa.Table:
        import cv2

        cv2.setNumThreads(0)
        outcomes = [evaluated.evaluate_files(one, annotation) for one in tables.from_table(SlideFiles, batch)]
        return tables.to_table(SlideOutcome, outcomes)

    if not items:
        return
    with ray_session():
        quieten_ray_data()
        found = ray.data.from_items([asdict(item) for item in items], override_num_blocks=len(items))
        step: Any = evaluate_batch  # Ray declares a batch as any of its formats
        scored = found.map_batches(step, batch_size=1, batch_format="pyarrow")
        for row in streamed(scored, Need("the scoring of a slide").look):
            yield tables.from_values(SlideOutcome, row)


@doing("resampling for the intervals, drawing the figures, writing the tables")
def write_outputs(
    out: str, outcomes: Sequence[SlideOutcome], pairs: SlidePairs, config: BootstrapConfig, limits: VerdictConfig
) -> dict[str, Any]:
    """Write tables, report and figure; return the facts for the manifest.

    Raises:
        ConfigError: no slide of the truth has a score.
    """
    from stas_core.figures import scores

    missing = [*pairs.missing, *(one.failure for one in outcomes if one.failure is not None)]
    missing.sort(key=lambda failure: failure.id)
    for kind, failed in (("missing", missing), ("without truth", pairs.without_truth)):
        for line in failures.lines(failed, kind):
            print(line)
    tables.write_rows(storage.join(out, "failures.parquet"), Failure, [*missing, *pairs.without_truth])
    good = [one for one in outcomes if one.score is not None]
    rows = [one.score for one in good if one.score is not None]
    if not rows:
        raise ConfigError(
            f"none of the {pairs.num_truth} slides of the truth has a score in run = {pairs.run}; see "
            f"{out}/failures.parquet, and check that truth and run name the same slides"
        )
    curves, pooled = {one.id: one.froc() for one in good}, evaluated.pooled_froc(good)
    summary = evaluated.summarise_slides(good, config)
    for name, text in _main_scores(summary).items():
        print(f"{name}: {text}")
    cases = _cases(rows)
    found = detection.score_detection(cases, config, level="slide")
    tables.write_rows(storage.join(out, "detection.parquet"), DetectionScore, found)
    points = [row for name, curve in curves.items() for row in evaluated.froc_rows(name, curve)]
    tables.write_rows(storage.join(out, "scores.parquet"), EvaluatedSlide, rows)
    tables.write_rows(storage.join(out, "summary.parquet"), SlideSummary, summary)
    tables.write_rows(storage.join(out, "froc.parquet"), FrocRow, [*points, *evaluated.froc_rows(None, pooled)])
    storage.write_bytes(storage.join(out, "figures", "froc.png"), scores.froc(curves, pooled, evaluated.FALSE_PER_MM2))
    verdict = _judge(rows, len(missing), limits)
    parts = [
        _heading(out, summary, rows, pairs, verdict),
        evaluation_report.failures_markdown(missing, pairs.without_truth),
        evaluation_report.summary_markdown(summary, config),
        detection.detection_markdown(found, detection.negatives_of(cases), config, what="slides", without=None),
        "![froc](figures/froc.png)",
        evaluation_report.slides_markdown(rows),
    ]
    storage.write_bytes(storage.join(out, "report.md"), ("\n\n".join(filter(None, parts)) + "\n").encode())
    counts = {"num_truth": pairs.num_truth, "num_scored": len(rows), "num_missing": len(missing)}
    return counts | {"num_without_truth": len(pairs.without_truth), **recorded(verdict, limits)}


def _cases(rows: Sequence[EvaluatedSlide]) -> list[Case]:
    """Return each slide as found or not, ranked by the area of its targets."""
    return [
        Case(
            row.id,
            row.target_px > 0,
            row.tp + row.fp > 0,
            {TOTAL: float(row.tp + row.fp)},
            row.fp / (row.frame_height * row.frame_width),
        )
        for row in rows
    ]


def _judge(rows: Sequence[EvaluatedSlide], num_missing: int, limits: VerdictConfig) -> Verdict:
    sizes = [row.frame_height * row.frame_width for row in rows]
    shares = {
        "truth": [row.target_px / size for row, size in zip(rows, sizes, strict=True)],
        "found": [(row.tp + row.fp) / size for row, size in zip(rows, sizes, strict=True)],
    }
    return verdicts.of_evaluation([row.dice for row in rows], shares, num_missing, limits)


def _main_scores(summary: Sequence[SlideSummary]) -> dict[str, str]:
    """Return what is told first."""
    of = {row.score: row for row in summary}
    told = {"dice": "Mean Dice per slide", "target_f1": "Mean target F1 per slide"}
    told["sensitivity_at_2"] = "Mean sensitivity at 2 false targets per mm²"
    return {
        words: f"{of[name].mean:.4f}; of all slides together {of[name].pooled:.4f}"
        for name, words in told.items()
        if of[name].mean is not None
    }


def _heading(
    out: str, summary: Sequence[SlideSummary], rows: Sequence[EvaluatedSlide], pairs: SlidePairs, verdict: Verdict
) -> str:
    facts = {
        "Run": pairs.run,
        "Truth": pairs.truth,
        "Slides of the truth": f"{pairs.num_truth}; scored {len(rows)}; **without a score "
        f"{pairs.num_truth - len(rows)}**",
        "Scored slides without truth": f"{len(pairs.without_truth)}",
        "Tissue": f"{sum(row.tissue_mm2 for row in rows):.4g} mm²",
    }
    facts |= _main_scores(summary)
    if any(not row.has_map for row in rows):
        facts["Slides without a map"] = (
            f"{sum(not row.has_map for row in rows)}: their targets count as found at every threshold"
        )
    if restricted := [row for row in rows if row.has_region]:
        num_outside, num_cut = (sum(getattr(row, name) for row in restricted) for name in ("num_outside", "num_cut"))
        facts["Slides with a region of interest"] = (
            f"{len(restricted)}; {num_outside} true target(s) outside of it left out, neither found nor missed; "
            f"{num_cut} that its edge cuts, of which the part inside counts"
        )
    notes = [
        "Scores of slides that the models were trained on are better than on new ones; the run does not say which "
        "these are."
    ]
    command = shlex.join(["python", "workflows/evaluate.py", "--config", f"{out}/config.resolved.yaml"])
    lines = [f"- {name}: {text}" for name, text in facts.items()]
    return "\n".join(
        ["# Evaluation of slides", "", verdict.markdown(), "", *lines, "", *notes, "", "Command:", "", f"    {command}"]
    )
