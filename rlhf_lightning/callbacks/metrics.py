"""Writes ``metrics.jsonl``: every logged number of a run, one line for each logged step."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from rlhf_lightning.callbacks.loop_position import steps_logged
from rlhf_lightning.callbacks.run_files import append_line, rewind_lines


class JsonlLogger(Logger):
    """Appends ``{"step", "time", name: number, ...}`` to ``metrics.jsonl``; time is in seconds since 1970.

    Args:
        folder: the run's folder; made when the first line is written.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)

    @property
    def path(self) -> Path:
        """The path of ``metrics.jsonl``."""
        return self.folder / "metrics.jsonl"

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def version(self) -> str:
        """Empty, since runs differ only by their names."""
        return ""

    @property
    def log_dir(self) -> str:
        """The run's folder."""
        return str(self.folder)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends one line."""
        append_line(self.path, {"step": step, "time": round(time.time(), 3), **metrics})

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing, since the run's config.yaml has the options."""

    @rank_zero_only
    def rewind(self, steps: int) -> None:
        """Keeps the lines of the first ``steps`` steps. Called when a run is resumed from there."""
        rewind_lines(self.path, steps)


def rewind_loggers(trainer: Trainer) -> None:
    """On a resume, removes entries after the checkpoint from metrics.jsonl and TensorBoard: they are logged again."""
    steps = steps_logged(trainer)
    for logger in trainer.loggers:
        if isinstance(logger, JsonlLogger):
            logger.rewind(steps)
        elif isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            # This is the event that SummaryWriter's purge_step writes. That option must be given when the file is
            # opened, and the step is known only later, when the checkpoint is read.
            restart = Event(session_log=SessionLog(status=SessionLog.START))
            logger.experiment._get_file_writer().add_event(restart, steps)
