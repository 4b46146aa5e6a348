"""Says where a resumed run goes on, and what is no longer as it was when its checkpoint was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from rlhf_lightning.callbacks.loop_position import batches_done
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.options import plain
from rlhf_lightning.training.made_with import typed

_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision", "world_size")


def settings(trainer: Trainer, module: RLHFModule) -> dict[str, Any]:
    """What a checkpoint should know of its run beside the module's options, as plain data."""
    return {
        "trainer": {name: plain(getattr(trainer, name)) for name in _TRAINER},
        "steps": module.total_steps(),
    }


def notes(trainer: Trainer, module: RLHFModule, then: Mapping[str, Any], options: Mapping[str, Any]) -> Iterable[str]:
    """The lines to print once a checkpoint is loaded.

    Args:
        trainer: the resumed run's.
        module: its module.
        then: the `settings` of the run that made the checkpoint; empty where it holds none.
        options: that run's options of the module.
    """
    now = settings(trainer, module)
    where = f"after batch {batches_done(trainer):,} and optimizer step {trainer.global_step:,}"
    yield f"from {Path(str(trainer.ckpt_path)).name}, {where}"
    yield from changed(options, plain(dict(module.hparams)), "model")
    yield from changed(then.get("trainer", {}), now["trainer"], "trainer")
    optimizer, before, after = module.optimizer_options, then.get("steps"), now["steps"]
    same = options.get("optimizer", {}).get("schedule") == optimizer.schedule != "constant"
    if same and before is not None and after not in (before, None):
        was, now_is = (
            f"{optimizer.learning_rate * optimizer.factor(trainer.global_step, partial(int, steps)):.3g}"
            for steps in (before, after)
        )
        yield (
            f"model.optimizer.schedule: {optimizer.schedule} ends at step {after:,}, and ended at {before:,} when the "
            f"checkpoint was made: the learning rate goes on at {now_is}"
            + (f" in place of {was}" if was != now_is else ", as before")
        )


def changed(then: Mapping[str, Any], now: Mapping[str, Any], name: str) -> Iterable[str]:
    """One line for every option, nested or not, that both have, with different values."""
    for key in (key for key in now if key in then):
        before, after = then[key], now[key]
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from changed(before, after, f"{name}.{key}")
        elif before != after:
            yield f"{name}.{key}: {typed(before)} when the checkpoint was made, now {typed(after)}"
