"""The check of gradients of logits sees what is lost where they are small."""

from __future__ import annotations

import pytest
import torch
from gpu.oracles import gradient_terms, token_log_probs
from ops.support import FLOATS, randint, randn
from tolerances import TOLERANCE, assert_gradient_near, assert_near

LOGITS, TOKENS = randn(4, 20000, dtype=torch.float64, scale=2.0), randint(20000, 4)
BY = torch.ones(4, dtype=torch.float64), torch.full((4,), 0.5, dtype=torch.float64)
SIXTEEN = [torch.bfloat16, torch.float16]


def check(change, dtype):
    """Of the gradient rounded to ``dtype``, changed."""
    *_, truth = token_log_probs(LOGITS, TOKENS, 1.0, *BY)
    terms = gradient_terms(LOGITS, TOKENS, 1.0, *BY)
    assert_gradient_near(change(truth.to(dtype)), truth, terms, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_rounded_truth_passes(dtype):
    check(lambda grad: grad, dtype)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_zeros_for_what_is_small_fail(dtype):
    def change(grad):
        kept = grad.abs() > 1e-2
        assert kept.double().mean() < 1e-3
        if dtype == torch.bfloat16:  # the other check cannot see it
            assert_near(grad * kept, grad, dtype, times=2)
        return grad * kept

    with pytest.raises(AssertionError, match="worst element"):
        check(change, dtype)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_noise_fails(dtype):
    with pytest.raises(AssertionError, match="worst element"):
        check(lambda grad: grad + 2e-3 * randn(*grad.shape, dtype=dtype, seed=5), dtype)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_factor_on_the_whole_fails_in_l2_first(dtype):
    *_, truth = token_log_probs(LOGITS, TOKENS, 1.0, *BY)
    with pytest.raises(AssertionError, match="relative L2"):
        check(lambda _: truth * (1 + 0.7 * TOLERANCE[dtype]), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_fails(dtype):
    with pytest.raises(AssertionError):
        check(lambda grad: torch.where(grad == grad.max(), torch.nan, grad), dtype)
