"""What `ray job submit --working-dir .` would upload of a tree full of things that must stay at home."""

import logging
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env import packaging  # private: the function that the command itself packs with

from tests.conftest import ROOT

HIDDEN = [".env", ".aws/credentials", ".ssh/id_rsa", ".netrc", ".git/config", ".venv/lib/x.py", ".config/x.yaml"]
AT_HOME = [*HIDDEN, "secret.env", "id_rsa", "key.pem", "token", "weights.safetensors", "model.pt", "cohort.parquet"]
AT_HOME += [
    "patients.csv",
    "slide.svs",
    "slide.ndpi",
    "a.tif",
    "b.png",
    "runs/a/fold_0/fold.json",
    "notes.yaml",
    "x.py",
]
AT_HOME += ["data/img.jpg", "tests/test_x.py", "CHANGELOG.md"]
BESIDE_CODE = ["id_rsa", ".env", "secret.env", "w.safetensors", "t.parquet", "s.svs", ".hidden.py", ".ssh/config.yaml"]
BESIDE_CODE += ["__pycache__/a.py", "deep/er/id_rsa", "deep/.aws/x.yaml", "deep/t.csv"]


def packed(tree: Path, target: Path) -> set[str]:
    packaging.create_package(str(tree), target, include_gitignore=True, logger=logging.getLogger("test"))
    with zipfile.ZipFile(target) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def tracked() -> list[str]:
    found = [path for folder in ("workflows", "stas_core") for path in (ROOT / folder).rglob("*.py")]
    found += [*(ROOT / "configs").rglob("*.yaml"), ROOT / "pyproject.toml"]
    found += [path for path in (ROOT / "stas_core" / "pages").glob("page.*") if path.suffix != ".py"]
    return [str(path.relative_to(ROOT)) for path in found]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of the checkout with all that must not travel beside, and among, its code."""
    root = tmp_path / "tree"
    among = [f"{folder}/{name}" for folder in ("workflows", "stas_core", "configs") for name in BESIDE_CODE]
    for name in [*AT_HOME, *among]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("secret")
    for name in [".rayignore", ".gitignore", *tracked()]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((ROOT / name).read_bytes())
    return root


def test_code_and_configs_travel_and_nothing_else(tree: Path, tmp_path: Path) -> None:
    assert packed(tree, tmp_path / "package.zip") == set(tracked())
