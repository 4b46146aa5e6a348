"""clipped_policy_loss and clipped_value_loss against the formulas, token by token in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


def run(function, tensors, *options):
    first = tensors[0].detach().requires_grad_()
    loss, clipped = function(first, *tensors[1:], *options)
    (grad,) = torch.autograd.grad(loss.sum(), first)
    return loss.detach(), clipped, grad


def case(*shape, dtype=torch.float32, spread=0.4, seed=0):
    first = randn(*shape, dtype=torch.float64, seed=seed)
    second = first + spread * randn(*shape, dtype=torch.float64, seed=seed + 1)
    return first.to(dtype), second.to(dtype), randn(*shape, dtype=dtype, seed=seed + 2)


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
    for native, plain, options in (
        (clipped_policy_loss, policy_reference, (0.2, 0.2, 2.0)),
        (clipped_value_loss, value_reference, (0.2,)),
    ):
        for actual, wanted in zip(run(native, tensors, *options), run(plain, tensors, *options), strict=True):
            assert_near(actual, wanted, result_dtype(dtype))


@settings(max_examples=100, deadline=None)
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


def test_gradient_to_the_first_argument_alone():
    for function, options in (
        (clipped_policy_loss, (0.2, 0.2)),
        (policy_reference, (0.2, 0.2)),
        (clipped_value_loss, (0.2,)),
        (value_reference, (0.2,)),
    ):
        first, second, third = (x.requires_grad_() for x in case(5))
        loss, clipped = function(first, second, third, *options)
        loss.sum().backward()
        assert first.grad is not None and second.grad is None and third.grad is None
        assert not clipped.requires_grad


def test_gradcheck():
    tensors = [x.double() for x in case(40, seed=3)]
    first = tensors[0].requires_grad_()
    for function, options in (
        (clipped_policy_loss, (0.2, 0.2, 1.2)),
        (policy_reference, (0.2, 0.2, 1.2)),
        (clipped_value_loss, (0.2,)),
        (value_reference, (0.2,)),
    ):
        assert torch.autograd.gradcheck(lambda x, f=function, o=options: f(x, *tensors[1:], *o)[0], (first,))


BOTH = [(clipped_policy_loss, (0.2, 0.2, 1.5)), (clipped_value_loss, (0.2,))]


@needs_native
@pytest.mark.parametrize(("function", "options"), BOTH)
def test_a_second_derivative_is_an_error_that_says_so(function, options):
    tensors = case(9)
    for weights in (None, torch.ones(9, requires_grad=True)):
        first = tensors[0].clone().requires_grad_()
        loss, _ = function(first, *tensors[1:], *options)
        total = (loss if weights is None else weights * loss).sum()
        with pytest.raises(NotImplementedError, match=f"{function.__name__}: gradients are first order only"):
            torch.autograd.grad(total, first, create_graph=True)


@needs_native
@pytest.mark.parametrize(("function", "options"), BOTH)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_kind_of_incoming_gradient(function, options, dtype):
    tensors = case(6, 37, dtype=dtype)
    kind = result_dtype(dtype)
    slope = run(function, tensors, *options)[2].double()
    for incoming in (
        torch.tensor(0.25, dtype=kind).expand(6, 37),  # as from a mean
        randn(6, 37, dtype=kind, seed=5),
        randn(37, 6, dtype=kind, seed=5).T,
        randn(6, 1, dtype=kind, seed=5).expand(6, 37),
        randn(37, dtype=kind, seed=5).expand(6, 37),
    ):
        first = tensors[0].clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(first, *tensors[1:], *options)[0], first, incoming)
        assert grad.dtype == dtype and grad.is_contiguous()
        assert_near(grad, slope * incoming.double(), dtype, times=2)  # the slope itself was rounded


@needs_native
@pytest.mark.parametrize(("function", "options"), BOTH)
def test_the_input_may_be_overwritten_after_the_call_and_is_needed_once(function, options):
    tensors = case(9)
    first = tensors[0].clone().requires_grad_()
    moved = first * 1
    loss, _ = function(moved, *tensors[1:], *options)
    with torch.no_grad():
        moved.zero_()
    loss.sum().backward()
    assert torch.equal(first.grad, run(function, tensors, *options)[2])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.sum().backward()


@needs_native
def test_opcheck_of_the_gradient():
    grad, slope = randn(3, 7), randn(3, 7, seed=1)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.library.opcheck(torch.ops.rlhf_lightning.clipped_loss_backward.default, (grad, slope, dtype))
    with pytest.raises(ValueError, match=r"clipped_loss_backward: grad_loss must have the shape of slope, \[3, 7\]"):
        torch.ops.rlhf_lightning.clipped_loss_backward(grad[:2], slope, torch.float32)


def test_bitwise_the_same_for_any_split_thread_count_and_repetition():
    tensors = case(150_003)  # enough for several threads
    for function, options in ((clipped_policy_loss, (0.2, 0.2, 2.0)), (clipped_value_loss, (0.2,))):
        whole = run(function, tensors, *options)
        assert all(map(torch.equal, whole, run(function, tensors, *options)))
        two = with_threads(2, lambda f=function, o=options: run(f, tensors, *o))
        assert all(map(torch.equal, whole, two))
        for size in (13, 1000, 4096):
            chunks = zip(*(x[:8200].split(size) for x in tensors), strict=True)
            parts = zip(*(run(function, chunk, *options) for chunk in chunks), strict=True)
            assert all(torch.equal(w[:8200], torch.cat(p)) for w, p in zip(whole, parts, strict=True))


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (clipped_policy_loss, (0.2, 0.2)),
        (policy_reference, (0.2, 0.2)),
        (clipped_value_loss, (0.2,)),
        (value_reference, (0.2,)),
    ],
)
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


ERRORS = [
    (
        clipped_policy_loss,
        dict(advantages=torch.zeros(3, dtype=torch.bool)),
        TypeError,
        "clipped_policy_loss: advantages must be a float32, bfloat16, float16 or float64 tensor, got bool",
    ),
    (
        clipped_policy_loss,
        dict(old_log_probs=torch.zeros(2)),
        ValueError,
        "clipped_policy_loss: old_log_probs must have the shape of log_probs, [3], got shape [2]",
    ),
    (
        clipped_policy_loss,
        dict(advantages=torch.zeros(3, device="meta")),
        ValueError,
        "clipped_policy_loss: advantages must be on the device of log_probs, cpu, got meta",
    ),
    (
        clipped_policy_loss,
        dict(clip_low=1.1),
        ValueError,
        "clipped_policy_loss: clip_low must be a number in [0, 1], got 1.1",
    ),
    (
        clipped_policy_loss,
        dict(clip_high=-0.1),
        ValueError,
        "clipped_policy_loss: clip_high must be a number of at least 0, got -0.1",
    ),
    (
        clipped_policy_loss,
        dict(dual_clip=1.0),
        ValueError,
        "clipped_policy_loss: dual_clip must be None or a number above 1, got 1.0",
    ),
    (
        clipped_value_loss,
        dict(values=None),
        TypeError,
        "clipped_value_loss: values must be a float32, bfloat16, float16 or float64 tensor, got NoneType",
    ),
    (
        clipped_value_loss,
        dict(returns=torch.zeros(3, 1)),
        ValueError,
        "clipped_value_loss: returns must have the shape of values, [3], got shape [3, 1]",
    ),
    (
        clipped_value_loss,
        dict(old_values=torch.zeros(3, device="meta")),
        ValueError,
        "clipped_value_loss: old_values must be on the device of values, cpu, got meta",
    ),
    (
        clipped_value_loss,
        dict(clip=0),
        ValueError,
        "clipped_value_loss: clip must be None or a positive number, got 0",
    ),
]


@pytest.mark.parametrize(("function", "change", "kind", "message"), ERRORS, ids=[e[3][:45] for e in ERRORS])
def test_wrong_arguments(function, change, kind, message):
    zeros = torch.zeros(3)
    good = {
        clipped_policy_loss: dict(
            log_probs=zeros, old_log_probs=zeros, advantages=zeros, clip_low=0.2, clip_high=0.2, dual_clip=None
        ),
        clipped_value_loss: dict(values=zeros, old_values=zeros, returns=zeros, clip=0.2),
    }[function]
    with pytest.raises(kind) as caught:
        function(**{**good, **change})
    assert str(caught.value) == message


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    first, second, third = case(3, 7, dtype=dtype)
    first.requires_grad_()
    torch.library.opcheck(torch.ops.rlhf_lightning.clipped_policy_loss.default, (first, second, third, 0.2, 0.2, 2.0))
    torch.library.opcheck(torch.ops.rlhf_lightning.clipped_value_loss.default, (first, second, third, None))


@needs_native
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_whole(dtype, dynamic):
    first, second, third = case(3, 7, dtype=dtype)

    def loss(x):
        policy, clipped = clipped_policy_loss(x, second, third, 0.2, 0.2)
        value, _ = clipped_value_loss(x, second, third, 0.2)
        return (policy + value + clipped.float()).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)):
        x = first.clone().requires_grad_()
        function(x).backward()
        results.append(x.grad)
    assert_near(results[1], results[0], dtype)
