"""Every operator against its definition in float64, over dtypes, sizes and awkward inputs, on the GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from gpu import oracles
from gpu.cases import (
    EVERY,
    SMALL,
    Call,
    cotangents,
    make_cross_entropy,
    make_gae,
    make_linear,
    make_policy_loss,
    make_token_log_probs,
    make_value_loss,
    result,
)
from ops.support import FLOATS, randint, randn
from tolerances import TOLERANCE, assert_error_within, assert_gradient_near, assert_near

from rlhf_lightning.ops.gae import reference as gae_reference

# Around the sizes of vectors, warps, blocks and tiles; the last are those of real models.
VOCABULARIES = [1, 2, 7, 8, 33, 129, 1000, 1024, 4099, 50257, 128256]


def outputs_and_grads(call: Call, device) -> list[torch.Tensor]:
    return [x.cpu() for x in call.to(device).run()]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("rows", "steps"), [(1, 1), (1, 7), (5, 31), (3, 32), (4, 33), (2, 129), (65, 257), (3, 1024), (2, 4097)]
)
@pytest.mark.parametrize("holes", [False, True])
def test_gae(device, dtype, rows, steps, holes):
    call = make_gae(rows, steps, dtype, holes)
    got, truth = outputs_and_grads(call, device), oracles.gae(*call.tensors, *call.numbers)
    plain = gae_reference(*call.tensors, *call.numbers)
    for actual, torchs, wanted in zip(got, plain, truth, strict=True):
        assert actual.dtype == result(dtype)
        assert_error_within(actual, torchs, wanted, result(dtype))
        assert (actual[~call.tensors[2]] == 0).all()


def test_gae_of_one_long_row(device):
    test_gae(device, torch.float32, 1, 32768, True)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.9, 0.5)])
def test_gae_at_the_limits_of_its_numbers(device, gamma, lam):
    tensors = make_gae(6, 300, torch.float64).tensors
    got = outputs_and_grads(Call("gae", tensors, (gamma, lam), 0), device)
    for actual, wanted in zip(got, oracles.gae(*tensors, gamma, lam), strict=True):
        assert_near(actual, wanted, torch.float64, times=100)


def test_gae_ignores_what_is_not_counted(device):
    rewards, values, mask = make_gae(9, 70).tensors
    mask[3], mask[5, 40:], mask[6, :40] = False, False, False
    clean = outputs_and_grads(Call("gae", (rewards, values, mask), (0.99, 0.95), 0), device)
    bad = torch.where(torch.arange(70) % 2 == 0, torch.nan, torch.inf).expand(9, 70)
    dirty = (torch.where(mask, rewards, bad), torch.where(mask, values, bad), mask)
    got = outputs_and_grads(Call("gae", dirty, (0.99, 0.95), 0), device)
    assert all(map(torch.equal, got, clean))
    assert (got[0][3] == 0).all() and (got[1][3] == 0).all()


def unfused(logits, tokens, temperature):
    """What torch users write, on the device at hand."""
    log_p = torch.log_softmax(logits.to(result(logits.dtype)) / temperature, -1)
    return log_p.gather(-1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def with_gradients(function, tensors, numbers, trained) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_(i < trained) for i, x in enumerate(tensors)]
    outputs = list(function(*leaves, *numbers))
    grads = torch.autograd.grad(outputs, leaves[:trained], cotangents(outputs))
    return [x.detach().cpu() for x in (*outputs, *grads)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_token_log_probs(device, dtype, vocabulary):
    rows = 67 if vocabulary < 2000 else 5
    call = make_token_log_probs(rows, vocabulary, dtype).to(device)
    got = outputs_and_grads(call, device)
    torchs = with_gradients(unfused, call.tensors, call.numbers, 1)
    truth = oracles.token_log_probs(*call.tensors, *call.numbers, *cotangents(got[:2]))
    kinds = result(dtype), result(dtype), dtype
    for actual, own, wanted, kind in zip(got, torchs, truth, kinds, strict=True):
        assert actual.dtype == kind
        assert_error_within(actual, own, wanted, kind)
    terms = oracles.gradient_terms(*call.tensors, *call.numbers, *cotangents(got[:2]))
    assert_gradient_near(got[2], truth[2], terms, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_token_log_probs_of_hard_logits(device, dtype, temperature, scale):
    logits, tokens = randn(9, 3001, dtype=dtype, scale=scale).to(device), randint(3001, 9).to(device)
    got = outputs_and_grads(Call("token_log_probs", (logits, tokens), (temperature,), 1), device)
    torchs = with_gradients(unfused, (logits, tokens), (temperature,), 1)
    truth = oracles.token_log_probs(logits, tokens, temperature, *cotangents(got[:2]))
    for actual, own, wanted, kind in zip(got, torchs, truth, (torch.float32, torch.float32, dtype), strict=True):
        assert_error_within(actual, own, wanted, kind)
    terms = oracles.gradient_terms(logits, tokens, temperature, *cotangents(got[:2]))
    assert_gradient_near(got[2], truth[2], terms, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocabulary", [40, 1000, 5003])
def test_token_log_probs_with_impossible_tokens(device, dtype, vocabulary):
    logits = randn(6, vocabulary, dtype=dtype)
    logits[:, ::3] = -torch.inf
    logits[4, 1:] = -torch.inf  # nothing but token 0 was possible, but for
    logits[4, 0] = 2.0
    tokens = torch.tensor([0, 1, 2, vocabulary - 1 - vocabulary % 3, 0, 4])
    got = outputs_and_grads(Call("token_log_probs", (logits, tokens), (0.9,), 1), device)
    truth = oracles.token_log_probs(logits, tokens, 0.9, *cotangents(got[:2]))
    assert got[0][0] == -torch.inf and got[0][4] == 0 and got[1][4] == 0
    for actual, wanted, kind in zip(got, truth, (result(dtype), result(dtype), dtype), strict=True):
        assert_near(actual, wanted, kind, times=2)
    terms = oracles.gradient_terms(logits, tokens, 0.9, *cotangents(got[:2]))
    assert_gradient_near(got[2][1:], truth[2][1:], terms[1:], dtype)
    assert (got[2][1:3, ::3] == 0).all()


def test_a_row_without_a_distribution_is_nan_and_alone(device):
    good = randn(1, 1030)
    for bad in (torch.full((1, 1030), -torch.inf), good.where(torch.arange(1030) != 700, torch.nan),
                good.where(torch.arange(1030) != 3, torch.inf)):  # fmt: skip
        logits, tokens = torch.cat([good, bad, good]), torch.full((3,), 5)
        for x in outputs_and_grads(Call("token_log_probs", (logits, tokens), (1.0,), 1), device)[:2]:
            assert x[1].isnan() and x[0].isfinite() and x[0] == x[2]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"),
    [(1, 1, 1), (7, 5, 7), (1, 16, 129), (129, 8, 1000), (64, 32, 777), (300, 64, 5003), (513, 96, 32000)],
)
def test_linear_token_log_probs(device, dtype, rows, width, vocabulary):
    if device.type == "cpu" and rows * vocabulary > 1e7:
        pytest.skip("large, for a GPU")
    call = make_linear(rows, width, vocabulary, dtype).to(device)
    got = outputs_and_grads(call, device)
    torchs = with_gradients(
        lambda h, w, t, temperature: unfused(h @ w.T, t, temperature), call.tensors, call.numbers, 2
    )
    truth = oracles.linear_token_log_probs(*call.tensors, *call.numbers, *cotangents(got[:2]))
    for place, (actual, own, wanted) in enumerate(zip(got, torchs, truth, strict=True)):
        assert actual.dtype == (dtype if place > 1 else result(dtype))
        # 16-bit gradients of hidden and weight pass through 16-bit gradients of the logits, here as in torch.
        kind = dtype if place > 1 or dtype.itemsize == 2 else result(dtype)
        scale = wanted.abs().amax().clamp_min(1.0)  # rounded sums of thousands of terms: relative to the largest
        assert_error_within(actual / scale, own / scale, wanted / scale, kind)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 1, 1), (7, 5, 7), (129, 8, 1000), (300, 64, 5003)])
def test_linear_cross_entropy(device, dtype, rows, width, vocabulary):
    call = make_cross_entropy(rows, width, vocabulary, dtype).to(device)
    call = replace(call, tensors=(*call.tensors[:3], call.tensors[3] / rows))  # a mean, as in training
    got, upstream = outputs_and_grads(call, device), cotangents([torch.zeros((), dtype=result(dtype))])[0].double()

    def plain(hidden, weight, tokens, weights, temperature):
        return [-(weights * unfused(hidden @ weight.T, tokens, temperature)[0]).sum()]

    torchs = with_gradients(plain, call.tensors, call.numbers, 2)
    loss, log_probs, entropy, *grads = oracles.linear_cross_entropy(*call.tensors, *call.numbers)
    kind = dtype if dtype.itemsize == 2 else result(dtype)
    assert [x.dtype for x in got] == [result(dtype)] * 3 + [dtype] * 2
    assert_error_within(got[0], torchs[0], loss, kind)
    assert_near(got[1], log_probs, kind, times=10)
    assert_near(got[2], entropy, kind, times=10)
    for actual, own, wanted in zip(got[3:], torchs[1:], grads, strict=True):
        scale = (wanted * upstream).abs().amax().clamp_min(1e-3)
        assert_error_within(actual / scale, own / scale, wanted * upstream / scale, kind)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 7, 129, 1000, 100_003])
@pytest.mark.parametrize("option", [None, 1.5])
@pytest.mark.parametrize("make", [make_policy_loss, make_value_loss])
def test_clipped_losses(device, dtype, size, option, make):
    call = make(size, dtype=dtype, **{"dual" if make is make_policy_loss else "clip": option})
    got = outputs_and_grads(call, device)
    leaf, upstream = call.leaves()[0], cotangents(got[:1])[0]
    loss, clipped, grad, edge = getattr(oracles, call.operator)(leaf, *call.tensors[1:], *call.numbers)
    sure = edge > 1e-5  # elsewhere rounding may put an element on the other side
    assert sure.float().mean() > 0.99 or size < 1000
    assert got[0].dtype == result(dtype) and got[1].dtype == torch.bool and got[2].dtype == dtype
    assert torch.equal(got[1][sure], clipped[sure])
    assert_near(got[0], loss, result(dtype), times=2)
    assert_near(got[2][sure], (grad * upstream.double())[sure], dtype, times=2)


@pytest.mark.parametrize("operator", EVERY)
def test_agrees_with_the_cpu(device, operator):
    """Dtype by dtype; products aside, the two differ by rounding in float32."""
    call = SMALL[operator]
    for actual, cpu in zip(outputs_and_grads(call, device), call.run(), strict=True):
        assert actual.dtype == cpu.dtype and actual.shape == cpu.shape
        assert_near(actual, cpu, torch.float32, times=10)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocabulary", [1, 7, 129, 5003, 50257])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 50, 1.0), (1.3, 0, 0.9), (0.8, 20, 0.5), (0.0, 0, 1.0)]
)
def test_sample_tokens(device, dtype, vocabulary, temperature, top_k, top_p):
    """Against a search in sorted float64; where a draw falls on the border of two tokens, either will do."""
    rows = 16 if vocabulary > 10_000 else 64  # the oracle sorts them on the CPU
    logits, draws = randn(rows, vocabulary, dtype=dtype, scale=3.0, seed=6), torch.linspace(0.01, 0.99, rows).double()
    numbers = (temperature, top_k, top_p)
    tokens, log_probs, entropy = outputs_and_grads(Call("sample_tokens", (logits, draws), numbers, 0), device)
    log_p, true_entropy, tokens_near = oracles.sampling(logits, draws, *numbers)
    assert all(int(token) in near for token, near in zip(tokens, tokens_near, strict=True))
    assert_near(log_probs, log_p.gather(1, tokens[:, None])[:, 0], result(dtype), times=10)
    assert_near(entropy, true_entropy, result(dtype), times=10)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element further in memory: aligned for no vector of two."""
    place = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:].view(tensor.shape)
    return place.copy_(tensor)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with gaps in the last dimension."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
    wide[..., ::2] = tensor
    return wide[..., ::2]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [shifted, strided])
@pytest.mark.parametrize("operator", EVERY)
def test_any_alignment_and_stride(device, operator, layout, dtype):
    call = SMALL[operator]
    tensors = tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in call.tensors)
    dense = Call(operator, tensors, call.numbers, call.trained).to(device)
    moved = Call(operator, tuple(layout(x) for x in dense.tensors), call.numbers, call.trained)
    for actual, wanted in zip(moved.run(), dense.run(), strict=True):
        assert_near(actual.cpu(), wanted.cpu(), actual.dtype if actual.is_floating_point() else torch.float32, times=3)


def test_leading_dimensions_and_slices_of_logits(device):
    base, tokens = randn(4, 6, 70).to(device), randint(33, 4, 6).to(device)
    for logits in (base[:, :, :33], base[:, :5, 33:66], base[:, 1:, 1:34], base[:1, :, :33].expand(4, 6, 33)):
        t = tokens[:, : logits.shape[1]]
        got = Call("token_log_probs", (logits, t), (1.1,), 0).function(logits, t, 1.1)
        wanted = oracles.softmax(logits.reshape(-1, 33), 1.1)
        picked = wanted[1].gather(1, t.reshape(-1, 1).cpu())[:, 0]
        assert got[0].shape == got[1].shape == t.shape
        assert_near(got[0].flatten().cpu(), picked, torch.float32, times=2)
        assert_near(got[1].flatten().cpu(), wanted[2], torch.float32, times=2)


@pytest.mark.parametrize(
    "call",
    [
        make_gae(0, 5), make_gae(3, 0), make_token_log_probs(0, 9), make_linear(0, 4, 9),
        make_cross_entropy(0, 4, 9), make_policy_loss(0), make_policy_loss(), make_value_loss(3, 0), make_value_loss(),
    ],
    ids=lambda call: f"{call.operator}{list(call.tensors[0].shape)}",
)  # fmt: skip
def test_empty_and_scalar(device, call):
    for actual, wanted in zip(call.to(device).run(), call.run(), strict=True):
        assert actual.shape == wanted.shape and actual.dtype == wanted.dtype
        assert_near(actual.cpu(), wanted, torch.float32)


def test_mixed_dtypes_are_computed_in_the_widest(device):
    for operator in ("gae", "clipped_policy_loss", "clipped_value_loss"):
        call = SMALL[operator].to(device)
        first, second, third = call.tensors
        for a, b in ((first.bfloat16(), second), (first, second.half()), (first.double(), second)):
            wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
            got, wanted = call.outputs(a, b, third), call.outputs(a.to(wide), b.to(wide), third)
            assert got[0].dtype == wide
            assert all(map(torch.equal, got, wanted))


def test_by_hand(device):
    """Small numbers worked out on paper, so that no oracle stands alone."""
    one = torch.tensor([[0.0, 2 * math.log(3)]], device=device)
    log_probs, entropy = SMALL["token_log_probs"].function(one, torch.tensor([1], device=device), 2.0)
    assert log_probs.item() == pytest.approx(math.log(0.75), rel=TOLERANCE[torch.float32])
    assert entropy.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=TOLERANCE[torch.float32])
    mask = torch.tensor([[True, False, True, False]], device=device)
    rewards, values = torch.tensor([[[1.0, 99, 3, 99]], [[2.0, 99, 4, 99]]], device=device)
    advantages, returns = SMALL["gae"].function(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[0.75, 0.0, -1.0, 0.0]] and returns.tolist() == [[2.75, 0.0, 3.0, 0.0]]
