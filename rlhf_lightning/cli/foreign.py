"""Turns errors of Lightning, and of the callbacks and loggers that a user has added, into one line."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from rlhf_lightning.cli.suggestions import did_you_mean
from rlhf_lightning.collectives import first_failure
from rlhf_lightning.errors import InputError, TrainingDiverged, out_of_memory
from rlhf_lightning.text import notice, say

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_LOADING = (
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.pytorch.utilities.migration",
    "lightning.fabric.utilities.cloud_io",
)
_SURE = ("val/loss", "val/scores")  # every validation of this library logs one of these
_LIBRARIES = re.compile(r"(rlhf_lightning|lightning|torch|copy|collections|contextlib|functools|typing)(\.|$)")
_OURS = ("rlhf_lightning.", "lightning.")


def check_loggers(loggers: Iterable[Logger]) -> None:
    """Raises an InputError if a logger cannot start. It would fail later, too, and now no work is lost."""
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
    """Raises an InputError if a callback watches a metric by Lightning's usual name, which this library never logs.

    Nothing is checked if the module or a callback is the user's own, since it may log such a name.
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
    """Refuses a callback that watches a metric which is never logged, as early as that is known.

    Lightning itself finds out only after the first epoch. Here, validation metrics are checked before the first step:
    there must be a validation, and its trial, the sanity check, must log the name. If needed, a trial is added. Other
    metrics are checked after the first step. A resumed run has no trial, so its first validation is checked.
    """

    def __init__(self) -> None:
        self._stepped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds a trial of one batch if there is none, and only a validation can tell whether a name is logged."""
        unsure = [
            (callback, name)
            for callback, name in _monitors(_callbacks(trainer))
            if name.startswith("val/") and name not in _SURE
        ]
        no_callbacks = trainer.fast_dev_run or trainer.barebones  # type: ignore[attr-defined]
        if unsure and not trainer.num_sanity_val_steps and not no_callbacks:
            trainer.num_sanity_val_steps = 1
            if trainer.is_global_zero:
                said = f"{type(unsure[0][0]).__name__} watches {unsure[0][1]!r}, which only a validation can tell of: "
                say(notice("note", f"{said}one batch is validated first, trainer.num_sanity_val_steps 0 or not"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises an InputError if a callback watches a validation metric and nothing is validated."""
        if not trainer.fit_loop.epoch_loop.val_loop.skip:
            return
        for callback, name in _monitors(_callbacks(trainer)):
            if name.startswith("val/"):
                raise InputError(
                    f"trainer.callbacks: {type(callback).__name__} watches {name!r}, and nothing is validated; set "
                    "data.val_path or data.validation_fraction, or leave the callback out"
                )

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises an InputError if the trial did not log a name, with the name that may have been meant."""
        known = sorted(trainer.callback_metrics)
        for callback, name in _monitors(_callbacks(trainer)):
            if name not in known and name.partition("/")[0] in {other.partition("/")[0] for other in known}:
                raise _unknown(callback, name, known, f"validation of {type(pl_module).__name__}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the first validation of a run without a trial in the same way."""
        known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        for callback, name in _monitors(_callbacks(trainer)) if known and not trainer.sanity_checking else ():
            if name not in known and name.startswith("val/"):
                raise _unknown(callback, name, known, f"validation of {type(pl_module).__name__}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checks the metrics of the first step in the same way."""
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


def explained(error: Exception) -> Exception | None:
    """The error to show in place of one that Lightning, torch or a user's part raised; None to show it as it is."""
    if (first := first_failure(error)) is not None:
        return first
    if isinstance(error, MisconfigurationException):
        return of_configuration(error)
    return of_checkpoint(error) or of_callback(error) or of_trainer(error)


def of_configuration(error: MisconfigurationException) -> InputError:
    """The error to show if Lightning refuses its options."""
    text = str(error)
    if "No supported gpu backend" in text:
        return InputError("trainer.accelerator: torch finds no GPU here; leave the option out")
    return InputError(text)


def of_checkpoint(error: Exception) -> InputError | None:
    """The error to show if a checkpoint holds more than data, or is none of a training; None for other errors.

    torch's own text says how to load it in spite of the first, which would run whatever code it names.
    """
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not any(name.startswith(_LOADING) for name in modules):
        return None
    if isinstance(error, IsADirectoryError):
        return InputError("--ckpt_path: it is a folder of shards, which --trainer.strategy fsdp2 can load")
    within = modules[next(number for number, name in enumerate(modules) if name.startswith(_LOADING)) :]
    shape = KeyError | TypeError | AttributeError | IndexError | ValueError
    # A user's own hooks may fail there, too, and are told as they are.
    if isinstance(error, shape) and not isinstance(error, InputError) and all(map(_LIBRARIES.match, within)):
        why = f"it has no {error}" if isinstance(error, KeyError) else _first_line(error)
        return InputError(
            f"--ckpt_path: the file is no checkpoint of a training ({why}); take one of a run's checkpoints; a model's "
            "weights are given as a folder, with --model.model"
        )
    if type(error).__name__ != "UnpicklingError":
        return None
    asked = _GLOBAL.search(str(error))
    what = f"asks for {asked[1]}" if asked else "is no data that torch has written"
    return InputError(f"--ckpt_path: the file {what}; take a checkpoint of this library, from a source you trust")


def of_callback(error: Exception) -> InputError | None:
    """The error to show if a user's callback raised ``error``; None for other errors."""
    if isinstance(error, InputError | TrainingDiverged | MisconfigurationException) or out_of_memory(error):
        return None
    callback, hook = _raised_in(error)
    if callback is None or type(callback).__module__.startswith(_OURS):
        return None
    place = traceback.extract_tb(error.__traceback__)[-1]
    return InputError(
        f"trainer.callbacks: {type(callback).__name__} failed in {hook} ({_first_line(error)}; {place.filename}:"
        f"{place.lineno}); repair it, or leave it out"
    )


def of_trainer(error: Exception) -> InputError | None:
    """The error to show if Lightning refused an option, which may be only when it sees the data; else None."""
    kinds = ValueError | TypeError | RuntimeError | ImportError
    if isinstance(error, InputError | TrainingDiverged) or not isinstance(error, kinds) or out_of_memory(error):
        return None
    frames = list(traceback.walk_tb(error.__traceback__))
    last = frames[-1][0] if frames else None
    # Only a line of Lightning with `raise` refuses something. Other lines fail on wrong values of ours.
    code = traceback.extract_tb(error.__traceback__)[-1].line or "" if last is not None else ""
    if last is None or not str(last.f_globals.get("__name__", "")).startswith("lightning.") or "raise" not in code:
        return None
    return InputError(f"trainer: {' '.join(str(error).split())}")


def _raised_in(error: Exception) -> tuple[Any, str]:
    """The innermost callback that was running and its hook, found in the frames of the loops over callbacks."""
    found, hook = None, ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        names = frame.f_locals
        if frame.f_code.co_name in ("_call_callback_hooks", "_call_setup_hook", "_tell") and "callback" in names:
            found, hook = names["callback"], names.get("hook_name") or names.get("hook", "")
    return found, hook


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
