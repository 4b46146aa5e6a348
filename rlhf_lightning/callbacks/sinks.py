"""Lets a training go on when a logger or another writer fails, and reports the failures."""

from __future__ import annotations

import sys
from functools import partial
from types import TracebackType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from rlhf_lightning.callbacks.metrics import JsonlLogger
from rlhf_lightning.text import printable, say

_WRITING = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
_PATIENCE = 20  # failures in a row after which a logger is not called again, since each may take a minute
_SHOWN = 200  # characters of an error


class Sink:
    """A context that swallows errors. It prints the first one and counts all.

    Args:
        name: the target's name, for messages.
        needed: whether the run's own records are incomplete without it.
    """

    def __init__(self, name: str, needed: bool = False) -> None:
        self.name = name
        self.needed = needed
        self.failed = 0  # number of writes that failed
        self.in_a_row = 0
        self.cause = ""

    @property
    def given_up(self) -> bool:
        """Whether the target has failed too often to be tried again."""
        return not self.needed and self.in_a_row >= _PATIENCE

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            self.in_a_row = 0
        if not isinstance(error, Exception):
            return False
        self.failed += 1
        self.in_a_row += 1
        self.cause = f"{type(error).__name__}: {' '.join(printable(str(error)).split())}"[:_SHOWN]
        if self.failed == 1:
            lost = "; numbers of this run are being LOST" if self.needed else ""
            say(f"warning: {self.name} cannot be written ({self.cause}){lost}; the training goes on", sys.stderr)
        return True

    def summary(self) -> str | None:
        """The line to print at the end; None if nothing failed."""
        if not self.failed:
            return None
        lost = " and are LOST" if self.needed else ""
        left = ", and it was left out from there on" if self.given_up else ""
        return f"warning: {self.name}: {self.failed} writes failed{lost} (the last: {self.cause}){left}"


class SinkGuard(Callback):
    """Keeps loggers' failures from ending a training, and reports their number at its end."""

    def __init__(self) -> None:
        self.sinks: list[Sink] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Guards every logger of the trainer."""
        for logger in trainer.loggers:
            if not hasattr(logger, "_guarded"):
                self.sinks.append(guard(logger))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints which writes failed."""
        for sink in self.sinks:
            if (text := sink.summary()) is not None:
                say(text, sys.stderr)
        self.sinks = []


def guard(logger: Logger) -> Sink:
    """Wraps the logger's writing methods, so that their errors go into the returned sink."""
    needed = isinstance(logger, JsonlLogger)
    sink = Sink(str(logger.path) if isinstance(logger, JsonlLogger) else type(logger).__name__, needed=needed)
    for name in _WRITING:
        setattr(logger, name, partial(_write, sink, getattr(logger, name)))
    logger._guarded = True  # type: ignore[attr-defined]
    return sink


def _write(sink: Sink, method: Any, *args: Any, **kwargs: Any) -> None:
    if not sink.given_up:
        with sink:
            method(*args, **kwargs)
