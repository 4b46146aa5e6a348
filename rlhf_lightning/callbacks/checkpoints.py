"""Writes checkpoints that are never incomplete: staged beside their place, synced to disk, and renamed in one step."""

from __future__ import annotations

import os
import shutil
import signal
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlhf_lightning.callbacks.metrics import rewind_loggers
from rlhf_lightning.callbacks.run_files import run_folder, sync_to_disk
from rlhf_lightning.collectives import barrier, failing_together
from rlhf_lightning.models.export import flush
from rlhf_lightning.outputs import check_room
from rlhf_lightning.text import say

_STAGING = ".staging-"


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint, a file or folder, in a run's ``checkpoints`` folder; None if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    return max((path for path in folder.glob("batch-*.ckpt") if is_whole(path)), default=None)


class RunCheckpoint(Checkpoint):
    """Saves to ``<run>/checkpoints/batch-N.ckpt`` after every so many batches, at the end, and on a signal.

    N counts batches over the whole run; one batch is one PPO iteration. With gradient accumulation a save waits for the
    optimizer step. If a run's last batch ends an epoch, the save also waits for the validation that follows, since a
    run resumed from there would have nothing left to do and would skip it. A save never touches earlier checkpoints, so
    they survive if the process is killed in the middle.

    A run resumed from an older checkpoint keeps the later checkpoints of its first attempt until it has saved one of
    its own. Then they are removed, so that the newest checkpoint always belongs to the resumed run.

    The first Ctrl-C saves after the current batch and stops; the second stops at once. SIGTERM saves, too. (In runs of
    several processes neither saves, since the processes may have stopped at different batches.)

    Args:
        every_n_batches: how often to save.
        keep: how many of the newest checkpoints to keep.
    """

    def __init__(self, every_n_batches: PositiveInt = 100, keep: PositiveInt = 2) -> None:
        self.every_n_batches = every_n_batches
        self.keep = keep
        self._folder: Path | None = None
        self._saved = 0  # batches done at the last save
        self._between_batches = False
        self._stop = self._stop_now = False
        self._old_handler: Any = None

    @property
    def newest(self) -> Path | None:
        """The newest complete checkpoint of this run; None if there is none."""
        return None if self._folder is None else latest(self._folder)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the run's folder here, since all processes must take part."""
        self._folder = run_folder(trainer) / "checkpoints"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the disk has room for the end of the run: one checkpoint and the model.

        Raises:
            InputError: there is less room, so the training would be lost; on all processes.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with failing_together():
            if trainer.is_global_zero:
                assert self._folder is not None
                needed, what = _bytes_at_the_end(pl_module), "a checkpoint and the model take at least"
                check_room(self._folder.parent, needed, what, "another place with --runs FOLDER")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a resume, removes log entries later than the checkpoint, since they will be written again."""
        if trainer.ckpt_path is not None:
            self._saved = _batches(trainer)
            rewind_loggers(trainer)
        if trainer.world_size == 1:
            self._take_over_interrupts()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stops if the user asked for it. Until the batch's end, a run could not be resumed from the state."""
        if self._stop_now:
            say(f"stopped; the same command goes on with --ckpt_path last, from {self.newest}")
            raise KeyboardInterrupt
        self._between_batches = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if a checkpoint is due."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._between_batches = True
        due = self._stop or _batches(trainer) - self._saved >= self.every_n_batches
        if due and not _is_last(trainer):  # the end is saved in any case
            self.save(trainer)
        # The run stops at the next batch's start, since this batch's metrics are logged after this hook.
        self._stop_now = self._stop

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the final state."""
        self.save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves if SIGTERM stopped the run. Never saves after a failure, which the state itself may have caused."""
        if isinstance(exception, SIGTERMException) and self._between_batches and trainer.world_size == 1:
            self.save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restores the handler of Ctrl-C."""
        if self._old_handler is not None:
            signal.signal(signal.SIGINT, self._old_handler)
            self._old_handler = None

    def save(self, trainer: Trainer) -> None:
        """Writes a checkpoint of the current state, unless there is one already. Every process calls it."""
        batches = _batches(trainer)
        if batches == self._saved or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self._folder is not None
        destination = self._folder / f"batch-{batches:08d}.ckpt"
        staging = self._folder / f"{_STAGING}{destination.name}"
        if trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(f"{_STAGING}*"):  # a killed run may have left some
                _delete(leftover)
        barrier()
        trainer.save_checkpoint(staging)
        if trainer.is_global_zero:
            if not is_whole(staging):
                # Lightning's atomic writer swallows some errors (permissions, for one) and reports success.
                raise OSError(f"{staging}: the checkpoint could not be written; is the disk full or read-only?")
            sync_to_disk(staging)
            # Checkpoints with higher numbers than the last save are from an earlier attempt. They are set aside before
            # the new one gets its name. If the process is killed in between, the newest one is where this run began.
            aside = [_set_aside(path) for path in self._folder.glob("batch-*.ckpt") if _number(path) > self._saved]
            os.replace(staging, destination)
            flush(self._folder)
            for old in aside:
                _delete(old)
            for old in sorted(self._folder.glob("batch-*.ckpt"))[: -self.keep]:
                _delete(_set_aside(old))
        barrier()
        self._saved = batches

    def _take_over_interrupts(self) -> None:
        def handler(number: int, frame: FrameType | None) -> None:
            self._stop = True
            say("\nstopping after this batch; Ctrl-C again stops at once")
            signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            self._old_handler = signal.signal(signal.SIGINT, handler)
        except ValueError:  # not in the main thread, where Python allows no handlers
            self._old_handler = None


def _bytes_at_the_end(module: LightningModule) -> int:
    """A lower bound: the trained weights with AdamW's two moments, and the exported model in 16 bits."""
    parameters = list(module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    state = sum(parameter.numel() * (parameter.element_size() + 2 * 4) for parameter in trained)
    return state + 2 * sum(parameter.numel() for parameter in parameters)


def _batches(trainer: Trainer) -> int:
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def _is_last(trainer: Trainer) -> bool:
    """Whether this batch ends both its epoch and the run.

    If ``max_steps`` ends a run within an epoch, Lightning's loop counts the rest of that epoch as done before
    `on_train_end`. A run resumed from there with a later end would skip those batches.
    """
    epochs = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.is_last_batch and (epochs or trainer.global_step == trainer.max_steps)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is complete: a file has its index at the end, a folder of shards the files written last."""
    if path.is_dir():
        return (path / "meta.pt").is_file() and (path / ".metadata").is_file()
    return path.is_file() and zipfile.is_zipfile(path)


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("batch-")
    return int(digits) if digits.isdecimal() else 0


def _set_aside(path: Path) -> Path:
    """Renames a checkpoint, so that a half-deleted folder is not taken for one. The next save deletes leftovers."""
    doomed = path.with_name(f"{_STAGING}doomed-{path.name}")
    if doomed.exists():
        _delete(doomed)
    os.replace(path, doomed)
    return doomed


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
