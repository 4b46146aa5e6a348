"""The temperatures that the operators take: right results up to both limits, the same error beyond them everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from ops.support import needs_native, randint, randn
from tolerances import assert_near

from rlhf_lightning.ops.linear_cross_entropy import linear_cross_entropy
from rlhf_lightning.ops.linear_token_log_probs import linear_token_log_probs
from rlhf_lightning.ops.sample_tokens import sample_tokens
from rlhf_lightning.ops.token_log_probs import reference, token_log_probs

LIMITS = [1e-12, 1e12]
BEYOND = [0.0, -1.0, 9e-13, 1e-30, 5e-324, 1.1e12, 1e36, 1e39, math.inf, math.nan]
WORDS = "temperature must be a number in [1e-12, 1e12], got "


def calls(temperature: float) -> dict:
    """Each operator at this temperature, in Python and as torch.ops has it."""
    op = torch.ops.rlhf_lightning
    logits, tokens, draws = randn(3, 9), randint(9, 3), torch.full((3,), 0.5, dtype=torch.float64)
    hidden, weight, weights, ones = randn(3, 4), randn(9, 4, seed=1), torch.ones(3), [torch.ones(3)] * 5
    return {
        "token_log_probs": [
            lambda: token_log_probs(logits, tokens, temperature),
            lambda: op.token_log_probs(logits, tokens, temperature),
            lambda: op.token_log_probs_backward(*ones[:2], logits, tokens, *ones[:3], temperature),
        ],
        "linear_token_log_probs": [
            lambda: linear_token_log_probs(hidden, weight, tokens, temperature),
            lambda: op.linear_token_log_probs(hidden, weight, tokens, temperature),
        ],
        "linear_cross_entropy": [
            lambda: linear_cross_entropy(hidden, weight, tokens, weights, temperature),
            lambda: op.linear_cross_entropy(hidden, weight, tokens, weights, temperature, True, True),
        ],
        "sample_tokens": [
            lambda: sample_tokens(logits, draws, temperature),
            lambda: op.sample_tokens(logits, draws, temperature, 0, 1.0),
        ],
    }


@needs_native
@pytest.mark.parametrize("temperature", BEYOND)
@pytest.mark.parametrize("operator", list(calls(1.0)))
def test_beyond_the_limits_python_and_the_native_operator_say_the_same(operator, temperature):
    if operator == "sample_tokens" and temperature == 0:
        return  # greedy
    words = WORDS.replace("be a", "be 0 or a") if operator == "sample_tokens" else WORDS
    for call in calls(temperature)[operator]:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).splitlines()[0] == f"{operator}: {words}{temperature:g}"


@pytest.mark.parametrize("temperature", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [pytest.param(token_log_probs, id="dispatched"), reference])
def test_at_the_limits_results_and_both_gradients_are_those_of_float64(function, dtype, temperature):
    # Logits as far apart as the temperature: there it decides what each probability is.
    logits, tokens = (randn(8, 300) * temperature).to(dtype), randint(300, 8)
    logits[3, ::2] = -torch.inf
    tokens[3] = 1
    x = logits.double().requires_grad_()
    log_p = torch.log_softmax(x / temperature, -1)
    finite = log_p.masked_fill(log_p == -torch.inf, 0.0)  # what is impossible adds 0, and has no slope
    true = log_p.gather(-1, tokens[:, None])[:, 0], -(log_p.exp() * finite).sum(-1)
    found = logits.clone().requires_grad_()
    got = function(found, tokens, temperature)
    incoming = randn(8, seed=2)
    for number in (0, 1):
        assert_near(got[number].detach(), true[number].detach(), torch.float32)
        for outputs, leaf in ((got, found), (true, x)):
            leaf.grad = None
            outputs[number].backward(incoming.to(outputs[number].dtype), retain_graph=True)
        assert_near(found.grad.double() * temperature, x.grad * temperature, dtype)


@pytest.mark.parametrize("temperature", LIMITS)
@pytest.mark.parametrize("function", [linear_token_log_probs, linear_cross_entropy])
def test_at_the_limits_the_fused_heads_are_those_of_float64(function, temperature):
    hidden, weight, tokens = randn(5, 4) * temperature, randn(30, 4, seed=1), randint(30, 5)
    incoming = randn(5, seed=2).abs()
    results = []
    for dtype in (torch.float32, torch.float64):
        h, w = (x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        if dtype == torch.float64:
            log_p = torch.log_softmax(h @ w.T / temperature, -1)
            loss = -(incoming.double() * log_p.gather(-1, tokens[:, None])[:, 0]).sum()
        elif function is linear_cross_entropy:
            loss = linear_cross_entropy(h, w, tokens, incoming, temperature)[0]
        else:
            loss = -(incoming * linear_token_log_probs(h, w, tokens, temperature)[0]).sum()
        loss.backward()
        results.append((loss.detach(), h.grad.double() * temperature, w.grad))
    for got, wanted in zip(*results, strict=True):
        assert_near(got.float(), wanted, torch.float32)


@pytest.mark.parametrize("temperature", LIMITS)
def test_at_the_limits_sampling_draws_from_the_right_distribution(temperature):
    logits = torch.tensor([[0.0, math.log(3) * temperature, -torch.inf]])
    for draw, token, probability in ((0.2, 0, 0.25), (0.3, 1, 0.75), (0.99, 1, 0.75)):
        got = sample_tokens(logits, torch.tensor([draw], dtype=torch.float64), temperature)
        assert got[0].item() == token
        assert got[1].item() == pytest.approx(math.log(probability), rel=1e-5)
        assert got[2].item() == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-5)
