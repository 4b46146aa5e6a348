"""Credit assignment: the advantage of each token of a response, with the critic's values as the baseline.

Shapes: ``B`` rows of this process, ``T`` response tokens. Rewards, values and returns are of ``T + 1`` states: before
each response token, and after the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.algorithms.advantages import ScorePosition, length_adaptive_advantages, token_rewards
from rlhf_lightning.algorithms.masked import whiten
from rlhf_lightning.batches import Rollout
from rlhf_lightning.collectives import all_reduce_sum
from rlhf_lightning.errors import InputError
from rlhf_lightning.ops.gae import gae
from rlhf_lightning.options import ClosedUnitInterval, Options, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class AdvantageOptions(Options):
    """From token rewards and values to advantages and returns.

    Args:
        gamma: discount per token.
        lam: GAE's lambda; None takes 0.95.
        critic_lam: lambda of the returns that the critic learns, 1 for what really came (decoupled GAE, Yue et al.
            2025, arXiv 2504.05118); None takes ``lam``.
        lam_alpha: in place of ``lam`` for the policy, a lambda of ``1 - 1 / (lam_alpha * l)`` for a response of l
            tokens (length-adaptive GAE, the same paper); None for none.
        whiten: give an iteration's advantages mean 0 and variance 1, over all processes.
        whiten_rewards: scale an iteration's token rewards to variance 1 and keep their mean.
        score_position: ``last_token``, or ``after_eos`` for one slot later.
        bootstrap_truncated: a response without EOS earns, in place of its score, the critic's value of the state it was
            cut off in: the value holds what would still have come, the score included.

    Raises:
        InputError: options contradict each other.
    """

    gamma: ClosedUnitInterval = 1.0
    lam: ClosedUnitInterval | None = None
    critic_lam: ClosedUnitInterval | None = None
    lam_alpha: PositiveFloat | None = None
    whiten: bool = True
    whiten_rewards: bool = False
    score_position: ScorePosition = "last_token"
    bootstrap_truncated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if None not in (self.lam, self.critic_lam, self.lam_alpha):
            raise InputError(
                f"model.advantages.lam: {self.lam} has no effect beside critic_lam and lam_alpha, which say all; leave "
                "one of them out"
            )


class Credit(NamedTuple):
    """What an update learns from."""

    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T + 1]


class CreditAssignment:
    """GAE (Schulman et al. 2015, arXiv 1506.02438, equation 16) on rewards made of a score and a KL penalty."""

    def __init__(self, options: AdvantageOptions) -> None:
        self.options = options

    def token_rewards(
        self, scores: Tensor, kl: Tensor, kl_coef: float, rollout: Rollout, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``-kl_coef * kl`` at every response token, and the score at its place.

        Args:
            scores: ``[B]``, as shaped.
            kl: ``[B, T]`` nats.
            kl_coef: the penalty per nat.
            rollout: the responses.
            values: ``[B, T + 1]``, for the bootstrap of cut responses.

        Returns: ``(rewards, states)``, ``[B, T + 1]`` each: the second is bool, the states that count.
        """
        if self.options.bootstrap_truncated:
            scores = scores.masked_fill(rollout.truncated, 0.0)
        rewards, states = token_rewards(
            scores=scores,
            kl=kl,
            lengths=rollout.response_lengths,
            truncated=rollout.truncated,
            weights=rollout.prompts.weights,
            kl_coef=kl_coef,
            score_position=self.options.score_position,
        )
        if self.options.whiten_rewards:
            rewards = whiten(rewards, states, all_reduce_sum, keep_mean=True)
        if self.options.bootstrap_truncated:
            rewards = rewards + self.options.gamma * values_at_the_cut(rollout, values)
        return rewards, states

    def compute_advantages(self, rewards: Tensor, values: Tensor, states: Tensor, mask: Tensor) -> Credit:
        """Advantages for the policy and returns for the critic, each with its own lambda.

        Args:
            rewards: ``[B, T + 1]``.
            values: ``[B, T + 1]``.
            states: ``[B, T + 1]`` bool, those that count.
            mask: ``[B, T]`` bool, the tokens that count.
        """
        lam = 0.95 if self.options.lam is None else self.options.lam
        advantages, returns = gae(rewards, values, states, self.options.gamma, lam)
        if self.options.critic_lam is not None:
            returns = gae(rewards, values, states, self.options.gamma, self.options.critic_lam)[1]
        if (alpha := self.options.lam_alpha) is not None:
            advantages = length_adaptive_advantages(rewards, values, states, self.options.gamma, alpha)
        advantages = advantages[:, :-1]  # the slot after the last token is a state, with no action to credit
        if self.options.whiten:
            advantages = whiten(advantages, mask, all_reduce_sum)
        return Credit(advantages, returns)


def values_at_the_cut(rollout: Rollout, values: Tensor) -> Tensor:
    """The critic's value of the state after the last token, on the last token's slot, at truncated rows; else 0.

    ``values`` is ``[B, T + 1]``, and so is the result: discounted, it stands for those rows' scores in the rewards.
    """
    lengths = rollout.response_lengths[:, None]
    after = values.gather(1, lengths)
    cut = (rollout.truncated & (rollout.prompts.weights > 0))[:, None]
    return torch.zeros_like(values).scatter(1, (lengths - 1).clamp(min=0), torch.where(cut, after, 0.0))
