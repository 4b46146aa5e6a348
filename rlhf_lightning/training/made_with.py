"""Checks that a checkpoint fits the run that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from rlhf_lightning.errors import InputError


def check_made_with(made: Mapping[str, Any], options: Mapping[str, Any], module: str | None = None) -> None:
    """Refuses a checkpoint of other options than the run's, and warns of one of another method.

    Args:
        made: the module and the options that the checkpoint was made with; what it does not have is not compared.
        options: the run's, by name, that decide which weights there are.
        module: the class whose training goes on from it; None where none does.

    Raises:
        InputError: names the first option that differs.
    """
    for name, now in options.items():
        if name in made and made[name] != now:
            then = typed(made[name])
            raise InputError(
                f"--ckpt_path: the checkpoint was made with model.{name} {then}, and this run has {typed(now)}; "
                f"give --model.{name} {then}, or leave --ckpt_path out"
            )
    if module is not None and made.get("module", module) != module:
        rank_zero_warn(
            f"--ckpt_path: {made['module']} made the checkpoint, and {module} goes on from its weights, its optimizer "
            "and its step; to begin anew from the model alone, name its exported folder by --model.model"
        )


def check_bases(made: Sequence[Sequence[str]], loaded: Sequence[tuple[str, str]]) -> None:
    """Refuses adapters that were trained beside other weights: they are worth nothing beside these.

    Args:
        made: folder and fingerprint of the weights beside each adapter of the checkpoint.
        loaded: the run's.

    Raises:
        InputError: names the folder.
    """
    for (then, expected), (folder, found) in zip(made, loaded, strict=False):
        if found != expected:
            now = "changed since" if then == folder else f"are not those of {folder}"
            raise InputError(
                f"the checkpoint's adapters were trained beside the weights of {then}, which {now}: they are worth "
                "nothing beside others; resume with the weights that the run was started from"
            )


def wrong_weights(error: RuntimeError, module: str, model: str, made: str) -> InputError:
    """The error for weights that torch refuses: one line in place of torch's line for every parameter.

    Args:
        error: torch's.
        module: the class that goes on.
        model: the folder of its model.
        made: by whom the checkpoint was made.
    """
    first = " ".join((str(error).splitlines()[1:2] or [str(error)])[0].split())[:200]
    return InputError(
        f"--ckpt_path: it does not fit {module} of {model} ({first}): it was made {made}; give the config and the "
        "options that it was made with, or leave --ckpt_path out"
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


def typed(value: Any) -> str:
    """An option's value as one types it on the command line."""
    return "null" if value is None else str(value)
