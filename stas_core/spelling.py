"""What people meant by the settings that they typed on a command line, and what of them is not shown again."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

_SECRETS = (
    (r"(://[^:@]*):.*@", r"\1:***@"),
    (r"(https?://)[^/]*@", r"\1***@"),
    (r"([?&;][^=&]*(?:pass(?!file)|pwd|token|secret|credential|odbc_connect)[^=&]*=)[^&]+", r"\1***"),
    (r"([?&;][^=&]*key[^=&]*=)(?!/|\.|~|%2f)[^&]+", r"\1***"),  # but not the path of a key
)


def without_passwords(text: str) -> str:
    """Return a text with the passwords and tokens of its URIs, which have no blanks, left out.

    Example:
        >>> without_passwords("tracking.uri=postgresql://stas:s3cret@db/mlflow")
        'tracking.uri=postgresql://stas:***@db/mlflow'
    """
    return re.sub(r"\S+", lambda word: without_password(word[0]), text)


def without_password(value: str) -> str:
    """Return one setting or URI without its password and tokens, which may hold any character.

    Example:
        >>> without_password("postgresql://stas:s3/ c@ret@db/mlflow?connect_timeout=5&pwd=s3cret")
        'postgresql://stas:***@db/mlflow?connect_timeout=5&pwd=***'
    """
    for pattern, shown in _SECRETS:
        value = re.sub(pattern, shown, value, flags=re.IGNORECASE | re.DOTALL)
    return value


def rejoined(overrides: Sequence[str]) -> list[str]:
    """Rejoin an override that the shell has split at blanks: `labels={tumor: target, other: ignore}` without quotes."""
    joined: list[str] = []
    for item in overrides:
        opened = joined[-1].partition("=")[2] if joined else ""
        if opened.startswith("{") and opened.count("{") > opened.count("}") and "=" not in item:
            joined[-1] = f"{joined[-1]} {item}"
        else:
            joined.append(item)
    return joined


def with_blanks(value: Any) -> Any:
    """Read `{tumor:target}` as `{tumor: target}`; to YAML it is one key without a value."""
    if not isinstance(value, dict):
        return value
    read: dict[str, Any] = {}
    for key, text in value.items():
        name, colon, word = key.rpartition(":")
        read |= {name: word} if text is None and colon and name and word else {key: text}
    return read


def nearest(key: str, valid: Sequence[str]) -> str:
    """Suggest a valid key for a misspelt one: the same last part, else the closest match.

    Example:
        >>> nearest("train.epochs", ["optim.lr", "training.epochs"])
        'training.epochs'
    """
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
    leaf = [name for name in valid if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return (leaf or near or ["--help"])[0]
