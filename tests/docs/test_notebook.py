"""The notebook runs, on phantoms alone, and holds no outputs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "field_to_targets.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_its_cells_run_one_after_the_other(
    ensemble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import matplotlib.pyplot as plt

    folds = tmp_path / "runs" / "demo" / "folds"
    shutil.copytree(ensemble, folds)
    members = [{"checkpoint": f"fold_{fold}/checkpoints/last"} for fold in (0, 1)]
    (folds / "ensemble.json").write_text(json.dumps({"members": members}))
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    found: dict[str, Any] = {}
    for cell in CODE:
        exec("".join(cell["source"]), found)
    plt.close("all")
    assert found["mask"].shape == found["field"].mask.shape == found["prob_u8"].shape
    assert len(found["targets"]) == capsys.readouterr().out.count("target ")
    assert len(found["dice"]) == len(found["levels"]) and 0 <= found["cascade"] <= 1


def test_it_is_kept_without_outputs() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
