"""Groups of options: what a constructor takes beside its models, and what the command line nests under one name.

The values are checked where a group is made, so a script of one's own is refused what the command line is refused.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
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

__all__ = [
    "ClosedUnitInterval",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenUnitInterval",
    "Options",
    "PositiveFloat",
    "PositiveInt",
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
