"""How many kernels a clipped loss is made of: one each way, and nothing else, for dense inputs of one dtype."""

from __future__ import annotations

import pytest
import torch
from gpu.cases import make_policy_loss, make_value_loss, result
from gpu.launches import OURS, launched
from ops.support import FLOATS

losses = pytest.mark.parametrize("make", [make_policy_loss, make_value_loss], ids=["policy", "value"])
dtypes = pytest.mark.parametrize("dtype", FLOATS)


@pytest.fixture(autouse=True)
def awake(gpu):
    """The first profile of a process may come too late for its first kernels."""
    launched(lambda: torch.ones(8, device=gpu).add_(1))


def test_what_torch_launches_is_seen(gpu):
    """Else the tests below could not fail by a copy too many."""
    x = torch.ones(64, 64, device=gpu)
    assert len(launched(lambda: x + 1)) == 1
    assert [name for name in launched(lambda: x.T.contiguous()) if "copy" in name.lower()]
    assert len(launched(lambda: x.to(torch.bfloat16).float())) == 2


@losses
@dtypes
@pytest.mark.parametrize("size", [1, 1027, 100_003])
def test_forward_is_one_launch(gpu, make, dtype, size):
    call = make(size, dtype=dtype).to(gpu)
    call.run()
    leaves = call.leaves()
    names = launched(lambda: call.outputs(*leaves))
    assert len(names) == 1 and OURS in names[0], names


@losses
@dtypes
@pytest.mark.parametrize("expanded", [False, True], ids=["dense", "expanded"])
def test_backward_is_one_launch(gpu, make, dtype, expanded):
    """Also of the gradient that ``.sum()`` hands back, one number for all: it is not written out first."""
    call = make(1027, dtype=dtype).to(gpu)
    call.run()
    leaves = call.leaves()
    loss = call.outputs(*leaves)[0]
    weights = torch.full((), 0.25, dtype=result(dtype), device=gpu).expand(1027)
    weights = weights if expanded else weights.contiguous()
    names = launched(lambda: torch.autograd.grad(loss, leaves[0], weights))
    assert len(names) == 1 and OURS in names[0], names


@losses
@dtypes
@pytest.mark.parametrize("reduction", [torch.sum, torch.mean], ids=["sum", "mean"])
def test_backward_through_a_reduction_adds_only_what_torch_does_for_it(gpu, make, dtype, reduction):
    """torch itself fills a one and divides it for the mean; copies and casts would be ours."""
    call = make(1027, dtype=dtype).to(gpu)
    call.run()
    leaves = call.leaves()
    total = reduction(call.outputs(*leaves)[0])
    names = launched(lambda: torch.autograd.grad(total, leaves[0]))
    assert sum(OURS in name for name in names) == 1, names
    assert not [name for name in names if "copy" in name.lower() or "memcpy" in name.lower()], names
