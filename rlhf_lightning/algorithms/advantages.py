"""Rewards and advantages: turns one score for each response into rewards of tokens, and into advantages of groups.

Groups: ``B`` rows are ``B / group_size`` prompts with ``group_size`` responses each. The rows of a prompt are adjacent.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.algorithms.masked import Reduce, masked_variance
from rlhf_lightning.batches import length_mask
from rlhf_lightning.errors import check_choice
from rlhf_lightning.ops.gae import gae

ScorePosition = Literal["last_token", "after_eos"]


class TokenRewards(NamedTuple):
    """Rewards on the slots for which the critic has a value: T response tokens, and one slot after the last."""

    rewards: Tensor  # [B, T + 1] float32, or float64 if the KL is
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
        scores: ``[B]`` float32, one for each response.
        kl: ``[B, T]`` float32 or float64, per-token KL estimate; values after a response's end are ignored.
        lengths: ``[B]`` int64, response tokens, EOS included.
        truncated: ``[B]`` bool, the responses that did not end by EOS.
        weights: ``[B]`` float32; a row of weight 0 has no counted slot.
        kl_coef: the penalty per nat.
        score_position: ``last_token`` puts the score on the last counted token (EOS if there is one). ``after_eos``
            puts it one slot later if the response ended by EOS, as in Stiennon et al. 2020's code; with lambda below 1
            this discounts the score once more for the EOS token's own advantage.

    A response without tokens gets no reward, since there is no action to credit.
    """
    check_choice("score_position", score_position, ScorePosition)
    rows, width = kl.shape
    present = weights > 0
    steps = lengths
    if score_position == "after_eos":
        steps = lengths + (~truncated & (lengths > 0)).to(lengths.dtype)
    steps = torch.where(present, steps, 0)
    dtype = torch.promote_types(kl.dtype, torch.float32)
    rewards = torch.zeros(rows, width + 1, dtype=dtype, device=kl.device)
    on_token = length_mask(torch.where(present, lengths, 0), width)
    rewards[:, :width] = torch.where(on_token, -kl_coef * kl.to(dtype), 0.0)
    rewards.scatter_add_(1, (steps - 1).clamp(min=0)[:, None], torch.where(steps > 0, scores.to(dtype), 0.0)[:, None])
    return TokenRewards(rewards, length_mask(steps, width + 1))


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """``sum_{k >= t} gamma^(k - t) reward_k``: the discounted return at each counted step, 0 elsewhere; ``[B, T]``.

    This is GAE with lambda 1 and a critic whose values are 0.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def group_advantages(rewards: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """``(reward - mean) / std`` within each group: GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    Args:
        rewards: ``[B]``.
        group_size: at least 2.
        scale: divide by the deviation; if False, this is Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, section 3).

    Returns: ``[B]``. The deviation is the sample deviation (divided by ``group_size - 1``; the paper does not say) plus
        1e-6, so that a group of equal rewards gets 0.
    """
    groups = rewards.double().reshape(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale:
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-6)
    return centred.flatten().to(rewards.dtype)


def leave_one_out_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Each reward minus the mean of the others in its group; ``[B]`` -> ``[B]``. ``group_size`` is at least 2.

    RLOO: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024, arXiv 2402.14740.
    """
    groups = rewards.double().reshape(-1, group_size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten().to(rewards.dtype)


def varied_groups(scores: Tensor, group_size: int) -> Tensor:
    """``[B]`` bool: whether the scores in the row's group differ. From equal scores nothing can be learned."""
    groups = scores.reshape(-1, group_size)
    return (groups.amax(dim=1) > groups.amin(dim=1)).repeat_interleave(group_size)


def length_adaptive_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, alpha: float) -> Tensor:
    """Length-adaptive GAE: ``lambda = 1 - 1 / (alpha * l)`` in a row of l steps, or 0 if that is negative.

    Lambda's weights then reach about ``alpha * l`` steps far, in short and in long responses alike. Yue et al. 2025,
    arXiv 2504.05118, take alpha 0.05 for responses of thousands of tokens. The other arguments and the result are those
    of `ops.gae`.
    """
    steps = mask.sum(dim=1)
    advantages = torch.zeros_like(rewards)
    for length in steps.unique().tolist():
        rows, lam = steps == length, max(0.0, 1.0 - 1.0 / (alpha * max(length, 1)))
        advantages[rows] = gae(rewards[rows], values[rows], mask[rows], gamma, lam)[0].to(advantages.dtype)
    return advantages


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce | None = None) -> Tensor:
    """``1 - Var(returns - values) / Var(returns)`` over the counted entries; 1 is a perfect critic, 0 a constant one.

    All are ``[B, T]``. Returns a float64 scalar, NaN if the returns do not vary. ``reduce``: see `masked.masked_mean`.
    """
    error = masked_variance(returns.double() - values.double(), mask, reduce)
    spread = masked_variance(returns.double(), mask, reduce)
    return torch.where(spread > 0, 1.0 - error / spread, torch.nan)
