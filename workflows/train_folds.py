"""Train cross-validation folds as parallel Ray Train jobs, with out-of-fold probability maps.

    python workflows/train_folds.py --config configs/stas_cpu.yaml data.cohort=/data/cohort/cohort.parquet out=/runs/a

    ray job submit --working-dir . -- python workflows/train_folds.py \\
        data.cohort=s3://my-bucket/cohort/cohort.parquet out=s3://my-bucket/run

Writes per fold <out>/fold_<k>/: checkpoints/ (best and last), oof/<id>.png and oof.parquet, metrics.parquet,
tensorboard/, fold.json; and for the run: ensemble.json, folds.parquet, figures/, and, last, manifest.json. Run again
with the same settings, it resumes unfinished folds and skips finished ones.
"""

from workflows.cli import main
from workflows.conclusion import conclude_again
from workflows.folds.training import TrainFoldsConfig, train
from workflows.out_folder import require_out


def run(config: TrainFoldsConfig, force: bool) -> int:
    """Train the folds; return the exit status."""
    if train(config, force):
        return 1
    return conclude_again(require_out(config.out, "/data/runs/a"), accept_warnings=config.accept_warnings)


if __name__ == "__main__":
    main("train_folds", TrainFoldsConfig, run, __doc__ or "")
