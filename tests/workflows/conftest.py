"""Commands of stages, run in this process."""

import importlib
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import ROOT
from workflows import planned


class Ended(NamedTuple):
    """What a command left."""

    status: int
    out: str
    err: str


@pytest.fixture
def plans_kept_here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Have plans kept in a folder of the test, not of the user; return it."""
    folder = tmp_path_factory.mktemp("plans")
    monkeypatch.setattr(planned, "cache_folder", lambda: folder)
    return folder


@pytest.fixture
def stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], plans_kept_here: Path
) -> Callable[..., Ended]:
    """Return a function that runs `python workflows/<name>.py <arguments>` in this process."""

    def run(name: str, *arguments: str) -> Ended:
        capsys.readouterr()
        monkeypatch.syspath_prepend(ROOT / "workflows")  # as Python does for a script
        monkeypatch.setattr(sys, "argv", [f"workflows/{name}.py", *arguments])
        # Loaded first under its own name: of a file that was run before, pydantic finds no text of the settings.
        importlib.import_module(f"workflows.{name}")
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "workflows" / f"{name}.py"), run_name="__main__")
        status = ended.value.code
        return Ended(status if isinstance(status, int) else 1, *capsys.readouterr())

    return run


@pytest.fixture
def prepared_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let prepare_data measure its fields in this process, without Ray and without figures."""
    from workflows import measuring, prepare_data

    def measure(items: Any, *given: Any) -> Iterator[dict[str, Any]]:
        return (measuring.measure_item(item, *given) for item in items)

    monkeypatch.setattr(prepare_data, "stream", measure)
    monkeypatch.setattr(prepare_data, "_write_figures", lambda *_: None)
