"""REINFORCE++: PPO's clipped update and token-level KL penalty, without a critic.

Shapes: ``B`` responses of this process, ``T`` response tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor

from rlhf_lightning.algorithms.advantages import discounted_returns, token_rewards
from rlhf_lightning.algorithms.kl import kl_estimate
from rlhf_lightning.algorithms.masked import whiten
from rlhf_lightning.batches import Rollout
from rlhf_lightning.collectives import all_reduce_sum
from rlhf_lightning.modules.experience import Experience
from rlhf_lightning.modules.on_policy_metrics import count_rollout
from rlhf_lightning.modules.policy_gradient import PolicyGradientModule
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.rewards.base import Reward


class ReinforcePlusPlusModule(PolicyGradientModule):
    """REINFORCE++: Hu 2025, arXiv 2501.03262. Advantages are whitened over the whole iteration and all processes.

    Args:
        model: folder (or hub id) of the policy to train.
        reward: what scores a response.
        group_size: responses to each prompt.
        baseline: ``group_mean`` takes the mean score of the prompt's responses off each score first (the paper's
            REINFORCE++ with baseline); it needs a ``group_size`` of at least 2.
        gamma: discount per token.
        kwargs: see `PolicyGradientModule`; ``kl_coef`` is the penalty in the reward, of each token.
    """

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        group_size: PositiveInt = 1,
        baseline: Literal["none", "group_mean"] = "none",
        gamma: ClosedUnitInterval = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, **kwargs)
        self.group_size = group_size if baseline == "none" else self.checked_group(group_size)
        self.baseline = baseline
        self.gamma = gamma

    @torch.no_grad()
    def collect(self, rollout: Rollout, scores: Tensor, totals: Totals) -> Experience:
        """A token's advantage is the discounted reward from it on, KL penalties and final score, whitened."""
        now = self.assess(rollout)
        count_rollout(totals, rollout, scores, now, self.kl_coefficient, self.kl_estimator)
        shaped = self.shaped(scores, rollout)
        if self.baseline == "group_mean":
            groups = shaped.reshape(-1, self.group_size)
            shaped = (groups - groups.mean(dim=1, keepdim=True)).flatten()
        rewards, mask = token_rewards(
            scores=shaped,
            kl=kl_estimate(now.log_probs, now.reference_log_probs, self.kl_estimator),
            lengths=rollout.response_lengths,
            truncated=rollout.truncated,
            weights=rollout.prompts.weights,
            kl_coef=self.kl_coefficient,
        )
        returns = discounted_returns(rewards, mask, self.gamma)
        advantages = whiten(returns, mask, all_reduce_sum)[:, :-1]
        return self.experience(rollout, now, advantages, rollout.prompts.weights, totals)
