"""Commands of stages, run in this process."""

import runpy
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.conftest import ROOT


class Ended(NamedTuple):
    """What a command left."""

    status: int
    out: str
    err: str


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Return a function that runs `python workflows/<name>.py <arguments>` in this process."""

    def run(name: str, *arguments: str) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"workflows/{name}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "workflows" / f"{name}.py"), run_name="__main__")
        status = ended.value.code
        return Ended(status if isinstance(status, int) else 1, *capsys.readouterr())

    return run
