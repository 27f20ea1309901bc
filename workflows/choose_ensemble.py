"""Choose members and flips of an ensemble on out-of-fold predictions, against what they cost.

    python workflows/choose_ensemble.py runs='[/data/folds, /data/search/trials/ab12_00003]' out=/data/ensemble

A member is a kind of model: the last weights, or a kept epoch, of a run of train_folds. Every image is predicted by the
models of its own fold, in each flip, once; then members are added greedily, nested by fold as in tune_postprocess.

Writes <out>/report.md (start there), sizes.parquet (members x flips: Dice and relative seconds), ensemble.json (the
knee, ready for score_images), maps/, figures/cost.png and, last, manifest.json. Maps that are there are not made again.
"""

import sys

if __name__ == "__main__" and not (__package__ or getattr(sys.flags, "safe_path", False)):  # a script
    import environment  # noqa: F401 - ends where this Python lacks what follows

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import Field

from stas_core import config as configs
from stas_core import storage, tables, verdicts
from stas_core.config import Config, Uri
from stas_core.data import images
from stas_core.data.fields import load_mask
from stas_core.data.reference import reference_of
from stas_core.errors import ConfigError
from stas_core.predict import inference as inferences
from stas_core.predict.inference import ALL_FLIPS, Flip
from stas_core.runs import OofMap, TrainingRun, write_ensemble
from stas_core.scores.bootstrap import BootstrapConfig
from stas_core.scores.metrics import ImageScores
from stas_core.search import ensemble_choice
from stas_core.search.ensemble_choice import Flips, Size, Subset
from stas_core.verdicts import Verdict, VerdictConfig
from workflows import next_step, tracking
from workflows.cli import main
from workflows.cluster import Node, default_gpus, describe, ray_session
from workflows.conclusion import conclude, conclude_again, is_judged, recorded
from workflows.forecast import (
    START_S,
    Forecast,
    begin,
    doubled,
    nodes_at_hand,
    num_cpus,
    peak_bytes,
    shown_bytes,
    try_out,
)
from workflows.member_maps import IMAGES_PER_TASK, OofField, Predicting, map_name, map_uri, predict_chunk, predict_maps
from workflows.out_folder import (
    OutFolder,
    Outputs,
    claim_for_stage,
    require_apart,
    require_out,
    require_uri,
)
from workflows.progress import doing
from workflows.tracking import TrackingConfig
from workflows.waiting import Need, results

OUTPUTS = Outputs(
    "choose_ensemble",
    ("report.md", "sizes.parquet", "ensemble.json", "seconds.json", "figures/cost.png", "maps/*/*/{id}.png"),
)


class ChooseEnsembleConfig(Config):
    """Settings of choose_ensemble."""

    out: Uri | None = None
    """Folder of the outputs; path or URI."""
    runs: tuple[Uri, ...] = ()
    """Folders of runs of train_folds on one cohort; folds that all of them finished are used."""
    cohort: Uri | None = None
    """cohort.parquet that the runs were trained on; null: where it was then."""
    top_k: int = Field(0, ge=0)
    """Also take so many of each fold's best kept epochs as members. They were chosen on the images they are judged on
    here, which flatters them."""
    flip_sets: tuple[Flips, ...] = (("identity",), ("identity", "lr"), ALL_FLIPS)
    """Sets of flips to compare."""
    amp: inferences.Amp = "auto"
    """Arithmetic of prediction, as inference.amp."""
    gpus_per_task: float | None = Field(None, ge=0)
    """GPUs of one prediction; null: one where the cluster has any; 0: CPUs."""
    bootstrap: BootstrapConfig = BootstrapConfig()
    verdict: VerdictConfig = VerdictConfig()
    """Limits of the verdict that the stage ends with."""
    accept_warnings: bool = False
    """Exit with status 0 even where the verdict is `do not use`."""
    tracking: TrackingConfig = TrackingConfig()
    """Whether MLflow is told of the run."""


@dataclass(frozen=True)
class SizeRow:
    """A row of `sizes.parquet`: an ensemble of a number of members under a set of flips, cheapest first."""

    num_members: int
    members: list[str]
    flips: list[str]
    relative_seconds: float
    """Per image, relative to one pass of the cheapest member."""
    tuned_dice: float
    """Mean over images, by members chosen on these same images."""
    nested_dice: float
    """Mean over images, each by members chosen without its fold; `low` and `high` bound its bootstrap interval."""
    nested_low: float
    nested_high: float
    is_knee: bool
    """Whether it is the one that `ensemble.json` names."""


@dataclass(frozen=True)
class Opened:
    """A choice that could begin."""

    out: str
    fields: list[OofField]
    members: list[str]
    work: tuple[ChooseEnsembleConfig, str]
    """What makes it the same choice: settings and fingerprint of the inputs."""


def run(config: ChooseEnsembleConfig, force: bool) -> int:
    """Predict, choose and report; return the exit status."""
    opened = _opened(config)
    ids = {field.row.id for field in opened.fields}
    with claim_for_stage(opened.out, OUTPUTS, force=force, work=opened.work, ids=ids) as folder:
        return _choose(config, folder, opened.fields, opened.members, opened.work)


def _opened(config: ChooseEnsembleConfig) -> Opened:
    """Find the out-of-fold images and the members, before anything is written.

    Raises:
        ConfigError: there are no runs, or nothing to choose between.
    """
    out = require_out(config.out, "/data/ensemble")
    if not config.runs:
        raise ConfigError("runs is empty; give folders of train_folds runs: runs='[/data/folds, /data/other]'")
    runs = [require_uri("runs", uri, "'[/data/folds]'") for uri in config.runs]
    from stas_core.predict import ensemble

    fields = find_fields(runs, config.cohort, config.top_k)
    members = sorted(fields[0].checkpoints)
    if len(members) < 2:
        raise ConfigError(f"runs holds one kind of member, {members[0]}: there is nothing to choose; give several runs")
    weights = {uri: ensemble.checkpoint_fingerprint(uri) for uri in {uri for *_, uri in _uses(fields)}}
    inputs = storage.fingerprint(
        *(f"{field.row.id} {field.row.content} {field.fold}" for field in fields),
        *sorted({f"{fold} {m} {weights[uri]}" for _, fold, m, uri in _uses(fields)}),
    )
    identity = config.model_copy(
        update={"out": None, "runs": (), "cohort": None, "gpus_per_task": None}
        | {"accept_warnings": False, "verdict": VerdictConfig()}
    )
    require_apart(out, {**{f"runs.{number}": uri for number, uri in enumerate(runs)}, "cohort": config.cohort})
    return Opened(out, fields, members, (identity, inputs))


def plan(config: ChooseEnsembleConfig, force: bool) -> list[Forecast]:
    """Say what the choice would take, from a map of each member that is predicted here."""
    opened = _opened(config)
    base = begin(opened.out, OUTPUTS, opened.work, force=force, is_for_one=True)
    if base.is_nothing:
        return [base]
    nodes, flips = nodes_at_hand(), _flips_of(config)
    there = set() if force or not storage.exists(opened.out) else set(storage.walk(opened.out))
    names = [
        map_name(member, flip, field.row.id) for field in opened.fields for member in opened.members for flip in flips
    ]
    num_maps = sum(name not in there for name in names)
    gpus = _gpus_per_task(config, nodes)
    how = Predicting(opened.out, flips[:1], config.amp, gpus)
    how.need.require(nodes)
    workers = sum(node.fitting(gpus) or 0 for node in nodes) if gpus else num_cpus(nodes)
    base = replace(
        base,
        work=f"{num_maps} of {len(names)} maps: {len(opened.members)} members, {len(opened.fields)} images, "
        f"{len(flips)} flips",
        layout=f"{describe(nodes)}, {workers:g} task(s) at once",
        num_gpus=_gpus_taken(gpus, nodes),
        faster=doubled(nodes),
    )
    import torch

    if gpus and not torch.cuda.is_available():
        return [replace(base, basis="tasks predict on GPUs, and this machine has none: plan where there is one")]

    def predict(member: str, folder: str) -> None:
        seconds.extend(predict_chunk(member, two, replace(how, out=folder), again=True))

    seconds: list[float] = []
    two = [field for field in opened.fields if field.fold == opened.fields[0].fold][:2]
    tried = try_out(predict, opened.members)
    return [
        replace(
            base,
            seconds=num_maps * float(np.mean(seconds)) / workers + START_S,
            basis=f"from a map of {tried.num_items} member(s) predicted here",
            memory_bytes=peak_bytes(),
            disk_bytes=num_maps * tried.num_bytes / len(two) + shown_bytes(1),
        )
    ]


def _flips_of(config: ChooseEnsembleConfig) -> Flips:
    """Return the flips that any of the sets has."""
    return tuple(flip for flip in ALL_FLIPS if any(flip in chosen for chosen in config.flip_sets))


def _gpus_per_task(config: ChooseEnsembleConfig, nodes: Sequence[Node]) -> float:
    return default_gpus(nodes) if config.gpus_per_task is None else config.gpus_per_task


def _gpus_taken(gpus: float, nodes: Sequence[Node]) -> float:
    return sum(node.num_gpus for node in nodes) if gpus else 0.0


def _choose(
    config: ChooseEnsembleConfig,
    folder: OutFolder,
    fields: Sequence[OofField],
    members: Sequence[str],
    work: tuple[ChooseEnsembleConfig, str],
) -> int:
    out, start = folder.uri, time.monotonic()
    if folder.is_finished(*work) and is_judged(out, config.verdict):
        print(f"nothing to do: {out} is up to date")
        return conclude_again(out, accept_warnings=config.accept_warnings)
    storage.write_bytes(storage.join(out, "config.resolved.yaml"), configs.dump(config).encode())
    tracking.begin()
    flips = _flips_of(config)
    print(f"{len(members)} members ({', '.join(members)}), {len(fields)} out-of-fold images, {len(flips)} flips")
    with ray_session() as nodes:
        how = Predicting(out, flips, config.amp, _gpus_per_task(config, nodes))
        folder.account.num_gpus = _gpus_taken(how.gpus, nodes)
        seconds = predict_maps(fields, members, how)
        with doing("scoring ensembles of every size"):
            sizes = ensemble_choice.tabulate(
                seconds,
                config.flip_sets,
                np.array([field.fold for field in fields]),
                _Scorer(fields, out),
                config.bootstrap,
                [field.row.group or field.row.id for field in fields],
            )
    folder.verify()
    chosen = ensemble_choice.knee(sizes)
    shares = [field.row.foreground_share for field in fields]
    verdict = verdicts.of_choice(chosen.nested_dice, shares, chosen.tuned - chosen.nested, config.verdict)
    _write_results(out, config, sizes, chosen, fields, verdict)
    facts = {
        "seconds": round(time.monotonic() - start, 1),
        "members": list(chosen.members),
        "flips": list(chosen.flips),
    }
    then = next_step.recorded(next_step.after_ensemble_choice(out, list(chosen.flips)))
    folder.write_manifest(*work, facts | recorded(verdict, config.verdict) | then)
    print(f"look at {out}/report.md")
    return conclude(verdict, accept_warnings=config.accept_warnings)


def find_fields(runs: Sequence[str], cohort: str | None, top_k: int) -> list[OofField]:
    """Return the out-of-fold images of folds that all runs finished, with each member's checkpoint.

    Raises:
        ConfigError: the runs share fewer than two finished folds, or differ in the images of a fold.
        CheckpointError: a fold kept fewer epochs than `top_k`.
    """
    found = [{(oof.fold, oof.row.id): oof for oof in TrainingRun.open("runs", uri).maps(cohort)} for uri in runs]
    folds = set.intersection(*({fold for fold, _ in oofs} for oofs in found))
    if len(folds) < 2:
        raise ConfigError(f"runs share the finished folds {sorted(folds)}; at least two are needed to choose and judge")
    shared = [{key for key in oofs if key[0] in folds} for oofs in found]
    if any(keys != shared[0] for keys in shared):
        raise ConfigError(
            "runs were trained on different splits: their folds hold different images; give runs of one cohort"
        )
    by_fold = {fold: _members(runs, fold, top_k) for fold in folds}
    oofs: Mapping[tuple[int, str], OofMap] = found[0]
    return [OofField(oofs[key].row, key[0], by_fold[key[0]]) for key in sorted(shared[0])]


def _uses(fields: Sequence[OofField]) -> Iterator[tuple[str, int, str, str]]:
    """Yield (image, fold, member, checkpoint) of everything that is predicted."""
    for field in fields:
        for member, uri in field.checkpoints.items():
            yield field.row.id, field.fold, member, uri


def _members(runs: Sequence[str], fold: int, top_k: int) -> dict[str, str]:
    from stas_core.networks import checkpoints
    from stas_core.predict import ensemble

    members = {}
    for number, uri in enumerate(runs):
        folder, name = TrainingRun(uri).fold(fold), storage.name_of(uri)
        if sum(storage.name_of(other) == name for other in runs) > 1:
            name = f"{name}#{number}"
        if f"{name}/last" in members:
            raise ConfigError(f"runs: two folders go by the name {name}; rename {uri}")
        members[f"{name}/last"] = folder.last
        if top_k:
            best = ensemble.find_checkpoints(folder.uri, top_k=top_k)
            ranked = sorted(best, key=lambda one: -checkpoints.read_record(one).scores["val_dice"])
            members |= {f"{name}/best{rank}": one for rank, one in enumerate(ranked, start=1)}
    return members


class _Scorer:
    """Scores subsets on every image in Ray tasks, and remembers the scores."""

    def __init__(self, fields: Sequence[OofField], out: str):
        import ray

        self._fields, self._out = fields, out
        self._need = Need("the scoring of maps")
        self._score = ray.remote(num_cpus=self._need.cpus)(_score_chunk)
        self._known: dict[Subset, ImageScores] = {}

    def __call__(self, subsets: Sequence[Subset]) -> list[ImageScores]:
        todo = [subset for subset in dict.fromkeys(subsets) if subset not in self._known]
        if todo:
            starts = range(0, len(self._fields), IMAGES_PER_TASK)
            chunks = [self._fields[start : start + IMAGES_PER_TASK] for start in starts]
            parts = results([self._score.remote(chunk, todo, self._out) for chunk in chunks], self._need.look)
            for index, subset in enumerate(todo):
                self._known[subset] = np.concatenate([part[index] for part in parts])
        return [self._known[subset] for subset in subsets]


def _score_chunk(chunk: Sequence[OofField], subsets: Sequence[Subset], out: str) -> list[ImageScores]:
    needed = sorted({(member, flip) for subset in subsets for member in subset.members for flip in subset.flips})
    dice = np.empty((len(subsets), len(chunk)))
    for column, field in enumerate(chunk):
        truth = load_mask(field.row)
        maps: dict[tuple[str, Flip], Any] = {}
        for member, flip in needed:
            uri = map_uri(out, member, flip, field.row.id)
            maps[member, flip] = images.decode_map(storage.read_bytes(uri), uri)
        for row, subset in enumerate(subsets):
            dice[row, column] = ensemble_choice.score_subset(maps, truth, subset).dice
    return list(dice)


def _write_results(
    out: str,
    config: ChooseEnsembleConfig,
    sizes: Sequence[Size],
    chosen: Size,
    fields: Sequence[OofField],
    verdict: Verdict,
) -> None:
    from stas_core.figures import searches

    rows = [
        SizeRow(
            num_members=len(size.members),
            members=list(size.members),
            flips=[str(flip) for flip in size.flips],
            relative_seconds=size.cost,
            tuned_dice=size.tuned,
            nested_dice=size.nested,
            nested_low=size.low,
            nested_high=size.high,
            is_knee=size is chosen,
        )
        for size in sizes
    ]
    tables.write_rows(storage.join(out, "sizes.parquet"), SizeRow, rows)
    by_fold = {field.fold: field.checkpoints for field in fields}
    reference = reference_of([field.row for field in fields])
    members = [
        {"fold": fold, "checkpoint": by_fold[fold][member], "member": member}
        for fold in sorted(by_fold)
        for member in sorted(chosen.members)
    ]
    write_ensemble(storage.join(out, TrainingRun.ENSEMBLE), members, reference, flips=list(chosen.flips))
    points = [(size.cost, size.nested, f"{len(size.members)}x{len(size.flips)}") for size in sizes]
    storage.write_bytes(storage.join(out, "figures", "cost.png"), searches.dice_by_cost(points, sizes.index(chosen)))
    table = ensemble_choice.sizes_markdown(sizes, chosen, config.bootstrap)
    text = (
        "Mean Dice over out-of-fold images of the mean map cut at 0.5. Cost: seconds per image relative to one pass of "
        "the cheapest member; an image to be scored costs that once per fold. *Tuned on all*: members chosen on these "
        "same images. *Nested*: each image by members chosen without its fold. Knee: the cheapest row that is not "
        "proven worse than the best."
    )
    report = (
        f"# Ensemble chosen on out-of-fold predictions\n\n{verdict.markdown()}\n\n{text}\n\n{table}\n\n"
        "![Dice against cost](figures/cost.png)\n"
    )
    storage.write_bytes(storage.join(out, "report.md"), report.encode())
    print(table)


if __name__ == "__main__":
    main("choose_ensemble", ChooseEnsembleConfig, run, __doc__ or "", plan=plan)
