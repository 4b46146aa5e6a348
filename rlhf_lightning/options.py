"""Groups of options: what a constructor takes beside its models, and what the command line nests under one name.

The values are checked where a group is made, so a script of one's own is refused what the command line is refused.
"""

from __future__ import annotations

import inspect
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

_HANDED_ON = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

__all__ = [
    "ClosedUnitInterval",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenUnitInterval",
    "Options",
    "PositiveFloat",
    "PositiveInt",
    "arguments_of",
    "groups_of",
    "plain",
]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The base of all groups, which are frozen dataclasses with their options as fields.

    Raises:
        InputError: a field's value is none that its type allows; names the field and the type.
    """

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            if not _allowed(value := getattr(self, name), kind):
                raise InputError(f"{type(self).__name__}.{name}: expected {_told(kind)}, got {value!r}")


def plain(value: Any) -> Any:
    """A constructor's argument as data for a checkpoint: a group as a mapping, an object by its class's name."""
    if isinstance(value, Options):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    for kind in (bool, int, float, str):  # and not one of jsonargparse's own classes of them
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else f"{type(value).__module__}.{type(value).__qualname__}"


def arguments_of(cls: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a constructor is called with, by name and with the defaults, also what it hands on to those of its bases."""
    found: dict[str, Any] = {}
    for init in (vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)):
        signature = inspect.signature(init)
        bound = signature.bind_partial(None, *args, **kwargs)
        bound.apply_defaults()
        kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
        by_kind = {kind: bound.arguments[name] for name, kind in kinds.items()}
        own = [name for name, kind in kinds.items() if kind not in _HANDED_ON][1:]
        found |= {name: bound.arguments[name] for name in own if name not in found}
        if inspect.Parameter.VAR_KEYWORD not in by_kind:
            return found
        args, kwargs = by_kind.get(inspect.Parameter.VAR_POSITIONAL, ()), by_kind[inspect.Parameter.VAR_KEYWORD]
    return found


def groups_of(constructor: Any, given: Mapping[str, Any]) -> dict[str, Options]:
    """The groups among the arguments of a constructor, made again of what `plain` made of them."""
    kinds = typing.get_type_hints(constructor)
    found = {name: kinds.get(name) for name in given}
    return {
        name: kind(**given[name])
        for name, kind in found.items()
        if isinstance(kind, type) and issubclass(kind, Options)
    }


def _allowed(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_allowed(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind is type(None):
        return value is None
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
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))
