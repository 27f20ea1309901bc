"""timm, torchvision and segmentation_models_pytorch, loaded without PyTorch's compiler.

torchvision asks the compiler whether one of its functions can be compiled, and timm marks some of its own as not to be
compiled, while they are imported: that alone loads `torch._dynamo`, SymPy and Triton, two fifths of the processor time
and a fifth of the memory of a process that predicts, although nothing here is compiled. Until something is, the two
functions that they import wait.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType
from typing import Any, cast

import torch

COMPILER = "torch._dynamo"
LIBRARIES = ("torchvision", "timm", "segmentation_models_pytorch")


@functools.cache
def load() -> None:
    """Import the libraries, once; call it before any of them is imported.

    Whoever compiles later, or trains, gets the compiler as it is.
    """
    if COMPILER in sys.modules:
        return
    with suppress(ImportError, AttributeError), _compiler_waiting():  # a version that wants more of it gets it
        for name in LIBRARIES:
            import_module(name)


@contextmanager
def _compiler_waiting() -> Iterator[None]:
    compiler, part = ModuleType(COMPILER), ModuleType(f"{COMPILER}.utils")
    compiler.__dict__.update(disable=_disable, utils=part, __path__=[])
    part.__dict__["is_compile_supported"] = _is_compile_supported
    sys.modules |= {module.__name__: module for module in (compiler, part)}
    torch.__dict__["_dynamo"] = compiler
    try:
        yield
    finally:
        del sys.modules[compiler.__name__], sys.modules[part.__name__], torch.__dict__["_dynamo"]


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return cast(bool, is_compile_supported(device_type))


def _disable(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    """Return the function as `torch._dynamo.disable` would; it is marked when it is first called."""

    @functools.cache
    def marked() -> Callable[..., Any]:
        disable: Any = import_module(COMPILER).disable
        return cast(Callable[..., Any], disable(function, *args, **options))

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        return marked()(*given, **named)

    return call
