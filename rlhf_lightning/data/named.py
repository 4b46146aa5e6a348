"""Parses the arguments of commands that give things names: ``sft=runs/sft/model``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_lightning.errors import InputError


def named(given: Sequence[str], option: str) -> list[tuple[str, str]]:
    """``NAME=WHAT`` or ``WHAT`` as (name, what). A model folder without a name is named by its run.

    Raises:
        InputError: a part is empty, or two have one name.
    """
    pairs: list[tuple[str, str]] = []
    for item in given:
        name, separator, what = item.partition("=")
        if not separator:
            name, what = _own_name(item), item
        if not name or not what:
            raise InputError(f"{option} {item}: expected NAME=DIR")
        if any(name == other for other, _ in pairs):
            raise InputError(f"{option}: two are named {name!r}: give each its own, as in NAME=DIR")
        pairs.append((name, what))
    return pairs


def _own_name(what: str) -> str:
    """``runs/ppo/model`` is ppo, ``my_rewards.py:brevity`` is brevity."""
    if is_function(what):
        return what.rpartition(":")[2]
    path = Path(what)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def is_function(what: str) -> bool:
    """Whether it is ``file.py:function``, and no path."""
    return ":" in what and not Path(what).exists()
