"""gae's CUDA kernel, emulated, against sums written from the definition in float64."""

from __future__ import annotations

import pytest
import torch
from gpu.oracles import gae as oracle
from ops.cuda_emulation import LaunchError, emulated, guarded
from ops.support import FLOATS, randn, result_dtype
from tolerances import assert_error_within

from rlhf_lightning.ops.gae import reference

EXPORTS = r"""
extern "C" int gae(
    const void* rewards, const void* values, const bool* mask, void* advantages, void* returns, int64_t rows,
    int64_t steps, int64_t type, double gamma, double lam) {
  using namespace rlhf_lightning;
  return launch_gae(
      {rewards, values, static_cast<Element>(type), mask, advantages, returns, rows, steps}, gamma, lam, nullptr);
}
"""
ELEMENT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
cuda = emulated("gae.cu", EXPORTS)


def case(rows, steps, dtype=torch.float32, holes=True, seed=0):
    mask = randn(rows, steps, seed=seed + 3) > (-0.8 if holes else -9.0)
    return randn(rows, steps, dtype=dtype, seed=seed), randn(rows, steps, dtype=dtype, seed=seed + 1), mask


def run(cuda, inputs, gamma=0.99, lam=0.95, seed=0, at_end=True, offset=0):
    """The outputs start as NaN: whatever is not written is seen."""
    rewards = inputs[0]
    empty = torch.full(rewards.shape, torch.nan, dtype=result_dtype(rewards.dtype))
    arrays = [guarded(x, at_end, offset) for x in (*inputs, empty, empty)]
    cuda.run("gae", *arrays, *rewards.shape, ELEMENT[rewards.dtype], gamma, lam, seed=seed)
    return arrays[3].clone(), arrays[4].clone()


def check(got, inputs, gamma=0.99, lam=0.95):
    for actual, torchs, truth in zip(got, reference(*inputs, gamma, lam), oracle(*inputs, gamma, lam), strict=True):
        assert_error_within(actual, torchs, truth, result_dtype(inputs[0].dtype))
        assert (actual[~inputs[2]] == 0).all()


# Around lanes, vectors, the runs of a warp and the tiles of a block; odd, and in whole vectors.
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 31, 32, 33, 127, 128, 129, 252, 256, 260, 1000, 1023, 2048, 2052, 2049])
def test_against_the_definition(cuda, dtype, steps):
    inputs = case(3, steps, dtype)
    check(run(cuda, inputs), inputs)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("steps", [8, 9, 260])
def test_bits_do_not_depend_on_the_address(cuda, steps, offset, at_end):
    inputs = case(5, steps)
    for actual, wanted in zip(run(cuda, inputs, at_end=at_end, offset=offset), run(cuda, inputs), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("steps", [6000, 6001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_the_batch_the_gpu_or_the_order(cuda, dtype, steps):
    """One block a row, clusters of two and more that do not divide a row's tiles, and no clusters at all."""
    inputs = case(3, steps, dtype)
    whole = run(cuda, inputs)
    check(whole, inputs)
    for multiprocessors, major in ((1, 9), (2, 9), (4, 9), (132, 8)):
        cuda.device(multiprocessors, major)
        again = run(cuda, inputs, seed=multiprocessors)
        cuda.device()
        assert all(map(torch.equal, again, whole))
    for row in range(3):
        alone = run(cuda, [x[row : row + 1] for x in inputs], seed=row)
        assert all(torch.equal(a[0], w[row]) for a, w in zip(alone, whole, strict=True))


@pytest.mark.parametrize("steps", [32, 33, 2049, 4100])
def test_false_slots_are_ignored_even_nan(cuda, steps):
    rewards, values, mask = case(6, steps)
    mask[0], mask[1, 10:], mask[2, :20], mask[3] = False, False, False, True
    mask[4] = False
    mask[4, steps // 2] = True
    clean = run(cuda, (rewards, values, mask))
    check(clean, (rewards, values, mask))
    bad = torch.where(torch.arange(steps) % 2 == 0, torch.nan, torch.inf).expand(6, steps)
    dirty = run(cuda, (torch.where(mask, rewards, bad), torch.where(mask, values, bad), mask))
    assert all(map(torch.equal, dirty, clean)) and (clean[0][0] == 0).all()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.9, 0.5), (1.0, 0.999)])
@pytest.mark.parametrize("steps", [300, 4301])
def test_limits_of_gamma_and_lambda(cuda, gamma, lam, steps):
    for dtype in (torch.float32, torch.float64):
        inputs = case(2, steps, dtype, holes=False)
        check(run(cuda, inputs, gamma, lam), inputs, gamma, lam)


def test_a_nan_reaches_earlier_steps_of_its_row_alone(cuda):
    rewards, values, mask = case(3, 2060, holes=False)
    clean = run(cuda, (rewards, values, mask))[0]
    rewards[1, 1500] = torch.nan
    got = run(cuda, (rewards, values, mask))[0]
    assert got[1, :1501].isnan().all() and torch.equal(got[1, 1501:], clean[1, 1501:])
    assert torch.equal(got[0], clean[0]) and torch.equal(got[2], clean[2])


def test_by_hand(cuda):
    rewards, values = torch.tensor([[1.0, 99, 3, 99]]), torch.tensor([[2.0, 99, 4, 99]])
    advantages, returns = run(cuda, (rewards, values, torch.tensor([[True, False, True, False]])), 0.5, 0.5)
    assert advantages.tolist() == [[0.75, 0, -1, 0]] and returns.tolist() == [[2.75, 0, 3, 0]]


def test_empty(cuda):
    for shape in ((0, 5), (3, 0)):
        run(cuda, (torch.empty(shape), torch.empty(shape), torch.empty(shape, dtype=torch.bool)))


@pytest.mark.parametrize("rows", [2**31, 2**32 + 3])
def test_more_rows_than_a_grid_has_blocks_are_refused(cuda, rows):
    arrays = [guarded(x) for x in (*case(3, 5), torch.zeros(3, 5), torch.zeros(3, 5))]
    with pytest.raises(LaunchError, match="error 9"):
        cuda.run("gae", *arrays, rows, 5, 0, 0.99, 0.95)
    assert not arrays[3].any() and not arrays[4].any()
