"""The settings of a stage, from its typed config: what `--help` shows, as tables."""

import importlib
from collections.abc import Iterable, Iterator
from typing import get_type_hints

from stas_core import config as configs
from stas_core import markdown
from stas_core.config import Config
from stas_core.config_schema import Key
from workflows.cli_help import shown
from workflows.console import STAGES

OF_OTHERS = {
    "pipeline": {
        "prepare": "prepare_data",
        "train": "train_folds",
        "tune": "tune_postprocess",
        "score": "score_images",
        "evaluate": "evaluate",
        "slides": "score_slides",
    },
    "tune_training": {"train": "train_folds"},
}
"""Sections that are all settings of another stage."""


def config_of(stage: str) -> type[Config]:
    """Return the class of a stage's settings."""
    if stage not in STAGES:
        raise ValueError(f"no stage {stage}; expected one of {', '.join(STAGES)}")
    found: type[Config] = get_type_hints(importlib.import_module(f"workflows.{stage}").run)["config"]
    return found


def settings_markdown(stage: str) -> str:
    """Return a table of settings per section; a section that is another stage's leads to its page."""
    others = OF_OTHERS.get(stage, {})
    keys = [key for key in configs.fields(config_of(stage)) if key.name.partition(".")[0] not in others]
    sections: dict[str, list[Key]] = {"": []}  # those of the stage itself come first
    for key in keys:
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    parts = []
    for section, found in sections.items():
        if not found:
            continue
        table = markdown.table(("setting, and its default", "what it is"), _rows(found))
        parts += [f"### `{section}`" if section else "", table]
    parts += [f"`{section}.*`: the settings of [{other}]({other}.md#settings)." for section, other in others.items()]
    return "\n\n".join(part for part in parts if part)


def _rows(keys: Iterable[Key]) -> Iterator[tuple[str, str]]:
    for key in keys:
        yield f"`{key.name}`<br>= `{shown(key.default)}`", f"{key.text} *{key.kind}*"
