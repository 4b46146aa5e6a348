// What the kernels of both clipped losses share: one elementwise pass over memory.
//
// Launch: one thread for each 16-byte vector of an operand, or for each element where an address is not aligned; blocks of
// 256 threads in a one-dimensional grid. A thread loads one vector of each operand, computes loss, clipped and slope of its
// elements, and stores them. The last thread takes the elements that fill no vector one by one.
//
// For float32 the forward moves 21 bytes an element (12 read, 9 written) and the backward 12. At a million elements one
// wave of blocks covers them all.
#pragma once

#include "clipped_losses_launch.h"
#include "device.cuh"

namespace rlhf_lightning {

constexpr int kLossThreads = 256;

inline Grid loss_blocks(int64_t count, int by_thread) {
  const int64_t by_block = static_cast<int64_t>(kLossThreads) * by_thread;
  return {(count + by_block - 1) / by_block};
}

template <typename C>
struct LossAt {
  C loss;
  bool clipped;
  C slope;
};

template <typename T>
struct LossArraysOf {
  const T* learned;
  const T* old;
  const T* target;
  Compute<T>* loss;
  unsigned char* clipped;
  Compute<T>* slope;
};

// Stores n elements of the compute type at x, 16 bytes at a time.
template <int n, typename C>
__device__ __forceinline__ void store_wide(C* x, const C (&values)[n]) {
  constexpr int width = n < kVector<C> ? n : kVector<C>;
#pragma unroll
  for (int i = 0; i < n; i += width) {
    Vector<C, width> vector;
#pragma unroll
    for (int j = 0; j < width; ++j) vector.at[j] = values[i + j];
    store<width>(x + i, vector);
  }
}

// Computes elements at, ..., at + n - 1, all of which exist.
template <int n, typename T, typename F>
__device__ __forceinline__ void losses_at(const LossArraysOf<T>& arrays, int64_t at, const F& loss_of) {
  using C = Compute<T>;
  const auto learned = load<n>(arrays.learned + at), old = load<n>(arrays.old + at);
  const auto target = load<n>(arrays.target + at);
  C loss[n], slope[n];
  Vector<unsigned char, n> clipped;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const LossAt<C> here = loss_of(to_compute(learned.at[i]), to_compute(old.at[i]), to_compute(target.at[i]));
    loss[i] = here.loss;
    clipped.at[i] = here.clipped;
    slope[i] = here.slope;
  }
  store_wide(arrays.loss + at, loss);
  store_wide(arrays.slope + at, slope);
  store<n>(arrays.clipped + at, clipped);
}

template <int n, typename T, typename F>
__global__ void __launch_bounds__(kLossThreads) losses_kernel(LossArraysOf<T> arrays, int64_t count, F loss_of) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kLossThreads + threadIdx.x) * n;
  if (at + n <= count) {
    losses_at<n>(arrays, at, loss_of);
  } else {
    for (int64_t i = at; i < count; ++i) losses_at<1>(arrays, i, loss_of);
  }
}

// loss_of(learned, old, target) returns a LossAt.
template <typename T, typename F>
cudaError_t launch_losses(const ClippedLossArrays& a, const F& loss_of, cudaStream_t stream) {
  using C = Compute<T>;
  constexpr int n = kVector<T>;
  const LossArraysOf<T> arrays{
      static_cast<const T*>(a.learned), static_cast<const T*>(a.old), static_cast<const T*>(a.target),
      static_cast<C*>(a.loss), reinterpret_cast<unsigned char*>(a.clipped), static_cast<C*>(a.slope)};
  const bool in_vectors = aligned(a.learned) && aligned(a.old) && aligned(a.target) && aligned(a.loss) &&
                          aligned(a.clipped) && aligned(a.slope);
  const auto kernel = in_vectors ? losses_kernel<n, T, F> : losses_kernel<1, T, F>;
  const Grid blocks = loss_blocks(a.count, in_vectors ? n : 1);
  return launch(kernel, blocks, kLossThreads, 0, stream, arrays, a.count, loss_of);
}

// `of_float` and `of_double` are the same function in the two compute types.
template <typename FloatLoss, typename DoubleLoss>
cudaError_t launch_losses_of(
    const ClippedLossArrays& arrays, const FloatLoss& of_float, const DoubleLoss& of_double, cudaStream_t stream) {
  if (arrays.count == 0) return cudaSuccess;
  switch (arrays.type) {
    case Element::kFloat: return launch_losses<float>(arrays, of_float, stream);
    case Element::kBfloat16: return launch_losses<__nv_bfloat16>(arrays, of_float, stream);
    case Element::kHalf: return launch_losses<__half>(arrays, of_float, stream);
    default: return launch_losses<double>(arrays, of_double, stream);
  }
}

}  // namespace rlhf_lightning
