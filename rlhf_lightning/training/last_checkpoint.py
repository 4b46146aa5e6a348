"""Where a training that diverged can go on from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer

from rlhf_lightning.errors import TrainingDiverged


@contextmanager
def naming_checkpoint(trainer: Trainer | None) -> Iterator[None]:
    """A `TrainingDiverged` raised inside names the last checkpoint of the Trainer's checkpoint callbacks."""
    try:
        yield
    except TrainingDiverged as error:
        raise TrainingDiverged(f"{error}; {_way_on(trainer)}") from error


def _way_on(trainer: Trainer | None) -> str:
    lower = "with a lower model.optimizer.learning_rate"
    for callback in trainer.checkpoint_callbacks if trainer is not None else ():
        for name in ("newest", "last_model_path", "best_model_path"):
            if path := getattr(callback, name, None):
                return f"the last checkpoint from before is {path}; resume from it {lower}"
    return f"no checkpoint was saved before; start again {lower}"
