"""linear_token_log_probs against an unfused float64 computation with its gradient written out."""

from __future__ import annotations

import pytest
import torch
from ops.support import FLOATS, needs_native, randint, randn, result_dtype, with_threads
from tolerances import TOLERANCE, assert_error_within, assert_near

from rlhf_lightning.ops.linear_token_log_probs import linear_token_log_probs, reference

IMPLEMENTATIONS = [pytest.param(linear_token_log_probs, id="dispatched"), pytest.param(reference, id="reference")]


def oracle(hidden, weight, tokens, temperature, by_log_probs, by_entropy):
    """Outputs, and the gradients of by_log_probs . log_probs + by_entropy . entropy, from the formulas in float64."""
    hidden, weight = hidden.double(), weight.double()
    scaled = torch.einsum("nh,vh->nv", hidden, weight) / temperature
    p = (scaled - scaled.amax(1, keepdim=True)).exp()
    p = p / p.sum(1, keepdim=True)
    log_p = p.log()
    entropy = -(p * log_p).sum(1)
    one_hot = torch.zeros_like(p)
    one_hot[torch.arange(len(tokens)), tokens] = 1
    by_logits = by_log_probs[:, None] * (one_hot - p) - by_entropy[:, None] * p * (log_p + entropy[:, None])
    by_logits = by_logits / temperature
    return log_p[torch.arange(len(tokens)), tokens], entropy, by_logits @ weight, by_logits.T @ hidden


def run(function, hidden, weight, tokens, temperature, by_log_probs, by_entropy):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    log_probs, entropy = function(hidden, weight, tokens, temperature)
    torch.autograd.backward([log_probs, entropy], [by_log_probs.to(log_probs), by_entropy.to(entropy)])
    return log_probs.detach(), entropy.detach(), hidden.grad, weight.grad


def case(rows, size, vocabulary, dtype):
    hidden, weight = randn(rows, size, dtype=dtype, seed=1), randn(vocabulary, size, dtype=dtype, seed=2)
    tokens = randint(vocabulary, rows, seed=3)
    return (
        hidden,
        weight,
        tokens,
        0.8,
        randn(rows, dtype=torch.float64, seed=4),
        randn(rows, dtype=torch.float64, seed=5),
    )


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "size", "vocabulary"), [(1, 1, 1), (7, 5, 7), (1, 16, 129), (129, 8, 1000)])
def test_against_the_definition(function, dtype, rows, size, vocabulary):
    inputs = case(rows, size, vocabulary, dtype)
    got, truth = run(function, *inputs), oracle(*inputs)
    assert got[0].dtype == got[1].dtype == result_dtype(dtype) and got[2].dtype == got[3].dtype == dtype
    for actual, wanted in zip(got, truth, strict=True):
        assert_near(actual, wanted, dtype, times=10)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_is_no_larger_than_the_unfused_ones(function, dtype):
    inputs = case(64, 32, 777, dtype)

    def unfused(h, w, t, temperature):
        log_p = torch.log_softmax((h @ w.T).to(result_dtype(dtype)) / temperature, -1)
        return log_p.gather(-1, t[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    got, torchs, truth = run(function, *inputs), run(unfused, *inputs), oracle(*inputs)
    for k in range(4):
        # 16-bit gradients of hidden and weight pass through 16-bit gradients of the logits, here as in torch.
        assert_error_within(got[k], torchs[k], truth[k], dtype if k > 1 or dtype.itemsize == 2 else result_dtype(dtype))


@needs_native
def test_several_chunks_of_the_vocabulary():
    """So many rows that the native operator takes 256 columns at a time: one whole chunk and one of 44."""
    inputs = case(16500, 2, 300, torch.float64)
    for actual, wanted in zip(run(linear_token_log_probs, *inputs), oracle(*inputs), strict=True):
        assert_near(actual, wanted, torch.float64, times=100)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_gradcheck_of_both_outputs(function):
    hidden = randn(3, 4, dtype=torch.float64).requires_grad_()
    weight = randn(6, 4, dtype=torch.float64, seed=1).requires_grad_()
    tokens = randint(6, 3)
    assert torch.autograd.gradcheck(lambda h, w: function(h, w, tokens, 0.7), (hidden, weight))


@pytest.mark.parametrize("needed", ["hidden", "weight"])
def test_only_the_needed_gradient(needed):
    inputs = case(5, 4, 30, torch.float32)
    both = dict(zip(("hidden", "weight"), run(linear_token_log_probs, *inputs)[2:], strict=True))
    operands = {"hidden": inputs[0].clone(), "weight": inputs[1].clone()}
    operands[needed].requires_grad_()
    log_probs, entropy = linear_token_log_probs(**operands, tokens=inputs[2], temperature=inputs[3])
    torch.autograd.backward([log_probs, entropy], [inputs[4].float(), inputs[5].float()])
    assert_near(operands[needed].grad, both[needed], torch.float32)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_strides(function):
    hidden, weight, tokens, *rest = case(6, 8, 40, torch.float32)
    dense = run(function, hidden, weight, tokens, *rest)
    wide = torch.zeros(40, 16)
    wide[:, ::2] = weight
    for h, w in ((hidden.T.contiguous().T, weight), (hidden, weight.T.contiguous().T), (hidden, wide[:, ::2])):
        for actual, wanted in zip(run(function, h, w, tokens, *rest), dense, strict=True):
            assert_near(actual, wanted, torch.float32, times=3)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_no_rows(function):
    got = run(function, *case(0, 4, 9, torch.float32))
    assert [list(x.shape) for x in got] == [[0], [0], [0, 4], [9, 4]]
    assert (got[3] == 0).all()


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_an_infinite_hidden_row_stays_alone(function):
    hidden, weight, tokens, temperature, *_ = case(3, 4, 20, torch.float32)
    hidden[1] = torch.inf
    expected = function(hidden[:1], weight, tokens[:1], temperature)
    for actual, wanted in zip(function(hidden, weight, tokens, temperature), expected, strict=True):
        assert actual[1].isnan()
        assert_near(actual[:1], wanted, torch.float32)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_autocast_with_mixed_operands(function):
    hidden, weight = randn(6, 16, dtype=torch.bfloat16).requires_grad_(), randn(50, 16, seed=1).requires_grad_()
    tokens = randint(50, 6)
    expected = function(hidden, weight.bfloat16(), tokens, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = function(hidden, weight, tokens, 1.0)
        (got[0].sum() + got[1].sum()).backward()
    for actual, wanted in zip(got, expected, strict=True):
        assert actual.dtype == torch.float32
        assert_near(actual, wanted, torch.float32, times=10)
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_deterministic():
    inputs = case(33, 16, 3000, torch.float32)
    first, again = run(linear_token_log_probs, *inputs), run(linear_token_log_probs, *inputs)
    assert all(map(torch.equal, first, again))
    for actual, wanted in zip(with_threads(2, lambda: run(linear_token_log_probs, *inputs)), first, strict=True):
        assert_near(actual, wanted, torch.float32, times=3)  # the matrix products are not ours


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
    (dict(temperature=-1.0), ValueError, "linear_token_log_probs: temperature must be a positive number, got -1.0"),
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    hidden, weight = randn(3, 4, dtype=dtype).requires_grad_(), randn(9, 4, dtype=dtype, seed=1).requires_grad_()
    torch.library.opcheck(
        torch.ops.rlhf_lightning.linear_token_log_probs.default,
        (hidden, weight, randint(9, 3), 0.9),
        atol=TOLERANCE[dtype],
        rtol=TOLERANCE[dtype],
    )


@needs_native
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole(autocast):
    hidden, weight, tokens = randn(3, 4), randn(9, 4, seed=1), randint(9, 3)

    def loss(h, w):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            log_probs, entropy = linear_token_log_probs(h, w, tokens, 0.9)
        return (log_probs + 0.1 * entropy).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        function(h, w).backward()
        results.append((h.grad, w.grad))
    for actual, wanted in zip(*results, strict=True):
        assert_near(actual, wanted, torch.float32)
