"""Which packages the processes of scoring load: each costs memory and start-up, in every one of them."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

LOADED = """
import sys, {module}
names = {{name.partition(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names)
print(*sorted(name for name in names if not name.startswith("_")))
"""
LIGHT = (
    "PIL annotated_types cv2 cython_runtime fsspec jaxtyping numpy pyarrow pycocotools pydantic pydantic_core "
    "stas_core typing_extensions typing_inspection workflows yaml"
)


def loaded(module: str) -> set[str]:
    line = [sys.executable, "-c", LOADED.format(module=module)]
    return set(subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize("module", ["workflows.scoring.guarded_reader", "workflows.scoring.tasks"])
def test_reading_and_finishing_load_few_packages(module: str) -> None:
    assert loaded(module) <= set(LIGHT.split())


def test_actors_load_neither_figures_nor_augmentation() -> None:
    assert not loaded("workflows.scoring.actor") & {"matplotlib", "albumentations", "skimage", "tensorboard", "pandas"}


@pytest.mark.parametrize("stage", ["score_images", "evaluate", "prepare_data"])
def test_stages_start_without_what_only_their_work_needs(stage: str) -> None:
    heavy = {
        "ray",
        "pandas",
        "torch",
        "matplotlib",
        "optuna",
        "scipy",
        "skimage",
        "albumentations",
        "timm",
        "safetensors",
    }
    assert not loaded(f"workflows.{stage}") & heavy
