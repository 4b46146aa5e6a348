"""The emulator of CUDA finds the mistakes that it is there for."""

from __future__ import annotations

import pytest
import torch
from ops import cuda_emulation
from ops.cuda_emulation import LaunchError, emulate, guarded

KERNELS = r"""
#include <cooperative_groups.h>
#include "device.cuh"
using namespace rlhf_lightning;

// Reverses each block's 64 numbers through shared memory.
template <bool barrier>
__global__ void reverse(const float* x, float* y) {
  __shared__ float tile[64];
  const unsigned t = threadIdx.x;
  tile[t] = x[blockIdx.x * 64 + t];
  if (barrier) __syncthreads();
  y[blockIdx.x * 64 + t] = tile[63 - t];
}
// Each lane takes over its neighbour's number, `rounds` times; a barrier is missing between reading and writing.
__global__ void rotate(const int64_t* x, int64_t* y, int64_t rounds) {
  __shared__ int64_t tile[64];
  const unsigned t = threadIdx.x;
  tile[t] = x[t];
  for (int64_t i = 0; i < rounds; ++i) {
    __syncthreads();
    const int64_t next = tile[(t + 1) % 64];
    tile[t] = next;
  }
  y[t] = tile[t];
}
__global__ void divergent(float* y, int64_t early) {
  if (threadIdx.x == 5 && early == 1) return;
  if (threadIdx.x == 5) __syncthreads();
  else
    __syncthreads();
  y[threadIdx.x] = 1;
}
__global__ void half_a_warp(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, static_cast<float>(threadIdx.x), 1);
}
__global__ void wrong_lane(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0xffffu, static_cast<float>(threadIdx.x), 16);
}
__global__ void lanes(float* y) {
  const int lane = threadIdx.x;
  const float own = static_cast<float>(lane);
  y[lane] = __shfl_down_sync(kAllLanes, own, 3);
  y[32 + lane] = __shfl_up_sync(kAllLanes, own, 3, 8);
  y[64 + lane] = __shfl_xor_sync(kAllLanes, own, 5);
  y[96 + lane] = __shfl_sync(kAllLanes, own, 9);
  y[128 + lane] = static_cast<float>(__popc(__ballot_sync(kAllLanes, lane % 3 == 0)));
  if (lane < 8) y[160 + lane] = __shfl_xor_sync(0xffu, own, 1);  // part of a warp, while the rest goes on
  __syncwarp();
}
__global__ void shift(const float* x, float* y, int64_t by) { y[threadIdx.x] = x[threadIdx.x + by]; }
__global__ void shift_vector(const float* x, float* y, int64_t by) { store<4>(y, load<4>(x + by)); }
__global__ void beyond(float* y, int64_t index) {
  __shared__ float tile[8];
  tile[index] = 1;
  __syncthreads();
  y[0] = tile[index];
}
__global__ void dynamic(float* y, int64_t count) {
  float* tile = reinterpret_cast<float*>(dynamic_shared());
  if (threadIdx.x < count) tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  if (threadIdx.x < count) y[threadIdx.x] = tile[count - 1 - threadIdx.x];
}
__global__ void sums(const float* x, float* y) {
  __shared__ float slots[4];
  const float sum = block_reduce<128>(x[threadIdx.x], slots, [](float a, float b) { return a + b; });
  const float highest = block_reduce<128>(x[threadIdx.x], slots, [](float a, float b) { return a > b ? a : b; });
  y[threadIdx.x] = sum + 1000 * highest;
}
template <bool barrier>
__global__ void neighbours(float* y) {
  __shared__ float mine;
  const auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) mine = blockIdx.x;
  cluster.sync();
  const float next = *cluster.map_shared_rank(&mine, (cluster.block_rank() + 1) % cluster.num_blocks());
  if (barrier) cluster.sync();
  if (threadIdx.x == 0) mine = -1;
  y[blockIdx.x * 32 + threadIdx.x] = next;
}
"""
EXPORTS = r"""
extern "C" {
int run_reverse(const float* x, float* y, int64_t barrier) {
  return launch(barrier ? reverse<true> : reverse<false>, {5}, 64, 0, nullptr, x, y);
}
int run_rotate(const int64_t* x, int64_t* y, int64_t rounds) {
  return launch(rotate, {1}, 64, 0, nullptr, x, y, rounds);
}
int run_divergent(float* y, int64_t early) { return launch(divergent, {1}, 64, 0, nullptr, y, early); }
int run_half_a_warp(float* y) { return launch(half_a_warp, {1}, 32, 0, nullptr, y); }
int run_wrong_lane(float* y) { return launch(wrong_lane, {1}, 32, 0, nullptr, y); }
int run_lanes(float* y) { return launch(lanes, {1}, 32, 0, nullptr, y); }
int run_shift(const float* x, float* y, int64_t by) { return launch(shift, {1}, 32, 0, nullptr, x, y, by); }
int run_shift_vector(const float* x, float* y, int64_t by) {
  return launch(shift_vector, {1}, 1, 0, nullptr, x, y, by);
}
int run_beyond(float* y, int64_t index) { return launch(beyond, {1}, 1, 0, nullptr, y, index); }
int run_dynamic(float* y, int64_t count, int64_t bytes) {
  return launch(dynamic, {1}, 32, bytes, nullptr, y, count);
}
int run_blocks(float* y, int64_t x_blocks, int64_t y_blocks) {
  return launch(dynamic, {x_blocks, y_blocks}, 32, 128, nullptr, y, 32);
}
int run_sums(const float* x, float* y) { return launch(sums, {1}, 128, 0, nullptr, x, y); }
int run_neighbours(float* y, int64_t size, int64_t barrier) {
  return launch_clusters(barrier ? neighbours<true> : neighbours<false>, {12}, 32, 0, size, nullptr, y);
}
}
"""


@pytest.fixture(scope="module")
def cuda():
    return emulate(KERNELS, EXPORTS)


def zeros(*shape: int) -> torch.Tensor:
    return guarded(torch.zeros(shape))


def count(*shape: int) -> torch.Tensor:
    return guarded(torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape))


def test_blocks_threads_and_shared_memory(cuda):
    x, y = count(5, 64), zeros(5, 64)
    for seed in range(5):
        cuda.run("run_reverse", x, y.zero_(), 1, seed=seed)
        assert torch.equal(y, x.flip(1))


def test_a_missing_barrier_is_seen(cuda):
    x, y = count(5, 64), zeros(5, 64)
    cuda.run("run_reverse", x, y, 0)
    assert not torch.equal(y, x.flip(1)) and y.isnan().any()  # shared memory that nobody has written yet is NaN


def test_a_missing_barrier_after_reading_is_seen(cuda):
    x, y = guarded(torch.arange(64)), guarded(torch.zeros(64, dtype=torch.int64))
    cuda.run("run_rotate", x, y, 2)
    assert not torch.equal(y, x.roll(-2))


def test_divergent_barriers_are_errors(cuda):
    with pytest.raises(LaunchError, match="a barrier that the other threads do not reach"):
        cuda.run("run_divergent", zeros(64), 1)  # a thread has ended
    with pytest.raises(LaunchError, match="a barrier that the other threads do not reach"):
        cuda.run("run_divergent", zeros(64), 0)  # a thread waits at another line


def test_wrong_lanes_are_errors(cuda):
    with pytest.raises(LaunchError, match="of the mask 0xffffffff has ended"):
        cuda.run("run_half_a_warp", zeros(32))
    with pytest.raises(LaunchError, match="reads lane 16, which is not in the mask"):
        cuda.run("run_wrong_lane", zeros(32))


def test_lanes(cuda):
    lane = torch.arange(32)
    for seed in range(3):
        y = zeros(6, 32)
        cuda.run("run_lanes", y, seed=seed)
        assert torch.equal(y[0], torch.where(lane < 29, lane + 3, lane).float())
        assert torch.equal(y[1], torch.where(lane % 8 >= 3, lane - 3, lane).float())
        assert torch.equal(y[2], (lane ^ 5).float()) and (y[3] == 9).all() and (y[4] == 11).all()
        assert y[5, :8].tolist() == [1, 0, 3, 2, 5, 4, 7, 6]


@pytest.mark.parametrize("by", [1, -1])
def test_reads_out_of_bounds_are_errors(cuda, by):
    x, y = guarded(torch.ones(32), at_end=by > 0), zeros(32)
    with pytest.raises(LaunchError, match=r"a memory fault at 0x.*thread"):
        cuda.run("run_shift", x, y, by)
    cuda.run("run_shift", x, y, 0)
    assert (y == 1).all()  # and the machine works on


def test_writes_beside_an_array_are_errors(cuda):
    y = guarded(torch.zeros(31), at_end=False)
    with pytest.raises(LaunchError, match="a write beside an array of shape"):
        cuda.run("run_shift", guarded(torch.ones(32)), y, 0)


def test_vectors_are_aligned_and_inside_to_the_byte(cuda):
    x, y = guarded(torch.arange(10.0), at_end=False), guarded(torch.zeros(4), at_end=False)
    cuda.run("run_shift_vector", x, y, 4)
    assert y.tolist() == [4, 5, 6, 7]
    with pytest.raises(LaunchError, match="__ldg: 16 bytes at an address that is no multiple of 16"):
        cuda.run("run_shift_vector", x, y, 1)
    with pytest.raises(LaunchError, match="__ldg: 16 bytes out of bounds"):
        cuda.run("run_shift_vector", x, y, 8)


def test_shared_arrays_have_bounds(cuda):
    cuda.run("run_beyond", zeros(1), 7)
    with pytest.raises(LaunchError, match="an index or operand out of its range"):
        cuda.run("run_beyond", zeros(1), 8)


def test_dynamic_shared_memory_is_what_was_asked_for(cuda):
    y = zeros(32)
    cuda.run("run_dynamic", y, 32, 128)
    assert torch.equal(y, torch.arange(31.0, -1.0, -1.0))
    with pytest.raises(LaunchError, match="a write 124 bytes into 124 bytes of dynamic shared memory"):
        cuda.run("run_dynamic", y, 32, 124)
    with pytest.raises(LaunchError, match="more shared memory than the kernel was allowed"):
        cuda.run("run_dynamic", y, 32, 50000)


def test_reductions(cuda):
    x, y = count(128), zeros(128)
    for seed in range(5):
        cuda.run("run_sums", x, y, seed=seed)
        assert (y == 127 * 64 + 127000).all()


@pytest.mark.parametrize("blocks", [(2**31, 1), (2**32 + 2, 1), (2, 2**16), (2, 2**32 + 2)])
def test_more_blocks_than_a_grid_has_are_refused(cuda, blocks):
    """And not cut to the 32 bits that a dim3 has for them."""
    y = zeros(32)
    with pytest.raises(LaunchError, match="error 9"):
        cuda.run("run_blocks", y, *blocks)
    assert (y == 0).all()
    cuda.run("run_blocks", y, 2, 3)
    assert (y != 0).any()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_clusters_see_each_other(cuda, size):
    y = zeros(12, 32)
    cuda.run("run_neighbours", y, size, 1)
    expected = torch.arange(12.0).view(-1, size).roll(-1, 1).reshape(12, 1).expand(12, 32)
    assert torch.equal(y, expected)
    cuda.run("run_neighbours", y, 4, 0)
    assert not torch.equal(y, expected)
    with pytest.raises(LaunchError, match="a cluster has 1 to 8 blocks and divides the grid"):
        cuda.run("run_neighbours", y, 5, 1)


def other_compiler(folder, macros: str) -> tuple[str, ...]:
    """A program that says that it defines these macros."""
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\nprintf '{macros}'\n")
    script.chmod(0o755)
    return (str(script), "-O2")


def test_a_compiler_that_cannot_be_used_is_told(monkeypatch, tmp_path):
    clang = other_compiler(tmp_path, "#define __GNUC__ 4\\n#define __clang__ 1\\n")
    for compiler, words in ((("no-such-compiler",), "no C\\+\\+ compiler no-such-compiler"), (clang, "is not GCC's")):
        monkeypatch.setattr(cuda_emulation, "COMPILER", compiler)
        monkeypatch.delenv("CI", raising=False)
        with pytest.raises(pytest.skip.Exception, match=words):
            emulate(KERNELS, EXPORTS)
        monkeypatch.setenv("CI", "1")
        with pytest.raises(pytest.fail.Exception, match=words):
            emulate(KERNELS, EXPORTS)
