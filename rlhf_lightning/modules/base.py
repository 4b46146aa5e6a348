"""What every module shares: the optimizer, the normalisation of summed losses, the guard against NaN, generation.

Losses are sums. A ``training_step`` returns the sum over its rows and calls `RLHFModule.count` with what that sum is to
be divided by; before the optimizer step, and before clipping, the gradients are divided by the count of the whole step:
all its micro-batches, all processes. So the result does not depend on how the rows were split.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    restricted_number_type,
)
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch, Rollout, View
from rlhf_lightning.distributed import FSDP2Strategy, all_reduce_sum, any_true, grad_norm, scale_grads, world_size
from rlhf_lightning.errors import InputError, TrainingDiverged
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.layers import checkpoint_activations
from rlhf_lightning.models.loading import check_vocabularies, eos_ids, load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.models.sharding import shard
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.rollout.sampler import sample

# Half or more would say that the labels are worthless or the wrong way round.
LabelSmoothing = restricted_number_type("LabelSmoothing", float, [(">=", 0), ("<", 0.5)])


class RLHFModule(LightningModule):
    """The base of all modules; subclasses build their models in ``configure_model``.

    Args:
        model: folder (or hub id) of the model to train.
        learning_rate: peak learning rate of AdamW.
        weight_decay: decoupled weight decay, on matrices only (not on biases and norms).
        adam_beta1: decay of AdamW's running mean of the gradient.
        adam_beta2: decay of AdamW's running mean of its square.
        adam_eps: AdamW's epsilon.
        warmup_steps: optimizer steps over which the learning rate rises linearly from 0 to its peak.
        schedule: after the warm-up: stay constant, or fall to 0 at the last step, linearly or along a cosine.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        trust_remote_code: let transformers run Python code that comes with the model.
    """

    automatic = True  # automatic optimisation; PPO turns it off
    data_view: View
    tokenizer: PreTrainedTokenizerBase

    # How `generate` samples; modules with a policy take these as options.
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __init__(
        self,
        model: str,
        learning_rate: PositiveFloat = 1e-5,
        weight_decay: NonNegativeFloat = 0.0,
        adam_beta1: OpenUnitInterval = 0.9,
        adam_beta2: OpenUnitInterval = 0.999,
        adam_eps: PositiveFloat = 1e-8,
        warmup_steps: NonNegativeInt = 0,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = self.automatic
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.adam_betas = (adam_beta1, adam_beta2)
        self.adam_eps = adam_eps
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.gradient_checkpointing = gradient_checkpointing
        self.trust_remote_code = trust_remote_code
        self.policy: Policy | None = None
        self.scalar: ScalarModel | None = None
        self.step_totals = (
            Totals()
        )  # what is logged after an optimizer step: means over its micro-batches and processes
        self.held_out_totals = Totals()  # what is logged after validation
        self._sums = torch.zeros(3, dtype=torch.float64)  # of this optimizer step: count, losses not finite, tokens
        self._counted = False
        self._max_grad_norm: float | None = None
        self._configured: list[dict[str, Any]] = []  # the options of the optimizer's groups, lr at its peak
        self._step_began = time.monotonic()
        self.grad_norm = 0.0  # of the last optimizer step, before clipping

    # Setting up

    def setup(self, stage: str) -> None:
        """Refuse strategies whose gradients this module would get wrong, and take the DataModule's tokenizer.

        Raises:
            InputError: FSDP1, DeepSpeed and others; the message names ``fsdp2``.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy):
            raise InputError(
                f"trainer.strategy: {type(strategy).__name__} is not supported; use ddp, or fsdp2 to shard the model"
            )
        # Lightning's bf16-true would round a batch's weights and margins, and nothing else in it is a float.
        self.trainer.precision_plugin.convert_input = lambda data: data
        given = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        self.tokenizer = given if given is not None else load_tokenizer(self.model, self.trust_remote_code)

    def build_policy(self, folder: str, critic: Literal["head"] | int | None = None, frozen: bool = False) -> Policy:
        """Load a policy, shard it where the strategy does, and ready it for training, or freeze it.

        A frozen model is on this process's device already. Keep it with `keep_frozen`, outside the module tree.
        """
        model = load_causal_lm(folder, trust_remote_code=self.trust_remote_code)
        check_vocabularies(self.tokenizer, model, folder)
        return self._prepare(Policy(model, critic), frozen)

    def build_scalar(self, folder: str, *, fresh_head: bool, seed: int = 0, frozen: bool = False) -> ScalarModel:
        """The same for a model with one scalar per token: a reward model, or a critic."""
        model = load_scalar_model(folder, fresh_head=fresh_head, seed=seed, trust_remote_code=self.trust_remote_code)
        check_vocabularies(self.tokenizer, model, folder)
        return self._prepare(ScalarModel(model), frozen)

    def _prepare(self, built: Any, frozen: bool) -> Any:
        if frozen:
            built.requires_grad_(False).eval()
        else:
            built.train()  # dropout is off; this is for gradient checkpointing, which HF does in train mode alone
            if self.gradient_checkpointing:
                checkpoint_activations(built.model)
        if self.device_mesh is not None:
            built = shard(built, self.device_mesh["data_parallel"])
        if frozen:
            built = self.trainer.precision_plugin.convert_module(built).to(self.trainer.strategy.root_device)
        return built

    def keep_frozen(self, name: str, module: nn.Module | None) -> None:
        """Set an attribute outside the module tree: it is in no checkpoint, no optimizer and no gradient reduction."""
        object.__setattr__(self, name, module)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups; a group's ``lr`` is its peak learning rate. Frozen parameters are left out."""
        return self.decay_groups([p for p in self.parameters() if p.requires_grad], self.learning_rate)

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
        optimizer = AdamW(
            self.parameter_groups(), lr=self.learning_rate, betas=self.adam_betas, eps=self.adam_eps, weight_decay=0.0
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
        """Normalise, check, measure; Lightning clips after this, manual modules clip in here.

        Raises:
            TrainingDiverged: loss or gradient NaN or infinite; on all processes together, and before the step.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        count, diverged, tokens = all_reduce_sum(self._sums).tolist()
        counted, self._counted, self._sums = self._counted, False, torch.zeros_like(self._sums)
        if diverged:
            raise TrainingDiverged(f"the loss is NaN or infinite at optimizer step {self.trainer.global_step + 1}")
        if counted:
            # DDP and FSDP2 have averaged over the processes, Lightning has divided by its accumulation.
            averaged = world_size() * (self.trainer.accumulate_grad_batches if self.automatic_optimization else 1)
            scale_grads(parameters, averaged / count if count > 0 else 0.0)
        self.grad_norm = grad_norm(parameters)
        # With fp16 an overflow is business as usual: the scaler skips the step and lowers its scale.
        if not math.isfinite(self.grad_norm) and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            raise TrainingDiverged(f"the gradient is NaN or infinite at optimizer step {self.trainer.global_step + 1}")
        if self._max_grad_norm is not None and self.grad_norm > self._max_grad_norm:
            scale_grads(parameters, self._max_grad_norm / self.grad_norm)
        if self.automatic_optimization:
            self._log_step(optimizer, tokens)

    def update(self, max_grad_norm: float | None = None) -> float:
        """Manual modules: normalise, check, clip to ``max_grad_norm``, step, zero the gradients, step the schedule.

        Returns: the 2-norm of the gradients before clipping, over all shards.
        """
        optimizer = self.optimizers()
        self._max_grad_norm = max_grad_norm
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()
        return self.grad_norm

    def _log_step(self, optimizer: Optimizer, tokens: float) -> None:
        means = self.step_totals.means()
        self.step_totals = Totals()
        now = time.monotonic()
        means["train/tokens_per_second"] = tokens / max(now - self._step_began, 1e-9)
        self._step_began = now
        means["train/grad_norm"] = self.grad_norm
        means["train/learning_rate"] = optimizer.param_groups[0]["lr"]
        self.log_dict(means)

    # Measuring

    def measure(self, batch: Any, totals: Totals) -> None:
        """Add a held-out batch to ``totals``, under names without the ``val/`` that they are logged with."""
        raise InputError(f"{type(self).__name__} measures nothing on held-out data; run fit, or override measure()")

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged, of the means that `measure` added up; override it to add what is made of several."""
        return means

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure; the means over all batches and processes are logged at the end."""
        self.measure(batch, self.held_out_totals)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As `validation_step`, logged as ``test/...``."""
        self.measure(batch, self.held_out_totals)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/...``."""
        self._log_held_out("val")
        self._step_began = time.monotonic()  # the time that validation took is no training time

    def on_test_epoch_end(self) -> None:
        """Log ``test/...``."""
        self._log_held_out("test")

    def _log_held_out(self, stage: str) -> None:
        means = self.summary(self.held_out_totals.means())
        self.held_out_totals = Totals()
        # The same numbers everywhere already; syncing tells Lightning so.
        self.log_dict({f"{stage}/{name}": value for name, value in means.items()}, sync_dist=True)

    # What callbacks hear

    def report_phase(self, phase: str, done: int, total: int) -> None:
        """Tell the callbacks' ``on_phase(trainer, module, phase, done, total)`` how far a part of the step is."""
        self._tell("on_phase", phase, done, total)

    def report_samples(self, rollout: Rollout, scores: dict[str, Tensor]) -> None:
        """Tell the callbacks' ``on_samples(trainer, module, rollout, scores)``; each score is ``[B]``."""
        self._tell("on_samples", rollout, scores)

    def _tell(self, hook: str, *arguments: Any) -> None:
        for callback in self.trainer.callbacks:
            if (method := getattr(callback, hook, None)) is not None:
                method(self.trainer, self, *arguments)

    # The policy's answers

    def generate(self, prompts: PromptBatch, iteration: int = 0, **overrides: Any) -> Rollout:
        """One response to every prompt; ``overrides`` are keywords of `rollout.sampler.sample`.

        Raises:
            InputError: the module trains no policy.
        """
        if self.policy is None:
            raise InputError(f"{type(self).__name__} has no policy to answer prompts with; use a policy's module")
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "eos_ids": eos_ids(self.policy.model, self.tokenizer),
            "seed": self.seed,
            "any_unfinished": any_true if self.device_mesh is not None else None,
            "progress": lambda done, total: self.report_phase("rollout", done, total),
        }
        return sample(self.policy, prompts, self.tokenizer, iteration=iteration, **{**options, **overrides})

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A response to every prompt, as rows for a JSONL file."""
        rollout = self.generate(batch)
        return [
            {
                "row": int(batch.rows[index]),
                "prompt": batch.prompts[index],
                "response": rollout.responses[index],
                "tokens": int(rollout.response_lengths[index]),
                "truncated": bool(rollout.truncated[index]),
            }
            for index in range(len(batch))
            if batch.weights[index] > 0
        ]

    def export(self, folder: str | Path) -> None:
        """Write the trained model as a Hugging Face folder; every process calls it, the first one writes."""
        assert self.policy is not None
        export_policy(self.policy, self.tokenizer, folder)
