"""Frozen typed configs from YAML, with dotted `key=value` overrides.

YAML states what differs from the defaults. One level of `extends: other.yaml` (relative to the file) is allowed.
There are no environment variables and no interpolation: running a written `config.resolved.yaml` repeats a run.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from stas_core.errors import ConfigError


class Config(BaseModel):
    """Base of every config section: frozen, no unknown keys, defaults validated, fields described by docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `5e-4` as a number and refuses duplicate keys."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _mapping_without_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise ConfigError(
                f"duplicate key {key!r} at line {key_node.start_mark.line + 1} of {key_node.start_mark.name}: keep one"
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def parse_yaml(text: str, name: str = "<text>") -> Any:
    """Parse YAML text; `name` stands in error messages.

    Raises:
        ConfigError: the text is not YAML, or a key is given twice.
    """
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from error
    finally:
        loader.dispose()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping, merged over the file its `extends` names."""
    values = _read_mapping(Path(path))
    parent = values.pop("extends", None)
    if parent is None:
        return values
    inherited = _read_mapping(Path(path).parent / parent)
    if "extends" in inherited:
        raise ConfigError(f"{path} extends {parent}, which itself has `extends`: only one level is allowed")
    return merge(inherited, values)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}; give an existing YAML file") from error
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, expected a mapping of keys to values")
    return values


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; values of `above` win, lists are replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `["optim.lr=5e-4"]` into `{"optim": {"lr": 0.0005}}`; values are YAML."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form key=value, for example optim.lr=5e-4")
        nested: Any = parse_yaml(text, f"override {key}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = merge(values, nested)
    return values


def build(cls: type[C], values: Mapping[str, Any]) -> C:
    """Validate a nested mapping (a YAML file, a Tune sample) as `cls`.

    Raises:
        ConfigError: naming each wrong key's path, its value, what was expected and the nearest valid name.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        valid = list(keys(cls))
        raise ConfigError("\n".join(_explain(item, valid) for item in error.errors())) from None


def _explain(item: Any, valid: Sequence[str]) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{path} = {item['input']!r}: {item['msg']}"
    return f"unknown key {path} = {item['input']!r}: did you mean {nearest(path, valid)}?"


def nearest(key: str, valid: Sequence[str]) -> str:
    """Return the valid dotted key that is meant by a wrong one: of the same last part, or most like it."""
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
    leaf = [name for name in valid if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return (leaf or near or ["--help"])[0]


def load_config(cls: type[C], path: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, lay `key=value` overrides on it, and validate."""
    values = read_yaml(path) if path is not None else {}
    return build(cls, merge(values, parse_overrides(overrides)))


def dump(config: Config) -> str:
    """Write a config as YAML that `load_config` reads back to an equal one."""
    # Escapes, not plain Unicode: PyYAML writes U+0085 and its like unquoted and reads them back as a line break.
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def keys(cls: type[Config], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every leaf key."""
    for key, _, _ in fields(cls, prefix):
        yield key


def fields(cls: type[Config], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, default, description) of every leaf field."""
    for name, field in cls.model_fields.items():
        key = f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from fields(field.annotation, f"{key}.")
        else:
            default = field.get_default(call_default_factory=True) if not field.is_required() else "(required)"
            yield key, default, " ".join((field.description or "").split())


def describe(config: Config) -> str:
    """Render the resolved config as YAML with each field's description as a comment."""
    lines: list[str] = []
    _describe(config, 0, lines)
    return "\n".join(lines) + "\n"


def _describe(config: Config, depth: int, lines: list[str]) -> None:
    pad = "  " * depth
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        description = " ".join((field.description or "").split())
        if isinstance(value, Config):
            lines.append(f"{pad}{name}:{'  # ' + description if description else ''}")
            _describe(value, depth + 1, lines)
        else:
            plain = config.model_dump(mode="json", include={name})[name]
            text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
            text = text.strip().removesuffix("...").strip()
            lines.append(f"{pad}{name}: {text}{'  # ' + description if description else ''}")
