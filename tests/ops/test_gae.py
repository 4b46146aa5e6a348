"""gae against sums written from the definition, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.support import FLOATS, SIZES, needs_native, randn, result_dtype, with_threads
from tolerances import assert_near

from rlhf_lightning.ops.gae import gae, reference

IMPLEMENTATIONS = [pytest.param(gae, id="dispatched"), pytest.param(reference, id="reference")]


def oracle(rewards, values, mask, gamma, lam):
    """Equation 16 of the paper as a double sum over each row's counted steps, in Python floats."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    returns = torch.zeros(rewards.shape, dtype=torch.float64)
    for b in range(rewards.shape[0]):
        steps = [t for t in range(rewards.shape[1]) if mask[b, t]]
        r = [float(rewards[b, t]) for t in steps]
        v = [float(values[b, t]) for t in steps] + [0.0]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(steps))]
        for i, t in enumerate(steps):
            advantage = math.fsum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(steps)))
            advantages[b, t], returns[b, t] = advantage, advantage + v[i]
    return advantages, returns


def case(rows, steps, dtype=torch.float32, seed=0):
    mask = randn(rows, steps, seed=seed + 2) > -0.8  # holes
    return randn(rows, steps, dtype=dtype, seed=seed), randn(rows, steps, dtype=dtype, seed=seed + 1), mask


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_by_hand(function):
    # delta = [1 + 0.5*4 - 2, 3 - 4] = [1, -1]; advantages = [1 + 0.25 * -1, -1]; the hole between them is not a step.
    advantages, returns = function(
        torch.tensor([[1.0, 99.0, 3.0, 99.0]]),
        torch.tensor([[2.0, 99.0, 4.0, 99.0]]),
        torch.tensor([[True, False, True, False]]),
        0.5,
        0.5,
    )
    assert advantages.tolist() == [[0.75, 0.0, -1.0, 0.0]]
    assert returns.tolist() == [[2.75, 0.0, 3.0, 0.0]]


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("steps", [1, 7, 129])
def test_against_the_definition(function, dtype, steps):
    inputs = case(5, steps, dtype)
    got, expected = function(*inputs, 0.99, 0.95), oracle(*inputs, 0.99, 0.95)
    for actual, truth in zip(got, expected, strict=True):
        assert actual.dtype == result_dtype(dtype)
        assert_near(actual, truth, result_dtype(dtype))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 20), steps=st.integers(1, 70), gamma=st.floats(0, 1), lam=st.floats(0, 1), seed=st.integers(0)
)
def test_any_shape_and_discount(rows, steps, gamma, lam, seed):
    inputs = case(rows, steps, torch.float64, seed % 2**40)
    for actual, truth in zip(gae(*inputs, gamma, lam), oracle(*inputs, gamma, lam), strict=True):
        assert_near(actual, truth, torch.float64)


@needs_native
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_native_is_the_reference_bit_for_bit(dtype, size):
    inputs = case(3, size, dtype)
    for native, plain in zip(gae(*inputs, 0.97, 0.9), reference(*inputs, 0.97, 0.9), strict=True):
        assert torch.equal(native, plain)


def recursion(rewards, values, mask, gamma, lam):
    """The definition step by step in Python floats, for rows too long for the double sum."""
    results = torch.zeros(2, *rewards.shape, dtype=torch.float64)
    for b, row in enumerate(zip(rewards.tolist(), values.tolist(), mask.tolist(), strict=True)):
        next_value = next_advantage = 0.0
        for t, (reward, value, counted) in reversed(list(enumerate(zip(*row, strict=True)))):
            if counted:
                next_advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
                next_value = value
                results[0, b, t], results[1, b, t] = next_advantage, next_advantage + value
    return results


def long_case(rows, steps, dtype=torch.float32):
    rewards, values, mask = case(rows, steps, dtype)
    mask[0, steps // 3 : 2 * steps // 3] = False  # longer than any piece that a row is cut into
    mask[-1, -700:] = False
    return rewards, values, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "steps"), [(1, 4096), (1, 4097), (3, 5000), (2, 9728), (18, 4609)])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.999, 0.99), (1.0, 0.0)])
def test_long_rows_against_the_definition(dtype, rows, steps, gamma, lam):
    inputs = long_case(rows, steps, dtype)
    for actual, truth in zip(gae(*inputs, gamma, lam), recursion(*inputs, gamma, lam), strict=True):
        assert_near(actual, truth, dtype, times=40)  # sums of thousands of terms
        assert (actual[~inputs[2]] == 0).all()


def test_long_rows_are_bitwise_the_same_for_any_split_and_thread_count():
    rewards, values, mask = inputs = long_case(5, 9000)
    whole = gae(*inputs, 0.999, 0.99)
    assert all(map(torch.equal, whole, with_threads(2, lambda: gae(*inputs, 0.999, 0.99))))
    for row in range(5):
        alone = gae(*(x[row : row + 1] for x in inputs), 0.999, 0.99)
        assert all(torch.equal(w[row : row + 1], a) for w, a in zip(whole, alone, strict=True))
    bad = [torch.where(mask, x, torch.nan) for x in (rewards, values)]
    assert all(map(torch.equal, whole, gae(*bad, mask, 0.999, 0.99)))


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_one_step_and_whole_sum_limits(function):
    rewards, values, _ = case(2, 9, torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    advantages, _ = function(rewards, values, mask, 1.0, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros(2, 1)], 1)
    assert_near(advantages, rewards + following - values, torch.float64)
    _, returns = function(rewards, values, mask, 1.0, 1.0)
    assert_near(returns, rewards.flip(1).cumsum(1).flip(1), torch.float64)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_false_slots_are_ignored_even_nan_and_give_exact_zero(function):
    rewards, values, mask = case(4, 33)
    expected = function(rewards, values, mask, 0.9, 0.8)
    bad = torch.full_like(rewards, torch.nan)
    bad[:, ::2] = torch.inf
    got = function(torch.where(mask, rewards, bad), torch.where(mask, values, bad), mask, 0.9, 0.8)
    for actual, wanted in zip(got, expected, strict=True):
        assert torch.equal(actual, wanted)
        assert (actual[~mask] == 0).all()


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(function, shape):
    empty = torch.empty(shape)
    for result in function(empty, empty, torch.empty(shape, dtype=torch.bool), 0.9, 0.9):
        assert result.shape == shape


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_all_masked(function):
    nan = torch.full((2, 5), torch.nan)
    for result in function(nan, nan, torch.zeros(2, 5, dtype=torch.bool), 0.9, 0.9):
        assert torch.equal(result, torch.zeros(2, 5))


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_strides(function):
    rewards, values, mask = case(6, 10)
    expected = function(rewards, values, mask, 0.9, 0.8)
    wide = torch.zeros(6, 20)
    wide[:, ::2] = values
    got = function(rewards.T.contiguous().T, wide[:, ::2], mask.T.contiguous().T, 0.9, 0.8)
    for actual, wanted in zip(got, expected, strict=True):
        assert torch.equal(actual, wanted)
    row = rewards[:1].expand(6, 10)
    for actual, wanted in zip(
        function(row, values, mask, 0.9, 0.8), function(row.clone(), values, mask, 0.9, 0.8), strict=True
    ):
        assert torch.equal(actual, wanted)


def test_bitwise_the_same_for_any_split_thread_count_and_repetition():
    inputs = case(37, 65)
    whole = gae(*inputs, 0.99, 0.95)
    for _ in range(3):
        assert all(map(torch.equal, whole, gae(*inputs, 0.99, 0.95)))
    assert all(map(torch.equal, whole, with_threads(2, lambda: gae(*inputs, 0.99, 0.95))))
    for size in (1, 5, 16):
        parts = [gae(*chunk, 0.99, 0.95) for chunk in zip(*(x.split(size) for x in inputs), strict=True)]
        assert all(torch.equal(w, torch.cat(p)) for w, p in zip(whole, zip(*parts, strict=True), strict=True))


@needs_native
@pytest.mark.parametrize(("rows", "steps"), [(2048, 2048), (2048, 2053), (512, 8208)])
def test_large_results_are_bitwise_those_of_small_parts(rows, steps):
    inputs = case(rows, steps)
    parts = [gae(*chunk, 0.99, 0.95) for chunk in zip(*(x.chunk(4) for x in inputs), strict=True)]
    expected = [torch.cat(p) for p in zip(*parts, strict=True)]
    for _ in range(2):  # the second time into the memory of the first, past the caches
        assert all(map(torch.equal, gae(*inputs, 0.99, 0.95), expected))


def test_no_gradient():
    rewards, values, mask = case(2, 4)
    for function in (gae, reference):
        for result in function(rewards.requires_grad_(), values.requires_grad_(), mask, 0.9, 0.9):
            assert not result.requires_grad


def test_mixed_dtypes():
    rewards, values, mask = case(2, 8)
    got = gae(rewards.bfloat16(), values, mask, 0.9, 0.9)
    expected = gae(rewards.bfloat16().float(), values, mask, 0.9, 0.9)
    assert all(map(torch.equal, got, expected))
    assert gae(rewards.double(), values, mask, 0.9, 0.9)[0].dtype == torch.float64


ERRORS = [
    (dict(rewards=[1.0]), TypeError, "gae: rewards must be a float32, bfloat16, float16 or float64 tensor, got list"),
    (
        dict(values=torch.zeros(2, 3, dtype=torch.int32)),
        TypeError,
        "gae: values must be a float32, bfloat16, float16 or float64 tensor, got int32",
    ),
    (dict(mask=torch.ones(2, 3)), TypeError, "gae: mask must be a bool tensor, got float32"),
    (dict(rewards=torch.zeros(6)), ValueError, "gae: rewards must have 2 dimensions [B, T], got shape [6]"),
    (
        dict(values=torch.zeros(2, 4)),
        ValueError,
        "gae: values must have the shape of rewards, [2, 3], got shape [2, 4]",
    ),
    (
        dict(mask=torch.ones(2, 3, dtype=torch.bool, device="meta")),
        ValueError,
        "gae: mask must be on the device of rewards, cpu, got meta",
    ),
    (dict(gamma=1.5), ValueError, "gae: gamma must be a number in [0, 1], got 1.5"),
    (dict(lam=math.nan), ValueError, "gae: lam must be a number in [0, 1], got nan"),
    (dict(lam="1"), TypeError, "gae: lam must be a number in [0, 1], got str"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[e[2][5:40] for e in ERRORS])
def test_wrong_arguments(change, kind, message):
    good = dict(
        rewards=torch.zeros(2, 3), values=torch.zeros(2, 3), mask=torch.ones(2, 3, dtype=torch.bool), gamma=0.9, lam=0.9
    )
    with pytest.raises(kind) as caught:
        gae(**{**good, **change})
    assert str(caught.value) == message


@needs_native
def test_the_library_itself_gives_the_same_messages():
    zeros, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for arguments, kind, message in [
        ((zeros.int(), zeros, mask), TypeError, "gae: rewards must be a float32, bfloat16, float16 or float64 tensor"),
        ((zeros, zeros, zeros), TypeError, "gae: mask must be a bool tensor, got float32"),
        ((zeros, zeros[:1], mask), ValueError, "gae: values must have the shape of rewards, [2, 3], got shape [1, 3]"),
    ]:
        with pytest.raises(kind) as caught:
            torch.ops.rlhf_lightning.gae(*arguments, 0.9, 0.9)
        assert message in str(caught.value)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    rewards, values, mask = case(3, 7, dtype)
    torch.library.opcheck(torch.ops.rlhf_lightning.gae.default, (rewards, values, mask, 0.9, 0.9))


@needs_native
def test_compiles_whole():
    inputs = case(3, 7)
    compiled = torch.compile(lambda r, v, m: gae(r, v, m, 0.9, 0.9)[0] * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), gae(*inputs, 0.9, 0.9)[0] * 2)
