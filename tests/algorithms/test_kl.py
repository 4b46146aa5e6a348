"""The three KL estimators against their formulas and against an exact KL, and the adaptive controller by hand."""

import math

import pytest
import torch

from rlhf_lightning.algorithms.kl import adapt_kl_coefficient, kl_estimate


def test_estimators_by_hand():
    log_probs, reference = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert kl_estimate(log_probs, reference, "k1").item() == pytest.approx(0.5)
    assert kl_estimate(log_probs, reference, "k2").item() == pytest.approx(0.125)
    assert kl_estimate(log_probs, reference, "k3").item() == pytest.approx(math.exp(-0.5) - 1 + 0.5)


def test_equal_models_have_no_divergence():
    log_probs = torch.randn(5, 6)
    for estimator in ("k1", "k2", "k3"):
        assert torch.equal(kl_estimate(log_probs, log_probs.clone(), estimator), torch.zeros(5, 6))


def test_k1_and_k3_are_unbiased_and_k2_and_k3_never_negative():
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(12, generator=generator, dtype=torch.float64).log_softmax(0)
    reference = torch.randn(12, generator=generator, dtype=torch.float64).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        estimates = kl_estimate(policy, reference, estimator)
        torch.testing.assert_close((policy.exp() * estimates).sum(), exact)  # the expectation over the policy
    for estimator in ("k2", "k3"):
        assert (kl_estimate(policy, reference, estimator) >= 0).all()


def test_the_gradient_of_expected_k2_is_the_gradient_of_the_kl():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(8, generator=generator, dtype=torch.float64).log_softmax(0)
    probabilities = logits.detach().softmax(0)  # the sampling distribution is not differentiated
    (k2,) = torch.autograd.grad((probabilities * kl_estimate(logits.log_softmax(0), reference, "k2")).sum(), logits)
    policy = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    torch.testing.assert_close(k2, exact)


@pytest.mark.parametrize("d", [1e-7, 1e-6, 1e-4, 1e-2, 1.0, 19.9, 24.0, 90.0])
def test_k3_of_float32_is_that_of_float64_near_and_far(d):
    """Near 0 it is d^2 / 2, which 1 + d has no digits for."""
    for sign in (1.0, -1.0):
        log_probs = torch.tensor([sign * d], requires_grad=True)
        value = kl_estimate(log_probs, torch.zeros(1), "k3")
        value.sum().backward()
        x = log_probs.item()  # as float32 has it
        if x >= -20:
            exact = math.fsum([(-x) ** n / math.factorial(n) for n in range(2, 12)]) if d < 0.1 else math.expm1(-x) + x
            slope = -math.expm1(-x)
        else:  # the tangent at -20
            slope = -math.expm1(20)
            exact = math.expm1(20) - 20 + slope * (x + 20)
        # expm1 is rounded to 1 part in 2^24 of d
        assert value.item() == pytest.approx(exact, rel=1e-5, abs=2 * d * 2**-24)
        assert log_probs.grad.item() == pytest.approx(slope, rel=1e-5, abs=2**-22)
        assert value.item() >= 0


def test_an_absurd_token_stays_finite():
    value = kl_estimate(torch.tensor([-200.0]), torch.tensor([-1.0]), "k3")
    assert torch.isfinite(value).all()


def test_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 256 / 10_000)),  # a tenth over
        (60.0, 0.1 * (1 + 0.2 * 256 / 10_000)),  # far over: the error is clipped
        (0.0, 0.1 * (1 - 0.2 * 256 / 10_000)),  # far under
    ],
)
def test_adaptive_coefficient_by_hand(kl, expected):
    assert adapt_kl_coefficient(0.1, kl, target=6.0, horizon=10_000, episodes=256) == pytest.approx(expected)


def test_the_coefficient_never_turns_into_a_prize():
    assert adapt_kl_coefficient(0.1, kl=0.0, target=6.0, horizon=10, episodes=1000) > 0
