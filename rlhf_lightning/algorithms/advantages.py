"""From one score a response to a reward for every token: where the score lands, and what KL and truncation cost."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.algorithms.masked import Reduce, masked_variance
from rlhf_lightning.batches import length_mask

ScorePosition = Literal["last_token", "after_eos"]


class TokenRewards(NamedTuple):
    """Rewards on the slots that the value function is asked about: T response tokens, and one slot after the last."""

    rewards: Tensor  # [B, T + 1] float32, or float64 as the KL's
    mask: Tensor  # [B, T + 1] bool, the slots that count as steps


def token_rewards(
    scores: Tensor,
    kl: Tensor,
    lengths: Tensor,
    truncated: Tensor,
    weights: Tensor,
    kl_coef: float,
    score_position: ScorePosition = "last_token",
) -> TokenRewards:
    """``-kl_coef * kl`` on every response token, plus the response's score on one slot.

    Args:
        scores: ``[B]`` float32, one a response.
        kl: ``[B, T]`` float32 or float64, per-token KL estimate; what lies past a response's end is ignored.
        lengths: ``[B]`` int64, response tokens, EOS included.
        truncated: ``[B]`` bool, the responses that did not end by EOS.
        weights: ``[B]`` float32; a row of weight 0 has no counted slot.
        kl_coef: the penalty per nat.
        score_position: ``last_token``, the last counted token (EOS where there is one); or ``after_eos``, one slot
            later where the response ended by EOS, as in Stiennon et al. 2020's code: with lambda below 1 this discounts
            the score once more for the EOS token's own advantage.

    A response without any token gets no reward: there is no action to credit.
    """
    rows, width = kl.shape
    present = weights > 0
    steps = lengths
    if score_position == "after_eos":
        steps = lengths + (~truncated & (lengths > 0)).to(lengths.dtype)
    elif score_position != "last_token":
        raise ValueError(f"score_position: expected last_token or after_eos, got {score_position!r}")
    steps = torch.where(present, steps, 0)
    dtype = torch.promote_types(kl.dtype, torch.float32)
    rewards = torch.zeros(rows, width + 1, dtype=dtype, device=kl.device)
    on_token = length_mask(torch.where(present, lengths, 0), width)
    rewards[:, :width] = torch.where(on_token, -kl_coef * kl.to(dtype), 0.0)
    rewards.scatter_add_(1, (steps - 1).clamp(min=0)[:, None], torch.where(steps > 0, scores.to(dtype), 0.0)[:, None])
    return TokenRewards(rewards, length_mask(steps, width + 1))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce | None = None) -> Tensor:
    """``1 - Var(returns - values) / Var(returns)`` over the counted entries; 1 is a perfect critic, 0 a constant one.

    All ``[B, T]``; returns a float64 scalar, NaN where the returns do not vary. ``reduce`` as in `masked.masked_mean`.
    """
    error = masked_variance(returns.double() - values.double(), mask, reduce)
    spread = masked_variance(returns.double(), mask, reduce)
    return torch.where(spread > 0, 1.0 - error / spread, torch.nan)
