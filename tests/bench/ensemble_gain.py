"""What an ensemble gains on its single members, on images that none of them saw: Dice at 0.5 with paired intervals.

    python -m tests.bench.ensemble_gain --cohort COHORT.parquet --runs RUN [RUN ...] [--save TABLE.parquet]

The hold-out of the cohort is predicted by every member, with all four flips and with one; ensembles are the means of
their members' maps, as `Predictor` makes them. Each run's own gain is one draw: training anew with another seed, or on
another processor, gives other members. With several runs of the same folds, every ensemble with a member of each fold
is scored as well. How far their gains lie apart is what these members allow; it is not the spread between runs, for the
ensembles share their members.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from rich.progress import track

from stas_core import places, process, tables
from stas_core.arrays import Mask
from stas_core.data.cohort import CohortRow, read_cohort
from stas_core.data.fields import load_image, load_mask
from stas_core.networks import checkpoints
from stas_core.predict import ensemble
from stas_core.predict.inference import ALL_FLIPS, Flip, InferenceConfig
from stas_core.predict.predictor import Predictor
from stas_core.scores import bootstrap, metrics

BAR = 0.02
KINDS: dict[str, tuple[Flip, ...]] = {"TTA": ALL_FLIPS, "no TTA": ("identity",)}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Ensemble = tuple[int, ...]
"""Of each fold, the number of the run whose member it takes."""


@dataclass(frozen=True)
class Scores:
    """Dice per image: of each run's members (image, run, fold), and of each ensemble (image, ensemble)."""

    single: np.ndarray
    joint: np.ndarray


def find_folds(runs: Sequence[str]) -> list[dict[int, str]]:
    """Return of each run its checkpoint folder by fold; runs of unequal folds cannot be mixed."""
    found = []
    for run in runs:
        by_fold: dict[int, str] = {}
        for folder in ensemble.find_checkpoints(run):
            fold = checkpoints.read_record(folder).fold
            if fold in by_fold:
                raise SystemExit(f"{run} has two members of fold {fold}, {by_fold[fold]} and {folder}; give one each")
            by_fold[fold] = folder
        found.append(dict(sorted(by_fold.items())))
        if list(found[-1]) != list(found[0]):
            raise SystemExit(
                f"{runs[0]} has folds {list(found[0])}, {run} has {list(found[-1])}; give runs of the same folds"
            )
    return found


def dice(probs: Sequence[torch.Tensor], truth: Mask) -> float:
    levels = (torch.stack(list(probs)).mean(dim=0) * 255).round().to(torch.uint8).cpu().numpy()
    return metrics.count(metrics.is_target(levels), truth).dice


def score(
    kind: str, rows: Sequence[CohortRow], found: Sequence[Mapping[int, str]], ensembles: Sequence[Ensemble]
) -> Scores:
    config = InferenceConfig(flips=KINDS[kind])
    by_run = [ensemble.load_members(list(run.values()), DEVICE) for run in found]
    predictors = [[Predictor([member], device=DEVICE, config=config) for member in run] for run in by_run]
    scores = Scores(np.zeros((len(rows), len(found), len(found[0]))), np.zeros((len(rows), len(ensembles))))
    for index, row in enumerate(track(rows, description=kind)):
        image, truth = load_image(row, 1.0), load_mask(row)
        probs = [[predictor.predict([image])[0].prob for predictor in run] for run in predictors]
        scores.single[index] = [[dice([prob], truth) for prob in run] for run in probs]
        for number, chosen in enumerate(ensembles):
            scores.joint[index, number] = dice([probs[run][fold] for fold, run in enumerate(chosen)], truth)
    return scores


def tell(name: str, first: np.ndarray, second: np.ndarray) -> None:
    gain, summary = bootstrap.compare(first, second), bootstrap.summarise(first)
    print(
        f"  {name}: gain {gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}): {summary.mean:.4f} "
        f"({summary.low:.3f} to {summary.high:.3f}) against {second.mean():.4f}, the mean of its members"
    )


def tell_all(scores: Scores, ensembles: Sequence[Ensemble]) -> None:
    folds = range(scores.single.shape[2])
    members = np.stack([scores.single[:, chosen, folds].mean(axis=1) for chosen in ensembles], axis=1)
    gains = (scores.joint - members).mean(axis=0)
    tell(f"all {len(ensembles)} ensembles of a member per fold, mean", scores.joint.mean(axis=1), members.mean(axis=1))
    print(
        f"  given these members, the ensembles' gains are {gains.min():+.4f} to {gains.max():+.4f}, sd "
        f"{gains.std(ddof=1):.4f}, {(gains >= BAR).mean():.0%} of them at least {BAR}; they share members, so this is "
        "not the spread between runs"
    )


def to_rows(kind: str, ids: Sequence[str], runs: Sequence[str], folds: Sequence[int], scores: Scores) -> pa.Table:
    """Return a row per image and run: Dice of the run's member of each fold, and of the run's own ensemble."""
    return pa.Table.from_pylist(
        [
            {"id": image_id, "run": run, "kind": kind}
            | {f"fold_{fold}": float(value) for fold, value in zip(folds, scores.single[index, number], strict=True)}
            | {"ensemble": float(scores.joint[index, number])}
            for index, image_id in enumerate(ids)
            for number, run in enumerate(runs)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", required=True, help="cohort.parquet with a hold-out")
    parser.add_argument("--runs", required=True, nargs="+", help="folders of train_folds, of the same folds")
    parser.add_argument("--save", help="write the Dice of every image, run and kind to this .parquet")
    arguments = parser.parse_args()
    process.keep_freed_memory()
    runs, rows = arguments.runs, [row for row in read_cohort(arguments.cohort) if row.split == "hold-out"]
    if not rows:
        raise SystemExit(f"--cohort {arguments.cohort} has no hold-out images; give a cohort with a hold-out")
    found = find_folds(runs)
    folds = list(found[0])
    own = [(number,) * len(folds) for number in range(len(runs))]
    mixed = [chosen for chosen in itertools.product(range(len(runs)), repeat=len(folds)) if chosen not in own]
    ensembles: list[Ensemble] = [*own, *mixed]  # the first ones are the runs' own
    parts = []
    for kind in KINDS:
        scores = score(kind, rows, found, ensembles)
        parts.append(to_rows(kind, [row.id for row in rows], runs, folds, scores))
        print(f"{kind}: {len(rows)} images, Dice at 0.5 (95 % intervals over images)")
        for number, run in enumerate(runs):
            tell(run, scores.joint[:, number], scores.single[:, number].mean(axis=1))
        for number, run in enumerate(runs):
            means = zip(folds, scores.single[:, number].mean(axis=0), strict=True)
            print(f"  {run}: members {', '.join(f'fold {fold} {mean:.4f}' for fold, mean in means)}")
        if mixed:
            tell_all(scores, ensembles)
    if arguments.save:
        tables.write_table(places.absolute(arguments.save), pa.concat_tables(parts))


if __name__ == "__main__":
    main()
