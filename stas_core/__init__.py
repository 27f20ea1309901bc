"""Spread-through-air-spaces segmentation: the library under the Ray workflows. It never imports Ray.

What notebooks and other programs need of it is here by name; docs/python.md shows it. A name loads its module when it
is first used: `import stas_core` loads neither torch nor anything else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stas_core.data.images import read_image
    from stas_core.predict.ensemble import load_ensemble
    from stas_core.predict.inference import InferenceConfig
    from stas_core.predict.postprocess import PostprocessConfig, find_targets, run_cascade
    from stas_core.predict.predictor import Predictor

__version__ = "0.1.0"
__all__ = [
    "InferenceConfig",
    "PostprocessConfig",
    "Predictor",
    "find_targets",
    "load_ensemble",
    "read_image",
    "run_cascade",
]

_MODULES = {
    "InferenceConfig": "predict.inference",
    "PostprocessConfig": "predict.postprocess",
    "Predictor": "predict.predictor",
    "find_targets": "predict.postprocess",
    "load_ensemble": "predict.ensemble",
    "read_image": "data.images",
    "run_cascade": "predict.postprocess",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
