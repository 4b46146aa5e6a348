"""Estimators of KL(policy || reference) from sampled tokens, and the controller that holds it near a target.

With a token sampled from the policy, ``d = log policy - log reference`` of that token. Schulman 2020, "Approximating KL
divergence" (joschu.net/blog/kl-approx.html), names three estimators of the mean of d:

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

# expm1(20) is 5e8: far past any useful estimate, far below what overflows fp32 when summed.
_LOG_RATIO_BOUND = 20.0


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: Estimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) in nats.

    Args:
        log_probs: ``[...]`` float, of the sampled tokens under the policy; gradients flow to it.
        reference_log_probs: the same shape, under the reference.
        estimator: ``k1``, ``k2`` or ``k3``, see the module's docstring.

    Returns: the same shape. Where d is below -20, k3 goes on as the straight line that touches it there, so that one
    absurd token cannot overflow the sum; value and slope still grow with the distance.
    """
    check_choice("estimator", estimator, Estimator)
    difference = log_probs - reference_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    # expm1: near 0, where k3 is d^2 / 2, fp32's exp(-d) - 1 has lost all of it.
    near = (-difference).clamp(max=_LOG_RATIO_BOUND)
    beyond = torch.relu(-difference - _LOG_RATIO_BOUND)
    return torch.expm1(near) - near + math.expm1(_LOG_RATIO_BOUND) * beyond


def adapt_kl_coefficient(coefficient: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The next KL coefficient: up by at most 20% (per horizon) when the KL is over its target, down when under.

    ``coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon)``, Ziegler et al. 2019, arXiv
    1909.08593, section 2.2.

    Args:
        coefficient: the one in force.
        kl: measured KL in nats per response (a sum over its tokens, a mean over responses).
        target: wanted KL, the same unit, above 0.
        horizon: episodes over which the error is corrected.
        episodes: responses in this iteration, over all processes.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    # An iteration larger than five horizons could push the factor to 0 or below, and a penalty must not become a prize.
    return coefficient * max(1.0 + error * episodes / horizon, 0.1)
