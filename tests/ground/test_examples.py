"""The examples in docstrings run as they are shown."""

import doctest
import importlib
import pkgutil

import pytest

import stas_core

MODULES = [found.name for found in pkgutil.walk_packages(stas_core.__path__, "stas_core.")]
SHOWN = [name for name in MODULES if ">>> " in (importlib.util.find_spec(name).loader.get_source(name) or "")]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", SHOWN)
def test_examples_give_what_they_show(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0
