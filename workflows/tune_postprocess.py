"""Search settings of the threshold cascade on out-of-fold maps, and say honestly what they are worth.

    python workflows/tune_postprocess.py run=/data/stas/folds out=/data/stas/thresholds

Every study is a search of its own: one on the maps of all folds, and for each fold one that never sees that fold's
maps and is then scored on them (nested). Studies run side by side as trials of Ray Tune, and share actors, one per CPU,
that hold the maps between them and score settings in batches (search.batch_size). What is found does not depend on how
many CPUs there are.

Writes <out>/report.md (start there), postprocess.tuned.yaml (what is recommended, ready for score_images),
candidates/*.yaml (what was found, recommended or not), images.parquet (Dice of each image under each), trials.parquet,
studies/<name>.json, figures/*.png and, last, manifest.json. Run again with the same settings, it goes on where it was.
"""

import sys

if __name__ == "__main__" and not (__package__ or getattr(sys.flags, "safe_path", False)):  # a script
    import environment  # noqa: F401 - ends where this Python lacks what follows

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import numpy as np
from pydantic import Field

from stas_core import config as configs
from stas_core import places, storage, tables
from stas_core.config import Config, Uri
from stas_core.errors import WriteError
from stas_core.predict.postprocess import PostprocessChoice, PostprocessConfig, cut_at
from stas_core.runs import OofMap, TrainingRun
from stas_core.scores import bootstrap as bootstraps
from stas_core.scores.bootstrap import BootstrapConfig, Difference
from stas_core.search import space as spaces
from stas_core.search import verdicts
from stas_core.search.level_sets import MapScorer
from stas_core.search.space import Dimension, Space
from stas_core.search.threshold_search import (
    LocalWork,
    ScoredSetting,
    Starts,
    Study,
    ThresholdSearchConfig,
    prepare_space,
    run_study,
)
from stas_core.search.verdicts import ALL, PICKS, Recommendation, TunedImage, Verdict
from stas_core.verdicts import VerdictConfig, of_choice
from workflows import next_step, tracking
from workflows.cli import main
from workflows.cluster import ray_session
from workflows.conclusion import conclude_again, is_judged, recorded
from workflows.forecast import (
    Forecast,
    begin,
    nodes_at_hand,
    num_cpus,
    on_all_cpus,
    peak_bytes,
    shown_bytes,
    spread,
    try_out,
)
from workflows.map_actors import STUDY_CPUS, MapActors, SharedWork, load_scorer
from workflows.out_folder import (
    OutFolder,
    Outputs,
    claim_for_stage,
    require_apart,
    require_out,
    require_uri,
)
from workflows.progress import Progress, doing
from workflows.tracking import TrackingConfig

FIGURES = ("partial_dependence", "importance", "global_threshold", "optimism", "dice_by_size")
OUTPUTS = Outputs(
    "tune_postprocess",
    (
        *("report.md", "postprocess.tuned.yaml", "images.parquet", "trials.parquet", "studies/*.json", "state/**"),
        *(f"candidates/{name}.yaml" for name in ("best", "simplest", "cut")),
        *(f"figures/{name}.png" for name in FIGURES),
    ),
)

TRIED_SETTINGS = 32
"""Scored on a few maps for a forecast."""
REPORT_S = 2.0
"""A study says how far it is, and saves its trials, this often."""


class TunePostprocessConfig(Config):
    """Settings of tune_postprocess."""

    out: Uri | None = None
    """Folder of the outputs; path or URI."""
    run: Uri | None = None
    """Folder of a run of train_folds, with its out-of-fold maps."""
    cohort: Uri | None = None
    """cohort.parquet that the run was trained on; null: where it was then."""
    default: PostprocessChoice = PostprocessConfig()
    """What is kept unless a better setting is proven, and the values of all keys that are not searched: a section, or
    the path of a YAML file."""
    reference: PostprocessChoice = PostprocessConfig(
        border_fill="first", max_foreground_share=None, max_foreground_px=808_236
    )
    """A second setting to compare with: the published code's."""
    space: dict[str, Dimension] = Field({})
    """Keys of the cascade and the values to search; `threshold`: grey levels to cut maps at, without a cascade."""
    search: ThresholdSearchConfig = ThresholdSearchConfig()
    bootstrap: BootstrapConfig = BootstrapConfig()
    verdict: VerdictConfig = VerdictConfig()
    """Limits of the verdict that the stage ends with."""
    accept_warnings: bool = False
    """Exit with status 0 even where the verdict is `do not use`."""
    tracking: TrackingConfig = TrackingConfig()
    """Whether MLflow is told of the run."""


@dataclass(frozen=True)
class StudyTask:
    """Arguments of every trial, besides the name of its study."""

    space: Space
    levels: list[int]
    starts: Starts
    search: ThresholdSearchConfig
    folds: list[int]
    """Of each map."""
    out: str


@dataclass(frozen=True)
class Opened:
    """A search that could begin."""

    task: StudyTask
    maps: list[OofMap]
    work: tuple[TunePostprocessConfig, str]
    """What makes it the same search: settings and fingerprint of the inputs."""


def run(config: TunePostprocessConfig, force: bool) -> int:
    """Search, choose and report; return the exit status."""
    opened = _opened(config)
    with claim_for_stage(opened.task.out, OUTPUTS, force=force, work=opened.work) as folder:
        return _tune(config, folder, opened.task, opened.maps, opened.work)


def _opened(config: TunePostprocessConfig) -> Opened:
    """Read what a search starts from, before anything is written.

    Raises:
        ConfigError: a setting is wrong, or the run has no maps to search on.
    """
    out = require_out(config.out, "/data/thresholds")
    run_uri = require_uri("run", config.run, "/data/folds")
    space, levels = prepare_space(config.space, config.default)
    spaces.grid_points(space, config.search)  # a grid that is too large is refused before `out` is claimed
    maps = TrainingRun.open("run", run_uri).maps(config.cohort)
    folds = [found.fold for found in maps]
    identity = config.model_copy(
        update={"out": None, "run": None, "cohort": None, "accept_warnings": False, "verdict": VerdictConfig()}
    )
    inputs = storage.fingerprint(*(f"{m.row.id} {m.fold} {m.row.content} {storage.stamp(m.uri)}" for m in maps))
    require_apart(out, {"run": run_uri, "cohort": config.cohort})
    task = StudyTask(space, levels, Starts(config.default, config.reference), config.search, folds, out)
    return Opened(task, maps, (identity, inputs))


def plan(config: TunePostprocessConfig, force: bool) -> list[Forecast]:
    """Say what the search would take, from settings that are scored on a few maps here."""
    opened = _opened(config)
    task, maps = opened.task, opened.maps
    base = begin(task.out, OUTPUTS, opened.work, force=force, is_for_one=True)
    if base.is_nothing:
        return [base]
    num_settings = len(spaces.grid_points(task.space, config.search)) or config.search.num_settings
    names = [ALL, *(str(fold) for fold in sorted(set(task.folds)))]
    todo = [name for name in names if force or not storage.exists(_study_uri(task.out, name))]

    proposed = LocalWork([], task.space, config.search).propose(range(TRIED_SETTINGS), [])
    settings = [spaces.apply(config.default, setting) for setting in proposed]
    loaded: list[MapScorer] = []
    read = try_out(lambda found, _: loaded.append(load_scorer(found)), spread(maps, 3))
    tried = try_out(lambda one, _: LocalWork([one], task.space, config.search).dice(settings, [0]), loaded)
    # A study leaves the maps of its fold out. Its choice goes back to the default key by key, each tried in each round.
    shares = [1.0 if name == ALL else 1 - task.folds.count(int(name)) / len(maps) for name in todo]
    num_scored = (num_settings + len(task.space) ** 2 / 2 + len(task.levels)) * sum(shares)
    work_s = len(maps) * (read.seconds * bool(todo) + num_scored * tried.seconds / TRIED_SETTINGS)
    trial_bytes = mean(len(json.dumps([setting, 1 / 3])) for setting in proposed)
    peak = peak_bytes()
    nodes = nodes_at_hand()
    held = len(maps) / min(len(maps), num_cpus(nodes))  # by each actor
    base = replace(
        base,
        work=f"{len(todo)} studies of {num_settings} settings on {len(maps)} maps of {len(names) - 1} folds",
        basis=f"from {TRIED_SETTINGS} settings on {tried.num_items} maps tried here",
        memory_bytes=peak + max(0.0, held - len(loaded)) * mean(one.num_bytes for one in loaded),
        # Of each setting the study's file and trials.parquet; of each map its Dice under a study's picks.
        disk_bytes=len(names) * (num_settings * 1.3 * trial_bytes + len(maps) * len(PICKS) * len(str(1 / 3)))
        + shown_bytes(len(FIGURES)),
    )
    return [on_all_cpus(base, nodes, "maps shared out over the CPUs", work_s)]


def _tune(
    config: TunePostprocessConfig,
    folder: OutFolder,
    task: StudyTask,
    maps: Sequence[OofMap],
    work: tuple[TunePostprocessConfig, str],
) -> int:
    out, folds, start = folder.uri, task.folds, time.monotonic()
    if folder.is_finished(*work) and is_judged(out, config.verdict):
        print(f"nothing to do: {out} is up to date ({len(maps)} maps)")
        return conclude_again(out, accept_warnings=config.accept_warnings)
    storage.write_bytes(storage.join(out, "config.resolved.yaml"), configs.dump(config).encode())
    tracking.begin()
    names = [ALL, *(str(fold) for fold in sorted(set(folds)))]
    todo = [name for name in names if not storage.exists(_study_uri(out, name))]
    print(
        f"{len(maps)} maps of folds {sorted(set(folds))}; {len(task.space)} keys; "
        f"studies: {', '.join(todo) or 'all done'}"
    )
    if todo:
        num_settings = len(spaces.grid_points(task.space, config.search)) or config.search.num_settings
        _search(task, maps, todo, num_settings)
    folder.verify()
    found = {name: storage.read_json(_study_uri(out, name)) for name in names}
    recommendation = _write_results(config, task, maps, found)
    seconds = round(time.monotonic() - start, 1)
    then = next_step.recorded(next_step.after_threshold_search(out, places.absolute(str(config.run))))
    folder.write_manifest(*work, recommendation | {"seconds": seconds} | then)
    print(f"look at {out}/report.md and {out}/figures; {out}/postprocess.tuned.yaml is ready for score_images")
    return conclude_again(out, accept_warnings=config.accept_warnings)


def _study_uri(out: str, name: str) -> str:
    return storage.join(out, "studies", f"{name}.json")


def _trials_uri(out: str, name: str) -> str:
    return storage.join(out, "studies", f"{name}.trials.json")


def _search(task: StudyTask, maps: Sequence[OofMap], todo: Sequence[str], num_settings: int) -> None:
    """Run studies side by side as trials of Ray Tune."""
    from ray import tune

    from workflows.full_disk import UntilFullDisk, tune_state

    until = UntilFullDisk()
    with (
        ray_session() as nodes,
        MapActors.started_for(maps, nodes, space=task.space, search=task.search) as shared,
        tune_state() as state,  # not in `out`, where others may write; studies save themselves
    ):
        print(f"{len(todo)} studies over {len(shared.actors)} CPUs; {num_settings} settings each", flush=True)
        trial = tune.with_parameters(_run_trial, task=task, shared=shared)
        tuner = tune.Tuner(
            tune.with_resources(trial, {"cpu": STUDY_CPUS}),
            param_space={"study": tune.grid_search(list(todo))},
            tune_config=tune.TuneConfig(max_concurrent_trials=len(todo)),
            run_config=tune.RunConfig(
                name="studies",
                storage_path=state,
                stop=until,
                callbacks=[_progress_lines(num_settings)],
                # A lost worker: its study goes on from its saved trials.
                failure_config=tune.FailureConfig(max_failures=3),
                verbose=0,
            ),
        )
        with doing("searching"):
            results = tuner.fit()
        until.raise_noted()
        if results.errors:
            raise results.errors[0]


def _run_trial(params: Mapping[str, str], task: StudyTask, shared: MapActors) -> None:
    """Run one study and write its results; what cannot be written is reported, for no retry mends that."""
    from ray import tune

    from workflows.full_disk import UNWRITABLE

    try:
        _run_study(params["study"], task, shared)
    except WriteError as error:
        tune.report({"study": params["study"], UNWRITABLE: str(error)})


def _run_study(name: str, task: StudyTask, shared: MapActors) -> None:
    """Run one study and write its results; an interrupted one resumes from its saved trials."""
    from ray import tune

    seen = [str(fold) != name for fold in task.folds]  # "all" is no fold
    partial = _trials_uri(task.out, name)
    done = [ScoredSetting(*trial) for trial in storage.read_json(partial)] if storage.exists(partial) else []
    trials: list[ScoredSetting] = []
    shown = -math.inf

    def note(batch: Sequence[ScoredSetting]) -> None:
        nonlocal shown
        trials.extend(batch)
        if time.monotonic() - shown > REPORT_S and len(trials) > len(done):
            shown = time.monotonic()
            storage.write_json(partial, trials)
            tune.report({"study": name, "num_trials": len(trials), "best": max(trial.dice for trial in trials)})

    first = [ALL, *map(str, sorted(set(task.folds)))].index(name) * task.search.batch_size
    work = SharedWork(shared, name, first)
    study = run_study(work, seen, task.starts, task.space, task.levels, task.search, done=done, note=note)
    storage.write_json(_study_uri(task.out, name), _to_json(study, trials))
    if storage.exists(partial):
        storage.remove(partial)
    tune.report({"study": name, "num_trials": len(trials), "best": max(trial.dice for trial in trials)})


def _to_json(study: Study, trials: Sequence[ScoredSetting]) -> dict[str, Any]:
    return {
        "best": study.best.model_dump(mode="json"),
        "simplest": study.simplest.model_dump(mode="json"),
        "level": study.level,
        "level_dice": list(study.level_dice.items()),
        "dice": {name: values.tolist() for name, values in study.dice.items()},
        "trials": [[trial.setting, trial.dice] for trial in trials],
    }


def _progress_lines(num_settings: int) -> Any:
    from ray import tune

    class ProgressLines(tune.Callback):  # type: ignore[misc]
        """Prints how far each study is."""

        def __init__(self) -> None:
            self._progress: dict[str, Progress] = {}

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
        ) -> None:
            name = result["study"]
            if "num_trials" not in result:  # it could not be written
                return
            if name not in self._progress:
                self._progress[name] = Progress(num_settings, "settings", label=f"study {name}: ")
            self._progress[name].reach(result["num_trials"], facts=f"best {result['best']:.4f}")

    return ProgressLines()


@doing("judging what was found, drawing the figures, writing the tables")
def _write_results(
    config: TunePostprocessConfig, task: StudyTask, maps: Sequence[OofMap], found: Mapping[str, Any]
) -> dict[str, Any]:
    """Judge what the studies found; write tables, candidates, figures and the report; return the manifest's facts."""
    tuned = [TunedImage(m.row.id, m.fold, m.row.group or m.row.id, sum(m.row.target_areas_px)) for m in maps]
    dice = {name: {pick: np.array(v) for pick, v in study["dice"].items()} for name, study in found.items()}
    scores = verdicts.nest(tuned, dice)
    judged = verdicts.judge(tuned, scores, config.bootstrap)
    best, simplest = (configs.build(PostprocessConfig, found[ALL][pick]) for pick in ("best", "simplest"))
    advice = verdicts.recommend(judged, config.default, simplest, config.bootstrap.confidence)
    pick = {"tuned": "simplest", "default": "default", "plain cut": "raw"}[advice.choice]
    shares = [m.row.foreground_share for m in maps]
    verdict = of_choice(scores["nested"][pick], shares, judged[pick].optimism, config.verdict)
    advice = advice.under(verdict.level)
    candidates = {"best": best, "simplest": simplest}
    if (level := found[ALL]["level"]) is not None:
        candidates["cut"] = cut_at(level)
    evidence = [
        f"Recommendation: {advice.reason}.",
        f"From {len(maps)} out-of-fold maps, {len(found[ALL]['trials'])} settings ({config.search.sampler}, seed "
        f"{config.search.seed}); mean Dice tuned on all / nested by fold:",
        *(f"  {v.name}: {v.tuned:.4f} / {v.nested:.4f} ({v.low:.4f} to {v.high:.4f})" for v in judged.values()),
    ]
    tuned_yaml = verdicts.to_yaml(advice.config, evidence)
    storage.write_bytes(storage.join(task.out, "postprocess.tuned.yaml"), tuned_yaml.encode())
    for name, candidate in candidates.items():
        text = verdicts.to_yaml(candidate, [f"Candidate: {verdicts.PICKS[name]}", *evidence])
        storage.write_bytes(storage.join(task.out, "candidates", f"{name}.yaml"), text.encode())
    tables.write_table(storage.join(task.out, "images.parquet"), verdicts.images_table(tuned, scores))
    tables.write_table(storage.join(task.out, "trials.parquet"), verdicts.trials_table(task.space, found))
    figures = _draw_figures(task, tuned, found, scores, config)
    for name, data in figures.items():
        storage.write_bytes(storage.join(task.out, "figures", f"{name}.png"), data)
    report = _report(config, judged, advice, candidates, found, list(figures), verdict.markdown())
    storage.write_bytes(storage.join(task.out, "report.md"), report.encode())
    print(verdicts.verdicts_markdown(judged, config.bootstrap).split("\n\n")[1])
    print(advice.reason)
    return {
        "recommendation": advice.reason,
        "recommended": advice.choice,
        **recorded(verdict, config.verdict),
        "nested_dice": {name: round(verdict.nested, 6) for name, verdict in judged.items()},
    }


def _draw_figures(
    task: StudyTask,
    tuned: Sequence[TunedImage],
    found: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, Any]],
    config: TunePostprocessConfig,
) -> dict[str, bytes]:
    from stas_core.figures import searches

    settings = [setting for setting, _ in found[ALL]["trials"]]
    values = [dice for _, dice in found[ALL]["trials"]]
    best = configs.build(PostprocessConfig, found[ALL]["best"])
    marks = {"Default": spaces.flatten(config.default), "Best found": spaces.flatten(best)}
    figures = {"partial_dependence": searches.partial_dependence(task.space, settings, values, marks)}
    if shares := searches.importance(task.space, settings, values):
        figures["importance"] = searches.importance_bars(shares)
    seen: dict[str, Difference] = {}
    unseen: dict[str, Difference] = {}
    for fold in sorted(set(task.folds)):
        dice = {name: np.array(v) for name, v in found[str(fold)]["dice"].items()}
        left_out = np.array(task.folds) == fold
        for gains, part in ((seen, ~left_out), (unseen, left_out)):
            chosen = [image for image, is_in in zip(tuned, part, strict=True) if is_in]
            resampling = verdicts.resampling(chosen, config.bootstrap)
            gains[str(fold)] = bootstraps.compare(dice["simplest"][part], dice["default"][part], **resampling)
    if level_dice := dict(found[ALL]["level_dice"]):
        figures["global_threshold"] = searches.dice_by_level(level_dice)
    figures["optimism"] = searches.optimism_by_fold(seen, unseen)
    nested = scores["nested"]
    areas = [image.target_px for image in tuned]
    figures["dice_by_size"] = searches.dice_by_size(areas, nested["default"].tolist(), nested["simplest"].tolist())
    return figures


def _report(
    config: TunePostprocessConfig,
    judged: Mapping[str, Verdict],
    advice: Recommendation,
    candidates: Mapping[str, PostprocessConfig],
    found: Mapping[str, Any],
    figures: Sequence[str],
    verdict: str,
) -> str:
    by_fold = {f"without fold {name}": s["simplest"] for name, s in found.items() if name != ALL}
    shown = {name: candidates[name] for name in ("best", "simplest")}
    shown |= {name: configs.build(PostprocessConfig, values) for name, values in by_fold.items()}
    parts = [
        "# Thresholds tuned on out-of-fold maps",
        verdict,
        f"**{advice.reason[0].upper()}{advice.reason[1:]}.**",
        verdicts.verdicts_markdown(judged, config.bootstrap),
        "## What was chosen",
        "Values that differ from the default. The simplest setting is the one nearest to the default within one "
        "standard error of the best, on all folds and without each; where these differ much, the data do not decide.",
        verdicts.settings_markdown(config.default, shown),
        _about_cut(found[ALL]["level"], judged) if "cut" in candidates else "",
        "## Figures",
        *(
            f"![{title}](figures/{name}.png)"
            for name, title in (
                ("partial_dependence", "Every setting tried, against each key"),
                ("importance", "Importance of the keys"),
                ("global_threshold", "Maps cut at each grey level, without a cascade"),
                ("optimism", "Gain where chosen and on the fold left out"),
                ("dice_by_size", "Dice by target area, before and after"),
            )
            if name in figures
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about_cut(level: int, judged: Mapping[str, Verdict]) -> str:
    rival = verdicts.baseline(judged)
    gain, name = judged["cut"].over[rival], verdicts.PICKS[rival]
    proven = f"it gains on the {name}" if gain.low > 0 else f"a gain on the {name} is not proven"
    return (
        f"Maps without a cascade are best cut at k >= {level} (128 is 0.5); nested, {proven}: {gain.mean:+.4f} "
        f"({gain.low:+.4f} to {gain.high:+.4f}). To use it: candidates/cut.yaml."
    )


if __name__ == "__main__":
    main("tune_postprocess", TunePostprocessConfig, run, __doc__ or "", plan=plan)
