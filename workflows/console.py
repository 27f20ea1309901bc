"""The command of an installed package: `stas <stage> ...` is `python workflows/<stage>.py ...`, from any folder.

stas train_folds data.cohort=/data/cohort/cohort.parquet out=/data/runs/a
stas train_folds --help
"""

import ast
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_type_hints

from stas_core.spelling import nearest
from workflows import cli

STAGES = (
    *("pipeline", "prepare_data", "train_folds", "tune_training", "tune_postprocess", "choose_ensemble"),
    *("score_images", "score_slides", "evaluate", "export", "export_model", "report"),
)
"""The pipeline, then its stages and their companions in the order of their use."""


def main() -> None:
    """Run the stage that the command line names, and exit with its status; without one, say which there are."""
    stage, *arguments = sys.argv[1:] or [""]
    if stage in ("", "-h", "--help"):
        print(overview())
        sys.exit(0 if stage else 2)
    if stage not in STAGES:
        print(f"no stage {stage}: did you mean {nearest(stage, STAGES)}? `stas --help` lists them", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(f"workflows.{stage}")
    settings = get_type_hints(module.run)["config"]
    cli.main(stage, settings, module.run, module.__doc__ or "", arguments, plan=module.plan)


def overview() -> str:
    """Return what each stage does, a line each."""
    lines = ["usage: stas STAGE [--config FILE] [key=value ...]", "       stas STAGE --help [key | section]", ""]
    return "\n".join(lines + [f"  {stage:<17} {_first_line(stage)}" for stage in STAGES])


def _first_line(stage: str) -> str:
    """Return what a stage says of itself, without loading it."""
    spec = find_spec(f"workflows.{stage}")
    source = Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin else ""
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
