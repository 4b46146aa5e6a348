"""Weights that correct for responses sampled by another policy than the one that learns from them."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_importance_weights(log_probs: Tensor, sampling_log_probs: Tensor, cap: float) -> Tensor:
    """``min(p(token) / q(token), cap)``: how much more a token should count than it was sampled.

    A mean over tokens of q, weighted so, is a mean over tokens of p, up to the truncation, which bounds the variance.
    Espeholt et al. 2018, arXiv 1802.01561 (V-trace's rho); for rollout engines that compute other probabilities than
    the training does, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".

    Args:
        log_probs: ``[...]`` under p, the policy as the training computes it.
        sampling_log_probs: the same shape, under q, what the tokens were drawn from.
        cap: above 0.

    Returns: the same shape, in (0, cap], without gradient.
    """
    return torch.exp((log_probs - sampling_log_probs).detach()).clamp(max=cap)
