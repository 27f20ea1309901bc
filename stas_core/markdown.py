"""Markdown that reports are made of."""

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; a bar within a cell is escaped, line breaks become spaces.

    Example:
        >>> print(table(["fold", "Dice"], [["0", "0.91"]]))
        | fold | Dice |
        | --- | --- |
        | 0 | 0.91 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
