"""A reward by subclassing: the score of this PPO is the configured reward plus a bonus computed from the tokens.

    python -m rlhf_lightning fit --config ppo.yaml --model examples.custom_reward_module.PatientPPO \
        --model.patience 0.02 --data.path prompts.jsonl
"""

from __future__ import annotations

from typing import Any

from jsonargparse.typing import NonNegativeFloat
from torch import Tensor

from rlhf_lightning.batches import Rollout
from rlhf_lightning.modules.ppo import PPOModule


class PatientPPO(PPOModule):
    """PPO that adds a bonus for every response token up to 20. A response that was cut off gets no bonus.

    Args:
        patience: reward per token.
        kwargs: `PPOModule`'s.
    """

    def __init__(self, *args: Any, patience: NonNegativeFloat = 0.01, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.patience = patience

    def score(self, rollout: Rollout) -> Tensor:
        """One score a response, ``[B]``."""
        bonus = self.patience * rollout.response_lengths.clamp(max=20)
        return super().score(rollout) + bonus * ~rollout.truncated
