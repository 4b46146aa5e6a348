"""Truncated importance weights: a weighted mean over q is the mean over p, by enumerating all tokens in float64."""

import pytest
import torch

from rlhf_lightning.algorithms.importance import truncated_importance_weights


def distributions(seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(7, generator=draws, dtype=torch.float64).softmax(0) for _ in range(2)]


def test_the_weighted_mean_over_q_is_the_mean_over_p():
    p, q = distributions()
    value = torch.arange(7, dtype=torch.float64).square()
    weights = truncated_importance_weights(p.log(), q.log(), cap=1e9)
    assert (q * weights * value).sum().item() == pytest.approx((p * value).sum().item(), rel=1e-12)


def test_the_cap_bounds_the_weights_and_an_overflow():
    p, q = distributions(1)
    weights = truncated_importance_weights(p.log(), q.log(), cap=1.2)
    assert weights.tolist() == pytest.approx([min(a / b, 1.2) for a, b in zip(p.tolist(), q.tolist(), strict=True)])
    assert truncated_importance_weights(torch.tensor([0.0]), torch.tensor([-1e4]), cap=2.0).item() == 2.0


def test_no_gradient_flows_through_the_weights():
    log_probs = torch.tensor([-1.0], requires_grad=True)
    assert not truncated_importance_weights(log_probs, torch.tensor([-2.0]), cap=5.0).requires_grad
