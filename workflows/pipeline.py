"""Run the stages in order; each is skipped when its outputs are up to date.

    python workflows/pipeline.py --config configs/demo.yaml out=runs/demo

Writes <out>/cohort (see prepare_data), <out>/folds (train_folds), <out>/thresholds (tune_postprocess, where
`tune.space` names keys to search), <out>/scores (score_images, of the hold-out images, with the thresholds recommended)
and <out>/evaluation (evaluate). Without a hold-out the last two are left out.
"""

from typing import Any

from stas_core import cohort as cohorts
from stas_core import config as configs
from stas_core import storage
from stas_core.cohort import HOLD_OUT
from stas_core.config import Config
from stas_core.postprocess import PostprocessConfig
from workflows import evaluate, prepare_data, score_images, train_folds, tune_postprocess
from workflows.cli import main
from workflows.evaluate import EvaluateConfig, TruthConfig
from workflows.prepare_data import PrepareConfig
from workflows.runtime import ray_session, require_uri
from workflows.score_images import EnsembleConfig, ImagesConfig, ScoreConfig
from workflows.train_folds import TrainFoldsConfig
from workflows.tune_postprocess import TunePostprocessConfig


class PipelineConfig(Config):
    """Settings of all stages; what links them (`out`, the cohort, the ensemble...) is derived from `out`."""

    out: str | None = None
    """Folder of all outputs; path or URI."""
    prepare: PrepareConfig = PrepareConfig()
    train: TrainFoldsConfig = TrainFoldsConfig()
    tune: TunePostprocessConfig = TunePostprocessConfig()
    score: ScoreConfig = ScoreConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def run(config: PipelineConfig, force: bool) -> int:
    """Run the stages; stop at the first that fails, with its exit status."""
    out = require_uri("out", config.out, "/data/runs/demo")
    cohort, folds, scores = (storage.join(out, name) for name in ("cohort", "folds", "scores"))
    table = storage.join(cohort, "cohort.parquet")
    with ray_session():
        print("== prepare_data")
        status = prepare_data.run(config.prepare.model_copy(update={"out": cohort}), force)
        if status:
            return status
        print("== train_folds")
        data = config.train.data.model_copy(update={"cohort": table})
        status = train_folds.run(config.train.model_copy(update={"out": folds, "data": data}), force)
        thresholds = config.score.postprocess
        if status == 0 and config.tune.space:
            print("== tune_postprocess")
            tuned = storage.join(out, "thresholds")
            links: dict[str, Any] = {"out": tuned, "run": folds, "cohort": table, "default": thresholds}
            status = tune_postprocess.run(config.tune.model_copy(update=links), force)
            recommended = storage.join(tuned, "postprocess.tuned.yaml")
            text = storage.read_bytes(recommended).decode()
            thresholds = configs.build(PostprocessConfig, configs.parse_yaml(text, recommended))
        if status or not any(row.split == HOLD_OUT for row in cohorts.read_cohort(table)):
            return status
        print("== score_images")
        links = {
            "out": scores,
            "data": ImagesConfig(images=table, split=HOLD_OUT),
            "ensemble": EnsembleConfig(uri=storage.join(folds, "ensemble.json")),
            "postprocess": thresholds,
        }
        status = score_images.run(config.score.model_copy(update=links), force)
        if status:
            return status
        print("== evaluate")
        truth = TruthConfig(cohort=table, split=HOLD_OUT)
        links = {"out": storage.join(out, "evaluation"), "run": scores, "truth": truth}
        return evaluate.run(config.evaluate.model_copy(update=links), force)


if __name__ == "__main__":
    main("pipeline", PipelineConfig, run, __doc__ or "")
