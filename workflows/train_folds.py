"""Train cross-validation folds as parallel Ray Train jobs, with out-of-fold probability maps.

    python workflows/train_folds.py --config configs/stas_cpu.yaml data.cohort=/data/cohort/cohort.parquet out=/runs/a

    ray job submit --working-dir . -- python workflows/train_folds.py \\
        data.cohort=s3://my-bucket/cohort/cohort.parquet out=s3://my-bucket/run

Writes per fold <out>/fold_<k>/: checkpoints/ (best and last), oof/<id>.png and oof.parquet, metrics.parquet,
tensorboard/, fold.json; and for the run: ensemble.json, folds.parquet, figures/; review.parquet, review_targets.parquet
and review/, the annotations that most deserve a second look; and, last, manifest.json. Run again with the same
settings, it resumes unfinished folds and skips finished ones.
"""

import sys

if __name__ == "__main__" and not (__package__ or getattr(sys.flags, "safe_path", False)):  # a script
    import environment  # noqa: F401 - ends where this Python lacks what follows

from dataclasses import replace

from stas_core.runs import TrainingRun
from workflows.cli import main
from workflows.cluster import plan_groups
from workflows.conclusion import conclude_again
from workflows.folds import training
from workflows.folds.estimate import of_folds
from workflows.folds.training import TrainFoldsConfig, train
from workflows.forecast import Forecast, begin, bytes_in, nodes_at_hand
from workflows.out_folder import require_out


def run(config: TrainFoldsConfig, force: bool) -> int:
    """Train the folds; return the exit status."""
    if train(config, force):
        return 1
    return conclude_again(require_out(config.out, "/data/runs/a"), accept_warnings=config.accept_warnings)


def plan(config: TrainFoldsConfig, force: bool) -> list[Forecast]:
    """Say what training the folds would take, from a few steps that are tried here."""
    opened = training.open_training(config)
    out, folds, run = opened.out, opened.folds, TrainingRun(opened.out)
    base = begin(out, training.OUTPUTS, opened.work, force=force, is_for_one=True)
    laid = plan_groups(nodes_at_hand(), training.demand(config.resources, len(folds)))
    todo = [fold for fold in folds if force or not run.fold(fold).is_done]
    if not force:  # what a fold that goes on has written by now is some of what it leaves
        base = base.in_place_of(bytes_in(run.fold(fold).uri for fold in todo))
    forecast = of_folds(base, opened.config.recipe, opened.rows, todo, laid)
    notes = () if opened.start is None else opened.start.notes
    return [replace(forecast, notes=(*forecast.notes, *notes))]


if __name__ == "__main__":
    main("train_folds", TrainFoldsConfig, run, __doc__ or "", plan=plan)
