"""What PyTorch asks of an operator, on the GPU: gradients, compilation, autocast, devices, streams, graphs, bits."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from gpu.cases import (
    EVERY,
    SMALL,
    Call,
    cotangents,
    make_cross_entropy,
    make_gae,
    make_linear,
    make_policy_loss,
    make_sampling,
    make_token_log_probs,
    make_value_loss,
    small,
)
from ops.support import needs_native, randn
from tolerances import TOLERANCE, assert_near

from rlhf_lightning.ops import extension

every = pytest.mark.parametrize("operator", EVERY)


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )


# ------------------------------------------------------------------ what was built

ALL = """
import sys
sys.path.insert(0, {tests!r})
from gpu.cases import small
for call in small():
    call.to({device!r}).run()
print("all native")
"""


def test_every_operator_has_its_kernel(device):
    if device.type == "cpu" and not extension.LOADED:
        pytest.skip(f"no native operators: {extension._REASON}")
    status = extension.status()
    assert {paths[device.type]["path"] for paths in status["operators"].values()} == {"native"}, status
    if device.type == "cuda":
        assert status["gpu"]["covered"], status


@needs_native
def test_native_makes_a_missing_kernel_an_error_and_none_is_missing(device):
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = python(ALL.format(tests=folder, device=device.type), RLHF_LIGHTNING_OPS="native")
    assert done.stdout == "all native\n", done.stderr


def test_the_calls_here_cover_every_operator():
    assert sorted(extension.OPERATORS) == EVERY


# ------------------------------------------------------------------ gradients, fakes, compilation


@every
def test_gradcheck(device, operator):
    call = {c.operator: c for c in small(torch.float64)}[operator].to(device)
    if not call.trained:
        return
    leaves = call.leaves()

    def function(*trained):
        outputs = call.outputs(*trained, *leaves[call.trained :])
        return [x for x in outputs if x.requires_grad]

    assert torch.autograd.gradcheck(function, leaves[: call.trained], nondet_tol=0.0)


@needs_native
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, operator, dtype):
    call = {c.operator: c for c in small(dtype)}[operator].to(device)
    # The public function tells it which gradients are needed.
    needed = (True, True) if operator == "linear_cross_entropy" else ()
    torch.library.opcheck(
        getattr(torch.ops.rlhf_lightning, operator).default,
        (*call.leaves(), *call.numbers, *needed),
        atol=TOLERANCE[dtype],
        rtol=TOLERANCE[dtype],
    )


def compiled_and_eager(call: Call, **options):
    def step(*tensors):
        return [2 * x if x.is_floating_point() else x for x in call.outputs(*tensors)]

    results = []
    for function in (torch.compile(step, fullgraph=True, **options), step):
        leaves = call.leaves()
        outputs = function(*leaves)
        with_grad = [x for x in outputs if x.requires_grad]
        grads = torch.autograd.grad([x.sum() for x in with_grad], leaves[: call.trained]) if with_grad else ()
        results.append([x.detach().cpu() for x in (*outputs, *grads)])
    return results


@every
def test_compiles_without_a_graph_break(device, operator):
    torch.compiler.reset()
    for actual, wanted in zip(*compiled_and_eager(SMALL[operator].to(device), backend="aot_eager"), strict=True):
        assert_near(actual, wanted, torch.float32)


@every
def test_compiles_with_inductor(gpu, operator):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("torch.compile's own backend needs triton, which is not installed")
    torch.compiler.reset()
    for actual, wanted in zip(*compiled_and_eager(SMALL[operator].to(gpu)), strict=True):
        assert_near(actual, wanted, torch.float32)


# ------------------------------------------------------------------ autocast, devices


@pytest.mark.parametrize("operator", ["linear_token_log_probs", "linear_cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_under_autocast(device, operator, dtype):
    hidden, weight, *rest = SMALL[operator].to(device).tensors
    mixed = Call(operator, (hidden.to(dtype), weight, *rest), (1.0,), 2)
    cast = Call(operator, (hidden.to(dtype), weight.to(dtype), *rest), (1.0,), 2)
    with torch.autocast(device.type, dtype=dtype):
        got = mixed.run()
    assert got[0].dtype == torch.float32 and got[-2].dtype == dtype and got[-1].dtype == torch.float32
    for actual, wanted in zip(got, cast.run(), strict=True):
        assert_near(actual.cpu(), wanted.float().cpu(), torch.float32 if actual.dtype == torch.float32 else dtype)


@every
def test_autocast_leaves_the_rest_alone(device, operator):
    if operator.startswith("linear"):
        return
    call = SMALL[operator].to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = call.run()
    assert all(map(torch.equal, got, call.run()))


@every
def test_the_tensors_gpu_is_used_and_not_the_current_one(gpu, operator):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    call = SMALL[operator]
    assert torch.cuda.current_device() == 0
    for actual, wanted in zip(call.to("cuda:1").run(), call.to("cuda:0").run(), strict=True):
        assert actual.device == torch.device("cuda:1")
        assert torch.equal(actual.cpu(), wanted.cpu())
    assert torch.cuda.current_device() == 0


@every
def test_tensors_of_two_devices_are_refused(gpu, operator):
    call = SMALL[operator].to(gpu)
    for place in range(1, len(call.tensors)):
        tensors = list(call.tensors)
        tensors[place] = tensors[place].cpu()
        with pytest.raises(ValueError, match=r"must be on the device of \w+, cuda:0, got cpu"):
            call.outputs(*tensors)


OUT_OF_RANGE = """
import torch
from rlhf_lightning import ops
tokens = torch.tensor([0, {token}, 1], device="cuda")
if {fused}:
    x = torch.ones(3, 4, device="cuda"), torch.ones(5, 4, device="cuda")
    ops.linear_token_log_probs(*x, tokens)
else:
    ops.token_log_probs(torch.ones(3, 5, device="cuda"), tokens)
torch.cuda.synchronize()
print("nothing was said")
"""


@pytest.mark.parametrize(("fused", "token"), [(False, 5), (True, -1)])
def test_a_token_outside_the_vocabulary_is_a_device_side_assertion(gpu, fused, token):
    done = python(OUT_OF_RANGE.format(fused=fused, token=token))
    assert done.returncode != 0 and done.stdout == ""
    assert "device-side assert" in done.stderr, done.stderr


# ------------------------------------------------------------------ streams and graphs


@every
def test_runs_on_the_current_stream(gpu, operator):
    """The inputs are written late on a side stream: a kernel on another one would read what was there before."""
    call = SMALL[operator].to(gpu)
    # Made beforehand: a copy from the CPU would wait for the sleep to end.
    upstream = cotangents([x for x in call.outputs(*call.leaves()) if x.requires_grad])
    expected = call.run(upstream)
    late = Call(operator, tuple(torch.zeros_like(x) for x in call.tensors), call.numbers, call.trained)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late.run(upstream)  # takes the stream's memory, which could wait too
        stream.synchronize()
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
        for place, tensor in zip(late.tensors, call.tensors, strict=True):
            place.copy_(tensor)
        got = late.run(upstream)
    assert not stream.query(), "nothing was left to wait for, so the test says nothing: sleep longer"
    stream.synchronize()
    assert all(map(torch.equal, got, expected))


@every
def test_is_captured_in_a_graph_and_replayed(gpu, operator):
    call = SMALL[operator].to(gpu)
    static = Call(operator, tuple(x.clone() for x in call.tensors), call.numbers, call.trained)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            static.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        leaves = static.leaves()
        outputs = static.outputs(*leaves)
        with_grad = [x for x in outputs if x.requires_grad]
        upstream = [torch.ones_like(x) for x in with_grad]
        grads = torch.autograd.grad(with_grad, leaves[: static.trained], upstream) if with_grad else ()
    other = tuple(x.flip(0) for x in call.tensors)
    for place, tensor in zip(static.tensors, other, strict=True):
        place.copy_(tensor)
    graph.replay()
    torch.cuda.synchronize()
    eager = Call(operator, other, call.numbers, call.trained)
    leaves = eager.leaves()
    expected = eager.outputs(*leaves)
    with_grad = [x for x in expected if x.requires_grad]
    ones = [torch.ones_like(x) for x in with_grad]
    by_hand = torch.autograd.grad(with_grad, leaves[: eager.trained], ones) if with_grad else ()
    for actual, wanted in zip((*outputs, *grads), (*expected, *by_hand), strict=True):
        assert torch.equal(actual.detach(), wanted.detach())


# ------------------------------------------------------------------ the same bits

LARGER = [
    make_gae(700, 515),
    make_token_log_probs(300, 5003),
    make_linear(300, 32, 5003),
    make_cross_entropy(300, 32, 5003),
    make_sampling(300, 5003),
    make_policy_loss(100_003),
    make_value_loss(100_003),
]


@pytest.mark.parametrize("call", LARGER, ids=lambda call: call.operator)
def test_a_repetition_gives_the_same_bits(device, call):
    call = call.to(device)
    first = call.run()
    busy = torch.randn(512, 512, device=device)
    for _ in range(3):
        busy = (busy @ busy).tanh()  # other work at hand, and other memory
        assert all(map(torch.equal, first, call.run()))


@pytest.mark.parametrize("sizes", [(1, 699), (16, 684), (100, 200, 400)])
def test_gae_is_the_same_bits_however_the_rows_are_split(device, sizes):
    call = LARGER[0].to(device)
    parts = [call.outputs(*part) for part in zip(*(x.split(list(sizes)) for x in call.tensors), strict=True)]
    for whole, split in zip(call.run(), zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(split))


@pytest.mark.parametrize("call", LARGER[-2:], ids=lambda call: call.operator)
@pytest.mark.parametrize("size", [1, 13, 4096, 50_001])
def test_the_losses_are_the_same_bits_however_they_are_split(device, call, size):
    call = call.to(device)
    whole = call.run()
    stop = min(100_003, 20 * size)
    upstream = randn(100_003, seed=90).to(device)
    losses, flags, grads = [], [], []
    for begin in range(0, stop, size):
        part = [x[begin : begin + size] for x in call.tensors]
        leaf = part[0].detach().requires_grad_()
        loss, clipped = call.outputs(leaf, *part[1:])
        grads += torch.autograd.grad(loss, leaf, upstream[begin : begin + size])
        losses.append(loss.detach())
        flags.append(clipped)
    for one, many in zip(whole, (losses, flags, grads), strict=True):
        many = torch.cat(many)
        assert torch.equal(one[: len(many)], many)
