"""The help of a stage: how it is called, and its keys, section by section, in the width of the terminal."""

import shutil
import textwrap
from collections.abc import Iterator

from stas_core import config as configs
from stas_core.config import Config
from stas_core.config_schema import Key
from stas_core.errors import ConfigError
from stas_core.spelling import nearest

MAX_WIDTH = 100
USAGE = """\
usage: {command} [--config FILE] [--dry-run | --plan [--price P]]
           [--force] [key=value ...]
       {command} --help [key | section]
"""
OPTIONS = """\
  --config FILE   YAML file, or the name of one in configs/, such as stas_cpu
                  (default: the stage's own)
  --dry-run       print the resolved config and stop; needs no Ray
  --plan          check all that a run needs, say what it would take, and stop
  --price P       with --plan: of an hour of a GPU, or of a cluster without
  --force         delete what the stage wrote in `out`, and start over
  --help [KEY]    show this, or only a key or a section such as {section}
  key=value       settings laid over the file's, for example {example}=...
"""


def stage_help(command: str, cls: type[Config], doc: str, width: int | None = None) -> str:
    """Return the whole help of a stage.

    Args:
        command: how it is called.
        cls: its settings.
        doc: what it does.
        width: characters of a line; None: those of the terminal, at most 100.
    """
    found = list(configs.fields(cls))
    sections = [key.name for key in found if "." in key.name]
    section = sections[0].partition(".")[0] if sections else found[0].name
    options = OPTIONS.format(section=section, example=(sections or [found[0].name])[0])
    width = width or _width()
    # Commands are indented, and stay as they are.
    blocks = [block if block.startswith(" ") else _wrapped(block, width) for block in doc.strip("\n").split("\n\n")]
    return "\n".join([USAGE.format(command=command), "\n\n".join(blocks), "", options, *_lines(found, width)])


def key_help(cls: type[Config], name: str, width: int | None = None) -> str:
    """Return the help of one key, or of the keys of a section.

    Raises:
        ConfigError: there is neither.
    """
    found = [key for key in configs.fields(cls) if key.name == name or key.name.startswith(f"{name}.")]
    if not found:
        raise ConfigError(f"no key or section {name}: did you mean {nearest(name, list(configs.keys(cls)))}?")
    return "\n".join(_lines(found, width or _width()))


def _width() -> int:
    return min(MAX_WIDTH, shutil.get_terminal_size((80, 24)).columns)


def _lines(found: list[Key], width: int) -> Iterator[str]:
    section = None
    for key in found:
        above = key.name.rpartition(".")[0]
        if above != section:
            section = above
            yield f"\n{above}:" if above else ""
        yield f"  {key.name} = {shown(key.default)}"
        text = f"({key.kind}) {key.text}".rstrip()
        yield from textwrap.wrap(
            text,
            width,
            initial_indent=" " * 6,
            subsequent_indent=" " * 6,
            break_long_words=False,
            break_on_hyphens=False,
        )


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def shown(default: object) -> str:
    """Return a default as it is written on the command line."""
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, Config):
        return f"{{{', '.join(f'{name}: {shown(value)}' for name, value in default)}}}"
    if isinstance(default, tuple):
        return f"[{', '.join(map(shown, default))}]"
    return str(default)
