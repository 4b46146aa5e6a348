"""Logs the gold reward of a policy's responses, which only the demo knows."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from rlhf_lightning.batches import Rollout
from rlhf_lightning.demo.gold import gold_reward
from rlhf_lightning.modules.base import RLHFModule


class GoldMonitor(Callback):
    """Logs ``gold/train`` every PPO iteration, and ``gold/held_out`` in validation. Nothing learns from it."""

    def on_samples(self, trainer: Trainer, module: RLHFModule, rollout: Rollout, scores: dict[str, Tensor]) -> None:
        """Called by the module with a rollout and its scores."""
        rewards = gold_reward(rollout.prompts.prompts, rollout.responses)
        name = "gold/train" if trainer.training else "gold/held_out"
        module.log(name, sum(rewards) / len(rewards), batch_size=len(rewards))
