"""Refuses values that the parser accepts but the constructors do not: null, or a number for a group of options."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from jsonargparse import Namespace


def refused_values(cls: type, given: Namespace, place: str, resolve: Callable[[str], type | None]) -> Iterator[str]:
    """One line for each null that ``cls``'s constructor does not take, and each plain value in place of a dataclass.

    Args:
        cls: the class whose options are checked.
        given: the parsed values.
        place: the key of the section.
        resolve: returns the class of a class path, or None if there is none.
    """
    values = dict(vars(given))
    for init in (vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)):
        try:
            kinds = typing.get_type_hints(init)
        except Exception:  # a user's class may have type hints that it does not import
            kinds = {}
        parameters = inspect.signature(init).parameters
        for name in [name for name in values if name in parameters]:
            value, kind = values.pop(name), kinds.get(name, Any)
            if value is None and parameters[name].default is not None and not _takes_none(kind):
                yield f"{place}.{name}: null is no value for it; leave the key out to get the default"
            else:
                yield from _inside(value, kind, f"{place}.{name}", resolve)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return


def _inside(value: Any, kind: Any, place: str, resolve: Callable[[str], type | None]) -> Iterator[str]:
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _inside(item, Any, f"{place}[{number}]", resolve)
    group = next((part for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part)), None)
    if not isinstance(value, Namespace):
        if group is not None and kind is group:
            yield f"{place}: expected its options as `key: value` lines, got {value}"
        return
    cls: Any = group
    if isinstance(path := value.get("class_path"), str):
        cls, value = resolve(path), value.get("init_args")
    if isinstance(cls, type) and isinstance(value, Namespace):
        yield from refused_values(cls, value, place, resolve)


def _takes_none(kind: Any) -> bool:
    if isinstance(kind, typing.TypeVar):
        return True
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_takes_none(part) for part in typing.get_args(kind))
    return kind in (Any, object, None, type(None), inspect.Parameter.empty)
