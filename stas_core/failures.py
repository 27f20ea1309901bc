"""What could not be used, as every stage reports it in its `failures.parquet`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stas_core.errors import InputError

SHOWN = 10
"""Failures that a stage prints; the file has all."""


@dataclass(frozen=True)
class Failure:
    """An input that could not be used."""

    id: str
    stage: str
    """The stage that could not use it."""
    reason: str
    """Reason code: one of `errors.py`, or the stage's own."""
    message: str

    @classmethod
    def of(cls, image_id: str, stage: str, error: InputError) -> "Failure":
        """Return the failure that an error is."""
        return cls(image_id, stage, error.reason, str(error))


def count_reasons(failures: Iterable[Failure]) -> str:
    """Return how often each reason occurs, the most frequent first.

    >>> count_reasons([Failure("a", "evaluate", "empty_file", "a.png holds 0 bytes")] * 2)
    '2 empty_file'
    """
    counts = Counter(failure.reason for failure in failures)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def groups(failures: Sequence[Failure]) -> list[str]:
    """Return a line for each kind of message, the most frequent first: how many failures have it, and the first.

    Messages that differ only in their failure's id are of one kind.

    >>> groups([Failure(name, "evaluate", "empty_file", f"{name}.png holds 0 bytes") for name in "ab"])
    ['2 x empty_file, such as a.png holds 0 bytes']
    """
    kinds: dict[tuple[str, str], list[Failure]] = {}
    for one in failures:
        kinds.setdefault((one.reason, one.message.replace(one.id, "{id}")), []).append(one)
    ordered = sorted(kinds.values(), key=len, reverse=True)
    return [f"{len(some)} x {some[0].reason}{', such as' * (len(some) > 1)} {some[0].message}" for some in ordered]


def lines(failures: Sequence[Failure], what: str = "failed") -> list[str]:
    """Return what a stage prints about its failures: counts by reason, then the first few."""
    if not failures:
        return []
    shown = [f"{what}: {one.id}: {one.reason}: {one.message}" for one in failures[:SHOWN]]
    return [f"{what}: {count_reasons(failures)}", *shown]
