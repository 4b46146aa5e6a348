"""AdamW, its parameter groups, and its learning rate over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import Trainer
from torch import nn
from torch.optim import AdamW

from rlhf_lightning.errors import InputError
from rlhf_lightning.options import NonNegativeFloat, NonNegativeInt, OpenUnitInterval, Options, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class AdamWOptions(Options):
    """AdamW and its learning rate.

    Args:
        learning_rate: peak learning rate.
        weight_decay: decoupled weight decay, on matrices only (not on biases and norms).
        beta1: decay of the running mean of the gradient.
        beta2: decay of the running mean of its square.
        eps: added to the root of the second, for stability.
        warmup_steps: optimizer steps over which the learning rate rises linearly from 0 to its peak.
        schedule: after the warm-up: stay constant, or fall to 0 at the last step, linearly or along a cosine.
    """

    learning_rate: PositiveFloat = 1e-5
    weight_decay: NonNegativeFloat = 0.0
    beta1: OpenUnitInterval = 0.9
    beta2: OpenUnitInterval = 0.999
    eps: PositiveFloat = 1e-8
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"

    def factor(self, step: int, total_steps: Callable[[], int | None]) -> float:
        """The share of the peak learning rate that optimizer step ``step`` (from 0) uses.

        Args:
            step: the step.
            total_steps: asked for the steps of the whole training, where the share depends on them.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        # The first step's share is asked for before the length of the training is known.
        if self.schedule == "constant" or step == self.warmup_steps:
            return 1.0
        total = self.checked(total_steps())
        progress = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        return 1.0 - progress if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    def checked(self, total_steps: int | None) -> int:
        """``total_steps``, of the whole training; 0 for None where the schedule needs no end.

        Raises:
            InputError: None, and the schedule needs an end.
        """
        if total_steps is None and self.schedule != "constant":
            raise InputError(
                f"model.optimizer.schedule: {self.schedule} needs an end; set trainer.max_steps or max_epochs, or "
                "constant"
            )
        return total_steps or 0


def decay_groups(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices, with the weight decay, and the rest, without it; empty ones are left out."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "lr": learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_adamw(groups: list[dict[str, Any]], options: AdamWOptions, *, fused: bool) -> AdamW:
    """The optimizer of `decay_groups`. ``fused``: one pass over the parameters instead of one for each operation."""
    return AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=0.0,
        fused=fused,
    )


def steps_of_training(trainer: Trainer) -> int | None:
    """Optimizer steps until ``max_steps`` or ``max_epochs`` end an automatically optimised training; None if neither.

    Lightning's ``estimated_stepping_batches`` would set up the loader too early.
    """
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.num_training_batches != math.inf:
        an_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        limits.append(an_epoch * trainer.max_epochs)
    return min(limits, default=None)
