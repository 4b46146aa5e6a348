"""GRPO: several responses to each prompt, and the group's own mean and deviation in place of a critic.

Shapes: ``B`` responses of this process, ``T`` response tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from torch import Tensor

from rlhf_lightning.algorithms.advantages import group_advantages, varied_groups
from rlhf_lightning.algorithms.losses import LossNormalisation
from rlhf_lightning.batches import Rollout
from rlhf_lightning.modules.experience import Experience
from rlhf_lightning.modules.on_policy_metrics import count_rollout
from rlhf_lightning.modules.policy_gradient import PolicyGradientModule
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.rewards.base import Reward


class GRPOModule(PolicyGradientModule):
    """Group relative policy optimisation: Shao et al. 2024, arXiv 2402.03300.

    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) is ``scale_by_std: false`` and ``loss_normalisation: constant``. DAPO
    (Yu et al. 2025, arXiv 2503.14476) is ``clip_high: 0.28``, ``loss_normalisation: token``, ``dynamic_sampling: true``
    and ``kl_loss_coef: 0``. Logs beside what PPO does ``rollout/equal_groups``, the share of groups of equal scores.

    Args:
        model: folder (or hub id) of the policy to train.
        reward: what scores a response.
        group_size: responses to each prompt, at least 2.
        scale_by_std: divide a group's advantages by the deviation of its rewards.
        dynamic_sampling: leave groups of equal scores out of the update; otherwise they count in its means. They are
            not sampled anew: an iteration learns from those that are left.
        kl_coef: penalty per nat in the reward, of the whole response.
        kl_loss_coef: weight of the KL term in the loss.
        kl_loss_estimator: k2 or k3.
        loss_normalisation: see `PolicyGradientModule`.
        kwargs: see `PolicyGradientModule`.
    """

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        group_size: PositiveInt = 8,
        scale_by_std: bool = True,
        dynamic_sampling: bool = False,
        kl_coef: NonNegativeFloat = 0.0,
        kl_loss_coef: NonNegativeFloat = 0.04,
        kl_loss_estimator: Literal["k2", "k3"] = "k3",
        loss_normalisation: LossNormalisation = "sequence",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            reward,
            kl_coef=kl_coef,
            kl_loss_coef=kl_loss_coef,
            kl_loss_estimator=kl_loss_estimator,
            loss_normalisation=loss_normalisation,
            **kwargs,
        )
        self.group_size = self.checked_group(group_size)
        self.scale_by_std = scale_by_std
        self.dynamic_sampling = dynamic_sampling

    @torch.no_grad()
    def collect(self, rollout: Rollout, scores: Tensor, totals: Totals) -> Experience:
        """A response's advantage, the same at each of its tokens, is its reward relative to its group's."""
        now = self.assess(rollout)
        count_rollout(totals, rollout, scores, self.kl_coefficient, now)
        rewards = self.response_rewards(scores, rollout, now)
        advantages = group_advantages(rewards, self.group_size, self.scale_by_std)
        weights = rollout.prompts.weights
        varied = varied_groups(self.shaped(scores, rollout), self.group_size)
        totals.add("rollout/equal_groups", ~varied, weights > 0)
        if self.dynamic_sampling:
            weights = weights * varied
        return self.experience(rollout, now, advantages[:, None].expand_as(now.log_probs), weights, totals)
