"""Whether this Python is the project's environment: what a stage asks before its first import.

Under `python -m` the package asks, before Python gets to the stage; else the stage, where it is a script. A script's
folder is where Python looks first, so `import environment` finds this file with any Python, when nothing else of the
project can be imported; a Python that was told not to look there (`python -P`) does without. It needs no package, looks
for the main ones without loading them, and says what is missing in one sentence, with exit status 2. An import that
fails for any other reason fails as ever.
"""

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

OLDEST = (3, 10)
"""Python that the project runs on."""
NEEDED = ("stas_core", "workflows", "pydantic", "yaml", "numpy", "pyarrow", "ray", "torch")
"""Without one of them no stage runs; `stas_core` and `workflows` are the project itself, as it is installed."""


def remedy(root: Path) -> str:
    """Return the command that runs this stage in the environment."""
    python = root / ".venv" / "bin" / "python"
    as_module = sys.argv[0] == "-m"  # which module is not told yet
    command = f"the same command with {python}" if as_module else shlex.join([str(python), *sys.argv])
    return f"run {command}" if python.exists() else f"run `make install` in {root}, then {command}"


def require() -> None:
    """End the process, unless the main packages can be found."""
    lacks = [name for name in NEEDED if find_spec(name) is None]
    if sys.version_info < OLDEST:
        lacks.insert(0, f"version {'.'.join(map(str, OLDEST))} or later")
    if lacks:
        what = f"{sys.executable} is not the Python of the project's environment: it lacks {', '.join(lacks)}"
        print(f"{what}; {remedy(Path(__file__).resolve().parents[1])}", file=sys.stderr)
        sys.exit(2)


require()
