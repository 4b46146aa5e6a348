"""linear_cross_entropy: what is its own; what it shares with linear_token_log_probs is in test_fused_heads.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops.fused_heads import CrossEntropy, operands, run
from ops.support import FLOATS, needs_native, randint, randn, result_dtype
from tolerances import TOLERANCE, assert_error_within, assert_near

from rlhf_lightning.ops.linear_cross_entropy import linear_cross_entropy, reference

IMPLEMENTATIONS = [pytest.param(linear_cross_entropy, id="dispatched"), pytest.param(reference, id="reference")]


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


@needs_native
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [256, 257, 600])
def test_one_tile_of_rows_and_several(dtype, rows):
    inputs = CrossEntropy.case(rows, 8, 100, dtype)
    got, plain = (run(CrossEntropy, function, *inputs) for function in (linear_cross_entropy, reference))
    truth = CrossEntropy.oracle(*inputs)
    for k in range(5):
        assert_error_within(got[k], plain[k], truth[k], dtype if k > 2 or dtype.itemsize == 2 else result_dtype(dtype))


def test_is_the_mean_cross_entropy():
    hidden, weight, tokens, _ = operands(20, 6, 50, torch.float64)
    mean = torch.full((20,), 1 / 20, dtype=torch.float64)
    assert_near(
        linear_cross_entropy(hidden, weight, tokens, mean)[0],
        F.cross_entropy(hidden @ weight.T, tokens),
        torch.float64,
    )


@needs_native
def test_no_gradient_is_made_where_none_is_needed():
    hidden, weight, tokens, temperature, token_weights = CrossEntropy.case(5, 4, 30, torch.float32)
    op = torch.ops.rlhf_lightning.linear_cross_entropy
    _, _, _, by_hidden, by_weight = op(hidden, weight, tokens, token_weights, temperature, False, False)
    assert by_hidden.numel() == by_weight.numel() == 0
    with torch.no_grad():
        loss, *_ = linear_cross_entropy(hidden.requires_grad_(), weight, tokens, token_weights, temperature)
    assert not loss.requires_grad


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_the_incoming_gradient_scales(function):
    inputs = CrossEntropy.case(9, 4, 30, torch.float32)
    plain = run(CrossEntropy, function, *inputs)
    third = run(CrossEntropy, lambda *a: ((loss := function(*a))[0] / 3, *loss[1:]), *inputs)
    for actual, wanted in zip(third[3:], plain[3:], strict=True):
        assert_near(actual * 3, wanted, torch.float32)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_a_retained_graph_gives_the_same_gradient_again(function):
    hidden, weight, tokens, _, token_weights = CrossEntropy.case(3, 4, 9, torch.float32)
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


@pytest.mark.parametrize("retained", [False, True])
@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_a_batch_of_incoming_gradients_gives_a_batch_of_gradients(function, retained):
    hidden, weight, tokens, _, token_weights = CrossEntropy.case(3, 4, 9, torch.float32)
    factors, options = torch.tensor([0.5, -2.0, 0.0]), dict(retain_graph=retained)

    def loss_of_new_operands():
        leaves = tuple(x.clone().requires_grad_() for x in (hidden, weight))
        return function(*leaves, tokens, token_weights)[0], leaves

    def by_grad(loss, leaves):
        return torch.autograd.grad(loss, leaves, factors, is_grads_batched=True, **options)

    def by_vmap(loss, leaves):
        return torch.vmap(lambda factor: torch.autograd.grad(loss, leaves, factor, **options))(factors)

    plain = torch.autograd.grad(*loss_of_new_operands())
    for batched in (by_grad, by_vmap):
        for gradient, once in zip(batched(*loss_of_new_operands()), plain, strict=True):
            assert_near(gradient, factors[:, None, None] * once, torch.float32)


def test_the_token_weights_get_no_gradient():
    hidden, weight, tokens, _, token_weights = CrossEntropy.case(3, 4, 9, torch.float32)
    loss, *_ = linear_cross_entropy(hidden.requires_grad_(), weight, tokens, token_weights.requires_grad_())
    loss.backward()
    assert hidden.grad is not None and token_weights.grad is None


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
    (dict(temperature=-1.0), ValueError, "linear_cross_entropy: temperature must be a number in [1e-12, 1e12], got -1"),
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


def test_float16_gradients_are_scaled_before_they_are_rounded():
    # As under a loss scaler: weights so small leave gradients that float16 cannot hold unscaled.
    hidden, weight = (0.3 * randn(n, 32, seed=n).to(torch.float16) for n in (64, 512))
    tokens, token_weights = randint(512, 64, seed=3), torch.full((64,), 1e-5)
    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    (65536.0 * linear_cross_entropy(*inputs, tokens, token_weights)[0]).backward()
    exact = CrossEntropy.oracle(hidden, weight, tokens, 1.0, token_weights)[3:]
    for x, true in zip(inputs, exact, strict=True):
        assert (x.grad.double() / 65536 - true).norm() < 2e-3 * true.norm()
