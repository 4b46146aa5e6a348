"""The classes that configs name: finds them by short or dotted names, lists their options, and builds them."""

from __future__ import annotations

import dataclasses
import importlib
from functools import lru_cache
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, callbacks, loggers
from lightning.pytorch.loggers import Logger

from rlhf_lightning import modules, rewards
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.errors import InputError

CLASSES = (
    *(getattr(modules, name) for name in modules.__all__),
    *(getattr(rewards, name) for name in rewards.__all__),
    PreferenceDataModule,
)
# Names of classes that configs may write without the module: the above, and Lightning's own.
SHORT_NAMES = [*(cls.__name__ for cls in CLASSES), *callbacks.__all__, *loggers.__all__]


def class_path(cls: type) -> str:
    """The dotted name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def imported(class_path: str) -> type:
    """The class of a dotted path. The parser has accepted the path, so the module can be imported."""
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def resolved(name: str) -> type | None:
    """The class of a short or dotted name in a config; None if it cannot be imported."""
    known = next((cls for cls in CLASSES if cls.__name__ == name), None)
    if known is not None or "." not in name:
        return known
    try:
        found = imported(name)
    except Exception:  # a user's module may raise anything; the parser will import it again and report the error
        return None
    return found if isinstance(found, type) else None


@lru_cache
def keys_of(cls: type) -> list[str]:
    """The constructor's keywords, base classes included, as the parser finds them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "it", fail_untyped=False, instantiate=False)
    keys = parser.get_defaults().keys()  # a Namespace cannot be iterated itself
    return [key.removeprefix("it.") for key in keys]


def built_of_plain_numbers(cls: type, *args: Any, **kwargs: Any) -> Any:
    """``cls(...)`` with plain numbers in place of restricted ones such as ``PositiveFloat(0.1)``.

    The parser's restricted types are classes of their own. In an optimizer's options they would get into checkpoints,
    which then could not be loaded with ``weights_only=True``.

    Raises:
        InputError: a logger or a callback cannot be built, for example because its package is not installed.
    """
    try:
        return cls(*(_plain(value) for value in args), **{name: _plain(value) for name, value in kwargs.items()})
    except Exception as error:
        if not issubclass(cls, Logger | Callback) or isinstance(error, InputError):
            raise
        section = "logger" if issubclass(cls, Logger) else "callbacks"
        raise InputError(f"trainer.{section}: {cls.__name__} cannot be built: {error}") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a group of options
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _plain(part) for name, part in fields.items()})
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (int, float):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value
