"""Generalised advantage estimation over the counted tokens of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.ops import checks, extension

_NAME = "gae"


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of sampled responses (Schulman et al. 2016, arXiv 1506.02438, equations 11 and 16).

    Over the True steps ``0 .. n-1`` of a row, in order, with ``V[n] = 0``::

        delta[t]      = rewards[t] + gamma * values[t + 1] - values[t]
        advantages[t] = delta[t] + gamma * lam * advantages[t + 1]
        returns[t]    = advantages[t] + values[t]

    Args:
        rewards: ``[B, T]`` floating point, the reward received after each step.
        values: ``[B, T]`` floating point, the critic's estimate before each step; its dtype may differ.
        mask: ``[B, T]`` bool, True counts. Values at False slots are ignored, even NaN. Gaps are skipped, so gamma and
            lambda count True steps only.
        gamma: discount per True step, in [0, 1].
        lam: lambda, in [0, 1]: 0 gives the one-step error, 1 the whole discounted sum.

    The value after a row's last True step is 0. To bootstrap a truncated row, add ``gamma * V`` to its last reward.

    Returns:
        ``(advantages, returns)``, each ``[B, T]`` float32 (float64 if an input is), exactly 0 where the mask is False,
        without gradient. The result is bitwise the same however the rows are split over calls.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.
    """
    _check(rewards, values, mask, gamma, lam)
    if extension.use_native(_NAME, rewards.device):
        return torch.ops.rlhf_lightning.gae(rewards.detach(), values.detach(), mask, gamma, lam)
    return reference(rewards, values, mask, gamma, lam)


@torch.no_grad()
def reference(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """:func:`gae` in plain PyTorch: the recursion, last step first, all rows at once."""
    dtype = checks.compute_dtype(rewards, values)
    rewards = torch.where(mask, rewards, 0).to(dtype)
    values = torch.where(mask, values, 0).to(dtype)
    next_value = next_advantage = rewards.new_zeros(rewards.shape[0])
    advantages = torch.zeros_like(rewards, memory_format=torch.contiguous_format)
    for t in range(rewards.shape[1] - 1, -1, -1):
        is_step = mask[:, t]
        delta = (rewards[:, t] + gamma * next_value) - values[:, t]
        advantage = delta + (gamma * lam) * next_advantage
        advantages[:, t] = torch.where(is_step, advantage, 0)
        next_advantage = torch.where(is_step, advantage, next_advantage)
        next_value = torch.where(is_step, values[:, t], next_value)
    return advantages, torch.where(mask, advantages + values, 0)


def _check(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> None:
    checks.float_tensor(_NAME, "rewards", rewards)
    checks.float_tensor(_NAME, "values", values)
    checks.bool_tensor(_NAME, "mask", mask)
    checks.dimensions(_NAME, "rewards", rewards, "[B, T]", 2)
    checks.alike(_NAME, {"values": values, "mask": mask}, rewards, "rewards")
    checks.number(_NAME, "gamma", gamma, "a number in [0, 1]", 0.0, 1.0, open_low=False)
    checks.number(_NAME, "lam", lam, "a number in [0, 1]", 0.0, 1.0, open_low=False)


def _fake(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    dtype = checks.compute_dtype(rewards, values)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


if extension.LOADED:
    torch.library.register_fake("rlhf_lightning::gae", _fake)
