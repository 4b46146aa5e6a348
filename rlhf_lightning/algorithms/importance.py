"""Importance weights, which correct for responses that another policy sampled than the one that learns from them."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_importance_weights(log_probs: Tensor, sampling_log_probs: Tensor, cap: float) -> Tensor:
    """``min(p(token) / q(token), cap)``, the weight of a token that was sampled from q and is to count as one of p.

    A mean over tokens of q with these weights is a mean over tokens of p, except for the truncation, which bounds the
    variance. Espeholt et al. 2018, arXiv 1802.01561 (V-trace's rho). For rollout engines whose probabilities differ
    from the training's: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".

    Args:
        log_probs: ``[...]`` under p, the policy as the training computes it.
        sampling_log_probs: the same shape, under q, from which the tokens were drawn.
        cap: above 0.

    Returns: the same shape, in (0, cap], without gradient.
    """
    return torch.exp((log_probs - sampling_log_probs).detach()).clamp(max=cap)
