"""Rejection-sampling fine-tuning: imitate the best of several responses to each prompt.

Shapes: ``B`` kept responses of this process, ``T`` response tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from rlhf_lightning.algorithms.losses import negative_log_likelihood
from rlhf_lightning.batches import Rollout
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.experience import Sampled
from rlhf_lightning.modules.on_policy import OnPolicyModule
from rlhf_lightning.modules.on_policy_metrics import count_rollout
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rollout.best_of import best_rows


class RejectionSamplingModule(OnPolicyModule):
    """RAFT (Dong et al. 2023, arXiv 2304.06767); rejection sampling of Touvron et al. 2023, arXiv 2307.09288.

    The loss is SFT's, the mean over a minibatch's tokens, at temperature 1 whatever the samples' was. The reference
    serves the logged KL alone: nothing holds the policy near it but the number of steps. Logs beside what PPO does
    ``rollout/kept_scores``, their mean score.

    Args:
        model: folder (or hub id) of the policy to train.
        reward: what scores a response.
        group_size: responses to each prompt.
        keep: how many of them, the best by score, are learnt from; fewer than ``group_size``.
        kwargs: see `OnPolicyModule`.

    Raises: InputError when nothing would be rejected.
    """

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        group_size: PositiveInt = 8,
        keep: PositiveInt = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, **kwargs)
        if keep >= group_size:
            raise InputError(f"model.keep: expected fewer than the {group_size} responses of group_size, got {keep}")
        self.group_size = group_size
        self.keep = keep

    @property
    def rows_per_prompt(self) -> int:
        """The kept responses."""
        return self.keep

    @torch.no_grad()
    def collect(self, rollout: Rollout, scores: Tensor, totals: Totals) -> Sampled:
        """The best responses."""
        now = self.evaluate(rollout, known=self.sampled_log_probs(rollout))
        count_rollout(totals, rollout, scores, now, self.kl_coefficient, self.kl_estimator)
        kept = best_rows(self.shaped(scores, rollout), self.group_size, self.keep).flatten()
        weights = rollout.prompts.weights[kept]
        totals.add("rollout/kept_scores", scores[kept], weights > 0)
        return Sampled(rollout.tokens[kept], rollout.lengths[kept], rollout.prompt_lengths[kept], weights)

    def counts(self, experience: Sampled, rows: Tensor) -> Tensor:
        """Tokens."""
        return experience.mask[rows].sum()[None]

    def loss(self, micro: Sampled, counts: Tensor, totals: Totals, moved: Totals) -> Tensor:
        """The negative log-likelihood a token."""
        now = self.token_scores(micro.tokens, micro.lengths, micro.prompt_lengths, temperature=1.0)
        totals.add("loss/policy", -now.log_probs, micro.mask)
        totals.add("policy/entropy", now.entropy, micro.mask)
        return negative_log_likelihood(now.log_probs, micro.mask).sum() / counts[0]
