"""Programs that the tests of deployment files run: packages of the dev extra bring them."""

import shutil
import sys
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """Return the path of a program beside this Python, or skip the test where its package has none for this machine."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed beside {sys.executable}")
    return found
