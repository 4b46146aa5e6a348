"""The clipped losses' CUDA kernels, emulated, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from gpu.cases import make_policy_loss
from gpu.oracles import clipped_policy_loss, clipped_value_loss
from ops.cuda_emulation import LaunchError, emulated, guarded
from ops.support import FLOATS, randn, result_dtype
from tolerances import assert_near

from rlhf_lightning.ops import clipped_value_loss as native_value_loss

ARGUMENTS = (
    "const void* learned, const void* old, const void* target, void* loss, bool* clipped, void* slope, int64_t count, "
    "int64_t type"
)
ARRAYS = "{learned, old, target, static_cast<rlhf_lightning::Element>(type), loss, clipped, slope, count}"
POLICY = f"""
extern "C" int loss({ARGUMENTS}, double low, double high, double dual) {{
  return rlhf_lightning::launch_clipped_policy_loss({ARRAYS}, low, high, dual, nullptr);
}}
"""
VALUE = f"""
extern "C" int loss({ARGUMENTS}, double clip) {{
  return rlhf_lightning::launch_clipped_value_loss({ARRAYS}, clip, nullptr);
}}
"""
GRADIENT = """
extern "C" int gradient(
    const void* grad, const void* slope, void* out, int64_t count, int64_t same_grad, int64_t type) {
  return rlhf_lightning::launch_clipped_loss_gradient(
      grad, same_grad != 0, slope, static_cast<rlhf_lightning::Element>(type), out, count, nullptr);
}
"""
ELEMENT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NONE = float("inf")
# Around vectors (2, 4 and 8 elements) and blocks (512, 1024 and 2048 of them).
SIZES = [1, 3, 4, 7, 8, 9, 511, 512, 513, 1023, 1024, 1027, 2048, 2051]

policy = emulated("clipped_policy_loss.cu", POLICY)
value = emulated("clipped_value_loss.cu", VALUE)
gradient = emulated("clipped_losses.cu", GRADIENT)


def run(cuda, tensors, *numbers, at_end=True, offset=0, seed=0):
    """The results start as NaN and as a byte that no bool is: whatever is not written is seen."""
    first = tensors[0]
    results = torch.full(first.shape, torch.nan, dtype=result_dtype(first.dtype))
    flags = torch.full(first.shape, 77, dtype=torch.uint8)
    arrays = [guarded(x, at_end, offset) for x in (*tensors, results, flags, results)]
    cuda.run("loss", *arrays, first.numel(), ELEMENT[first.dtype], *numbers, seed=seed)
    loss, clipped, slope = (x.clone() for x in arrays[3:])
    assert (clipped <= 1).all()
    return loss, clipped.bool(), slope


def check(got, truth, dtype):
    loss, clipped, slope, edge = truth
    sure = edge > 1e-5  # nearer to a switch between branches, rounding may decide
    assert sure.sum() >= len(loss) - 1
    assert_near(got[0], loss, result_dtype(dtype))
    assert torch.equal(got[1][sure], clipped[sure])
    assert_near(got[2][sure], slope[sure], result_dtype(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dual", [NONE, 1.5])
def test_policy_loss_against_the_definition(policy, dtype, size, dual):
    tensors = make_policy_loss(size, dtype=dtype).tensors
    truth = clipped_policy_loss(*tensors, 0.2, 0.28, None if dual == NONE else dual)
    check(run(policy, tensors, 0.2, 0.28, dual), truth, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("clip", [NONE, 0.2])
def test_value_loss_against_the_definition(value, dtype, size, clip):
    tensors = make_policy_loss(size, dtype=dtype).tensors
    truth = clipped_value_loss(*tensors, None if clip == NONE else clip)
    check(run(value, tensors, clip), truth, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_value_loss_is_the_cpus_bit_for_bit(value, dtype):
    tensors = make_policy_loss(1027, dtype=dtype).tensors
    loss, clipped, slope = run(value, tensors, 0.2)
    learned = tensors[0].to(result_dtype(dtype)).requires_grad_()
    expected, expected_clipped = native_value_loss(learned, *tensors[1:], 0.2)
    (grad,) = torch.autograd.grad(expected.sum(), learned)
    assert torch.equal(loss, expected) and torch.equal(clipped, expected_clipped) and torch.equal(slope, grad)


def test_bits_depend_on_the_element_alone(policy, value):
    tensors = make_policy_loss(1027).tensors
    for cuda, numbers in ((policy, (0.2, 0.28, 1.5)), (value, (0.2,))):
        whole = run(cuda, tensors, *numbers)
        for at_end, offset in ((False, 0), (False, 1), (False, 3)):
            assert all(map(torch.equal, run(cuda, tensors, *numbers, at_end=at_end, offset=offset, seed=offset), whole))
        part = run(cuda, [x[5:700].clone() for x in tensors], *numbers)
        assert all(torch.equal(p, w[5:700]) for p, w in zip(part, whole, strict=True))


def test_nan_and_infinity_stay_alone(policy, value):
    tensors = [x.clone() for x in make_policy_loss(40).tensors]
    clean = {cuda: run(cuda, tensors, *numbers) for cuda, numbers in ((policy, (0.2, 0.28, 1.5)), (value, (0.2,)))}
    tensors[0][3], tensors[2][5], tensors[0][7], tensors[1][9] = torch.nan, torch.nan, -torch.inf, torch.nan
    others = [i for i in range(40) if i not in (3, 5, 7, 9)]
    for cuda, numbers in ((policy, (0.2, 0.28, 1.5)), (value, (0.2,))):
        got = run(cuda, tensors, *numbers)
        assert got[0][3].isnan() and got[0][5].isnan()
        assert all(torch.equal(g[others], c[others]) for g, c in zip(got, clean[cuda], strict=True))


def test_a_log_ratio_beyond_20_is_clamped_without_gradient(policy):
    tensors = [torch.tensor(x) for x in ([30.0, -30.0, 20.5], [0.0, 0.0, 0.0], [-1.0, 1.0, -2.0])]
    loss, clipped, slope = run(policy, tensors, 0.2, 0.3, NONE)
    e = torch.tensor(20.0, dtype=torch.float64).exp()
    assert_near(loss / torch.stack([e, -1 / e, 2 * e]), torch.ones(3), torch.float32)
    assert not clipped.any() and (slope == 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("same", [False, True])
def test_gradient(gradient, dtype, size, same):
    wide = result_dtype(dtype)
    grad, slope = randn(1 if same else size, dtype=wide), randn(size, dtype=wide, seed=1)
    for at_end, offset in ((True, 0), (False, 0), (False, 1)):
        arrays = [guarded(x, at_end, offset) for x in (grad, slope, torch.full((size,), torch.nan, dtype=dtype))]
        gradient.run("gradient", *arrays, size, int(same), ELEMENT[dtype])
        assert torch.equal(arrays[2], (grad * slope).to(dtype))


def test_empty(policy, value, gradient):
    empty = [torch.empty(0)] * 3
    run(policy, empty, 0.2, 0.2, NONE)
    run(value, empty, 0.2)
    gradient.run("gradient", *(guarded(x) for x in empty), 0, 0, 0)


@pytest.mark.parametrize("blocks", [2**31, 2**32 + 1])
@pytest.mark.parametrize("by_thread", [4, 1])
def test_more_blocks_than_a_grid_has_are_refused(policy, value, gradient, by_thread, blocks):
    """In vectors, and one by one where the arrays start off 16 bytes."""
    floats = [guarded(torch.zeros(4), at_end=False, offset=4 - by_thread) for _ in range(5)]
    flags = guarded(torch.zeros(4, dtype=torch.uint8), at_end=False, offset=4 - by_thread)
    arrays, count = (*floats[:4], flags, floats[4]), (blocks - 1) * 256 * by_thread + 1
    with pytest.raises(LaunchError, match="error 9"):
        policy.run("loss", *arrays, count, 0, 0.2, 0.2, NONE)
    with pytest.raises(LaunchError, match="error 9"):
        value.run("loss", *arrays, count, 0, 0.2)
    with pytest.raises(LaunchError, match="error 9"):
        gradient.run("gradient", *floats[:3], count, 0, 0)
    assert not any(x.any() for x in arrays)
