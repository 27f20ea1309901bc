"""Arrays that were used last, as many as fit into a number of bytes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable


@runtime_checkable
class Held(Protocol):
    """An array, or what holds bytes like one."""

    @property
    def nbytes(self) -> int:
        """Return how many."""


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Held)
_ENTRY_BYTES = 256
"""That an entry takes beside its array: many may be empty."""


class RecentArrays(Generic[K]):
    """Keeps arrays by key; where they exceed its bytes, those of the least recent use give way, but never the last.

    Example:
        >>> import numpy as np
        >>> kept: RecentArrays[str] = RecentArrays(most_bytes=2000)
        >>> make = lambda: np.zeros(800, np.uint8)
        >>> first = kept.of("a", make)
        >>> first is kept.of("a", make), kept.of("b", make) is kept.of("c", make), first is kept.of("a", make)
        (True, False, False)
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._arrays: OrderedDict[K, Any] = OrderedDict()
        self._num_bytes = 0

    def of(self, key: K, make: Callable[[], V]) -> V:
        """Return the array of a key, which is made unless it is kept."""
        if key in self._arrays:
            self._arrays.move_to_end(key)
            found: V = self._arrays[key]
            return found
        array = make()
        self._arrays[key] = array
        self._num_bytes += array.nbytes + _ENTRY_BYTES
        while self._num_bytes > self._most_bytes and len(self._arrays) > 1:
            self._num_bytes -= self._arrays.popitem(last=False)[1].nbytes + _ENTRY_BYTES
        return array

    def clear(self) -> None:
        """Let go of all."""
        self._arrays.clear()
        self._num_bytes = 0
