"""Which packages each kind of process loads: every one of them costs memory and start-up, in every process."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

LOADED = """
import os, sys, {modules}
names = {{name.partition(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names)
print(*sorted(name for name in names if not name.startswith("_")), flush=True)
os._exit(0)  # torch takes seconds to take itself apart
"""
LIGHT = (
    "PIL annotated_types cloudpickle cv2 cython_runtime fsspec jaxtyping numpy pyarrow pycocotools pydantic "
    "pydantic_core shapely stas_core typing_extensions typing_inspection workflows yaml"
)
"""All that reading and finishing an image need, and cloudpickle, which pyarrow loads where it is installed."""
FIGURES = {"matplotlib", "tensorboard"}
HEAVY = FIGURES | {"torch", "torchvision", "ray", "optuna", "scipy", "skimage", "pandas", "albumentations", "rich"}
HEAVY |= {"timm", "safetensors", "mlflow"}
"""What help, a dry run and the refusal of a setting must not wait for."""
STAGES = sorted(path.stem for path in (ROOT / "workflows").glob("*.py") if '__name__ == "__main__"' in path.read_text())
ALL_STAGES = ", ".join(f"workflows.{name}" for name in STAGES)
LIBRARIES = "stas_core.networks.libraries"
PIPELINES = "workflows.scoring.pipeline, workflows.scoring.slide_pipeline"


def loaded(modules: str) -> set[str]:
    line = [sys.executable, "-c", LOADED.format(modules=modules)]
    return set(subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())


def test_reading_and_finishing_load_few_packages() -> None:
    assert loaded("workflows.scoring.guarded_reader, workflows.scoring.tasks") <= set(LIGHT.split())


@pytest.mark.parametrize(
    ("process", "modules", "banned"),
    [
        ("stages, tasks of slides", f"{ALL_STAGES}, workflows.scoring.slide_tasks", HEAVY),
        ("pipelines, fold controller", f"{PIPELINES}, workflows.folds.launch", HEAVY - {"ray", "pandas"}),
        ("actor", "workflows.scoring.actor", FIGURES | {"albumentations", "skimage", "pandas"}),
        ("actor with a model", f"workflows.scoring.actor, {LIBRARIES}; {LIBRARIES}.load()", {"sympy", "triton"}),
        ("fold worker", "workflows.folds.worker", {"matplotlib", "optuna", "skimage"}),
        ("study", "optuna, workflows.tune_postprocess", HEAVY - {"optuna"}),
    ],
)
def test_a_process_loads_only_what_it_uses(process: str, modules: str, banned: set[str]) -> None:
    assert not loaded(modules) & banned, process
