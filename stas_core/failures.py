"""What could not be used, as every stage reports it in its `failures.parquet`."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stas_core.errors import InputError

SHOWN = 10
"""Kinds of failures that a stage prints; the file has all."""


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


def groups(failures: Iterable[Failure]) -> list[list[Failure]]:
    """Return failures by kind, the most frequent first: messages that differ only in the id are of one kind."""
    kinds: dict[tuple[str, str], list[Failure]] = {}
    for one in failures:
        template = re.sub(rf"(?<!\w){re.escape(one.id)}(?!\w)", "{id}", one.message)
        kinds.setdefault((one.reason, template), []).append(one)
    return sorted(kinds.values(), key=len, reverse=True)


def kinds(failures: Iterable[Failure]) -> list[str]:
    """Return a line for each kind of failure, the most frequent first: how many, and the first; at most `SHOWN`.

    >>> kinds([Failure(name, "evaluate", "empty_file", f"{name}.png holds 0 bytes") for name in "ab"])
    ['2 x empty_file, such as a: a.png holds 0 bytes']
    """
    lines = []
    for some in groups(failures)[:SHOWN]:
        first = some[0]
        such = f"{len(some)} x {first.reason}, such as {first.id}" if len(some) > 1 else f"{first.id}: {first.reason}"
        lines.append(f"{such}: {first.message}")
    return lines


def lines(failures: Sequence[Failure], what: str = "failed") -> list[str]:
    """Return what a stage prints about its failures: counts by reason, then a line for each kind of message."""
    if not failures:
        return []
    return [f"{what}: {count_reasons(failures)}", *(f"{what}: {line}" for line in kinds(failures))]
