"""Writes checkpoints that are never incomplete: staged beside their place, synced to disk, and renamed in one step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.distributed.checkpoint.api import CheckpointException

from rlhf_lightning.callbacks.checkpoint_files import (
    PlainFiles,
    batches_of,
    clear_staging,
    delete,
    latest,
    list_files,
    manifest_of,
    set_aside,
    staging,
)
from rlhf_lightning.callbacks.loop_position import (
    allow_fewer_epochs,
    around_each_batch,
    batches_done,
    begin_next_epoch,
    reopen_later,
    settle,
)
from rlhf_lightning.callbacks.metrics import rewind_loggers
from rlhf_lightning.callbacks.resume_notes import notes, settings
from rlhf_lightning.callbacks.run_files import run_folder, sync_to_disk
from rlhf_lightning.callbacks.slurm import requeue
from rlhf_lightning.callbacks.stop_signals import StopSignals
from rlhf_lightning.collectives import failing_together
from rlhf_lightning.errors import InputError, RolloutDropped
from rlhf_lightning.models.replacing import flush
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.outputs import check_room
from rlhf_lightning.text import notice, say


class RunCheckpoint(Checkpoint):
    """Saves to ``<run>/checkpoints/batch-N.ckpt`` after every so many batches, at the end, and on a signal.

    N counts batches over the whole run; one batch is one PPO iteration. A save comes after the batch's validation and
    its log entry; with gradient accumulation it waits for the optimizer step. A save never touches earlier checkpoints,
    so they survive if the process is killed in the middle.

    A run resumed from an older checkpoint keeps the later checkpoints of its first attempt until it has saved one of
    its own. Then they are removed, so that the newest checkpoint always belongs to the resumed run. A resumed run
    trains exactly what is missing, whatever ended the first attempt, and its log entries replace the later ones.

    Ctrl-C, SIGTERM and SIGUSR1, to any of the processes, save and stop: after the current batch, or at once within a
    rollout (it is drawn again) or a validation (it is made again). A second Ctrl-C stops at once, and saves nothing.

    Args:
        every_n_batches: how often to save.
        keep: how many of the newest checkpoints to keep.
    """

    def __init__(self, every_n_batches: PositiveInt = 100, keep: PositiveInt = 2) -> None:
        self.every_n_batches = every_n_batches
        self.keep = keep
        self._folder: Path | None = None
        self._reset()

    def _reset(self) -> None:
        """The state before a fit; one callback may be used for several."""
        self._saved = 0  # batches done at the last save
        self._newest_own = 0  # the number of this run's newest checkpoint; higher ones are from an earlier attempt
        self._then: tuple[dict[str, Any], dict[str, Any]] = {}, {}  # settings and options of a loaded checkpoint's run
        self._signals = StopSignals()
        self._endings: list[Callable[[], None]] = []  # what is to be undone at a fit's end
        self._saving = self._validating = False  # the second: within a validation
        self._held = False  # whether a wish to stop waits for the batch's end and the optimizer step

    @property
    def newest(self) -> Path | None:
        """The newest complete checkpoint of this run; None if there is none."""
        return None if self._folder is None else latest(self._folder)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the run's folder here, since all processes must take part."""
        self._folder = run_folder(trainer) / "checkpoints"
        if trainer.strategy._checkpoint_io is None:
            trainer.strategy.checkpoint_io = PlainFiles()
        if stage == "fit":
            self._undo()
            self._reset()
            self._take_signals(trainer)

    def _take_signals(self, trainer: Trainer) -> None:
        """Takes the signals over right after Lightning has set its own handlers."""
        connector = trainer._signal_connector
        register = connector.register_signal_handlers

        def registered() -> None:
            register()
            self._signals.take(trainer)

        vars(connector)["register_signal_handlers"] = registered
        self._endings += [lambda: vars(connector).pop("register_signal_handlers", None), self._signals.give_back]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes what a killed save has left, and checks the disk's room for the run's end: a checkpoint, the model.

        Raises:
            InputError: there is less room, so the training would be lost; on all processes.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with failing_together():
            if trainer.is_global_zero:
                assert self._folder is not None
                clear_staging(self._folder)
                needed, what = _bytes_at_the_end(pl_module), "a checkpoint and the model take at least"
                check_room(self._folder.parent, needed, what, "another place with --runs FOLDER")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lets the run go on within an epoch that was ended early, or that is longer now."""
        if trainer.state.fn == "fit":
            self._endings.append(reopen_later(trainer))
            run, options = (checkpoint.get(name, {}) for name in ("run", "hyper_parameters"))
            if not (isinstance(run, dict) and isinstance(options, dict)):
                raise TypeError("its run or its options are no mapping")
            self._then = run, options
            allow_fewer_epochs(trainer, checkpoint)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: RLHFModule, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        """Saves the position in Lightning's loops so that a resumed run goes on exactly there."""
        checkpoint["run"] = settings(trainer, pl_module)
        if self._saving:
            settle(checkpoint["loops"]["fit_loop"], self._validating)

    def on_train_start(self, trainer: Trainer, pl_module: RLHFModule) -> None:  # type: ignore[override]
        """After a resume, removes log entries later than the checkpoint, since they will be written again."""
        if trainer.ckpt_path is not None:
            # Where a validation is left to make, the checkpoint is written again after it.
            self._newest_own = batches_done(trainer)
            self._saved = self._newest_own - trainer.fit_loop.epoch_loop.val_loop.restarted_mid_evaluation
            rewind_loggers(trainer)
            begin_next_epoch(trainer)
            for line in notes(trainer, pl_module, *self._then) if trainer.is_global_zero else ():
                say(notice("resume", line))
        hold, between = (partial(hook, trainer) for hook in (self._hold_stop, self._between_batches))
        self._endings.append(around_each_batch(trainer, hold, between))

    def _hold_stop(self, trainer: Trainer) -> None:
        """Lets a wish to stop (``max_time``) wait until the batch is done: no validation is made that was not due."""
        self._held |= trainer.should_stop
        trainer.should_stop = False

    def _between_batches(self, trainer: Trainer) -> None:
        self._hold_stop(trainer)
        if trainer.fit_loop.epoch_loop._should_accumulate():  # no checkpoint holds gradients
            return
        trainer.should_stop = self._held
        stop = self._signals.agreed()
        if stop or batches_done(trainer) - self._saved >= self.every_n_batches:
            self.save(trainer)
        if stop:
            self._stop(trainer)

    def on_phase(self, trainer: Trainer, module: LightningModule, phase: str, done: int, total: int) -> None:
        """Called by modules with the progress of a part of their step. A rollout is dropped if the user wants to stop.

        Raises:
            RolloutDropped: a signal came to this process, or to another one.
        """
        draws = phase == "rollout" and trainer.training and not module.automatic_optimization
        if draws and self._signals.came():
            raise RolloutDropped

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Stops if the user wants to, but for a run's last validation under ``max_steps``: a resume would skip it."""
        if trainer.state.fn != "fit" or not self._signals.agreed():
            return
        if not trainer.sanity_checking:
            loop = trainer.fit_loop.epoch_loop
            if loop.global_step == trainer.max_steps or loop._should_accumulate():  # no checkpoint holds gradients
                return
            self._validating = True
            self.save(trainer)
        self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the final state. From here on a signal ends the process as it did before the run."""
        self.save(trainer)
        if self._signals.agreed():
            self._stop(trainer)
        self._undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Puts back what a fit has changed; Lightning calls no ``teardown`` after a failure."""
        self._undo()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts back what a fit has changed."""
        self._undo()

    def _undo(self) -> None:
        endings, self._endings = self._endings, []
        for end in endings:
            end()

    def _stop(self, trainer: Trainer) -> NoReturn:
        if trainer.is_global_zero:
            goes_on = f"; the same command goes on with --ckpt_path last, from {self.newest}" if self.newest else ""
            say(f"stopped{goes_on}")
            if self._signals.requeues:
                requeue()
        self._signals.stop()

    def save(self, trainer: Trainer) -> None:
        """Writes a checkpoint of the current state, unless there is one already. Every process calls it.

        Raises:
            InputError: it cannot be written; on all processes. The checkpoints from before are as they were.
        """
        batches = batches_done(trainer)
        if batches == self._saved or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self._folder is not None
        began = time.monotonic()
        destination = self._folder / f"batch-{batches:08d}.ckpt"
        staged = staging(destination)
        with failing_together(), self._written(destination):
            if trainer.is_global_zero:
                self._folder.mkdir(parents=True, exist_ok=True)
                clear_staging(self._folder)  # of a failed save in this run
        self._saving = True
        try:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)  # with optimizers and callbacks
        finally:
            self._saving = False
        try:
            # Trainer.save_checkpoint ends in a barrier, at which the others would wait for one that has failed.
            with failing_together(), self._written(destination):
                trainer.strategy.save_checkpoint(checkpoint, staged)
            with failing_together(), self._written(destination):
                if trainer.is_global_zero:
                    size = self._name(staged, destination)
                    said = f"saved: {destination}, {size / 1e6:,.1f} MB in {time.monotonic() - began:,.1f} s"
                    rank_zero_info(said, extra={"in_preflight": True})
        except InputError:
            if trainer.is_global_zero:  # half a checkpoint may be what fills the disk
                with suppress(OSError):
                    clear_staging(self._folder)
            raise
        self._saved = self._newest_own = batches

    def _name(self, staged: Path, destination: Path) -> int:
        """Gives a written checkpoint its name, and removes what it replaces; returns its bytes."""
        sync_to_disk(staged)
        folder = destination.parent
        # Checkpoints with higher numbers than this run's newest are from an earlier attempt. They are set aside before
        # the new one gets its name. If the process is killed in between, the newest one is where this run began.
        others = [path for path in folder.glob("batch-*.ckpt") if batches_of(path) > self._newest_own]
        others += [destination] if destination.exists() and destination not in others else []
        size = list_files(staged, destination)
        aside = [set_aside(path) for path in others]
        if staged.is_file():
            os.replace(manifest_of(staged), manifest_of(destination))
        os.replace(staged, destination)
        flush(folder)
        for old in aside:
            delete(old)
        for old in sorted(folder.glob("batch-*.ckpt"))[: -self.keep]:
            delete(set_aside(old))
        return size

    @contextmanager
    def _written(self, destination: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, CheckpointException) as error:
            failures = (
                [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
            )
            why = next((failure for failure in [error, *failures] if isinstance(failure, OSError)), error)
            newest = self.newest
            before = f"the one from before is whole: {newest}" if newest else "there is none from before"
            raise InputError(
                f"{destination}: this checkpoint cannot be written ({getattr(why, 'strerror', why)}); {before}"
            ) from error


def _bytes_at_the_end(module: LightningModule) -> int:
    """A lower bound: the trained weights with AdamW's two moments, and the exported model in 16 bits."""
    parameters = list(module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    state = sum(parameter.numel() * (parameter.element_size() + 2 * 4) for parameter in trained)
    return state + 2 * sum(parameter.numel() for parameter in parameters)
