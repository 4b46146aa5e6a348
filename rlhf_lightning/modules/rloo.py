"""RLOO: REINFORCE on whole responses, with the mean reward of the prompt's other responses as the baseline.

Shapes: ``B`` responses of this process, ``T`` response tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from rlhf_lightning.algorithms.advantages import leave_one_out_advantages
from rlhf_lightning.algorithms.losses import LossNormalisation
from rlhf_lightning.batches import Rollout
from rlhf_lightning.modules.experience import Experience
from rlhf_lightning.modules.on_policy_metrics import count_rollout
from rlhf_lightning.modules.policy_gradient import PolicyGradientModule
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.rewards.base import Reward


class RLOOModule(PolicyGradientModule):
    """REINFORCE leave-one-out: Ahmadian et al. 2024, arXiv 2402.14740.

    With one optimizer step an iteration, the default, the ratio is 1 and the gradient is the paper's, ``A * grad log
    p(response)``, divided by ``max_new_tokens``. With more steps each token's ratio is clipped as in PPO.

    Args:
        model: folder (or hub id) of the policy to train.
        reward: what scores a response.
        group_size: responses to each prompt, at least 2.
        loss_normalisation: ``constant`` keeps the sum over a response's tokens; see `PolicyGradientModule`.
        kwargs: see `PolicyGradientModule`; ``kl_coef`` is the penalty in the reward, of the whole response.
    """

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        group_size: PositiveInt = 4,
        loss_normalisation: LossNormalisation = "constant",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, loss_normalisation=loss_normalisation, **kwargs)
        self.group_size = self.checked_group(group_size)

    @torch.no_grad()
    def collect(self, rollout: Rollout, scores: Tensor, totals: Totals) -> Experience:
        """A response's advantage, the same at each of its tokens, is its reward less the mean of the others'."""
        now = self.assess(rollout)
        count_rollout(totals, rollout, scores, now, self.kl_coefficient, self.kl_estimator)
        advantages = leave_one_out_advantages(self.response_rewards(scores, rollout, now), self.group_size)
        tokenwise = advantages[:, None].expand_as(now.log_probs)
        return self.experience(rollout, now, tokenwise, rollout.prompts.weights, totals)
