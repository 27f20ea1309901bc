"""The command line every stage shares.

    python workflows/<stage>.py [--config FILE] [--dry-run] [--force] [key=value ...]

Exit status: 0 done, 1 done with failures beyond what the config allows, 2 wrong config, data path or resources, 130
interrupted by Ctrl-C.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from stas_core import config as configs
from stas_core.config import Config
from stas_core.errors import StasError
from workflows.out_folder import code_version

C = TypeVar("C", bound=Config)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main(stage: str, cls: type[C], run: Callable[[C, bool], int], doc: str) -> None:
    """Parse the command line, run the stage with (config, force), and exit with its status."""
    parser = argparse.ArgumentParser(
        prog=f"python workflows/{stage}.py",
        description=doc,
        epilog="keys:\n"
        + "\n".join(f"  {key} = {default}\n      {text}" for key, default, text in configs.fields(cls)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = CONFIGS / f"{stage}.yaml"
    parser.add_argument("--config", type=Path, default=default, help=f"YAML file (default: configs/{stage}.yaml)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop; needs no Ray")
    parser.add_argument("--force", action="store_true", help="delete what the stage wrote in `out`, and start over")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings laid over the file's")
    arguments = parser.parse_intermixed_args()
    try:
        config = configs.load_config(cls, arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(configs.describe(config), end="")
            sys.exit(0)
        code = code_version()
        print(f"{shlex.join(['python', *sys.argv])}\ncode {code['path']} at {code['commit']}", flush=True)
        status = run(config, arguments.force)
    except StasError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on where it was", file=sys.stderr)
        sys.exit(130)
    sys.exit(status)
