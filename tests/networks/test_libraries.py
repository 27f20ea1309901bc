"""timm and its like without the compiler, which is there for whoever compiles."""

import subprocess
import sys

from tests.conftest import ROOT

PROGRAM = """
import sys, torch
from stas_core.networks import libraries
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.model import build_model

model = build_model(ModelConfig(encoder="mobilenetv3_small_050", encoder_weights="none"), pretrained=False).eval()
field = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    predicted = model(field)[0]
assert libraries.COMPILER not in sys.modules, "a library asks for more of the compiler: see libraries.py"
assert not {"sympy", "triton"} & sys.modules.keys()

# Whoever compiles gets the compiler, and what timm does not want to be compiled runs as it is.
from timm.models.naflexvit import NaFlexRopeIterator
try:
    next(object.__new__(NaFlexRopeIterator))
except AttributeError as error:
    assert "_depth_idx" in str(error) and torch._dynamo.is_dynamo_supported()
compiled = torch.compile(model, backend="eager")
with torch.inference_mode():
    assert torch.equal(compiled(field)[0], predicted)
"""


def test_models_predict_without_the_compiler_and_can_be_compiled() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
