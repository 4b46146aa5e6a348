"""The out-of-memory message: the sizes of the pass, and the options that make it smaller."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from rlhf_lightning.errors import out_of_memory
from rlhf_lightning.models.passes import explain
from rlhf_lightning.ops.extension import keep_memory


class ExplainMemory(Callback):
    """Rewrites an out-of-memory error so that it helps, and gives kept memory back. Every `RLHFModule` brings it.

    It covers the forward and backward passes and the optimizer's step, in modules that users write too.
    """

    def __init__(self) -> None:
        self._phase = ""

    def on_phase(self, trainer: Trainer, module: LightningModule, phase: str, done: int, total: int) -> None:
        """Remembers which part of an on-policy step is running."""
        self._phase = phase if done < total else ""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Rewrites the message, and gives kept memory back, as ``on_fit_end`` does without an error."""
        if trainer.state.fn == TrainerFn.FITTING and pl_module.device.type == "cpu":
            keep_memory(False)
        if out_of_memory(exception):
            explain(exception, self._phase, _advice(pl_module, trainer, self._phase))


def _advice(module: Any, trainer: Any, phase: str) -> list[str]:
    """Options to change, the likeliest first."""
    data = getattr(trainer, "datamodule", None)
    size = "batch_size" if trainer.training else "val_batch_size"
    batch, budget = (getattr(data, name, None) for name in (size, "batch_tokens"))
    options = getattr(module, "update_options", None)
    micro = getattr(options, "micro_batch_tokens", None)
    if phase == "rollout":
        longest = module.sampler.options.max_new_tokens
        return [f"lower --data.{size} ({batch}) or --model.sampling.max_new_tokens ({longest})"]
    if micro is not None:
        advice = [f"lower --model.update.micro_batch_tokens ({micro})"]
        if phase == "":
            advice.append("lower micro_batch_tokens of the reward model, if that was the one")
    else:
        advice = [f"lower --data.batch_tokens ({budget}) or --data.{size} ({batch})"]
        if trainer.training:
            more = f"--trainer.accumulate_grad_batches ({trainer.accumulate_grad_batches})"
            advice[0] += f", with more {more} for steps of the same rows"
    if trainer.training and not module.network_options.gradient_checkpointing:
        advice.append("set --model.network.gradient_checkpointing true")
    return advice
