"""What a config may hold: its keys, their types, defaults and descriptions."""

import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator, model_validator


def _expand_home(uri: str) -> str:
    if not uri or "\0" in uri:
        raise ValueError("a path needs at least one character and no NUL; give one, or null")
    return str(Path(uri).expanduser()) if uri.startswith("~") else uri


Uri = Annotated[str, AfterValidator(_expand_home)]
"""A local path or object-store URI; `~` is the home folder."""


class Config(BaseModel):
    """Base of every config section: frozen, no unknown keys, finite numbers, fields described by docstrings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    former_names: ClassVar[Mapping[str, str]] = {}
    """Former name of a key -> its name now: files from before the renaming are still read."""

    @model_validator(mode="before")
    @classmethod
    def _read_former_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        for former, name in cls.former_names.items():
            if former in values and name in values:
                raise ValueError(f"{former} is the former name of {name}, and both are given; keep {name}")
        return with_current_names(cls, values)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_ranges(cls, value: Any, info: Any) -> Any:  # pydantic's ValidationInfo cannot be checked at run time
        """Refuse `0-3` for an integer: pydantic would read -3."""
        if isinstance(value, str | list | tuple) and _has_integers(cls.model_fields[str(info.field_name)].annotation):
            for text in [value] if isinstance(value, str) else value:
                if isinstance(text, str) and _RANGE.match(text):
                    raise ValueError(f"{text} is no integer, and ranges are not read; give each, such as 0,1,2,3")
        return value


_RANGE = re.compile(r"\s*\+?[\d_]+\s*-\s*\d")


def _has_integers(kind: Any) -> bool:
    """Tell whether a value, or an item of it, is an integer, and no text."""
    members = types_of(kind)[0]
    inner = [item for member in members for item in get_args(member) if get_origin(member) in (tuple, list)]
    found = [*members, *(one for item in inner if item is not ... for one in types_of(item)[0])]
    return int in found and not any(map(is_text, found))


def with_current_names(cls: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename keys that are given under a former name alone."""
    current = dict(values)
    for former, name in cls.former_names.items():
        if former in current and name not in current:
            current[name] = current.pop(former)
    return current


def current_name(cls: type[Config], key: str) -> str:
    """Return a dotted key whose first part, if it is a former name, is replaced by the current one."""
    first, dot, rest = key.partition(".")
    return f"{cls.former_names.get(first, first)}{dot}{rest}"


@dataclass(frozen=True)
class SettingsOf:
    """Marks a `dict` whose keys are those of a config that is built later."""

    config: type[Config]


@dataclass(frozen=True)
class OrFile:
    """Marks a section that may be given as the path of a YAML file instead."""


def types_of(kind: Any) -> tuple[list[Any], bool]:
    """Return the types a value may have (annotations stripped, our own marks kept), and whether it may be null."""
    if get_origin(kind) is Annotated:
        inner, *marks = get_args(kind)
        ours = [mark for mark in marks if isinstance(mark, SettingsOf | OrFile)]
        found, optional = types_of(inner)
        return ([ours[0].config] if ours and isinstance(ours[0], SettingsOf) else [*found, *ours]), optional
    if get_origin(kind) in (Union, types.UnionType):
        parts = [types_of(part) for part in get_args(kind)]
        return [member for members, _ in parts for member in members], any(optional for _, optional in parts)
    return ([], True) if kind is type(None) else ([kind], False)


def kind_of(field: Any) -> Any:
    """Return the annotation of a pydantic field, with our own marks."""
    marks = tuple(mark for mark in field.metadata if isinstance(mark, SettingsOf | OrFile))
    return Annotated[field.annotation, marks[0]] if marks else field.annotation


def section_of(members: Sequence[Any]) -> type[Config] | None:
    """Return the section among the types, if there is one."""
    return next((kind for kind in members if isinstance(kind, type) and issubclass(kind, Config)), None)


def value_kind(members: Sequence[Any]) -> Any:
    """Return the type of a mapping's values, if there is a mapping among the types."""
    return next((get_args(kind)[1] for kind in members if get_origin(kind) is dict), None)


def default_of(field: Any) -> Any:
    """Return the default of a pydantic field; None also where it must be given."""
    return None if field.is_required() else field.get_default(call_default_factory=True)


def is_text(kind: Any) -> bool:
    """Tell whether values of a type are text: any, or a choice of words."""
    return kind is str or (get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind)))


@dataclass(frozen=True)
class Key:
    """A key of a config."""

    name: str
    """Its dotted path."""
    kind: str
    """What its value may be, in words."""
    default: Any
    text: str
    """Its description."""


_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_WORDS = {str: "text", int: "integer", float: "number", bool: "true or false"}


def kind_in_words(field: Any) -> str:
    """Say what the value of a pydantic field may be.

    Example:
        >>> from stas_core.predict.inference import InferenceConfig
        >>> kind_in_words(InferenceConfig.model_fields["flips"])
        'list of identity, lr, ud or both'
    """
    allowed, optional = types_of(kind_of(field))
    is_uri = Uri in get_args(field.annotation) or any(mark in get_args(Uri) for mark in field.metadata)
    bounds = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(limit, name)
    ]
    words = ["path or URI" if kind is str and is_uri else _in_words(kind) for kind in allowed]
    first = f"{words[0]} {' and '.join(bounds)}".rstrip()
    return " or ".join([first, *words[1:], *(["null"] if optional else [])])


def _in_words(kind: Any) -> str:
    """Say what values a type has."""
    if isinstance(kind, OrFile):
        return "YAML file of one"
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(part for part in (", ".join(map(str, inner[:-1])), str(inner[-1])) if part)
    if origin in (tuple, list, dict):
        of = " or ".join(_in_words(part) for part in types_of(inner[-1 if origin is dict else 0])[0])
        plural = f"{of}s" if of in ("integer", "number", "section", "text") else of
        return f"mapping of names to {plural}" if origin is dict else f"list of {plural}"
    if section_of([kind]) is not None:
        return "section"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def keys(cls: type[Config]) -> Iterator[str]:
    """Yield the dotted path of every key; `<key>` stands for any name in a mapping, `<n>` for any place in a list."""
    for key in fields(cls):
        yield key.name


def fields(cls: type[Config], prefix: str = "", default: Config | None = None) -> Iterator[Key]:
    """Yield every key, section by section.

    A section that may be null, or that a mapping or a list holds, is yielded itself before its keys.
    """
    for name, field in cls.model_fields.items():
        key = f"{prefix}{name}"
        value = default_of(field) if default is None else getattr(default, name)
        members, optional = types_of(kind_of(field))
        section = section_of(members)
        if section is None or optional or len(members) > 1 or field.annotation is not section:
            shown = "(required)" if field.is_required() else value
            yield Key(key, kind_in_words(field), shown, " ".join((field.description or "").split()))
        if section is not None:
            yield from fields(section, f"{key}.", value if isinstance(value, section) else None)
        for kind in members:
            held = get_args(kind)[-1 if get_origin(kind) is dict else 0] if get_args(kind) else None
            if (inner := section_of(types_of(held)[0])) is not None:
                yield from fields(inner, f"{key}.<key>." if get_origin(kind) is dict else f"{key}.<n>.")
