"""Errors of the callbacks and loggers that a user has added, and of Lightning itself, in one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from rlhf_lightning.cli.suggestions import did_you_mean
from rlhf_lightning.errors import InputError, TrainingDiverged, out_of_memory

_OURS = ("rlhf_lightning.", "lightning.")


def check_loggers(loggers: Iterable[Logger]) -> None:
    """InputError where a logger cannot start: it would not later either, and now nothing is lost."""
    for logger in loggers:
        try:
            if hasattr(type(logger), "experiment"):
                getattr(logger, "experiment")  # noqa: B009 - a property, which not every logger has
        except Exception as error:
            raise InputError(
                f"trainer.logger: {type(logger).__name__} cannot start ({_first_line(error)}); "
                "set it up, or leave it out"
            ) from error


def check_monitors(callbacks: Iterable[Callback], module: LightningModule) -> None:
    """InputError where a callback watches a metric by Lightning's customary name, which nothing here logs.

    That is sure only of modules of this library beside its own callbacks and Lightning's: another may log such a name.
    """
    callbacks = list(callbacks)
    if not all(type(part).__module__.startswith(_OURS) for part in (module, *callbacks)):
        return
    for callback in callbacks:
        name = getattr(callback, "monitor", None)
        if isinstance(name, str) and (name == "loss" or name.startswith(("val_", "train_"))):
            held_out = "val/loss" if module.automatic_optimization else "eval/scores"
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__} watches {name!r}, which {type(module).__name__} never "
                f"logs; metrics are called like {held_out} (metrics.jsonl of a run has all names): set its monitor"
            )


class CheckHeldOutMonitors(Callback):
    """Refuses, after the trial of the validation, a callback that watches a metric of it which there is not.

    Lightning itself tells only when it looks, after the first epoch.
    """

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """InputError with the name that may have been meant."""
        known = sorted(trainer.callback_metrics)
        kinds = {name.partition("/")[0] for name in known if "/" in name}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            name = getattr(callback, "monitor", None)
            if isinstance(name, str) and name not in known and name.partition("/")[0] in kinds:
                raise InputError(
                    f"trainer.callbacks: {type(callback).__name__} watches {name!r}{did_you_mean(name, known)}; the "
                    f"validation of {type(pl_module).__name__} logs {', '.join(known)}"
                )


def of_callback(error: Exception) -> InputError | None:
    """What to say of an error that a callback of the user's raised; None for all others."""
    if isinstance(error, InputError | TrainingDiverged | MisconfigurationException) or out_of_memory(error):
        return None
    callback, hook = _raised_in(error)
    if callback is None or type(callback).__module__.startswith(_OURS):
        return None
    place = traceback.extract_tb(error.__traceback__)[-1]
    return InputError(
        f"trainer.callbacks: {type(callback).__name__} failed in {hook} ({_first_line(error)}; {place.filename}:"
        f"{place.lineno}); mend it, or leave it out"
    )


def of_trainer(error: Exception) -> InputError | None:
    """What to say where Lightning itself refused an option, some of which it looks at with the data; None otherwise."""
    kinds = ValueError | TypeError | RuntimeError | ImportError
    if isinstance(error, InputError | TrainingDiverged) or not isinstance(error, kinds) or out_of_memory(error):
        return None
    frames = list(traceback.walk_tb(error.__traceback__))
    last = frames[-1][0] if frames else None
    # A line that raises, and not one that broke on a value of ours.
    code = traceback.extract_tb(error.__traceback__)[-1].line or "" if last is not None else ""
    if last is None or not str(last.f_globals.get("__name__", "")).startswith("lightning.") or "raise" not in code:
        return None
    return InputError(f"trainer: {' '.join(str(error).split())}")


def _raised_in(error: Exception) -> tuple[Any, str]:
    """The innermost callback that was being called, by the frames of Lightning's loop over the callbacks or ours."""
    found, hook = None, ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        names = frame.f_locals
        if frame.f_code.co_name in ("_call_callback_hooks", "_call_setup_hook", "_tell") and "callback" in names:
            found, hook = names["callback"], names.get("hook_name") or names.get("hook", "")
    return found, hook


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
