"""What linear_token_log_probs and linear_cross_entropy share: values, gradients, and what torch asks of operators."""

from __future__ import annotations

import pytest
import torch
from ops.fused_heads import HEADS, run
from ops.support import FLOATS, needs_native, randn, result_dtype, with_threads
from tolerances import assert_error_within, assert_near

heads = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
implementations = pytest.mark.parametrize(
    ("head", "function"),
    [
        pytest.param(head, function, id=f"{head.name}-{kind}")
        for head in HEADS
        for kind, function in (("dispatched", head.function), ("reference", head.reference))
    ],
)


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "size", "vocabulary"), [(1, 1, 1), (7, 5, 7), (1, 16, 129), (129, 8, 1000)])
def test_against_the_definition(head, function, dtype, rows, size, vocabulary):
    inputs = head.case(rows, size, vocabulary, dtype)
    got, truth = run(head, function, *inputs), head.oracle(*inputs)
    assert got[0].dtype == got[1].dtype == result_dtype(dtype) and got[3].dtype == got[4].dtype == dtype
    for actual, wanted in zip(got, truth, strict=True):
        assert_near(actual, wanted, dtype, times=head.slack)


@implementations
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_is_no_larger_than_the_unfused_ones(head, function, dtype):
    inputs = head.case(64, 32, 777, dtype)
    got, torchs, truth = run(head, function, *inputs), run(head, head.unfused, *inputs), head.oracle(*inputs)
    for k in range(5):
        # 16-bit gradients of hidden and weight pass through 16-bit gradients of the logits, here as in torch.
        assert_error_within(got[k], torchs[k], truth[k], dtype if k > 2 or dtype.itemsize == 2 else result_dtype(dtype))


@implementations
def test_gradcheck(head, function):
    hidden, weight, *rest = head.case(3, 4, 6, torch.float64)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: head.call(function, h, w, *rest)[head.differentiable], inputs)


@heads
@pytest.mark.parametrize("needed", ["hidden", "weight", ""])
def test_only_the_needed_gradient(head, needed):
    hidden, weight, *rest = head.case(5, 4, 30, torch.float32)
    both = dict(zip(("hidden", "weight"), run(head, head.function, hidden, weight, *rest)[3:], strict=True))
    operands = {"hidden": hidden.clone(), "weight": weight.clone()}
    if needed:
        operands[needed].requires_grad_()
    *_, total = head.call(head.function, *operands.values(), *rest)
    assert total.requires_grad == bool(needed)
    if needed:
        total.backward()
        assert_near(operands[needed].grad, both[needed], torch.float32)


@implementations
def test_strides(head, function):
    hidden, weight, tokens, temperature, *by_token = head.case(6, 8, 40, torch.float32)
    dense = run(head, function, hidden, weight, tokens, temperature, *by_token)
    wide = torch.zeros(40, 16)
    wide[:, ::2] = weight
    by_token = [x.repeat_interleave(2)[::2] for x in by_token]
    for h, w in ((hidden.T.contiguous().T, weight), (hidden, weight.T.contiguous().T), (hidden, wide[:, ::2])):
        got = run(head, function, h, w, tokens, temperature, *by_token)
        for actual, wanted in zip(got, dense, strict=True):
            assert_near(actual, wanted, torch.float32, times=3)


@implementations
def test_no_rows(head, function):
    got = run(head, function, *head.case(0, 4, 9, torch.float32))
    assert [list(x.shape) for x in got] == [[0], [0], [], [0, 4], [9, 4]]
    assert got[2] == 0 and (got[4] == 0).all()


@implementations
def test_autocast_with_mixed_operands(head, function):
    _, _, tokens, temperature, *by_token = head.case(6, 16, 50, torch.float32)
    hidden, weight = randn(6, 16, dtype=torch.bfloat16).requires_grad_(), randn(50, 16, seed=1).requires_grad_()
    expected = head.call(function, hidden, weight.bfloat16(), tokens, temperature, *by_token)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = head.call(function, hidden, weight, tokens, temperature, *by_token)
        got[-1].backward()
    assert got[0].dtype == got[1].dtype == torch.float32
    for actual, wanted in zip(got, expected, strict=True):
        assert_near(actual, wanted, torch.float32, times=10)
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


@heads
def test_deterministic(head):
    inputs = head.case(33, 16, 3000, torch.float32)
    first, again = run(head, head.function, *inputs), run(head, head.function, *inputs)
    assert all(map(torch.equal, first, again))
    for actual, wanted in zip(with_threads(2, lambda: run(head, head.function, *inputs)), first, strict=True):
        assert_near(actual, wanted, torch.float32, times=3)  # the matrix products are not ours


@needs_native
@heads
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole(head, autocast):
    hidden, weight, *rest = head.case(3, 4, 9, torch.float32)

    def total(h, w):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return head.call(head.function, h, w, *rest)[-1] / 2

    results = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        function(h, w).backward()
        results.append((h.grad, w.grad))
    for actual, wanted in zip(*results, strict=True):
        assert_near(actual, wanted, torch.float32)
