"""`stas <stage>`, the command of an installed package, is `python workflows/<stage>.py`."""

import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.workflows.conftest import Ended
from tests.workflows.test_cli import STAGES
from workflows import console


def stas(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> Ended:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/stas", *arguments])
    with pytest.raises(SystemExit) as ended:
        console.main()
    assert isinstance(ended.value.code, int)
    return Ended(ended.value.code, *capsys.readouterr())


def test_the_package_installs_it() -> None:
    entry = f'stas = "{console.__name__}:{console.main.__name__}"'
    assert f"[project.scripts]\n{entry}\n" in (ROOT / "pyproject.toml").read_text()


def test_every_stage_is_listed_with_what_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(console.STAGES) == set(STAGES)
    done = stas(monkeypatch, capsys, "--help")
    assert done.status == 0
    for stage in console.STAGES:
        (line,) = (line for line in done.out.splitlines() if line.startswith(f"  {stage} "))
        assert len(line.split(maxsplit=1)[1]) > 20
    assert stas(monkeypatch, capsys).status == 2


def test_it_runs_a_stage_and_shows_its_own_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "usage: stas train_folds [--config FILE]" in stas(monkeypatch, capsys, "train_folds", "--help").out
    shown = stas(monkeypatch, capsys, "train_folds", "optim.lr=5e-4", "--dry-run")
    assert shown.status == 0 and "  lr: 0.0005  #" in shown.out
    refused = stas(monkeypatch, capsys, "train_folds", "folds=0,1")
    assert refused.status == 2 and "out is not set; give it, or run: stas train_folds folds=0,1 out=" in refused.err


def test_a_stage_that_there_is_not_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = stas(monkeypatch, capsys, "train_fold")
    assert done.status == 2 and "no stage train_fold: did you mean train_folds?" in done.err
