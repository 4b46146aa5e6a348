"""Online DPO: the reward picks the best and the worst of fresh responses, and DPO learns from the pair.

Shapes: ``B`` pairs of this process, ``S`` prompt + response tokens, ``T`` response tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor

from rlhf_lightning.algorithms.losses import PreferenceLoss, negative_log_likelihood, preference_loss
from rlhf_lightning.batches import Rollout
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.positions import response_mask
from rlhf_lightning.modules.base import LabelSmoothing
from rlhf_lightning.modules.experience import Pairs
from rlhf_lightning.modules.on_policy import OnPolicyModule
from rlhf_lightning.modules.on_policy_metrics import count_rollout
from rlhf_lightning.modules.reward_model import wins
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rollout.best_of import best_rows


class OnlineDPOModule(OnPolicyModule):
    """Direct preference optimisation on the policy's own responses: Guo et al. 2024, arXiv 2402.04792.

    The judge is the reward: of a prompt's responses the best and the worst make the pair; where they score the same
    there is none. Logs beside what PPO does ``rewards/chosen``, ``rewards/rejected``, ``policy/accuracy``, as
    `DPOModule` does, and ``rollout/ties``, the share of prompts without a pair.

    Args:
        model: folder (or hub id) of the policy to train.
        reward: what scores a response.
        group_size: responses to each prompt, at least 2.
        beta: the strength of the pull to the reference.
        loss: see `DPOModule`.
        label_smoothing: see `DPOModule`; for ``sigmoid`` alone.
        kwargs: see `OnPolicyModule`.

    Raises: InputError when options contradict each other.
    """

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        group_size: PositiveInt = 2,
        beta: PositiveFloat = 0.1,
        loss: PreferenceLoss = "sigmoid",
        label_smoothing: LabelSmoothing = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, **kwargs)
        if label_smoothing > 0 and loss != "sigmoid":
            raise InputError(
                f"model.label_smoothing: {label_smoothing} has no meaning for loss {loss}; set it to 0, or use sigmoid"
            )
        self.group_size = self.checked_group(group_size)
        self.beta = self.kl_coefficient = beta
        self.preference = loss
        self.label_smoothing = label_smoothing

    @property
    def rows_per_prompt(self) -> int:
        """One pair."""
        return 1

    @torch.no_grad()
    def collect(self, rollout: Rollout, scores: Tensor, totals: Totals) -> Pairs:
        """The best and the worst response to each prompt, under the reference."""
        now = self.evaluate(rollout, known=self.sampled_log_probs(rollout))
        count_rollout(totals, rollout, scores, now, self.kl_coefficient, self.kl_estimator)
        shaped = self.shaped(scores, rollout)
        best, worst = best_rows(shaped, self.group_size), best_rows(-shaped, self.group_size)
        pairs = torch.cat([best, worst], dim=1)
        weights, ahead = rollout.prompts.weights[pairs[:, 0]], shaped[pairs[:, 0]] > shaped[pairs[:, 1]]
        totals.add("rollout/ties", ~ahead, weights > 0)
        reference = -negative_log_likelihood(now.reference_log_probs, rollout.response_mask)
        return Pairs(
            tokens=rollout.tokens[pairs],
            lengths=rollout.lengths[pairs],
            prompt_lengths=rollout.prompt_lengths[pairs],
            weights=weights * ahead,
            reference_log_probs=reference[pairs],
        )

    def counts(self, experience: Pairs, rows: Tensor) -> Tensor:
        """Pairs."""
        return (experience.weights[rows] > 0).sum()[None]

    def loss(self, micro: Pairs, counts: Tensor, totals: Totals, moved: Totals) -> Tensor:
        """The preference loss a pair."""
        lengths, prompt_lengths = micro.lengths.flatten(), micro.prompt_lengths.flatten()
        now = self.token_scores(micro.tokens.flatten(0, 1), lengths, prompt_lengths, self.temperature)
        mask = response_mask(prompt_lengths, lengths)
        log_probs = -negative_log_likelihood(now.log_probs, mask)
        ratios = log_probs.reshape(-1, 2) - micro.reference_log_probs
        scaled = ratios / mask.sum(dim=1).clamp(min=1).reshape(-1, 2) if self.preference == "ipo" else ratios
        losses = preference_loss(scaled[:, 0], scaled[:, 1], self.beta, self.preference, self.label_smoothing)
        paired = micro.weights > 0
        rewards = self.beta * ratios.detach()
        totals.add("loss/policy", losses, paired)
        totals.add("policy/entropy", now.entropy, mask & paired.repeat_interleave(2)[:, None])
        totals.add("policy/accuracy", wins(rewards[:, 0], rewards[:, 1]), paired)
        totals.add("rewards/chosen", rewards[:, 0], paired)
        totals.add("rewards/rejected", rewards[:, 1], paired)
        return torch.where(paired, losses, 0.0).sum() / counts[0]
