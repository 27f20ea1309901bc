"""Frozen typed configs from YAML, with dotted `key=value` overrides.

YAML states what differs from the defaults. One level of `extends: other.yaml` (relative to the file) is allowed.
There are no environment variables and no interpolation: running a written `config.resolved.yaml` repeats a run.

How the value of an override is read depends on the type of its key:

- Text (`str`, a `Uri`, a choice of words) is taken verbatim, blanks, quotes and `#` included; where the key may be
  null, `null` is null, and a file of that name is `./null`. A list of texts is YAML if it starts with `[`, else one
  item; one of a choice of words is taken apart at its commas: `formats=coco,asap`.
- Everything else is YAML: `5e-4`, `true`, `[0, 1]`, `{low: 1, high: 5}`. A list of numbers may go without its
  brackets: `folds=0,1`.
- `~` at the start of a `Uri` is the home folder, in YAML files too.

`section.key=value` changes one key of a mapping and leaves the others; `section={...}` states a mapping as a whole.
"""

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from stas_core.config_schema import Config as Config
from stas_core.config_schema import OrFile as OrFile
from stas_core.config_schema import SettingsOf as SettingsOf
from stas_core.config_schema import Uri as Uri
from stas_core.config_schema import current_name as current_name
from stas_core.config_schema import (
    default_of,
    is_text,
    kind_of,
    section_of,
    types_of,
    value_kind,
    with_current_names,
)
from stas_core.config_schema import fields as fields
from stas_core.config_schema import keys as keys
from stas_core.errors import ConfigError
from stas_core.spelling import nearest as nearest
from stas_core.spelling import rejoined, with_blanks, without_password

MAX_INTEGER_BITS = 1000
"""Integers of up to about this size fit in a float."""
MAX_YAML_BYTES, MAX_YAML_NODES, MAX_YAML_DEPTH = 1 << 20, 100_000, 50
"""A config has a few thousand values, some levels deep; more is a mistake, or aliases that multiply one another."""

C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `5e-4` as a number, and refuses YAML that no config needs; its messages say what."""

    depth = 0

    def error(self, node: yaml.Node | None, why: str) -> ConfigError:
        line = (node.start_mark if node is not None else self.get_mark()).line + 1
        return ConfigError(f"{self.name}, line {line}: {why}")

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            raise self.error(None, f"more than {MAX_YAML_DEPTH} levels of nesting; a config has a handful")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        self._count(node, {})
        return super().construct_document(node)

    def _count(self, node: yaml.Node, known: dict[int, int]) -> int:
        """Count the values of a node with its aliases expanded."""
        if id(node) in known:
            if known[id(node)] == 0:
                raise self.error(node, "an alias within what it stands for; write the value out")
            return known[id(node)]
        known[id(node)] = 0
        below: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            below = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            below = node.value
        size = 1 + sum(self._count(part, known) for part in below)
        if isinstance(node, yaml.ScalarNode):
            size += len(node.value) // 64
        if size > MAX_YAML_NODES:
            raise self.error(node, f"more than {MAX_YAML_NODES} values once aliases are written out; write fewer")
        known[id(node)] = size
        return size

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
        except (yaml.YAMLError, ConfigError):
            raise
        except Exception as error:  # what Python makes of a date of the 13th month, of `!!int x`, of 5,000 digits
            shown = str(node.value)[:40] if isinstance(node, yaml.ScalarNode) else type(node).__name__
            raise self.error(
                node, f"{shown} is no {node.tag.rpartition(':')[2]} ({error}); quote it if it is text"
            ) from error
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise self.error(node, f"an integer of {value.bit_length()} bits, expected at most {MAX_INTEGER_BITS}")
        if isinstance(value, str) and not _is_unicode(value):
            raise self.error(node, f"{value!r} holds half a character (a surrogate); write the whole character")
        return value


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the text `5e-4`, which the loader would read as a number."""


_EXPONENT = re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def _mapping_of_names(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise loader.error(key_node, "merge keys (<<) are not supported; write the values out, or use extends")
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise loader.error(
                key_node, f"key {key!r} is of type {type(key).__name__}, expected a name; quote it if it is one"
            )
        if key in values:
            raise ConfigError(
                f"duplicate key {key!r} at line {key_node.start_mark.line + 1} of {loader.name}: keep one"
            )
        values[key] = loader.construct_object(value_node, deep=True)
    return values


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_of_names)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def parse_yaml(text: str, name: str = "<text>") -> Any:
    """Parse YAML text; `name` stands in error messages.

    Raises:
        ConfigError: the text is not YAML, a key is given twice or is no text, or it is larger, deeper or holds larger
            numbers than a config can.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ConfigError(f"{name} has {len(text)} characters, more than the {MAX_YAML_BYTES} of any config")
    try:
        loader = _Loader(text)
        loader.name = name
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping, merged over the file that its `extends` names.

    Raises:
        ConfigError: a file cannot be read, holds no mapping, or extends one that extends a third.
    """
    values = _read_mapping(Path(path))
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"{path} extends {parent!r}, expected the path of a YAML file")
    inherited = _read_mapping(Path(path).parent / parent)
    if "extends" in inherited:
        raise ConfigError(f"{path} extends {parent}, which itself has `extends`: only one level is allowed")
    return merge(inherited, values)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read config file {path}: {reason}; give an existing YAML file") from error
    try:
        text = data[:MAX_YAML_BYTES].decode("utf-8-sig") if len(data) <= MAX_YAML_BYTES else None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    if text is None:
        raise ConfigError(f"{path} has more than {MAX_YAML_BYTES} bytes, more than any config; is it another file?")
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


@dataclass(frozen=True)
class _Place:
    """Where a dotted key leads: its parts, the type found there (None: unknown) and the default."""

    path: tuple[str, ...]
    kind: Any
    default: Any = None
    optional: bool = False
    whole: bool = False
    """A mapping that is not a section: given as a whole, it replaces what was there."""
    mapping: int | None = None
    """How many names lead to the mapping that holds this key, if one does."""


def _find(kind: Any, names: tuple[str, ...], default: Any) -> _Place:
    members, optional = types_of(kind)
    section, values = section_of(members), value_kind(members)
    if not names:
        return _Place((), members, default, optional, whole=values is not None)
    if section is not None and names[0] in section.model_fields:
        field = section.model_fields[names[0]]
        below = getattr(default, names[0], None) if isinstance(default, Config) else default_of(field)
        place = _find(kind_of(field), names[1:], below)
    elif values is not None:  # names of its keys may have dots in them
        inner = section_of(types_of(values)[0])
        whole = inner is None or len(names) == 1 or names[-1] not in inner.model_fields
        key = ".".join(names if whole else names[:-1])
        place = _find(values, () if whole else names[-1:], None)
        return _Place((key, *place.path), place.kind, default, place.optional, place.whole, mapping=0)
    else:
        return _Place(names, None)
    depth = None if place.mapping is None else place.mapping + 1
    return _Place((names[0], *place.path), place.kind, place.default, place.optional, place.whole, depth)


def _read_value(text: str, place: _Place, name: str) -> Any:
    """Read an override's value as its key's type demands."""
    if place.kind is None:
        return parse_yaml(text, name)
    if place.optional and text == "null":
        return None
    if place.kind and all(is_text(kind) for kind in place.kind):
        return text
    if any(isinstance(kind, OrFile) for kind in place.kind) and not text.lstrip().startswith("{"):
        return text
    lists = [kind for kind in place.kind if get_origin(kind) in (tuple, list)]
    items = types_of(get_args(lists[0])[0])[0] if lists else []
    if items and all(is_text(item) for item in items) and not text.lstrip().startswith("["):
        return [text] if str in items else [word.strip(" '\"") for word in text.split(",") if text.strip()]
    if lists and len(lists) == len(place.kind) and not text.lstrip().startswith(("[", "{", "-")):
        text = f"[{text}]"
    value = parse_yaml(text, name)
    return with_blanks(value) if value_kind(place.kind) is not None else value


def parse_overrides(
    overrides: Sequence[str], cls: type[Config] | None = None, values: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Turn `["optim.lr=5e-4"]` into `{"optim": {"lr": 0.0005}}`, laid over the values of a file.

    The types of `cls` decide how a value is read; without it, all are YAML.

    Raises:
        ConfigError: an override is not of the form key=value, or its value cannot be read.
    """
    laid = dict(values or {})
    for item in rejoined(overrides):
        key, equals, text = item.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override {item!r} is not of the form key=value, for example optim.lr=5e-4")
        if not _is_unicode(item):  # how Python passes on bytes that it cannot decode
            remedy = {"utf-8": "give the file or folder a name that is"}.get(known := sys.getfilesystemencoding())
            raise ConfigError(f"override {item!r} is not {known.upper()}; {remedy or 'set PYTHONUTF8=1'}")
        place = _find(cls, tuple(key.split(".")), None)
        laid = _lay(laid, place, _read_value(text, place, f"override {key}"))
    return laid


def _lay(values: Mapping[str, Any], place: _Place, value: Any) -> dict[str, Any]:
    """Set a value in nested mappings; a section that is missing is first filled with its defaults."""
    top: dict[str, Any] = dict(values)
    level = top
    for depth, name in enumerate(place.path[:-1], start=1):
        held = level.get(name)
        if not isinstance(held, Mapping):
            held = place.default if depth == place.mapping and isinstance(place.default, Mapping) else {}
        level[name] = level = dict(held)
    last, held = place.path[-1], level.get(place.path[-1])
    if isinstance(held, Mapping) and isinstance(value, Mapping) and not place.whole:
        value = merge(held, value)
    level[last] = value
    return top


def build(cls: type[C], values: Mapping[str, Any]) -> C:
    """Validate a nested mapping (a YAML file, a Tune sample) as `cls`.

    Raises:
        ConfigError: naming each wrong key's path, its value, what was expected and the nearest valid name.
    """
    try:
        return cls.model_validate(_over_defaults(cls, values))
    except ValidationError as error:
        valid = list(keys(cls))
        found = error.errors()
        inner = {item["loc"][:depth] for item in found for depth in range(len(item["loc"]))}
        # Of a list of which no item is valid, pydantic also says that it is too short.
        told = [item for item in found if item["type"] != "too_short" or item["loc"] not in inner]
        raise ConfigError("\n".join(_explain(item, valid) for item in told)) from None


def _over_defaults(cls: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what a section's default sets beyond the defaults of its class."""
    completed = dict(values)
    for name, field in cls.model_fields.items():
        section, value = section_of(types_of(field.annotation)[0]), values.get(name)
        if section is not None and isinstance(value, Mapping):
            default = default_of(field)
            stated = default.model_dump(exclude_unset=True) if isinstance(default, Config) else {}
            completed[name] = _over_defaults(section, merge(stated, with_current_names(section, value)))
    return completed


def _explain(item: Any, valid: Sequence[str]) -> str:
    path = ".".join(str(part) for part in item["loc"])
    value, shown = item["input"], _shortened(item["input"])
    if item["type"] == "extra_forbidden":
        given = path
        while isinstance(value, Mapping) and len(value) == 1:  # `data.images=x` is {"data": {"images": "x"}} by now
            ((name, value),) = value.items()
            given = f"{given}.{name}"
        return f"unknown key {given} = {_shortened(value)}: did you mean {nearest(given, valid)}?"
    if item["type"] == "model_type":
        inner = [key for key in valid if key.startswith(f"{path}.")]
        example = f"{inner[0]}=..." if inner else "the keys in it"
        return f"{path} = {shown}: this is a section, not a value; set {example}"
    return f"{path} = {shown}: {item['msg'].removeprefix('Value error, ')}"


def _shortened(value: Any) -> str:
    """Return a value as a message shows it."""
    shown = without_password(repr(value))
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def load_config(cls: type[C], path: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, lay `key=value` overrides on it, and validate.

    Raises:
        ConfigError: naming the key path, the value, what was expected and the nearest valid name.

    Example:
        >>> from stas_core.predict.inference import InferenceConfig
        >>> load_config(InferenceConfig, None, ["flips=[identity, lr]", "amp=none"]).flips
        ('identity', 'lr')
    """
    return build(cls, parse_overrides(overrides, cls, read_yaml(path) if path is not None else None))


def section_files(cls: type[Config], values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the files that are given in place of sections (`OrFile`), by key."""
    found: dict[str, str] = {}
    given = with_current_names(cls, values)
    for name, field in cls.model_fields.items():
        value, (members, _) = given.get(name), types_of(kind_of(field))
        if isinstance(value, Mapping) and (section := section_of(members)) is not None:
            found |= section_files(section, value, f"{prefix}{name}.")
        elif isinstance(value, str) and any(isinstance(kind, OrFile) for kind in members):
            found[f"{prefix}{name}"] = value
    return found


def additions(key: str, names: Sequence[str], value: str, held: Mapping[str, str]) -> str:
    """Return the overrides, as a shell takes them, that add `name: value` of each name to a mapping of words, `key`.

    What `section.key=` cannot hold (`=`, empty parts, what does not print) is stated with all that the mapping has
    (`held`), in YAML.

    Example:
        >>> print(additions("labels", ["Tumor", "a b"], "target", {"STAS": "target"}))
        labels.Tumor=target 'labels.a b=target'
        >>> print(additions("labels", ["a=b"], "target", {"STAS": "target"}))
        'labels={"STAS": target, "a=b": target}'
    """
    plain = [name for name in names if "=" not in name and all(name.split(".")) and name.isprintable()]
    others = {name: value for name in names if name not in plain}
    words = [f"{key}.{name}={value}" for name in plain]
    if others:  # first: it replaces what was there
        stated = ", ".join(f"{_quoted(name)}: {word}" for name, word in {**held, **others}.items())
        words.insert(0, f"{key}={{{stated}}}")
    return " ".join(map(shlex.quote, words))


def _quoted(name: str) -> str:
    return str(yaml.dump(name, Dumper=_Dumper, default_style='"', allow_unicode=True, width=math.inf)).strip()


def dump(config: Config) -> str:
    """Write a config as YAML that `load_config` reads back to an equal one."""
    # Escapes, not plain Unicode: PyYAML writes U+0085 and its like unquoted and reads them back as a line break.
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=100)


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
            text = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=10_000, allow_unicode=True)
            if not text[:-1].isprintable():  # as in dump
                text = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=10_000)
            text = text.removesuffix("\n...\n").strip()
            lines.append(f"{pad}{name}: {text}{'  # ' + description if description else ''}")
