"""Arrays that were used last, as many as fit into a number of bytes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
K = TypeVar("K", bound=Hashable)
_ENTRY_BYTES = 256
"""That an entry takes beside its array: many may be empty."""


class RecentArrays(Generic[K]):
    """Keeps arrays by key; where they exceed its bytes, those of the least recent use give way, but never the last.

    Example:
        >>> kept: RecentArrays[str] = RecentArrays(most_bytes=2000)
        >>> make = lambda: np.zeros(800, np.uint8)
        >>> first = kept.of("a", make)
        >>> first is kept.of("a", make), kept.of("b", make) is kept.of("c", make), first is kept.of("a", make)
        (True, False, False)
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._arrays: OrderedDict[K, Bytes] = OrderedDict()
        self._num_bytes = 0

    def of(self, key: K, make: Callable[[], Bytes]) -> Bytes:
        """Return the array of a key, which is made unless it is kept."""
        if key in self._arrays:
            self._arrays.move_to_end(key)
            return self._arrays[key]
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
