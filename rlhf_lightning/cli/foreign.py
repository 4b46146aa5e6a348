"""Errors of the callbacks and loggers that a user has added, and of Lightning itself, in one line."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from rlhf_lightning.cli.suggestions import did_you_mean
from rlhf_lightning.errors import InputError, TrainingDiverged, out_of_memory
from rlhf_lightning.text import notice, say

_EPOCHS_BEHIND = re.compile(r"checkpoint with current_epoch=(\d+), but you have set Trainer\(max_epochs=(\d+)")
_SURE = ("val/loss", "val/scores")  # what every validation of ours measures
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
    if not _ours((module, *callbacks)):
        return
    for callback, name in _monitors(callbacks):
        if name == "loss" or name.startswith(("val_", "train_")):
            held_out = "val/loss" if module.automatic_optimization else "val/scores"
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__} watches {name!r}, which {type(module).__name__} never "
                f"logs; metrics are called like {held_out} (metrics.jsonl of a run has all names): set its monitor"
            )


def _ours(parts: Iterable[object]) -> bool:
    return all(type(part).__module__.startswith(_OURS) for part in parts)


class CheckMonitors(Callback):
    """Refuses, as soon as that can be known, a callback that watches a metric which there is not.

    Lightning itself tells only when it looks, after the first epoch. Before the first step: one of the validation,
    where there is none, or none of this name in its trial, which is made for it. After the first step: any other that
    training does not log. A resumed run has no trial: there the first validation tells.
    """

    def __init__(self) -> None:
        self._stepped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A trial of one batch where nobody asked for any, and a name is watched that nothing else can tell of."""
        unsure = [
            (callback, name)
            for callback, name in _monitors(_callbacks(trainer))
            if name.startswith("val/") and name not in _SURE
        ]
        deaf = trainer.fast_dev_run or trainer.barebones  # type: ignore[attr-defined]  # nothing is watched there
        if unsure and not trainer.num_sanity_val_steps and not deaf:
            trainer.num_sanity_val_steps = 1
            if trainer.is_global_zero:
                said = f"{type(unsure[0][0]).__name__} watches {unsure[0][1]!r}, which only a validation can tell of: "
                say(notice("note", f"{said}one batch is validated first, trainer.num_sanity_val_steps 0 or not"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """InputError where nothing is held out."""
        if not trainer.fit_loop.epoch_loop.val_loop.skip:
            return
        for callback, name in _monitors(_callbacks(trainer)):
            if name.startswith("val/"):
                raise InputError(
                    f"trainer.callbacks: {type(callback).__name__} watches {name!r}, and nothing is validated; set "
                    "data.val_path or data.validation_fraction, or leave the callback out"
                )

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """InputError with the name that may have been meant."""
        known = sorted(trainer.callback_metrics)
        for callback, name in _monitors(_callbacks(trainer)):
            if name not in known and name.partition("/")[0] in {other.partition("/")[0] for other in known}:
                raise _unknown(callback, name, known, f"validation of {type(pl_module).__name__}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same of a run without a trial."""
        known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        for callback, name in _monitors(_callbacks(trainer)) if known and not trainer.sanity_checking else ():
            if name not in known and name.startswith("val/"):
                raise _unknown(callback, name, known, f"validation of {type(pl_module).__name__}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The same for the metrics of the first step."""
        if self._stepped or not trainer.global_step or not _ours((pl_module, *_callbacks(trainer))):
            return
        self._stepped = True
        known = sorted(trainer.callback_metrics)
        for callback, name in _monitors(_callbacks(trainer)):
            if name not in known and "/" in name and not name.startswith("val/"):
                raise _unknown(callback, name, known, f"training of {type(pl_module).__name__}")


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _monitors(callbacks: Iterable[Callback]) -> list[tuple[Callback, str]]:
    """The callbacks that watch a metric, with its name."""
    found = [(callback, getattr(callback, "monitor", None)) for callback in callbacks]
    return [(callback, name) for callback, name in found if isinstance(name, str)]


def _unknown(callback: Callback, name: str, known: list[str], where: str) -> InputError:
    return InputError(
        f"trainer.callbacks: {type(callback).__name__} watches {name!r}{did_you_mean(name, known)}; the {where} logs "
        f"{', '.join(known)}"
    )


def of_configuration(error: MisconfigurationException) -> InputError:
    """What to say where Lightning refuses how it is set up."""
    told = str(error)
    if "No supported gpu backend" in told:
        return InputError("trainer.accelerator: torch finds no GPU here; leave the option out")
    if (epochs := _EPOCHS_BEHIND.search(told)) is not None:
        return InputError(
            f"--ckpt_path: the run has had {epochs[1]} epochs and trainer.max_epochs is {epochs[2]}, so nothing is "
            "left to train; raise it"
        )
    return InputError(told)


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
