"""linear_token_log_probs: what is its own; what it shares with linear_cross_entropy is in test_fused_heads.py."""

from __future__ import annotations

import pytest
import torch
from ops.fused_heads import TokenLogProbs, operands, run
from ops.support import needs_native, randint, randn
from tolerances import TOLERANCE, assert_near

from rlhf_lightning.ops.linear_token_log_probs import linear_token_log_probs, reference

IMPLEMENTATIONS = [pytest.param(linear_token_log_probs, id="dispatched"), pytest.param(reference, id="reference")]


@needs_native
def test_several_chunks_of_the_vocabulary():
    """So many rows that the native operator takes 256 columns at a time: one whole chunk and one of 44."""
    inputs = TokenLogProbs.case(16500, 2, 300, torch.float64)
    got = run(TokenLogProbs, linear_token_log_probs, *inputs)
    for actual, wanted in zip(got, TokenLogProbs.oracle(*inputs), strict=True):
        assert_near(actual, wanted, torch.float64, times=100)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_an_infinite_hidden_row_stays_alone(function):
    hidden, weight, tokens, temperature = operands(3, 4, 20, torch.float32)
    hidden[1] = torch.inf
    expected = function(hidden[:1], weight, tokens[:1], temperature)
    for actual, wanted in zip(function(hidden, weight, tokens, temperature), expected, strict=True):
        assert actual[1].isnan()
        assert_near(actual[:1], wanted, torch.float32)


@needs_native
def test_the_logits_are_never_held():
    """The peak of what the operator allocates, forward and backward, against the size of the logits."""
    hidden, weight = randn(512, 8).requires_grad_(), randn(40000, 8).requires_grad_()
    tokens = randint(40000, 512)
    with torch.profiler.profile(profile_memory=True) as profile:
        log_probs, entropy = linear_token_log_probs(hidden, weight, tokens, 1.0)
        (log_probs.sum() + entropy.sum()).backward()
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert 0 < largest < 512 * 40000 * 4 / 3


ERRORS = [
    (
        dict(hidden=torch.zeros(2, 3, 4)),
        ValueError,
        "linear_token_log_probs: hidden must have 2 dimensions [N, H], got shape [2, 3, 4]",
    ),
    (
        dict(weight=torch.zeros(5, 3)),
        ValueError,
        "linear_token_log_probs: weight must have shape [V, 4] with V > 0, got shape [5, 3]",
    ),
    (
        dict(weight=torch.zeros(5, 4, dtype=torch.bfloat16)),
        TypeError,
        "linear_token_log_probs: weight must have the dtype of hidden, float32, got bfloat16",
    ),
    (
        dict(weight=torch.zeros(5, 4, device="meta")),
        ValueError,
        "linear_token_log_probs: weight must be on the device of hidden, cpu, got meta",
    ),
    (
        dict(tokens=torch.zeros(2, 1, dtype=torch.int64)),
        ValueError,
        "linear_token_log_probs: tokens must have the shape of hidden without its last dimension, [2], "
        "got shape [2, 1]",
    ),
    (dict(tokens=torch.tensor([0, 5])), ValueError, "linear_token_log_probs: tokens must be in [0, 5), got 5"),
    (
        dict(temperature=-1.0),
        ValueError,
        "linear_token_log_probs: temperature must be a number in [1e-12, 1e12], got -1",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[e[2][24:55] for e in ERRORS])
def test_wrong_arguments(change, kind, message):
    good = dict(
        hidden=torch.zeros(2, 4), weight=torch.zeros(5, 4), tokens=torch.zeros(2, dtype=torch.int64), temperature=1.0
    )
    with pytest.raises(kind) as caught:
        linear_token_log_probs(**{**good, **change})
    assert str(caught.value) == message


@needs_native
@pytest.mark.parametrize("place", range(5))
def test_both_backwards_check_what_they_are_given_of_each_row(place):
    hidden, weight, tokens = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)
    rows, op = [torch.zeros(2) for _ in range(5)], torch.ops.rlhf_lightning
    calls = {
        "token_log_probs": lambda: op.token_log_probs_backward(*rows[:2], hidden, tokens, *rows[2:], 1.0),
        "linear_token_log_probs": lambda: op.linear_token_log_probs_backward(
            *rows[:2], hidden, weight, tokens, *rows[2:], 1.0, True, True
        ),
    }
    for name, call in calls.items():
        for wrong in (torch.zeros(3), torch.zeros(1), torch.zeros(2, 1)):
            rows[place] = wrong
            with pytest.raises(ValueError, match=f"^{name}: a gradient or saved result must have the shape of tokens"):
                call()
        rows[place] = torch.zeros(2)
        call()
        tokens = tokens.int()
        with pytest.raises(TypeError, match=f"^{name}: tokens must be an int64 tensor, got int32"):
            call()
        tokens = tokens.long()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    hidden, weight = randn(3, 4, dtype=dtype).requires_grad_(), randn(9, 4, dtype=dtype, seed=1).requires_grad_()
    torch.library.opcheck(
        torch.ops.rlhf_lightning.linear_token_log_probs.default,
        (hidden, weight, randint(9, 3), 0.9),
        atol=TOLERANCE[dtype],
        rtol=TOLERANCE[dtype],
    )
