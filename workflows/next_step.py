"""What to run next: the commands that a stage names at its end, their arguments filled in.

They stand in the manifest under `next`. Words in capitals, such as IMAGES, are for the user to replace.
"""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stas_core import storage
from stas_core.config import additions
from workflows.out_folder import MANIFEST

KEY = "next"
"""Of the manifest."""
IMAGES, SLIDES, OUTLINES, MASKS = "IMAGES", "SLIDES", "OUTLINES", "MASKS"


@dataclass(frozen=True)
class NextStep:
    """A command, and what it is for."""

    why: str
    """Completes "next, "."""
    command: str


def recorded(*steps: NextStep | None) -> dict[str, Any]:
    """Return steps as a fact of the manifest; those that are None do not apply."""
    return {KEY: [asdict(step) for step in steps if step is not None]}


def lines(out: str) -> list[str]:
    """Return the steps that the manifest of a finished run names, in words."""
    uri = storage.join(out, MANIFEST)
    record = storage.read_json(uri) if storage.exists(uri) else {}
    steps = record.get(KEY) if isinstance(record, dict) else None
    known = [step for step in steps or [] if isinstance(step, dict) and {"why", "command"} <= step.keys()]
    return [line for step in known for line in (f"next, {step['why']}:", f"  {step['command']}")]


def after_prepare(out: str) -> NextStep:
    """Return what follows `prepare_data`."""
    cohort = storage.join(out, "cohort.parquet")
    return _step("to train on it", "train_folds", {"data.cohort": cohort, "out": _beside(out, "folds")})


def after_training(out: str) -> list[NextStep]:
    """Return what follows `train_folds`."""
    return [
        _step(
            "to choose thresholds on its out-of-fold maps",
            "tune_postprocess",
            {"run": out, "out": _beside(out, "thresholds")},
        ),
        _step(
            "to look again at the annotations that its maps contradict",
            "export",
            {"run": out, "review": "true", "out": _beside(out, "review")},
        ),
    ]


def after_training_search(out: str, cohort: str) -> NextStep | None:
    """Return what follows `tune_training`; None: `--config` takes files of this machine alone."""
    if not storage.is_local(out):
        return None
    return _step(
        "to train every fold with the best setting",
        "train_folds",
        {"data.cohort": cohort, "out": _beside(out, "folds")},
        config=storage.join(out, "train_folds.best.yaml"),
    )


def after_threshold_search(out: str, run: str) -> NextStep:
    """Return what follows `tune_postprocess`."""
    values = {
        "ensemble.uri": storage.join(run, "ensemble.json"),
        "postprocess": storage.join(out, "postprocess.tuned.yaml"),
    }
    return _step(
        "to score images with these thresholds",
        "score_images",
        {"data.images": IMAGES, **values, "out": _beside(out, "scores")},
    )


def after_ensemble_choice(out: str, flips: list[str]) -> NextStep:
    """Return what follows `choose_ensemble`."""
    values = {"ensemble.uri": storage.join(out, "ensemble.json"), "inference.flips": f"[{','.join(flips)}]"}
    return _step(
        "to score images with these members",
        "score_images",
        {"data.images": IMAGES, **values, "out": _beside(out, "scores")},
    )


def after_scoring(out: str, images: str, split: str | None) -> list[NextStep]:
    """Return what follows `score_images`; `split`: of the cohort that `images` is, None: it may be none."""
    corrected = _step(
        "to correct the masks in QuPath",
        "export",
        {"run": out, "formats": "[geojson]", "out": _beside(out, "geojson")},
    )
    truth = {"truth.masks": MASKS} if split is None else {"truth.cohort": images, "truth.split": split}
    values = {"run": out, **truth, "out": _beside(out, "evaluation")}
    return [_step("to hold the masks to the truth", "evaluate", values), corrected]


def after_slides(out: str, truth: str | None) -> NextStep:
    """Return what follows `score_slides`; `truth`: a folder of outlines, where there is one."""
    values = {"run": out, "truth.slides": truth or OUTLINES, "out": _beside(out, "evaluation")}
    return _step("to hold the slides to outlines of targets", "evaluate", values)


def after_evaluation(run: str, *, of_slides: bool) -> NextStep | None:
    """Return what follows `evaluate`: more of the same; None: nothing says how the run was made."""
    config = storage.join(run, "config.resolved.yaml")
    if not (storage.is_local(config) and storage.exists(config)):
        return None
    stage, new = (
        ("score_slides", {"slides": SLIDES, "phantom": "null"})
        if of_slides
        else ("score_images", {"data.images": IMAGES, "data.split": "null"})
    )
    why = f"to score other {'slides' if of_slides else 'images'} with the same settings"
    return _step(why, stage, {**new, "out": _beside(run, "more")}, config=config)


def after_export(out: str, folder: str, images: str, label: str | None = None, *, partly: bool = False) -> NextStep:
    """Return what follows `export`: the files of one of its folders, corrected, go into a cohort.

    Args:
        out: the export's.
        folder: below it, or a glob of files.
        images: where the images are.
        label: class of the targets, which is to be listed; None: nothing is.
        partly: there may be others, which were not exported.
    """
    values = {"data.images": images, "data.annotations": storage.join(out, folder)}
    if label is not None:
        (setting,) = shlex.split(additions("annotation.labels", [label], "target", {}))
        values |= dict([setting.split("=", 1)])
    values |= {"data.unannotated": "leave_out"} if partly else {}
    return _step("to make a cohort of the corrected files", "prepare_data", values | {"out": _beside(out, "cohort")})


def _step(why: str, stage: str, values: Mapping[str, str], *, config: str | None = None) -> NextStep:
    settings = [f"{key}={value}" for key, value in values.items()]
    return NextStep(why, shlex.join([*_program(stage), *(["--config", config] if config else []), *settings]))


def _program(stage: str) -> list[str]:
    """Return how another stage is called, by the way this one was."""
    called = Path(sys.argv[0])
    if called.name == "stas":
        return ["stas", stage]
    here = called.parent if called.parent.name == "workflows" else Path("workflows")
    return ["python", str(here / f"{stage}.py")]


def _beside(out: str, name: str) -> str:
    return f"{out}-{name}"
