"""Groups of options: arguments of constructors that the command line nests under one name.

A group checks its values when it is made, so scripts and the command line accept the same values.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
)

from rlhf_lightning.errors import InputError

# How messages call the types of options.
WORDS = {
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number from 0 up",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number from 0 up",
    "ClosedUnitInterval": "a number from 0 to 1",
    "OpenUnitInterval": "a number above 0 and below 1",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dict": "options as `key: value` lines",
    "list": "a list",
    "NoneType": "None",
}
_HANDED_ON = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

__all__ = [
    "ClosedUnitInterval",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenUnitInterval",
    "Options",
    "PositiveFloat",
    "PositiveInt",
    "arguments_again",
    "arguments_of",
    "check_arguments",
    "plain",
]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The base of all groups, which are frozen dataclasses with their options as fields.

    Raises:
        InputError: a field's type does not allow its value, or it is a number that is not finite; names the field.
    """

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            if not _allowed(value := getattr(self, name), kind):
                raise InputError(f"{type(self).__name__}.{name}: expected {_told(kind)}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{type(self).__name__}.{name}: expected a finite number, got {value!r}")


def plain(value: Any) -> Any:
    """A constructor's argument as data for a checkpoint: a group as a mapping, an object as ``<its class's name>``."""
    if isinstance(value, Options):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    for kind in (bool, int, float, str):  # jsonargparse's subclasses become plain ones
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else f"<{type(value).__module__}.{type(value).__qualname__}>"


def arguments_of(cls: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor's call by name, with defaults, and those that it passes on to base classes."""
    found: dict[str, Any] = {}
    for init in _constructors(cls):
        signature = inspect.signature(init)
        try:
            bound = signature.bind_partial(None, *args, **kwargs)
        except TypeError:  # the constructor will report it itself
            return found
        bound.apply_defaults()
        kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
        by_kind = {kind: bound.arguments.get(name) for name, kind in kinds.items()}
        named = [name for name, kind in kinds.items() if kind not in _HANDED_ON][1:]
        found |= {name: bound.arguments[name] for name in named if name not in found and name in bound.arguments}
        if inspect.Parameter.VAR_KEYWORD not in by_kind:
            return found
        args = by_kind.get(inspect.Parameter.VAR_POSITIONAL) or ()
        kwargs = by_kind[inspect.Parameter.VAR_KEYWORD] or {}
    return found


def check_arguments(cls: type, given: Mapping[str, Any]) -> None:
    """Raises an InputError if an argument's type does not allow its value; names the class and the argument."""
    for name, kind in _kinds(cls).items():
        if name in given and not _allowed(given[name], kind):
            raise InputError(f"{cls.__name__}.{name}: expected {_told(kind)}, got {given[name]!r}")


def _constructors(cls: type) -> list[Any]:
    """The constructors of a class and its bases, the nearest first."""
    return [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]


def _kinds(cls: type) -> dict[str, Any]:
    """The types of a constructor's arguments, and of those that it passes on to base classes."""
    kinds: dict[str, Any] = {}
    for init in reversed(_constructors(cls)):
        with contextlib.suppress(NameError):  # a user's class may have type hints that it does not import
            kinds |= typing.get_type_hints(init)
    return kinds


def arguments_again(cls: type, saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's arguments, restored from the data that `plain` made of them. ``given`` wins over ``saved``.

    Raises:
        InputError: ``saved`` has the name of an object, which must be given; names it.
    """
    kinds, arguments = _kinds(cls), dict(given)
    for name, value in saved.items():
        kind = kinds.get(name)
        if isinstance(value, str) and value.startswith("<") and name not in given:
            raise InputError(f"{name}: the checkpoint was made with {value}, which it does not hold; give {name}=...")
        if isinstance(kind, type) and issubclass(kind, Options) and name not in given:
            arguments[name] = kind(**value)
    return arguments


def _allowed(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_allowed(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind is type(None):
        return value is None
    if kind in (bool, str) or (isinstance(kind, type) and issubclass(kind, Options)):
        return isinstance(value, kind)
    if hasattr(kind, "_restrictions"):  # one of jsonargparse's numbers with a range
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        try:
            kind(value)
        except ValueError:
            return False
    return True


def _told(kind: Any) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_told(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    name = getattr(kind, "__name__", str(kind))
    return WORDS.get(name, name)
