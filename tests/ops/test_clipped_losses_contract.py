"""What torch asks of the clipped losses: gradients, compilation, messages for arguments that are refused."""

from __future__ import annotations

import pytest
import torch
from ops.clipped_losses import BOTH, EVERY, case, run
from ops.support import FLOATS, needs_native, randn, result_dtype
from tolerances import assert_near

from rlhf_lightning.ops import clipped_policy_loss, clipped_value_loss


def test_gradient_to_the_first_argument_alone():
    for function, options in EVERY:
        first, second, third = (x.requires_grad_() for x in case(5))
        loss, clipped = function(first, second, third, *options)
        loss.sum().backward()
        assert first.grad is not None and second.grad is None and third.grad is None
        assert not clipped.requires_grad


def test_gradcheck():
    tensors = [x.double() for x in case(40, seed=3)]
    first = tensors[0].requires_grad_()
    for function, options in EVERY:
        assert torch.autograd.gradcheck(lambda x, f=function, o=options: f(x, *tensors[1:], *o)[0], (first,))


@needs_native
@pytest.mark.parametrize(("function", "options"), BOTH)
def test_a_second_derivative_is_an_error_that_says_so(function, options):
    tensors = case(9)
    for weights in (None, torch.ones(9, requires_grad=True)):
        first = tensors[0].clone().requires_grad_()
        loss, _ = function(first, *tensors[1:], *options)
        total = (loss if weights is None else weights * loss).sum()
        with pytest.raises(
            NotImplementedError, match=f"{function.__name__}: gradients are first order, reverse mode only"
        ):
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
