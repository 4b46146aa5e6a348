"""Where a training is in Lightning's loops: told between two batches, saved, and put right where a run is resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from rlhf_lightning.errors import RolloutDropped


def around_each_batch(trainer: Trainer, before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
    """Calls ``before`` and ``after`` around what Lightning does at a batch's end: validation, and the log entry.

    ``after`` is called before the next batch is fetched. Lightning has no hook there. A checkpoint must be written at
    that moment: earlier, its log entry and its validation may be lost; later, a loader with a state has already given
    away the next batch. At an epoch's last batch it is called once the epoch's own hooks are done. Where a batch ends
    in a `RolloutDropped` it is called alone, and stops the run.

    Returns: a function that ends this.
    """
    batches, epochs = trainer.fit_loop.epoch_loop, trainer.fit_loop
    advance, end_of_batch, end_of_epoch = batches.advance, batches.on_advance_end, epochs.on_advance_end

    def batch(fetcher: Any) -> None:
        try:
            advance(fetcher)
        except RolloutDropped:
            after()
            raise

    def batch_done(fetcher: Any) -> None:
        before()
        end_of_batch(fetcher)
        if not batches._num_ready_batches_reached():
            after()

    def epoch_done() -> None:
        end_of_epoch()
        if batches._num_ready_batches_reached():
            after()

    def end() -> None:
        for loop, name in ((batches, "advance"), (batches, "on_advance_end"), (epochs, "on_advance_end")):
            vars(loop).pop(name, None)

    vars(batches).update(advance=batch, on_advance_end=batch_done)
    vars(epochs).update(on_advance_end=epoch_done)
    return end


def settle(progress: dict[str, Any], validating: bool) -> None:
    """Turns the counts of a save within an epoch into those from which Lightning goes on exactly.

    These are the counts that it has in ``on_train_batch_end``. A batch that has begun is not counted: it is trained
    again, with the same draws.

    Args:
        progress: ``loops.fit_loop`` of the checkpoint that is being saved.
        validating: whether the save is within a validation, which the resumed run then makes from its beginning.
    """
    epoch, batch = progress["epoch_progress"], progress["epoch_loop.batch_progress"]
    validation = progress["epoch_loop.val_loop.batch_progress"]
    if validating:
        total = validation["total"]
        total.update(started=total["ready"], processed=total["ready"] - 1, completed=total["ready"] - 1)
        validation["current"].update(ready=0, started=0, processed=0, completed=0)
    elif epoch["current"]["processed"] < epoch["current"]["started"]:
        for counts in (batch["total"], batch["current"]):
            counts["ready"] = counts["started"] = counts["processed"]
        if batch["current"]["processed"] == 0:  # within the epoch's first batch: the epoch begins again
            for counts in (epoch["total"], epoch["current"]):
                counts["ready"] = counts["started"] = counts["processed"]
        else:
            _back_to_the_batchs_end(progress)


def reopen_later(trainer: Trainer) -> Callable[[], None]:
    """Lets a run that loads a checkpoint `reopen` its epoch as soon as Lightning has counted the epoch's batches.

    Returns: a function that ends this.
    """
    loop: Any = trainer.fit_loop
    set_up = loop.setup_data

    def end() -> None:
        vars(loop).pop("setup_data", None)

    def reopening() -> None:
        end()
        set_up()
        parts = {
            "epoch_progress": loop.epoch_progress,
            "epoch_loop.batch_progress": loop.epoch_loop.batch_progress,
        }
        progress = {name: part.state_dict() for name, part in parts.items()}
        progress["epoch_loop.state_dict"] = {"_batches_that_stepped": loop.epoch_loop._batches_that_stepped}
        if reopen(progress, loop.max_batches):
            for name, part in parts.items():
                part.load_state_dict(progress[name])
            loop.epoch_loop._batches_that_stepped = progress["epoch_loop.state_dict"]["_batches_that_stepped"]
            loop.restarting = True
            loop._load_combined_loader_states()
            iter(loop._data_fetcher)

    vars(loop)["setup_data"] = reopening
    return end


def reopen(progress: dict[str, Any], batches: float) -> bool:
    """Lets a resumed run go on within an epoch that Lightning counts as done though batches of it are missing.

    It counts so if anything ends a run within an epoch (``max_steps``, ``max_time``, early stopping), and would skip
    the rest of the epoch. An epoch may also have become longer, e.g. by more iterations.

    Args:
        progress: that of the loops, as in a checkpoint's ``loops.fit_loop``; changed in place.
        batches: an epoch's batches in the resumed run; infinite where a loader has no length, and then the epoch is as
            long as it was.

    Returns: whether anything was missing.
    """
    epoch, batch = progress["epoch_progress"], progress["epoch_loop.batch_progress"]
    ended = 0 < epoch["current"]["processed"] == epoch["current"]["started"]
    missing = not batch["is_last_batch"] if batches == math.inf else batch["current"]["processed"] < batches
    if not (ended and missing and batch["current"]["processed"]):
        return False
    for counts in (epoch["total"], epoch["current"]):
        counts["processed"] -= 1
        counts["completed"] = counts["processed"]
    batch["is_last_batch"] = False
    _back_to_the_batchs_end(progress)
    return True


def _back_to_the_batchs_end(progress: dict[str, Any]) -> None:
    """The counts of ``on_train_batch_end``, from those after the batch's log entry."""
    batch = progress["epoch_loop.batch_progress"]
    for counts in (batch["total"], batch["current"]):
        counts["completed"] = counts["processed"] - 1
    progress["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def begin_next_epoch(trainer: Trainer) -> None:
    """Lets a run that was resumed between two epochs train the next one.

    Under ``max_steps`` Lightning takes every resumed run for one within an epoch, and would skip the next epoch.
    """
    loop: Any = trainer.fit_loop
    if loop.epoch_progress.current.processed == loop.epoch_progress.current.started:
        loop._restarting = False
        loop.epoch_loop.restarting = False


def batches_done(trainer: Trainer) -> int:
    """The batches of the whole run that are trained."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return int(progress.total.processed)


def steps_logged(trainer: Trainer) -> int:
    """When a run is resumed: how many of its log entries, from the first on, belong to the checkpoint's state."""
    loop: Any = trainer.fit_loop.epoch_loop
    within_batch = loop.batch_progress.total.completed < loop.batch_progress.total.processed
    return int(loop._batches_that_stepped) + (within_batch or loop.val_loop.restarted_mid_evaluation)


def allow_fewer_epochs(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Lets a run that has had more epochs than are asked for end at once, as with steps; Lightning would refuse it."""
    had = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if trainer.max_epochs is not None and -1 < trainer.max_epochs < had:
        trainer.fit_loop.max_epochs = had
