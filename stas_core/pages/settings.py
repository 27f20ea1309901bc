"""Which settings of a run differ from the defaults, for people."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from stas_core import config as configs
from stas_core.config import Config

_MAX_CHARACTERS = 300


@dataclass(frozen=True)
class Setting:
    """A setting that is not at its default."""

    key: str
    value: str
    default: str
    help: str


def changed_settings(values: Mapping[str, Any], cls: type[Config]) -> list[Setting]:
    """Return the settings of a run that differ from the defaults of its stage, sorted by key.

    Args:
        values: all settings, nested, as the manifest holds them.
        cls: the settings of the stage.
    """
    known = {field.name: field for field in configs.fields(cls)}
    changed: dict[str, Setting] = {}
    for key, value in _flat(values, ""):
        field = known.get(key)
        default = _plain(field.default) if field is not None else _default_of(known, key)
        if _plain(value) == default:
            continue
        if field is not None:
            changed[key] = Setting(key, _shown(value), _shown(default), field.text)
        else:  # within a mapping: a line for each of its names
            above, _, name = key.rpartition(".")
            place = above if above and above not in known else key
            text = f"{name}: {_shown(value)}" if place == above else _shown(value)
            before = f"{changed[place].value}, " if place in changed else ""
            changed[place] = Setting(place, f"{before}{text}", _shown(default), "")
    return sorted(changed.values(), key=lambda one: one.key)


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings by dotted key."""
    return dict(_flat(values, ""))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _default_of(known: Mapping[str, Any], key: str) -> Any:
    """Return the default of a key within a mapping or a section that is null by default."""
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        above = known.get(".".join(parts[:length]))
        if above is not None:
            return reduce(_below, parts[length:], _plain(above.default))
    return None


def _below(values: Any, name: str) -> Any:
    return values.get(name) if isinstance(values, Mapping) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def _shown(value: Any) -> str:
    if value is None or value == "(required)":
        return "null" if value is None else "-"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} ..."
