// The softmax statistics of a part of a row, for the CUDA kernels of token_log_probs and sample_tokens.
#pragma once

#include <cfloat>

#include "device.cuh"

namespace rlhf_lightning {

constexpr double kLog2E = 1.4426950408889634;

// 2^x of an x below this is 0, as of -inf, but this can be multiplied by 0.
template <typename A>
constexpr A kLowest = sizeof(A) == 8 ? A(-1100) : A(-300);
template <typename A>
constexpr A kSmallest = sizeof(A) == 8 ? A(-DBL_MAX) : A(-FLT_MAX);

// The larger of the two, or NaN if either is NaN: fmax would drop the NaN.
__device__ __forceinline__ float maximum(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return b > a || b != b ? b : a;
#endif
}
__device__ __forceinline__ double maximum(double a, double b) { return b > a || b != b ? b : a; }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// With d = log2(e) / temperature * (x - max): sum is the sum of 2^d, weighted that of 2^d * d. It has no initialisers,
// because shared memory runs no constructors.
template <typename A>
struct State {
  A max, sum, weighted;
};
// The state of no elements. Its max is finite, so that a part of -inf alone has a sum of 0, not NaN.
template <typename A>
__device__ __forceinline__ State<A> empty_state() {
  return {kSmallest<A>, A(0), A(0)};
}

// Rescales the sums to a larger maximum. power_of(d) is 2^d for d <= 0.
template <typename A, typename F>
__device__ __forceinline__ void raise(State<A>& state, A max, A scale, const F& power_of) {
  const A d = maximum((state.max - max) * scale, kLowest<A>);
  const A factor = power_of(d);
  state.weighted = factor * (state.weighted + d * state.sum);
  state.sum *= factor;
  state.max = max;
}

template <typename A, typename F>
__device__ __forceinline__ State<A> merge(State<A> a, State<A> b, A scale, const F& power_of) {
  const A max = larger(a.max, b.max);
  raise(a, max, scale, power_of);
  raise(b, max, scale, power_of);
  return {max, a.sum + b.sum, a.weighted + b.weighted};
}

}  // namespace rlhf_lightning
