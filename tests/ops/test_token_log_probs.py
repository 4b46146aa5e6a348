"""token_log_probs against sums written from the definition, in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.support import (
    FLOATS,
    SIZES,
    needs_compiler,
    needs_native,
    randint,
    randn,
    result_dtype,
    with_threads,
)
from tolerances import assert_error_within, assert_near

from rlhf_lightning.ops.token_log_probs import reference, token_log_probs

IMPLEMENTATIONS = [pytest.param(token_log_probs, id="dispatched"), pytest.param(reference, id="reference")]


def oracle(logits, tokens, temperature):
    """log_probs, entropy, and the two functions' gradients by logits, of a [N, V] case, row by row in Python floats."""
    log_probs, entropy, grad_log_probs, grad_entropy = [], [], [], []
    for row, token in zip(logits.tolist(), tokens.tolist(), strict=True):
        scaled = [x / temperature for x in row]
        top = max(scaled)
        log_z = top + math.log(math.fsum(math.exp(x - top) for x in scaled))
        log_p = [x - log_z for x in scaled]
        p = [math.exp(x) for x in log_p]
        h = -math.fsum(a * b for a, b in zip(p, log_p, strict=True) if a > 0)
        log_probs.append(log_p[token])
        entropy.append(h)
        grad_log_probs.append([((i == token) - p[i]) / temperature for i in range(len(p))])
        grad_entropy.append([-p[i] * (log_p[i] + h) / temperature if p[i] > 0 else 0.0 for i in range(len(p))])
    return [torch.tensor(x, dtype=torch.float64) for x in (log_probs, entropy, grad_log_probs, grad_entropy)]


def gradients(function, logits, tokens, temperature):
    logits = logits.detach().requires_grad_()
    log_probs, entropy = function(logits, tokens, temperature)
    (by_log_probs,) = torch.autograd.grad(log_probs.sum(), logits, retain_graph=True)
    (by_entropy,) = torch.autograd.grad(entropy.sum(), logits)
    return log_probs.detach(), entropy.detach(), by_log_probs, by_entropy


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_by_hand(function):
    # At temperature 2 the logits are 0, log 3: p = 1/4, 3/4; entropy = log 4 - 3/4 log 3.
    logits = torch.tensor([[0.0, 2 * math.log(3)]], requires_grad=True)
    log_probs, entropy = function(logits, torch.tensor([1]), 2.0)
    assert log_probs.item() == pytest.approx(math.log(0.75), rel=1e-6)
    assert entropy.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-6)
    log_probs.backward()
    assert logits.grad.tolist()[0] == pytest.approx([-0.125, 0.125])


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocabulary", [1, 7, 129, 1000])
def test_against_the_definition(function, dtype, vocabulary):
    logits, tokens = randn(5, vocabulary, dtype=dtype, scale=3.0), randint(vocabulary, 5)
    got = gradients(function, logits, tokens, 0.7)
    expected = oracle(logits.double(), tokens, 0.7)
    assert got[0].dtype == got[1].dtype == result_dtype(dtype)
    assert got[2].dtype == got[3].dtype == dtype
    for actual, truth in zip(got[:2], expected[:2], strict=True):
        assert_near(actual, truth, result_dtype(dtype))
    for actual, truth in zip(got[2:], expected[2:], strict=True):
        assert_near(actual, truth, dtype)


@needs_native
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 7, 129])
@pytest.mark.parametrize("vocabulary", [*SIZES, 5000])
def test_native_is_near_the_reference(dtype, rows, vocabulary):
    logits, tokens = randn(rows, vocabulary, dtype=dtype, scale=4.0), randint(vocabulary, rows)
    got, expected = (gradients(f, logits, tokens, 1.3) for f in (token_log_probs, reference))
    for actual, plain in zip(got[:2], expected[:2], strict=True):
        assert_near(actual, plain, result_dtype(dtype), times=2)
    for actual, plain in zip(got[2:], expected[2:], strict=True):
        assert_near(actual, plain, dtype)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_no_larger_than_torchs_own(dtype, scale, offset):
    logits, tokens = (randn(16, 3000, scale=scale) + offset).to(dtype), randint(3000, 16)
    exact = logits.double().requires_grad_()
    truth = torch.log_softmax(exact, -1)
    torchs = torch.log_softmax(logits.float(), -1)
    log_probs, entropy, grad, _ = gradients(token_log_probs, logits, tokens, 1.0)
    (true_grad,) = torch.autograd.grad(truth.gather(-1, tokens[:, None]).sum(), exact)
    torchs_grad = -torchs.exp()
    torchs_grad[torch.arange(16), tokens] += 1
    assert_error_within(
        log_probs, torchs.gather(-1, tokens[:, None])[:, 0], truth.gather(-1, tokens[:, None])[:, 0], torch.float32
    )
    true_entropy = -(truth.exp() * truth).sum(-1).detach()
    assert_error_within(entropy, -(torchs.exp() * torchs).sum(-1), true_entropy, torch.float32)
    assert_error_within(grad, torchs_grad.to(dtype), true_grad, dtype)


@settings(max_examples=60)
@given(
    vocabulary=st.integers(1, 300), temperature=st.floats(0.05, 20), scale=st.floats(0, 50), seed=st.integers(0, 2**40)
)
def test_properties(vocabulary, temperature, scale, seed):
    logits = randn(1, vocabulary, dtype=torch.float64, seed=seed, scale=scale)
    every = torch.arange(vocabulary)
    log_probs, entropy = token_log_probs(logits.expand(vocabulary, vocabulary), every, temperature)
    assert log_probs.exp().sum().item() == pytest.approx(1.0)
    assert entropy[0].item() == pytest.approx(-(log_probs.exp() * log_probs).sum().item(), abs=1e-9)
    assert -1e-9 <= entropy[0] <= math.log(vocabulary) + 1e-9
    shifted, _ = token_log_probs(logits.expand(vocabulary, vocabulary) + 5.0, every, temperature)
    assert_near(shifted, log_probs, torch.float64, times=1e3)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_impossible_tokens(function, dtype):
    logits = randn(3, 40, dtype=dtype)
    logits[:, ::3] = -torch.inf
    tokens = torch.tensor([0, 1, 2])  # the first is impossible
    log_probs, entropy, by_log_probs, by_entropy = gradients(function, logits, tokens, 0.9)
    possible = logits[0].isfinite()
    wanted = oracle(logits[:, possible].double(), torch.tensor([0, 0, 1]), 0.9)
    assert log_probs[0] == -torch.inf
    assert_near(log_probs[1:], wanted[0][1:], result_dtype(dtype))
    assert_near(entropy, wanted[1], result_dtype(dtype))
    assert_near(by_entropy[:, possible], wanted[3], dtype)
    assert (by_entropy[:, ~possible] == 0).all()
    assert (by_log_probs[1:, ~possible] == 0).all()
    assert by_log_probs.isfinite().all()


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [[-torch.inf] * 50, [torch.inf] + [0.0] * 49, [0.0] * 33 + [torch.nan] + [0.0] * 16])
def test_a_row_without_a_distribution_is_nan_and_alone(function, bad):
    good = randn(1, 50)
    logits, tokens = torch.cat([good, torch.tensor([bad]), good]), torch.tensor([3, 3, 3])
    for result in function(logits, tokens, 1.0):
        assert result[1].isnan()
        assert result[0].isfinite() and result[0] == result[2]


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_huge_logits_do_not_overflow(function):
    logits = torch.tensor([[3e38, -3e38, 3e38]])
    log_probs, entropy = function(logits, torch.tensor([0]), 1.0)
    assert log_probs.item() == pytest.approx(-math.log(2)) and entropy.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_strides_and_leading_dimensions(function):
    base = randn(4, 6, 2 * 33)
    tokens = randint(33, 4, 6)
    for logits in (
        base[:, :, ::2],  # gaps in the last dimension
        base[:, :, :33],  # rows further apart than they are long
        base[:, :, :33].transpose(0, 1).contiguous().transpose(0, 1),
        base[:1, :, :33].expand(4, 6, 33),
        base[:, :5, 33:],
    ):
        t = tokens[:, : logits.shape[1]]
        got = gradients(function, logits, t, 1.1)
        dense = gradients(
            function, logits.clone(memory_format=torch.contiguous_format).reshape(-1, 33), t.reshape(-1), 1.1
        )
        assert got[0].shape == t.shape
        for actual, wanted in zip(got, dense, strict=True):
            assert torch.equal(actual.reshape(wanted.shape), wanted)
    scalar = function(base[0, 0], torch.tensor(5), 1.0)
    assert scalar[0].shape == scalar[1].shape == ()


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_empty(function, shape):
    logits = torch.empty(*shape, 9, requires_grad=True)
    log_probs, entropy = function(logits, torch.empty(shape, dtype=torch.int64), 1.0)
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.shape == entropy.shape == shape and logits.grad.shape == logits.shape


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_gradcheck_of_both_outputs(function):
    logits, tokens = randn(3, 7, dtype=torch.float64).requires_grad_(), randint(7, 3)
    assert torch.autograd.gradcheck(lambda x: function(x, tokens, 0.7), (logits,))


def test_bitwise_the_same_for_any_thread_count_and_repetition():
    logits, tokens = randn(37, 3001), randint(3001, 37)
    first = gradients(token_log_probs, logits, tokens, 0.8)
    again = gradients(token_log_probs, logits, tokens, 0.8)
    two = with_threads(2, lambda: gradients(token_log_probs, logits, tokens, 0.8))
    for a, b, c in zip(first, again, two, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_autocast(function):
    logits, tokens = randn(4, 20, dtype=torch.bfloat16).requires_grad_(), randint(20, 4)
    expected = function(logits, tokens, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = function(logits, tokens, 1.0)
        sum(x.sum() for x in got).backward()
    for actual, wanted in zip(got, expected, strict=True):
        assert actual.dtype == torch.float32
        assert_near(actual, wanted, torch.float32)
    assert logits.grad.dtype == torch.bfloat16


ERRORS = [
    (
        dict(logits=torch.zeros(2, 3, dtype=torch.int64)),
        TypeError,
        "token_log_probs: logits must be a float32, bfloat16, float16 or float64 tensor, got int64",
    ),
    (
        dict(tokens=torch.zeros(2, dtype=torch.int32)),
        TypeError,
        "token_log_probs: tokens must be an int64 tensor, got int32",
    ),
    (
        dict(logits=torch.zeros(2, 0)),
        ValueError,
        "token_log_probs: logits must have shape [..., V] with V > 0, got shape [2, 0]",
    ),
    (
        dict(tokens=torch.zeros(3, dtype=torch.int64)),
        ValueError,
        "token_log_probs: tokens must have the shape of logits without its last dimension, [2], got shape [3]",
    ),
    (
        dict(tokens=torch.zeros(2, dtype=torch.int64, device="meta")),
        ValueError,
        "token_log_probs: tokens must be on the device of logits, cpu, got meta",
    ),
    (dict(temperature=0.0), ValueError, "token_log_probs: temperature must be a number in [1e-12, 1e12], got 0"),
    (dict(temperature=None), TypeError, "token_log_probs: temperature must be a number in [1e-12, 1e12], got NoneType"),
    (dict(tokens=torch.tensor([0, 3])), ValueError, "token_log_probs: tokens must be in [0, 3), got 3"),
    (dict(tokens=torch.tensor([-1, 0])), ValueError, "token_log_probs: tokens must be in [0, 3), got -1"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[e[2][17:50] for e in ERRORS])
def test_wrong_arguments(change, kind, message):
    good = dict(logits=torch.zeros(2, 3), tokens=torch.zeros(2, dtype=torch.int64), temperature=1.0)
    with pytest.raises(kind) as caught:
        token_log_probs(**{**good, **change})
    assert str(caught.value) == message


@pytest.mark.parametrize("token", [-1, 3])
def test_the_reference_refuses_the_same_tokens(token):
    with pytest.raises(ValueError, match=r"token_log_probs: tokens must be in \[0, 3\), got"):
        reference(torch.zeros(1, 3), torch.tensor([token]), 1.0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    logits, tokens = randn(2, 3, 9, dtype=dtype).requires_grad_(), randint(9, 2, 3)
    torch.library.opcheck(torch.ops.rlhf_lightning.token_log_probs.default, (logits, tokens, 0.9))


@needs_native
@needs_compiler
def test_compiles_whole():
    logits, tokens = randn(3, 9), randint(9, 3)

    def loss(x):
        log_probs, entropy = token_log_probs(x, tokens, 0.9)
        return (log_probs + 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True)
    got, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    compiled(got).backward()
    loss(expected).backward()
    assert_near(got.grad, expected.grad, torch.float32)


LOWER_CODE = """
import torch
from rlhf_lightning.ops import extension
from rlhf_lightning.ops.token_log_probs import reference, token_log_probs
assert extension.build_info()["cpu_instruction_set_in_use"] == "{name}", extension.build_info()
torch.manual_seed(0)
for dtype, slack in {{torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-12}}.items():
    x = (4 * torch.randn(9, 1003)).to(dtype)
    x[0, ::5] = -torch.inf
    x[1] *= 1e-7  # 16-bit subnormals among the gradients
    y = torch.randint(1003, (9,)) // 5 * 5 + 1
    results = []
    for f in (token_log_probs, reference):
        z = x.clone().requires_grad_()
        a, e = f(z, y, 1.2)
        (a + 0.3 * e).sum().backward()
        results.append((a.detach(), e.detach(), z.grad))
    for k, (got, expected) in enumerate(zip(*results)):
        limit = slack if k == 2 or dtype == torch.float64 else 6e-6
        torch.testing.assert_close(got, expected, rtol=limit, atol=limit)
"""


@needs_native
@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_lower_instruction_sets(name):
    """ATEN_CPU_CAPABILITY lowers torch's kernels and these alike: what an older machine would run."""
    runnable = {"AVX512": ("avx2", "avx512"), "AVX2": ("avx2",)}.get(torch.backends.cpu.get_cpu_capability(), ())
    if name not in ("baseline", *runnable):
        pytest.skip(f"this machine has no {name}")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default" if name == "baseline" else name}
    subprocess.run([sys.executable, "-c", LOWER_CODE.format(name=name)], env=environment, check=True, timeout=120)


THREADS_CODE = """
import os, torch
from rlhf_lightning.ops import token_log_probs
torch.set_num_threads({count})
before = len(os.listdir("/proc/self/task"))
x = torch.zeros(64, 5000).requires_grad_()
torch.ops.rlhf_lightning.token_log_probs(x.detach(), torch.zeros(64, dtype=torch.int64), 1.0)
print(len(os.listdir("/proc/self/task")) - before)
"""


@needs_native
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux shows them")
@pytest.mark.parametrize("count", [1, 3])
def test_as_many_threads_as_torch_is_told(count):
    code, environment = THREADS_CODE.format(count=count), {**os.environ, "OMP_NUM_THREADS": "4"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, timeout=120)
    assert int(result.stdout) == count - 1  # the calling thread is one of them


@needs_native
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_gradient_so_large_that_it_is_written_past_the_caches(dtype):
    """The second result takes the memory of the first, is streamed, and has rows that start at any address."""
    vocabulary = (1 << 24) // dtype.itemsize // 16 - 3
    logits, tokens = randn(17, vocabulary, dtype=dtype, scale=3.0), randint(vocabulary, 17)
    fresh = gradients(token_log_probs, logits, tokens, 0.9)[2:]
    copies = [x.clone() for x in fresh]
    del fresh
    for _ in range(2):
        again = gradients(token_log_probs, logits, tokens, 0.9)[2:]
        assert all(map(torch.equal, again, copies))
        del again
    assert_near(copies[0], gradients(reference, logits.double(), tokens, 0.9)[2], dtype)


@pytest.mark.parametrize("temperature", [1e-3, 0.3, 7.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_at_any_temperature_is_no_larger_than_torchs_own(dtype, temperature):
    logits, tokens = (randn(16, 3000, scale=8.0) + 40).to(dtype), randint(3000, 16)
    logits[3, ::2] = -torch.inf
    tokens[3] = 1
    results = []
    for x in (logits.double(), logits.float()):
        x.requires_grad_()
        table = torch.log_softmax(x / temperature, -1)
        table.gather(-1, tokens[:, None]).sum().backward()
        finite = table.detach().masked_fill(table == -torch.inf, 0.0)
        results.append((table.detach().gather(-1, tokens[:, None])[:, 0], -(finite.exp() * finite).sum(-1), x.grad))
    # masked entries count 0 * exp(0) = 0 in the entropy
    truth, torchs = results
    got = gradients(token_log_probs, logits, tokens, temperature)
    assert_error_within(got[0], torchs[0], truth[0], torch.float32)
    assert_error_within(got[1], torchs[1], truth[1], torch.float32)
    assert_error_within(got[2] * temperature, (torchs[2] * temperature).to(dtype), truth[2] * temperature, dtype)


def test_agrees_with_cross_entropy():
    logits, tokens = randn(11, 257, scale=2.0), randint(257, 11)
    assert_near(-token_log_probs(logits, tokens)[0].mean(), F.cross_entropy(logits, tokens), torch.float32)
