"""Faults of a node, not of what it was given: they say where they were met, so that other nodes can do the work."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from stas_core.errors import LocalDiskError, ResourceError


class NodeFault(ResourceError):
    """A node cannot do what the cluster promises of it; its items are not to blame."""

    def __init__(self, message: str, node_id: str):
        super().__init__(message, node_id)  # both: they are what pickle makes it anew from
        self.node_id = node_id

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def naming_this_node() -> Iterator[None]:
    """Name this node in an error about what it lacks: another may have that.

    Raises:
        NodeFault: what was met, and where.
    """
    try:
        yield
    except (LocalDiskError, ResourceError) as error:
        import ray

        raise NodeFault(str(error), ray.get_runtime_context().get_node_id()) from None


def beside(avoid: Collection[str]) -> dict[str, str]:
    """Return the label selector of tasks and actors that belong on other nodes than these."""
    from workflows.ray_internals import NODE_LABEL

    return {NODE_LABEL: f"!in({','.join(sorted(avoid))})"} if avoid else {}
