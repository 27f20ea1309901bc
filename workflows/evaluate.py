"""Score a run's masks against the truth: per image, per target, with intervals, figures and paired comparisons.

    python workflows/evaluate.py run=/data/stas/runs/scored truth.cohort=/data/stas/cohort/cohort.parquet \\
        truth.split=hold-out out=/data/stas/runs/evaluation
    python workflows/evaluate.py run=/data/stas/runs/slides truth.slides=/data/stas/outlines \\
        out=/data/stas/runs/evaluation

Writes <out>/report.md (start there), scores.parquet (one row per image), summary.parquet, comparisons.parquet,
failures.parquet (images of the truth without a score, and why), figures/*.png and, last, manifest.json. Where the run
has maps, these are scored too, cut at 0.5, and compared with the masks. With `against=` masks and maps are compared
with those of another run. Of a run of score_slides there is a row per slide, with targets per mm2 of tissue, and
froc.parquet: sensitivity against false targets per mm2; where only a region of interest was scored, only there. Run
again, it does nothing unless a setting or a file it reads has changed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from stas_core import config as configs
from stas_core import storage, tables
from stas_core.config import Config, Uri
from stas_core.data.annotations import AnnotationConfig, Description
from stas_core.errors import ConfigError
from stas_core.failures import Failure
from stas_core.scored_runs import MAPS, MASKS, ScoredRun
from stas_core.scores import evaluation
from stas_core.scores.bootstrap import BootstrapConfig
from stas_core.scores.evaluation import STAGE, Outcome, PairedFiles
from stas_core.scores.metrics import GreyLevelCounts
from stas_core.verdicts import VerdictConfig
from workflows import next_step
from workflows.cli import main
from workflows.cluster import describe, quieten_ray_data, ray_session
from workflows.conclusion import conclude_again
from workflows.evaluation.outputs import FIGURES, TABLES, Context, write_outputs
from workflows.evaluation.pairing import (
    KINDS_OF_TRUTH,
    Found,
    Scored,
    TruthConfig,
    find_truth,
    fingerprint,
    pair,
    pair_other,
    read_run,
    require_truth_of_kind,
)
from workflows.forecast import Forecast, doubled, nodes_at_hand, num_cpus, spread, try_out
from workflows.out_folder import (
    MANIFEST,
    OutFolder,
    Outputs,
    claim_for_stage,
    require_apart,
    require_claimable,
    require_out,
    require_uri,
)
from workflows.progress import Progress
from workflows.scoring.guarded_reader import MeasureLimits, reader
from workflows.tracking import TrackingConfig

if TYPE_CHECKING:
    from workflows.evaluation.slides import SlidePairs

OUTPUTS = Outputs(
    STAGE,
    (
        "report.md",
        *(f"{name}.parquet" for name in (*TABLES, "froc")),
        *(f"figures/{name}.png" for name in (*FIGURES, "froc")),
    ),
)


class EvaluateConfig(Config):
    """Settings of evaluate."""

    out: Uri | None = None
    """Folder of the outputs; path or URI."""
    run: Uri | None = None
    """Folder of the scored run, of score_images or score_slides: masks/ and perhaps maps/."""
    truth: TruthConfig = TruthConfig()
    against: Uri | None = None
    """Folder of a second run of score_images, compared with the first image by image."""
    bootstrap: BootstrapConfig = BootstrapConfig()
    max_missing_fraction: float = Field(0.0, ge=0, le=1)
    """Exit with status 1 when a larger share of the truth's images, or slides, has no score."""
    verdict: VerdictConfig = VerdictConfig()
    """Limits of the verdict that the stage ends with."""
    accept_warnings: bool = False
    """Exit with status 0 even where the verdict is `do not use`."""
    tracking: TrackingConfig = TrackingConfig()
    """Whether MLflow is told of the run."""


def run(config: EvaluateConfig, force: bool) -> int:
    """Evaluate the run; return the exit status."""
    config, out = _opened(config)
    if config.truth.slides is not None:
        from workflows.evaluation import slides

        pairs = slides.find_pairs(str(config.run), config.truth.slides)
        with claim_for_stage(out, OUTPUTS, force=force) as folder:
            return _evaluate_slides(config, folder, pairs)
    scored, found, other = _found(config)
    with claim_for_stage(out, OUTPUTS, force=force) as folder:
        return _evaluate(config, folder, found, scored, other)


def _opened(config: EvaluateConfig) -> tuple[EvaluateConfig, str]:
    """Return the settings with absolute paths, and `out`.

    Raises:
        ConfigError: a setting is wrong.
    """
    out = require_out(config.out, "/data/runs/evaluation")
    config = _with_absolute_paths(config)
    _refuse_inputs_as_out(config, out)
    return config, out


def _found(config: EvaluateConfig) -> tuple[Scored, Found, Scored | None]:
    scored = read_run("run", str(config.run))
    found = find_truth(config.truth, scored.image_uris.keys(), lambda uri: _describe(uri, config.truth.annotation))
    return scored, found, None if config.against is None else read_run("against", config.against)


def plan(config: EvaluateConfig, force: bool) -> list[Forecast]:
    """Say what the evaluation would take, from a few images that are scored here."""
    config, out = _opened(config)
    require_claimable(out, OUTPUTS, force=force)
    nodes = nodes_at_hand()
    layout = f"{describe(nodes)}, an image, or a slide, per CPU"
    if config.truth.slides is not None:
        from workflows.evaluation import slides

        pairs = slides.find_pairs(str(config.run), config.truth.slides)
        work = f"{pairs.num_truth} slides of the truth, {len(pairs.items)} of them in the run"
        return [Forecast(STAGE, out, work, layout, basis="slides differ too much in size: none was tried")]
    scored, found, other = _found(config)
    items, missing = pair(found[0], scored)
    if other is not None:
        items, _ = pair_other(items, found[0], other)
    tried = try_out(lambda item, _: evaluation.score_files(item, config.truth.annotation), spread(items, 4))
    work = f"{len(found[0])} images of the truth, {len(items)} of them in the run, {len(missing)} missing"
    seconds = tried.seconds * len(items) / num_cpus(nodes)
    return [Forecast(STAGE, out, work, layout, seconds=seconds, basis=tried.basis("images"), faster=doubled(nodes))]


def _describe(uri: str, config: AnnotationConfig) -> Description:
    return reader().describe(uri, None, config=config, limits=MeasureLimits())


def _refuse_inputs_as_out(config: EvaluateConfig, out: str) -> None:
    truth = config.truth
    read = {"run": config.run, "against": config.against, "truth.cohort": truth.cohort}
    listed = {name: uri for name in ("masks", "annotations", "slides") if (uri := getattr(truth, name)) is not None}
    listed = {f"truth.{name}": uri for name, uri in listed.items()}
    for key, run_uri in (("run", config.run), ("against", config.against)):
        if run_uri is not None:
            listed |= {f"{key}/{folder}": ScoredRun(run_uri).path(folder) for folder in (MASKS, MAPS)}
    require_apart(out, read | listed, listed=listed)


def _evaluate(config: EvaluateConfig, folder: OutFolder, found: Found, scored: Scored, other: Scored | None) -> int:
    truths, refused, passed_over = found
    items, missing = pair(truths, scored)
    missing += refused
    not_compared: list[Failure] = []
    if other is not None:
        items, not_compared = pair_other(items, truths, other)

    def work(out: str) -> dict[str, Any]:
        print(f"{len(truths)} images of the truth, {len(items)} of them in the run, {len(missing)} missing")
        outcomes, levels = _score(items, config.truth.annotation)
        folder.verify()
        context = Context(
            run=str(config.run),
            against=config.against,
            truth=config.truth,
            bootstrap=config.bootstrap,
            truths=truths,
            scored=scored,
            missing=missing,
            not_compared=not_compared,
            levels=levels,
            limits=config.verdict,
        )
        return write_outputs(out, outcomes, context) | {"passed_over": passed_over}

    inputs = fingerprint(truths, items, [*missing, *not_compared])
    return _work(config, folder, inputs, work, num_truth=len(truths) + len(refused))


def _evaluate_slides(config: EvaluateConfig, folder: OutFolder, pairs: "SlidePairs") -> int:
    from workflows.evaluation import slides

    def work(out: str) -> dict[str, Any]:
        print(f"{pairs.num_truth} slides of the truth, {len(pairs.items)} of them in the run")
        outcomes = slides.score(pairs.items)
        folder.verify()
        facts = slides.write_outputs(out, outcomes, pairs, config.bootstrap, config.verdict)
        return facts | {"passed_over": pairs.passed_over}

    return _work(config, folder, pairs.fingerprint(), work, num_truth=pairs.num_truth)


def _work(
    config: EvaluateConfig,
    folder: OutFolder,
    inputs: str,
    work: Callable[[str], dict[str, Any]],
    *,
    num_truth: int,
) -> int:
    """Do the work unless the folder holds its results; return the exit status."""
    out, start = folder.uri, time.monotonic()
    # Where the results go and how many may fail does not change them; changed files at the same paths do.
    identity = config.model_copy(update={"out": None, "max_missing_fraction": 0.0, "accept_warnings": False})
    if folder.is_finished(identity, inputs):
        print(f"nothing to do: {out} is up to date ({num_truth} of the truth)")
        num_missing = storage.read_record(storage.join(out, MANIFEST), "num_missing")["num_missing"]
        worthless = conclude_again(out, accept_warnings=config.accept_warnings)
        return worthless or _status(config, num_missing, num_truth)
    folder.discard()  # it describes other settings or inputs
    resolved = configs.dump(config.model_copy(update={"out": out}))
    storage.write_bytes(storage.join(out, "config.resolved.yaml"), resolved.encode())
    facts = work(out)
    then = next_step.after_evaluation(str(config.run), of_slides=config.truth.slides is not None)
    facts |= {"seconds": round(time.monotonic() - start, 1), **next_step.recorded(then)}
    folder.write_manifest(identity, inputs, facts)
    print(f"look at {out}/report.md and {out}/figures; rows in scores.parquet, summary.parquet")
    worthless = conclude_again(out, accept_warnings=config.accept_warnings)
    return worthless or _status(config, facts["num_missing"], num_truth)


def _status(config: EvaluateConfig, num_missing: int, num_truth: int) -> int:
    return int(num_missing > config.max_missing_fraction * num_truth)


def _with_absolute_paths(config: EvaluateConfig) -> EvaluateConfig:
    """Return the config with every path safe to use on any node.

    Raises:
        ConfigError: a path is missing, not exactly one kind of truth is given, or it is not that of the run's kind.
    """
    truth = config.truth
    given = {name: value for name in KINDS_OF_TRUTH if (value := getattr(truth, name)) is not None}
    if len(given) != 1:
        stated = ", ".join(f"truth.{name} = {value}" for name, value in given.items()) or "none of them is set"
        kinds = ", ".join(f"truth.{name}" for name in KINDS_OF_TRUTH)
        raise ConfigError(f"give one of {kinds}; now: {stated}")
    if truth.cohort is None:
        for key, value, default in (
            ("truth.split", truth.split, "all"),
            ("truth.folds", truth.folds, None),
            ("bootstrap.by", config.bootstrap.by, "image"),
        ):
            if value != default:
                raise ConfigError(f"{key} = {value} needs truth.cohort, whose images have splits, folds and groups")
    paths = {name: require_uri(f"truth.{name}", value, f"/data/{name}") for name, value in given.items()}
    update: dict[str, Any] = {
        "run": require_uri("run", config.run, "/data/runs/scored"),
        "truth": truth.model_copy(update=paths),
    }
    if config.against is not None:
        update["against"] = require_uri("against", config.against, "/data/runs/other")
    config = config.model_copy(update=update)
    require_truth_of_kind(str(config.run), config.truth, config.against)
    return config


def _score(items: Sequence[PairedFiles], config: AnnotationConfig) -> tuple[list[Outcome], GreyLevelCounts]:
    """Score all items; return the outcomes sorted by id, and the grey-level counts of all maps together."""
    outcomes, levels = [], np.zeros((256, 2), np.int64)
    progress = Progress(len(items))
    for outcome in stream(items, config):
        if outcome.levels is not None:
            levels += np.reshape(outcome.levels, levels.shape)
        outcomes.append(replace(outcome, levels=None))
        progress.step()
    return sorted(outcomes, key=lambda outcome: outcome.id), levels


def stream(items: Sequence[PairedFiles], config: AnnotationConfig) -> Iterator[Outcome]:
    """Yield the outcomes of items as Ray Data finishes them."""
    import ray.data

    def evaluate_batch(batch: pa.Table) -> pa.Table:
        import cv2

        cv2.setNumThreads(0)
        files = tables.from_table(PairedFiles, batch)
        return tables.to_table(Outcome, [evaluation.score_files(one, config) for one in files])

    if not items:
        return
    with ray_session():
        quieten_ray_data()
        found = ray.data.from_items([asdict(item) for item in items], override_num_blocks=max(1, len(items) // 8))
        step: Any = evaluate_batch  # Ray declares a batch as any of its formats
        for row in found.map_batches(step, batch_size=8, batch_format="pyarrow").iter_rows():
            yield tables.from_values(Outcome, row)


if __name__ == "__main__":
    main(STAGE, EvaluateConfig, run, __doc__ or "", plan=plan)
