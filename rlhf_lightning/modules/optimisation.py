"""The optimizer and its step: the normalisation of summed losses, the guard against NaN, the schedule.

Losses are sums. A ``training_step`` returns the sum over its rows and calls `OptimisedModule.count` with what that sum
is to be divided by; before the optimizer step, and before clipping, the gradients are divided by the count of the whole
step: all its micro-batches, all processes. So the result does not depend on how the rows were split.
"""

from __future__ import annotations

import math
import time
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveFloat
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlhf_lightning.collectives import all_reduce_sum, grad_norm, scale_grads, world_size
from rlhf_lightning.errors import InputError, TrainingDiverged
from rlhf_lightning.modules.balancing import check_taken
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.ops.extension import keep_memory


class OptimisedModule(LightningModule):
    """AdamW with a schedule, and optimizer steps that are refused when something is not finite.

    Args:
        learning_rate: peak learning rate of AdamW.
        weight_decay: decoupled weight decay, on matrices only (not on biases and norms).
        adam_beta1: decay of AdamW's running mean of the gradient.
        adam_beta2: decay of AdamW's running mean of its square.
        adam_eps: AdamW's epsilon.
        warmup_steps: optimizer steps over which the learning rate rises linearly from 0 to its peak.
        schedule: after the warm-up: stay constant, or fall to 0 at the last step, linearly or along a cosine.
    """

    def __init__(
        self,
        learning_rate: PositiveFloat = 1e-5,
        weight_decay: NonNegativeFloat = 0.0,
        adam_beta1: OpenUnitInterval = 0.9,
        adam_beta2: OpenUnitInterval = 0.999,
        adam_eps: PositiveFloat = 1e-8,
        warmup_steps: NonNegativeInt = 0,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.adam_betas = (adam_beta1, adam_beta2)
        self.adam_eps = adam_eps
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.step_totals = (
            Totals()
        )  # what is logged after an optimizer step: means over its micro-batches and processes
        # Of the last optimizer step, before anything is clipped: by network, and of all together.
        self.grad_norms: dict[str, float] = {}
        self.grad_norm = 0.0
        self._sums = torch.zeros(3, dtype=torch.float64)  # of this optimizer step: count, losses not finite, tokens
        self._counted = False
        self._configured: list[dict[str, Any]] = []  # the options of the optimizer's groups, lr at its peak
        self._step_began = time.monotonic()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups; a group's ``lr`` is its peak learning rate. Frozen parameters are left out."""
        return self.decay_groups([p for p in self.parameters() if p.requires_grad], self.learning_rate)

    def networks(self) -> dict[str, nn.Module]:
        """The parts whose gradient norms are measured apart, by their names."""
        return {}

    def decay_groups(self, parameters: list[nn.Parameter], learning_rate: float) -> list[dict[str, Any]]:
        """Matrices, with the weight decay, and the rest, without it."""
        matrices = [p for p in parameters if p.ndim >= 2]
        rest = [p for p in parameters if p.ndim < 2]
        groups = [
            {"params": matrices, "lr": learning_rate, "weight_decay": self.weight_decay},
            {"params": rest, "lr": learning_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def configure_optimizers(self) -> Any:
        """AdamW, and the schedule, stepped once an optimizer step."""
        # Fused: one pass over the parameters instead of one for each operation. Not under a scaler of fp16 gradients,
        # where it would take the scale off in its step, after `on_before_optimizer_step` has measured and clipped.
        fused = getattr(self.trainer.precision_plugin, "scaler", None) is None
        optimizer = AdamW(
            self.parameter_groups(),
            lr=self.learning_rate,
            betas=self.adam_betas,
            eps=self.adam_eps,
            weight_decay=0.0,
            fused=fused,
        )
        options = ("lr", "weight_decay", "betas", "eps")
        self._configured = [{name: group[name] for name in options} for group in optimizer.param_groups]
        # A lambda and not a bound method: LambdaLR saves the attributes of anything that is not a plain function.
        scheduler = LambdaLR(optimizer, lambda step: self.rate_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def rate_factor(self, step: int) -> float:
        """The share of the peak learning rate that optimizer step ``step`` (from 0) uses."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        # The first step's is asked for before the length of the training is known.
        if self.schedule == "constant" or step == self.warmup_steps:
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps() - self.warmup_steps))
        return 1.0 - progress if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    def total_steps(self) -> int:
        """Optimizer steps of the whole training. (Not ``estimated_stepping_batches``: it sets up the loader too early.)

        Raises:
            InputError: the training has no end that could be told in advance.
        """
        trainer = self.trainer
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.num_training_batches != math.inf:
            an_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            limits.append(an_epoch * trainer.max_epochs)
        if not limits:
            raise InputError(
                f"model.schedule: {self.schedule} needs an end; set trainer.max_steps or max_epochs, or constant"
            )
        return min(limits)

    def on_fit_start(self) -> None:
        """Training on the CPU keeps the memory of large tensors from step to step."""
        if self.device.type == "cpu":
            keep_memory(True)

    def on_fit_end(self) -> None:
        """And gives it back."""
        if self.device.type == "cpu":
            keep_memory(False)

    def on_train_start(self) -> None:
        """The configured optimizer options win over a checkpoint's; a schedule without an end is refused now."""
        if self.schedule != "constant":
            self.total_steps()
        schedulers = self.lr_schedulers()
        if isinstance(schedulers, LambdaLR):
            schedulers.base_lrs = [configured["lr"] for configured in self._configured]
            factor = self.rate_factor(schedulers.last_epoch)
            for group, configured in zip(schedulers.optimizer.param_groups, self._configured, strict=True):
                group.update(configured, initial_lr=configured["lr"], lr=configured["lr"] * factor)
        self._step_began = time.monotonic()

    # The optimizer step

    def count(self, amount: Tensor, loss: Tensor, tokens: Tensor | None = None) -> None:
        """Add to what this optimizer step's gradients are divided by, over its micro-batches and all processes.

        Args:
            amount: scalar; the tokens, rows or weight behind the summed loss. Without any call in a step the gradients
                stay as they are (a manual module may divide by a count that it has reduced itself).
            loss: the loss, see `check`.
            tokens: scalar; real tokens processed, for the logged tokens per second.
        """
        self._counted = True
        self._add(0, amount)
        if tokens is not None:
            self._add(2, tokens)
        self.check(loss)

    def check(self, loss: Tensor) -> None:
        """Remember whether the loss has a NaN or infinity on any process: no process takes the next step then."""
        self._add(1, (~torch.isfinite(loss.detach())).any())

    def _add(self, slot: int, amount: Tensor) -> None:
        self._sums = self._sums.to(amount.device)
        self._sums[slot] += amount.detach().double()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Normalise, check, measure; Lightning clips after this.

        Raises:
            TrainingDiverged: loss or gradient NaN or infinite; on all processes together, and before the step. Names
                the last checkpoint.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        count, diverged, tokens = all_reduce_sum(self._sums).tolist()
        counted, self._counted, self._sums = self._counted, False, torch.zeros_like(self._sums)
        if diverged:
            raise TrainingDiverged(f"the loss is NaN or infinite at {self.moment}; {self.last_checkpoint()}")
        if counted:
            # DDP and FSDP2 have averaged over the processes, Lightning has divided by its accumulation.
            averaged = world_size() * (self.trainer.accumulate_grad_batches if self.automatic_optimization else 1)
            scale_grads(parameters, averaged / count if count > 0 else 0.0)
        check_taken(self.children())
        networks = {name: list(network.parameters()) for name, network in self.networks().items()}
        measured = {id(p) for network in networks.values() for p in network}
        self.grad_norms = {name: grad_norm(network) for name, network in networks.items()}
        rest = grad_norm(p for p in parameters if id(p) not in measured)
        self.grad_norm = math.hypot(rest, *self.grad_norms.values())
        # With fp16 an overflow is business as usual: the scaler skips the step and lowers its scale.
        if not math.isfinite(self.grad_norm) and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            raise TrainingDiverged(f"the gradient is NaN or infinite at {self.moment}; {self.last_checkpoint()}")
        if self.automatic_optimization:
            self._log_step(optimizer, tokens)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """``trainer.gradient_clip_val`` by the norm that is measured already; other algorithms are Lightning's.

        A module's own ``on_before_optimizer_step`` has to call ``super()``'s, which measures it.
        """
        if not gradient_clip_val or gradient_clip_algorithm not in (None, "norm"):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif self.grad_norm > gradient_clip_val:
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            scale_grads(parameters, gradient_clip_val / self.grad_norm)

    @property
    def moment(self) -> str:
        """Where the training is, as an error tells it."""
        return f"optimizer step {self.trainer.global_step + 1}"

    def last_checkpoint(self) -> str:
        """Where to go on from after a divergence, by the run's checkpoint callback: this library's, or Lightning's."""
        for callback in self.trainer.checkpoint_callbacks:
            for name in ("newest", "last_model_path", "best_model_path"):
                if path := getattr(callback, name, None):
                    return f"the last checkpoint from before is {path}; resume from it with a lower model.learning_rate"
        return "no checkpoint was saved before; start again with a lower model.learning_rate"

    def _log_step(self, optimizer: Optimizer, tokens: float) -> None:
        means = self.step_totals.means()
        self.step_totals = Totals()
        now = time.monotonic()
        means["train/tokens_per_second"] = tokens / max(now - self._step_began, 1e-9)
        self._step_began = now
        means["train/grad_norm"] = self.grad_norm
        means["train/learning_rate"] = optimizer.param_groups[0]["lr"]
        self.log_dict(means)

    def restart_clock(self) -> None:
        """Leave the time since the last optimizer step out of the tokens per second."""
        self._step_began = time.monotonic()
