"""Estimators of KL(policy || reference) from sampled tokens, and the controller that keeps the KL near a target.

For a token sampled from the policy, let ``d = log policy - log reference``. The KL is the mean of d. Schulman 2020,
"Approximating KL divergence" (joschu.net/blog/kl-approx.html), names three estimators of it:

    k1 = d                   unbiased, may be negative
    k2 = d^2 / 2             biased, never negative; its gradient is the gradient of the KL
    k3 = exp(-d) - 1 + d     unbiased, never negative, lower variance
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.errors import check_choice

Estimator = Literal["k1", "k2", "k3"]

# expm1(20) is 5e8: far beyond any useful estimate, and far below an overflow of fp32 sums.
_LOG_RATIO_BOUND = 20.0


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: Estimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) in nats.

    Args:
        log_probs: ``[...]`` float, log-probs of the sampled tokens under the policy; it gets gradients.
        reference_log_probs: the same shape, under the reference.
        estimator: ``k1``, ``k2`` or ``k3``, see the module's docstring.

    Returns: the same shape. Below d = -20, k3 is continued by its tangent, so that one extreme token cannot overflow
    the sum. The value still grows with the distance.
    """
    check_choice("estimator", estimator, Estimator)
    difference = log_probs - reference_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    # Near 0, k3 is about d^2 / 2. In fp32, exp(-d) - 1 would lose all digits of it; expm1 does not.
    near = (-difference).clamp(max=_LOG_RATIO_BOUND)
    beyond = torch.relu(-difference - _LOG_RATIO_BOUND)
    return torch.expm1(near) - near + math.expm1(_LOG_RATIO_BOUND) * beyond


def adapt_kl_coefficient(coefficient: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The next KL coefficient: higher if the KL is above its target, lower if below, by at most 20% per horizon.

    ``coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon)``, Ziegler et al. 2019, arXiv
    1909.08593, section 2.2.

    Args:
        coefficient: the current coefficient.
        kl: measured KL in nats per response (a sum over its tokens, a mean over responses).
        target: wanted KL in the same unit, above 0.
        horizon: number of episodes over which the error is corrected.
        episodes: number of responses in this iteration, over all processes.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    # With more than five horizons in an iteration the factor could be 0 or negative, and the penalty become a bonus.
    return coefficient * max(1.0 + error * episodes / horizon, 0.1)
