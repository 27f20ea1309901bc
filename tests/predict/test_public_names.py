"""What the library offers by name, as docs/python.md shows it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stas_core
from stas_core.errors import InputError
from stas_core.predict import ensemble as ensembles
from stas_core.predict.inference import InferenceConfig
from stas_core.predict.predictor import Predictor
from tests.conftest import ROOT

BLOCKS = re.findall(r"((?:^    .*\n|^\n)+)", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE)
CODE = "".join(block for block in BLOCKS if "stas_core." in block)


def test_the_documented_lines_give_what_scoring_gives(
    ensemble: str, many_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    shutil.copytree(ensemble, tmp_path / "runs" / "demo" / "folds")
    members = [f'{{"checkpoint": "fold_{fold}/checkpoints/last"}}' for fold in (0, 1)]
    (tmp_path / "runs" / "demo" / "folds" / "ensemble.json").write_text(f'{{"members": [{", ".join(members)}]}}')
    shutil.copy(many_images / "field_00003.jpg", tmp_path / "field.jpg")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(re.sub(r"^    ", "", CODE, flags=re.MULTILINE), found)
    loaded = ensembles.load_members(ensembles.find_checkpoints(ensemble), torch.device("cpu"))
    plain = Predictor(loaded, device=torch.device("cpu"), config=InferenceConfig())
    image = stas_core.read_image(str(many_images / "field_00003.jpg"))
    assert np.array_equal(found["prob_u8"], plain.predict_u8(image))
    assert found["labels"].shape == found["mask"].shape == image.shape[:2]
    assert found["passes"] == [2] and found["fast"].predict_u8(image).shape == image.shape[:2]


def test_names_load_nothing_before_they_are_used() -> None:
    program = (
        "import sys, stas_core; assert 'torch' not in sys.modules and 'numpy' not in sys.modules;"
        "stas_core.PostprocessConfig; assert 'torch' not in sys.modules;"
        "assert all(getattr(stas_core, name).__name__ == name and name in dir(stas_core) for name in stas_core.__all__)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="no attribute 'load_ensembles'"):
        stas_core.load_ensembles  # noqa: B018


def test_an_image_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"text")
    with pytest.raises(InputError, match=r"a\.jpg"):
        stas_core.read_image(str(tmp_path / "a.jpg"))
