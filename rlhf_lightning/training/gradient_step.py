"""One optimizer step over its micro-batches and processes: it divides summed losses and stops at NaN.

Losses are sums. A ``training_step`` returns the sum over its rows and calls `GradientStep.count` with what that sum is
to be divided by. Before the optimizer step, and before clipping, the gradients are divided by the count of the whole
step: all its micro-batches, all processes. So the result does not depend on how the rows were split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rlhf_lightning.collectives import all_reduce_sum, grad_norm, scale_grads, world_size
from rlhf_lightning.errors import TrainingDiverged
from rlhf_lightning.training.totals import Totals


class GradientStep:
    """Collects counts and checks until the optimizer steps.

    Attributes:
        totals: what is logged after the step: means over its micro-batches and processes.
        norm: the gradient's norm in the last step, before anything was clipped.
        norms: the same by network.
    """

    def __init__(self) -> None:
        self.totals = Totals()
        self.norm = 0.0
        self.norms: dict[str, float] = {}
        self._sums = torch.zeros(3, dtype=torch.float64)  # count, losses not finite, tokens
        self._counted = False

    def count(self, amount: Tensor, loss: Tensor, tokens: Tensor | None = None) -> None:
        """Adds to what this step's gradients are divided by.

        Args:
            amount: scalar; the tokens, rows or weight behind the summed loss. Without any call in a step the gradients
                stay as they are (a module may divide by a count that it has reduced itself).
            loss: the loss, see `check`.
            tokens: scalar; real tokens processed, for the logged tokens per second.
        """
        self._counted = True
        self._add(0, amount)
        if tokens is not None:
            self._add(2, tokens)
        self.check(loss)

    def check(self, loss: Tensor) -> None:
        """Remembers whether the loss is NaN or infinite on any process; then no process takes the step."""
        self._add(1, (~torch.isfinite(loss.detach())).any())

    def _add(self, slot: int, amount: Tensor) -> None:
        self._sums = self._sums.to(amount.device)
        self._sums[slot] += amount.detach().double()

    def finish(
        self,
        parameters: Sequence[nn.Parameter],
        networks: Mapping[str, nn.Module],
        accumulated: int,
        moment: str,
        *,
        overflows: bool,
    ) -> float:
        """Divides the gradients by the count of all processes, checks them, and measures their norms.

        Args:
            parameters: all that the optimizer steps.
            networks: whose norms are measured apart.
            accumulated: micro-batches that the gradients were averaged over already.
            moment: when this is, for messages.
            overflows: whether a gradient may be infinite: a scaler of fp16 gradients then skips the step and lowers its
                scale.

        Returns: the real tokens of the step, of all processes.

        Raises:
            TrainingDiverged: loss or gradient NaN or infinite, on all processes together and before the step.
        """
        count, diverged, tokens = all_reduce_sum(self._sums).tolist()
        counted, self._counted, self._sums = self._counted, False, torch.zeros_like(self._sums)
        if diverged:
            raise TrainingDiverged(f"the loss is NaN or infinite at {moment}")
        if counted:
            # DDP and FSDP2 have averaged over the processes, Lightning has divided by its accumulation.
            averaged = world_size() * accumulated
            scale_grads(parameters, averaged / count if count > 0 else 0.0)
        own = {name: list(network.parameters()) for name, network in networks.items()}
        measured = {id(p) for network in own.values() for p in network}
        self.norms = {name: grad_norm(network) for name, network in own.items()}
        rest = grad_norm(p for p in parameters if id(p) not in measured)
        self.norm = math.hypot(rest, *self.norms.values())
        if not math.isfinite(self.norm) and not overflows:
            raise TrainingDiverged(f"the gradient is NaN or infinite at {moment}")
        return tokens

    def means(self) -> dict[str, float]:
        """What was added to `totals` since the last call, as means over all processes."""
        means, self.totals = self.totals.means(), Totals()
        return means
