"""One local Ray for the tests that call stages in this process."""

from collections.abc import Iterator

import pytest

from workflows.runtime import Node, ray_session


@pytest.fixture(scope="session")
def ray_nodes() -> Iterator[list[Node]]:
    """Start Ray with two CPUs once; stages called inside use it."""
    with ray_session(num_cpus=2) as nodes:
        yield nodes
