"""Type checks of every annotated call of stas_core: by beartype, and by jaxtyping where arrays have shapes.

jaxtyping's hook decorates every function, binds its arguments in every call and checks them twice, so that letters
such as "h w" mean the same size throughout a call. A function whose annotations name no array has no such letters:
beartype alone finds the same faults there, several times faster.
"""

import dataclasses
import functools
import inspect
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is accepted where a float is declared
_with_shapes = jaxtyping.jaxtyped


def install() -> None:
    """Check every module of stas_core that is imported from now on."""
    setattr(jaxtyping, "jaxtyped", _decorate)  # noqa: B010 - what the hook writes before each function
    jaxtyping.install_import_hook("stas_core", f"{__name__}.checked")


def _decorate(item: Any = None, *, typechecker: Any) -> Any:
    """Decorate a function, method or property as jaxtyping does, or, where no array is named, with beartype alone."""
    if item is None:
        return functools.partial(_decorate, typechecker=typechecker)
    again = functools.partial(_decorate, typechecker=typechecker)
    if isinstance(item, classmethod | staticmethod):
        return type(item)(again(item.__func__))
    if isinstance(item, property):
        return property(*(part and again(part) for part in (item.fget, item.fset, item.fdel)))
    if inspect.isclass(item):
        if dataclasses.is_dataclass(item) and "__init__" in vars(item) and not hasattr(item.__init__, "__wrapped__"):
            item.__init__ = again(item.__init__)  # type: ignore[method-assign]
        return item
    return _with_shapes(item, typechecker=typechecker) if _names_arrays(item) else typechecker(item)


def _names_arrays(function: Any) -> bool:
    classes = dict.fromkeys(
        function.__qualname__.split(".")[:-1], object
    )  # that are being made: beartype waits for them
    try:
        hints = get_type_hints(function, localns=classes)
    except NameError:  # of what is made later, or for type checkers alone: jaxtyping passes over it
        return True
    return any(map(_is_array, hints.values()))


def _is_array(hint: Any) -> bool:
    return (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(map(_is_array, get_args(hint)))
