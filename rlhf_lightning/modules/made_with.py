"""Whether a checkpoint fits the run that would go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_lightning.errors import InputError


def check_made_with(made: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other options than the run's.

    Args:
        made: options that the checkpoint was made with; what it does not have is not compared.
        options: the run's, by name, that decide which weights there are.

    Raises:
        InputError: names the first option that differs.
    """
    for name, now in options.items():
        if name in made and made[name] != now:
            then = _typed(made[name])
            raise InputError(
                f"--ckpt_path: the checkpoint was made with model.{name} {then}, and this run has {_typed(now)}; "
                f"give --model.{name} {then}, or leave --ckpt_path out"
            )


def own_part(checkpoint: Mapping[str, Any], key: str, module: str, made: str) -> dict[str, Any]:
    """What a method saved under ``key``.

    Args:
        checkpoint: as Lightning loads it.
        key: the method's own.
        module: the class that goes on, for messages.
        made: by whom it was made, for messages.

    Raises:
        InputError: the checkpoint is of another method, which saves no such part.
    """
    if key not in checkpoint:
        raise InputError(
            f"--ckpt_path: it was made {made}, and {module} cannot go on from it; start from its exported model with "
            "--model.model"
        )
    part: dict[str, Any] = checkpoint[key]
    return part


def _typed(value: Any) -> str:
    return "null" if value is None else str(value)
