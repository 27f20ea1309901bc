"""Score a run's masks against the truth: per image, per target, with intervals, figures and paired comparisons.

    python workflows/evaluate.py run=/data/stas/runs/scored truth.cohort=/data/stas/cohort/cohort.parquet \\
        truth.split=hold-out out=/data/stas/runs/evaluation
    python workflows/evaluate.py run=/data/stas/runs/slides truth.slides=/data/stas/outlines \\
        out=/data/stas/runs/evaluation

Writes <out>/report.md (start there), scores.parquet (one row per image), summary.parquet, comparisons.parquet,
failures.parquet (images of the truth without a score, and why), figures/*.png and, last, manifest.json. Where the run
has maps, these are scored too, cut at 0.5, and compared with the masks. With `against=` masks and maps are compared
with those of another run. Of a run of score_slides there is a row per slide, with targets per mm2 of tissue, and
froc.parquet: sensitivity against false targets per mm2; where only a region of interest was scored, only there; and
layers/<id>.*.png: truth, missed and false targets, as small as the page shows them. Run again, it does nothing unless a
setting or a file it reads has changed.
"""

import sys

if __name__ == "__main__" and not (__package__ or getattr(sys.flags, "safe_path", False)):  # a script
    import environment  # noqa: F401 - ends where this Python lacks what follows

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from stas_core import config as configs
from stas_core import storage, tables
from stas_core.config import Config, Uri
from stas_core.data.annotations import AnnotationConfig, Description
from stas_core.errors import ConfigError
from stas_core.scored_runs import MAPS, MASKS, ScoredRun
from stas_core.scores import evaluation
from stas_core.scores.bootstrap import BootstrapConfig
from stas_core.scores.evaluation import STAGE, Outcome, PairedFiles
from stas_core.scores.metrics import GreyLevelCounts
from stas_core.slides.layers import COMPARED, compared_uri
from stas_core.verdicts import VerdictConfig
from workflows import next_step, tracking
from workflows.cli import main
from workflows.cluster import quieten_ray_data, ray_session
from workflows.conclusion import conclude_again
from workflows.evaluation.outputs import FIGURES, TABLES, Context, write_outputs
from workflows.evaluation.pairing import (
    KINDS_OF_TRUTH,
    ImagePairs,
    TruthConfig,
    find_pairs,
    require_truth_of_kind,
)
from workflows.forecast import Failing, Forecast, begin
from workflows.out_folder import (
    MANIFEST,
    OutFolder,
    Outputs,
    claim_for_stage,
    require_apart,
    require_out,
    require_uri,
)
from workflows.progress import Progress
from workflows.scoring.guarded_reader import MeasureLimits, reader
from workflows.tracking import TrackingConfig
from workflows.waiting import Need, streamed

if TYPE_CHECKING:
    from workflows.evaluation.slides import SlidePairs

OUTPUTS = Outputs(
    STAGE,
    (
        "report.md",
        *(f"{name}.parquet" for name in (*TABLES, "froc")),
        *(f"figures/{name}.png" for name in (*FIGURES, "froc")),
        *(compared_uri("", "{id}", kind) for kind in COMPARED),
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


@dataclass(frozen=True)
class Opened:
    """An evaluation that could begin."""

    config: EvaluateConfig
    """With absolute paths."""
    out: str
    pairs: "ImagePairs | SlidePairs"
    work: tuple[EvaluateConfig, str]
    """What makes it the same evaluation: settings and fingerprint of the inputs."""


def run(config: EvaluateConfig, force: bool) -> int:
    """Evaluate the run; return the exit status."""
    opened = _opened(config)
    with claim_for_stage(opened.out, OUTPUTS, force=force) as folder:
        num_missing = _evaluate(opened, folder)
    worthless = conclude_again(opened.out, accept_warnings=config.accept_warnings)
    return worthless or int(num_missing > config.max_missing_fraction * opened.pairs.num_truth)


def _opened(config: EvaluateConfig) -> Opened:
    """Pair the run with the truth, before anything is written.

    Raises:
        ConfigError: a setting is wrong, or there is no run or no truth.
    """
    out = require_out(config.out, "/data/runs/evaluation")
    config = _with_absolute_paths(config)
    _refuse_inputs_as_out(config, out)
    truth, run_uri = config.truth, str(config.run)
    pairs: ImagePairs | SlidePairs
    if truth.slides is not None:
        from workflows.evaluation import slides

        pairs = slides.find_pairs(run_uri, truth.slides)
    else:
        pairs = find_pairs(run_uri, truth, config.against, lambda uri: _describe(uri, truth.annotation))
    # Where the results go and how many may fail does not change them; changed files at the same paths do.
    identity = config.model_copy(update={"out": None, "max_missing_fraction": 0.0, "accept_warnings": False})
    return Opened(config, out, pairs, (identity, pairs.fingerprint()))


def _in_words(pairs: "ImagePairs | SlidePairs") -> str:
    kind = "images" if isinstance(pairs, ImagePairs) else "slides"
    return f"{pairs.num_truth} {kind} of the truth, {len(pairs.items)} of them in the run, {len(pairs.missing)} missing"


def plan(config: EvaluateConfig, force: bool) -> list[Forecast]:
    """Say what the evaluation would take, from a few images, or a slide, that are scored here."""
    from workflows.evaluation import estimate

    opened = _opened(config)
    base = begin(opened.out, OUTPUTS, opened.work, force=force, starts_over=True)
    pairs, annotation = opened.pairs, config.truth.annotation
    kind = "images" if isinstance(pairs, ImagePairs) else "slides"
    failing = Failing(
        pairs.missing,
        pairs.num_truth,
        config.max_missing_fraction,
        key="max_missing_fraction",
        refusal=f"none of the {pairs.num_truth} {kind} of the truth has a score in run = {opened.config.run}",
    )
    if base.is_nothing:
        return [replace(base, notes=failing.notes())]
    base = replace(base, work=_in_words(pairs))
    if isinstance(pairs, ImagePairs):
        return [estimate.of_images(base, pairs, annotation, failing)]
    return [estimate.of_slides(base, pairs, annotation, failing)]


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


def _evaluate(opened: Opened, folder: OutFolder) -> int:
    """Evaluate, unless the folder holds the results; return how many images or slides of the truth have no score."""
    out, start, pairs, config = opened.out, time.monotonic(), opened.pairs, opened.config
    if folder.is_finished(*opened.work):
        print(f"nothing to do: {out} is up to date ({pairs.num_truth} of the truth)")
        return int(storage.read_record(storage.join(out, MANIFEST), "num_missing")["num_missing"])
    folder.discard()  # it describes other settings or inputs
    resolved = configs.dump(config.model_copy(update={"out": out}))
    storage.write_bytes(storage.join(out, "config.resolved.yaml"), resolved.encode())
    tracking.begin()
    print(_in_words(pairs))
    if isinstance(pairs, ImagePairs):
        facts = _evaluate_images(config, folder, pairs)
    else:
        facts = _evaluate_slides(config, folder, pairs)
    facts["passed_over"] = pairs.passed_over
    then = next_step.after_evaluation(str(config.run), of_slides=config.truth.slides is not None)
    facts |= {"seconds": round(time.monotonic() - start, 1), **next_step.recorded(then)}
    folder.write_manifest(*opened.work, facts)
    print(f"look at {out}/report.md and {out}/figures; rows in scores.parquet, summary.parquet")
    return int(facts["num_missing"])


def _evaluate_images(config: EvaluateConfig, folder: OutFolder, pairs: ImagePairs) -> dict[str, Any]:
    outcomes, levels = _score(pairs.items, config.truth.annotation)
    folder.verify()
    context = Context(
        run=str(config.run),
        against=config.against,
        truth=config.truth,
        bootstrap=config.bootstrap,
        pairs=pairs,
        levels=levels,
        limits=config.verdict,
    )
    return write_outputs(folder.uri, outcomes, context)


def _evaluate_slides(config: EvaluateConfig, folder: OutFolder, pairs: "SlidePairs") -> dict[str, Any]:
    from workflows.evaluation import slides

    folder.name_ids(item.id for item in pairs.items)
    items = [replace(item, layers_uri=folder.uri) for item in pairs.items]
    outcomes = slides.score(items, config.truth.annotation)
    folder.verify()
    return slides.write_outputs(folder.uri, outcomes, pairs, config.bootstrap, config.verdict)


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
        scored = found.map_batches(step, batch_size=8, batch_format="pyarrow")
        for row in streamed(scored, Need("the scoring of images").look):
            yield tables.from_values(Outcome, row)


if __name__ == "__main__":
    main(STAGE, EvaluateConfig, run, __doc__ or "", plan=plan)
