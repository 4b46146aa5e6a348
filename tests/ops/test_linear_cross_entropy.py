"""linear_cross_entropy against an unfused float64 computation with its gradient written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops.support import FLOATS, needs_native, randint, randn, result_dtype, with_threads
from tolerances import TOLERANCE, assert_error_within, assert_near

from rlhf_lightning.ops.linear_cross_entropy import linear_cross_entropy, reference

IMPLEMENTATIONS = [pytest.param(linear_cross_entropy, id="dispatched"), pytest.param(reference, id="reference")]


def oracle(hidden, weight, tokens, token_weights, temperature):
    """loss, log_probs, entropy, and the gradients of the loss by hidden and weight, from the formulas in float64."""
    hidden, weight, token_weights = hidden.double(), weight.double(), token_weights.double()
    scaled = torch.einsum("nh,vh->nv", hidden, weight) / temperature
    p = (scaled - scaled.amax(1, keepdim=True)).exp()
    p = p / p.sum(1, keepdim=True)
    log_p = p.log()
    log_probs = log_p[torch.arange(len(tokens)), tokens]
    by_logits = p.clone()
    by_logits[torch.arange(len(tokens)), tokens] -= 1
    by_logits = by_logits * token_weights[:, None] / temperature
    loss = -(token_weights * log_probs).sum()
    return loss, log_probs, -(p * log_p).sum(1), by_logits @ weight, by_logits.T @ hidden


def run(function, hidden, weight, tokens, token_weights, temperature):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss, log_probs, entropy = function(hidden, weight, tokens, token_weights, temperature)
    loss.backward()
    assert not log_probs.requires_grad and not entropy.requires_grad
    return loss.detach(), log_probs, entropy, hidden.grad, weight.grad


def case(rows, size, vocabulary, dtype):
    hidden, weight = randn(rows, size, dtype=dtype, seed=1), randn(vocabulary, size, dtype=dtype, seed=2)
    token_weights = randn(rows, dtype=result_dtype(dtype), seed=4).abs()
    token_weights[::3] = 0
    return hidden, weight, randint(vocabulary, rows, seed=3), token_weights, 0.8


def test_by_hand():
    """Two tokens, logits log 3 and 0: the probabilities are 3/4 and 1/4."""
    hidden = torch.tensor([[1.0]]).requires_grad_()
    weight = torch.tensor([[3.0], [1.0]]).log().requires_grad_()
    loss, log_probs, entropy = linear_cross_entropy(hidden, weight, torch.tensor([1]), torch.tensor([2.0]))
    loss.backward()
    log3, log4 = torch.tensor([3.0, 4.0]).log().tolist()
    assert_near(loss.detach(), torch.tensor(2 * log4), torch.float32)
    assert_near(log_probs, torch.tensor([-log4]), torch.float32)
    assert_near(entropy, torch.tensor([log4 - 0.75 * log3]), torch.float32)
    assert_near(weight.grad, torch.tensor([[1.5], [-1.5]]), torch.float32)
    assert_near(hidden.grad, torch.tensor([[1.5 * log3]]), torch.float32)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "size", "vocabulary"), [(1, 1, 1), (7, 5, 7), (1, 16, 129), (129, 8, 1000)])
def test_against_the_definition(function, dtype, rows, size, vocabulary):
    inputs = case(rows, size, vocabulary, dtype)
    got, truth = run(function, *inputs), oracle(*inputs)
    assert {x.dtype for x in got[:3]} == {result_dtype(dtype)} and got[3].dtype == got[4].dtype == dtype
    for actual, wanted in zip(got, truth, strict=True):
        assert_near(actual, wanted, dtype, times=30)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_is_no_larger_than_the_unfused_ones(function, dtype):
    inputs = case(64, 32, 777, dtype)

    def unfused(hidden, weight, tokens, token_weights, temperature):
        log_p = torch.log_softmax((hidden @ weight.T).to(result_dtype(dtype)) / temperature, -1)
        log_probs = log_p.gather(-1, tokens[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        return -(token_weights * log_probs).sum(), log_probs.detach(), entropy.detach()

    got, torchs, truth = run(function, *inputs), run(unfused, *inputs), oracle(*inputs)
    for k in range(5):
        # 16-bit gradients of hidden and weight pass through 16-bit gradients of the logits, here as in torch.
        assert_error_within(got[k], torchs[k], truth[k], dtype if k > 2 or dtype.itemsize == 2 else result_dtype(dtype))


@needs_native
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [256, 257, 600])
def test_one_tile_of_rows_and_several(dtype, rows):
    hidden, weight, *rest = case(rows, 8, 100, dtype)
    inputs = hidden, weight, *rest
    got, truth = run(linear_cross_entropy, *inputs), oracle(*inputs)
    plain = run(reference, *inputs)
    for k in range(5):
        assert_error_within(got[k], plain[k], truth[k], dtype if k > 2 or dtype.itemsize == 2 else result_dtype(dtype))


def test_is_the_mean_cross_entropy():
    hidden, weight, tokens, *_ = case(20, 6, 50, torch.float64)
    mean = torch.full((20,), 1 / 20, dtype=torch.float64)
    assert_near(
        linear_cross_entropy(hidden, weight, tokens, mean)[0],
        F.cross_entropy(hidden @ weight.T, tokens),
        torch.float64,
    )


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_gradcheck(function):
    hidden = randn(3, 4, dtype=torch.float64).requires_grad_()
    weight = randn(6, 4, dtype=torch.float64, seed=1).requires_grad_()
    tokens, token_weights = randint(6, 3), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)

    def loss(h, w):
        return function(h, w, tokens, token_weights, 0.7)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("needed", ["hidden", "weight", ""])
def test_only_the_needed_gradient(needed):
    inputs = case(5, 4, 30, torch.float32)
    results = dict(zip(("hidden", "weight"), run(linear_cross_entropy, *inputs)[3:], strict=True))
    operands = {"hidden": inputs[0].clone(), "weight": inputs[1].clone()}
    if needed:
        operands[needed].requires_grad_()
    loss, *_ = linear_cross_entropy(**operands, tokens=inputs[2], token_weights=inputs[3], temperature=inputs[4])
    assert loss.requires_grad == bool(needed)
    if needed:
        loss.backward()
        assert_near(operands[needed].grad, results[needed], torch.float32)


@needs_native
def test_no_gradient_is_made_where_none_is_needed():
    hidden, weight, tokens, token_weights, temperature = case(5, 4, 30, torch.float32)
    op = torch.ops.rlhf_lightning.linear_cross_entropy
    _, _, _, by_hidden, by_weight = op(hidden, weight, tokens, token_weights, temperature, False, False)
    assert by_hidden.numel() == by_weight.numel() == 0
    with torch.no_grad():
        loss, *_ = linear_cross_entropy(hidden.requires_grad_(), weight, tokens, token_weights, temperature)
    assert not loss.requires_grad


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_the_incoming_gradient_scales(function):
    inputs = case(9, 4, 30, torch.float32)
    plain = run(function, *inputs)
    third = run(lambda *a: ((loss := function(*a))[0] / 3, *loss[1:]), *inputs)
    for actual, wanted in zip(third[3:], plain[3:], strict=True):
        assert_near(actual * 3, wanted, torch.float32)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_a_retained_graph_gives_the_same_gradient_again(function):
    hidden, weight, tokens, token_weights, _ = case(3, 4, 9, torch.float32)
    operands = hidden.requires_grad_(), weight.requires_grad_()
    loss, *_ = function(*operands, tokens, token_weights)
    half, kept = torch.tensor(0.5), dict(retain_graph=True)
    halves = torch.autograd.grad(loss, operands, half, **kept)
    loss.backward(**kept)
    loss.backward(**kept)
    loss.backward()
    for operand, by_half in zip(operands, halves, strict=True):
        assert_near(operand.grad, 6 * by_half, torch.float32)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_token_weights_get_no_gradient():
    hidden, weight, tokens, token_weights, _ = case(3, 4, 9, torch.float32)
    loss, *_ = linear_cross_entropy(hidden.requires_grad_(), weight, tokens, token_weights.requires_grad_())
    loss.backward()
    assert hidden.grad is not None and token_weights.grad is None


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_strides(function):
    hidden, weight, tokens, token_weights, temperature = case(6, 8, 40, torch.float32)
    dense = run(function, hidden, weight, tokens, token_weights, temperature)
    wide = torch.zeros(40, 16)
    wide[:, ::2] = weight
    for h, w in ((hidden.T.contiguous().T, weight), (hidden, weight.T.contiguous().T), (hidden, wide[:, ::2])):
        got = run(function, h, w, tokens, token_weights.repeat_interleave(2)[::2], temperature)
        for actual, wanted in zip(got, dense, strict=True):
            assert_near(actual, wanted, torch.float32, times=3)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_no_rows(function):
    got = run(function, *case(0, 4, 9, torch.float32))
    assert [list(x.shape) for x in got] == [[], [0], [0], [0, 4], [9, 4]]
    assert got[0] == 0 and (got[4] == 0).all()


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_autocast_with_mixed_operands(function):
    hidden, weight = randn(6, 16, dtype=torch.bfloat16).requires_grad_(), randn(50, 16, seed=1).requires_grad_()
    tokens, token_weights = randint(50, 6), torch.full((6,), 1 / 6)
    expected = function(hidden, weight.bfloat16(), tokens, token_weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = function(hidden, weight, tokens, token_weights)
        got[0].backward()
    for actual, wanted in zip(got, expected, strict=True):
        assert actual.dtype == torch.float32
        assert_near(actual, wanted, torch.float32, times=10)
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_deterministic():
    inputs = case(33, 16, 3000, torch.float32)
    first, again = run(linear_cross_entropy, *inputs), run(linear_cross_entropy, *inputs)
    assert all(map(torch.equal, first, again))
    for actual, wanted in zip(with_threads(2, lambda: run(linear_cross_entropy, *inputs)), first, strict=True):
        assert_near(actual, wanted, torch.float32, times=10)  # the matrix products are not ours


ERRORS = [
    (
        dict(weight=torch.zeros(5, 3)),
        ValueError,
        "linear_cross_entropy: weight must have shape [V, 4] with V > 0, got shape [5, 3]",
    ),
    (
        dict(token_weights=torch.zeros(2, dtype=torch.int64)),
        TypeError,
        "linear_cross_entropy: token_weights must be a float32, bfloat16, float16 or float64 tensor, got int64",
    ),
    (
        dict(token_weights=torch.zeros(3)),
        ValueError,
        "linear_cross_entropy: token_weights must have the shape of tokens, [2], got shape [3]",
    ),
    (
        dict(token_weights=torch.zeros(2, device="meta")),
        ValueError,
        "linear_cross_entropy: token_weights must be on the device of hidden, cpu, got meta",
    ),
    (dict(tokens=torch.tensor([0, 5])), ValueError, "linear_cross_entropy: tokens must be in [0, 5), got 5"),
    (dict(temperature=-1.0), ValueError, "linear_cross_entropy: temperature must be a positive number, got -1.0"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[e[2][22:60] for e in ERRORS])
def test_wrong_arguments(change, kind, message):
    good = dict(
        hidden=torch.zeros(2, 4),
        weight=torch.zeros(5, 4),
        tokens=torch.zeros(2, dtype=torch.int64),
        token_weights=torch.ones(2),
        temperature=1.0,
    )
    with pytest.raises(kind) as caught:
        linear_cross_entropy(**{**good, **change})
    assert str(caught.value) == message


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, False)])
def test_opcheck(dtype, needed):
    hidden = randn(3, 4, dtype=dtype).requires_grad_(needed[0])
    weight = randn(9, 4, dtype=dtype, seed=1).requires_grad_(needed[1])
    torch.library.opcheck(
        torch.ops.rlhf_lightning.linear_cross_entropy.default,
        (hidden, weight, randint(9, 3), torch.tensor([0.5, 0.0, 2.0]), 0.9, *needed),
        atol=TOLERANCE[dtype],
        rtol=TOLERANCE[dtype],
    )


@needs_native
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole(autocast):
    hidden, weight, tokens = randn(3, 4), randn(9, 4, seed=1), randint(9, 3)

    def loss(h, w):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return linear_cross_entropy(h, w, tokens, torch.tensor([0.5, 0.0, 2.0]), 0.9)[0] / 2

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        function(h, w).backward()
        results.append((h.grad, w.grad))
    for actual, wanted in zip(*results, strict=True):
        assert_near(actual, wanted, torch.float32)


def test_float16_gradients_are_scaled_before_they_are_rounded():
    # As under a loss scaler: weights so small leave gradients that float16 cannot hold unscaled.
    hidden, weight = (0.3 * randn(n, 32, seed=n).to(torch.float16) for n in (64, 512))
    tokens, token_weights = randint(512, 64, seed=3), torch.full((64,), 1e-5)
    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    (65536.0 * linear_cross_entropy(*inputs, tokens, token_weights)[0]).backward()
    exact = oracle(hidden, weight, tokens, token_weights, 1.0)[3:]
    for x, true in zip(inputs, exact, strict=True):
        assert (x.grad.double() / 65536 - true).norm() < 2e-3 * true.norm()
