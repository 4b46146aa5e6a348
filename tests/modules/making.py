"""Modules made with options written as in a config: a mapping for each group, over the method's own defaults."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, TypeVar

from rlhf_lightning.options import Options

_M = TypeVar("_M")


def make(cls: type[_M], *args: Any, **options: Any) -> _M:
    """``cls(...)`` with ``kl={"coef": 0.3}`` for its ``kl`` group with that one option changed."""
    defaults = {name: p.default for base in reversed(cls.__mro__) for name, p in _parameters(base)}
    for name, value in options.items():
        if isinstance(value, dict) and isinstance(defaults.get(name), Options):
            options[name] = replace(defaults[name], **value)
    return cls(*args, **options)


def _parameters(cls: type) -> list[tuple[str, inspect.Parameter]]:
    return list(inspect.signature(cls.__init__).parameters.items()) if "__init__" in vars(cls) else []


def merged(*options: dict[str, Any]) -> dict[str, Any]:
    """Options laid over each other, groups option by option; the later ones win."""
    result: dict[str, Any] = {}
    for layer in options:
        for name, value in layer.items():
            both = isinstance(value, dict) and isinstance(result.get(name), dict)
            result[name] = {**result[name], **value} if both else value
    return result
