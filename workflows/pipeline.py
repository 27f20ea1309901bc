"""Run the stages in order; each is skipped when its outputs are up to date.

    python workflows/pipeline.py --config configs/demo.yaml out=runs/demo

Writes <out>/cohort (see prepare_data) and <out>/folds (see train_folds).
"""

from stas_core import storage
from stas_core.config import Config
from workflows import prepare_data, train_folds
from workflows.cli import main
from workflows.prepare_data import PrepareConfig
from workflows.runtime import ray_session, require_uri
from workflows.train_folds import TrainFoldsConfig


class PipelineConfig(Config):
    """Settings of all stages; `out` and `data.cohort` of each are derived from the pipeline's `out`."""

    out: str | None = None
    """Folder of all outputs; path or URI."""
    prepare: PrepareConfig = PrepareConfig()
    train: TrainFoldsConfig = TrainFoldsConfig()


def run(config: PipelineConfig, force: bool) -> int:
    """Run the stages; stop at the first that fails, with its exit status."""
    out = require_uri("out", config.out, "/data/runs/demo")
    cohort, folds = storage.join(out, "cohort"), storage.join(out, "folds")
    data = config.train.data.model_copy(update={"cohort": storage.join(cohort, "cohort.parquet")})
    with ray_session():
        print("== prepare_data")
        status = prepare_data.run(config.prepare.model_copy(update={"out": cohort}), force)
        if status:
            return status
        print("== train_folds")
        return train_folds.run(config.train.model_copy(update={"out": folds, "data": data}), force)


if __name__ == "__main__":
    main("pipeline", PipelineConfig, run, __doc__ or "")
