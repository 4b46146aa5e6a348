"""clipped_policy_loss and clipped_value_loss against the formulas, token by token in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.clipped_losses import BOTH, EVERY, case, run
from ops.support import FLOATS, SIZES, needs_native, randn, result_dtype, with_threads
from tolerances import assert_near

from rlhf_lightning.ops.clipped_policy_loss import clipped_policy_loss
from rlhf_lightning.ops.clipped_policy_loss import reference as policy_reference
from rlhf_lightning.ops.clipped_value_loss import clipped_value_loss
from rlhf_lightning.ops.clipped_value_loss import reference as value_reference

POLICY = [pytest.param(clipped_policy_loss, id="dispatched"), pytest.param(policy_reference, id="reference")]
VALUE = [pytest.param(clipped_value_loss, id="dispatched"), pytest.param(value_reference, id="reference")]


def policy_oracle(log_prob, old, advantage, low, high, dual):
    """(loss, clipped, gradient) of one token."""
    ratio = math.exp(min(max(log_prob - old, -20.0), 20.0))
    free, bounded = -advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high)
    loss, clipped = max(free, bounded), bounded > free
    flat = clipped or abs(log_prob - old) > 20
    if dual is not None and advantage < 0 and loss > -dual * advantage:
        loss, flat = -dual * advantage, True
    return loss, clipped, 0.0 if flat else free


def value_oracle(value, old, target, clip):
    free = 0.5 * (value - target) ** 2
    if clip is None or abs(value - old) <= clip:
        return free, False, value - target
    bounded = 0.5 * (old + math.copysign(clip, value - old) - target) ** 2
    return (bounded, True, 0.0) if bounded > free else (free, False, value - target)


def oracle(function, tensors, *options):
    rows = [function(*row, *options) for row in zip(*(x.double().flatten().tolist() for x in tensors), strict=True)]
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    loss, clipped, grad = (torch.tensor(column, dtype=torch.float64).reshape(tensors[0].shape) for column in columns)
    return loss, clipped.bool(), grad


# log-ratio, advantage, dual_clip -> loss, clipped, gradient, with clip_low 0.2 and clip_high 0.3
LOG_2 = math.log(2)
HAND = [
    (0.0, 3.0, None, -3.0, False, -3.0),  # the first update: ratio 1, the policy gradient itself
    (LOG_2, 1.0, None, -1.3, True, 0.0),  # up far enough already
    (LOG_2, -1.0, None, 2.0, False, 2.0),  # going the wrong way is never clipped
    (-LOG_2, 1.0, None, -0.5, False, -0.5),
    (-LOG_2, -1.0, None, 0.8, True, 0.0),  # down far enough already
    (math.log(8), -2.0, 3.0, 6.0, False, 0.0),  # dual clip: at most 3 times -A
    (math.log(8), -2.0, None, 16.0, False, 16.0),
    (math.log(8), 2.0, 3.0, -2.6, True, 0.0),  # dual clip leaves positive advantages alone
    (30.0, -1.0, None, math.exp(20), False, 0.0),  # log-ratio clamped at 20, no gradient beyond
    (-30.0, 1.0, None, -math.exp(-20), False, 0.0),
    (1.0, 0.0, 2.0, 0.0, False, 0.0),
]


@pytest.mark.parametrize("function", POLICY)
@pytest.mark.parametrize(("log_ratio", "advantage", "dual", "loss", "clipped", "grad"), HAND)
def test_policy_by_hand(function, log_ratio, advantage, dual, loss, clipped, grad):
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (log_ratio - 1.5, -1.5, advantage)]
    got = run(function, tensors, 0.2, 0.3, dual)
    assert got[0].item() == pytest.approx(loss) and got[1].item() is clipped and got[2].item() == pytest.approx(grad)


@pytest.mark.parametrize("function", VALUE)
@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "clipped", "grad"),
    [
        (1.0, 1.0, 3.0, 0.2, 2.0, False, -2.0),
        (2.0, 1.0, 3.0, 0.2, 1.62, True, 0.0),  # clipped to 1.2, error 1.8
        (2.0, 1.0, 0.0, 0.2, 2.0, False, 2.0),  # the free prediction is the worse one
        (2.0, 1.0, 3.0, None, 0.5, False, -1.0),
        (0.0, 1.0, -1.0, 0.25, 1.53125, True, 0.0),  # clipped to 0.75, error 1.75
    ],
)
def test_value_by_hand(function, value, old, target, clip, loss, clipped, grad):
    got = run(function, [torch.tensor([x], dtype=torch.float64) for x in (value, old, target)], clip)
    assert got[0].item() == pytest.approx(loss) and got[1].item() is clipped and got[2].item() == pytest.approx(grad)


@pytest.mark.parametrize("function", POLICY)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dual", [None, 1.5])
def test_policy_against_the_definition(function, dtype, dual):
    tensors = case(3, 129, dtype=dtype, spread=0.7)
    loss, clipped, grad = run(function, tensors, 0.2, 0.28, dual)
    true_loss, true_clipped, true_grad = oracle(policy_oracle, tensors, 0.2, 0.28, dual)
    assert loss.dtype == result_dtype(dtype) and grad.dtype == dtype and clipped.dtype == torch.bool
    assert_near(loss, true_loss, result_dtype(dtype))
    assert torch.equal(clipped, true_clipped) and clipped.any() and not clipped.all()
    assert_near(grad, true_grad, dtype)


@pytest.mark.parametrize("function", VALUE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_against_the_definition(function, dtype, clip):
    tensors = case(3, 129, dtype=dtype)
    loss, clipped, grad = run(function, tensors, clip)
    true_loss, true_clipped, true_grad = oracle(value_oracle, tensors, clip)
    assert loss.dtype == result_dtype(dtype) and grad.dtype == dtype and clipped.dtype == torch.bool
    assert_near(loss, true_loss, result_dtype(dtype))
    assert torch.equal(clipped, true_clipped)
    assert_near(grad, true_grad, dtype)


@needs_native
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_native_is_near_the_reference(dtype, size):
    tensors = case(size, dtype=dtype)
    for (native, options), plain in zip(BOTH, (policy_reference, value_reference), strict=True):
        for actual, wanted in zip(run(native, tensors, *options), run(plain, tensors, *options), strict=True):
            assert_near(actual, wanted, result_dtype(dtype))


@settings(max_examples=100)
@given(
    first=st.floats(-30, 5), second=st.floats(-30, 5), third=st.floats(-10, 10),
    low=st.floats(0, 1), high=st.floats(0, 3), clip=st.floats(0.01, 5), dual=st.none() | st.floats(1.1, 10),
)  # fmt: skip
def test_properties(first, second, third, low, high, clip, dual):
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (first, second, third)]
    loss, clipped, grad = run(clipped_policy_loss, tensors, low, high, dual)
    true_loss, _, _ = policy_oracle(first, second, third, low, high, dual)
    assert loss.item() == pytest.approx(true_loss, rel=1e-9, abs=1e-12)
    free = -third * math.exp(min(max(first - second, -20), 20))
    if dual is None:
        assert loss.item() >= free - 1e-9 * abs(free)  # a pessimistic bound
    if clipped.item():
        assert grad.item() == 0.0
    loss, clipped, grad = run(clipped_value_loss, tensors, clip)
    assert loss.item() >= 0.5 * (first - third) ** 2 * (1 - 1e-9)
    assert grad.item() == (0.0 if clipped.item() else first - third)


@pytest.mark.parametrize("function", [clipped_policy_loss, policy_reference])
def test_at_ratio_one_the_gradient_is_the_policy_gradient_and_nothing_is_clipped(function):
    log_probs, _, advantages = case(4, 50)
    loss, clipped, grad = run(function, (log_probs, log_probs.clone(), advantages), 0.2, 0.2)
    assert torch.equal(loss, -advantages) and torch.equal(grad, -advantages) and not clipped.any()
    assert not run(function, (log_probs, log_probs.clone(), advantages), 0.0, 0.0)[1].any()


@pytest.mark.parametrize("function", [clipped_value_loss, value_reference])
def test_a_value_within_the_clip_range_is_never_called_clipped(function):
    old = randn(4000)
    values, returns = old + 0.19 * randn(4000, seed=1).tanh(), randn(4000, seed=2)
    assert not run(function, (values, old, returns), 0.2)[1].any()


def test_bitwise_the_same_for_any_split_thread_count_and_repetition():
    tensors = case(150_003)  # enough for several threads
    for function, options in BOTH:
        whole = run(function, tensors, *options)
        assert all(map(torch.equal, whole, run(function, tensors, *options)))
        two = with_threads(2, lambda f=function, o=options: run(f, tensors, *o))
        assert all(map(torch.equal, whole, two))
        for size in (13, 1000, 4096):
            chunks = zip(*(x[:8200].split(size) for x in tensors), strict=True)
            parts = zip(*(run(function, chunk, *options) for chunk in chunks), strict=True)
            assert all(torch.equal(w[:8200], torch.cat(p)) for w, p in zip(whole, parts, strict=True))


@pytest.mark.parametrize(("function", "options"), EVERY)
class TestBoth:
    @pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
    def test_empty_and_scalar(self, function, options, shape):
        loss, clipped, grad = run(function, case(*shape), *options)
        assert loss.shape == clipped.shape == grad.shape == shape

    def test_strides(self, function, options):
        first, second, third = case(6, 10)
        expected = run(function, (first, second, third), *options)
        wide = torch.zeros(6, 20)
        wide[:, ::2] = third
        got = run(function, (first.T.contiguous().T, second.T.contiguous().T, wide[:, ::2]), *options)
        assert all(map(torch.equal, got, expected))
        row = third[:1].expand(6, 10)
        assert all(
            map(
                torch.equal,
                run(function, (first, second, row), *options),
                run(function, (first, second, row.clone()), *options),
            )
        )

    def test_nan_and_infinity_stay_alone(self, function, options):
        tensors = case(20)
        expected = run(function, tensors, *options)
        tensors[0][3], tensors[2][5], tensors[0][7] = torch.nan, torch.nan, -torch.inf
        got = run(function, tensors, *options)
        assert got[0][3].isnan() and got[0][5].isnan()
        others = [i for i in range(20) if i not in (3, 5, 7)]
        assert all(torch.equal(a[others], b[others]) for a, b in zip(got, expected, strict=True))

    def test_autocast_and_mixed_dtypes(self, function, options):
        first, second, third = case(30)
        first = first.bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = function(first, second, third, *options)
            loss.sum().backward()
        assert loss.dtype == torch.float32 and first.grad.dtype == torch.bfloat16
        assert torch.equal(loss, function(first.detach().float(), second, third, *options)[0])
        assert function(first, second.double(), third, *options)[0].dtype == torch.float64
