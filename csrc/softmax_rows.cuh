// What the CUDA kernels of token_log_probs and of its backward share: powers of two, loads of 16-byte vectors from any
// address, and the launch geometry. In names here, a word is a 16-byte vector and a team a group of threads: a warp or a block.
#pragma once

#include <cmath>
#include <type_traits>

#include "device.cuh"
#include "softmax_state.cuh"
#include "token_log_probs_launch.h"

namespace rlhf_lightning {
namespace {

constexpr int kThreads = 256;
template <typename T>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == 8 ? 2 : 4;  // the bound on registers a thread
constexpr int kGroup = 4;            // 16-byte vectors that a thread loads in one iteration
constexpr int64_t kPart = 4096;      // 16-byte vectors of a row that one block takes: 64 KiB
constexpr int64_t kWarpRow = 1024;   // 16-byte vectors of the longest row that one warp takes
constexpr double kLog2 = 0.6931471805599453;

// 2^x for x <= 0 to 2 units in the last place; 0 where that is below the smallest normal number.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ double exp2_approx(double x) { return exp2(x); }

// The elements of a 16-byte vector; the registers hold the vector until they are widened here.
template <typename T>
__device__ __forceinline__ void widen(const uint4& word, Compute<T> (&values)[kVector<T>]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const unsigned int pairs[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = __uint_as_float(pairs[i] << 16);
      values[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  } else {
    Vector<T, kVector<T>> vector;
    __builtin_memcpy(&vector, &word, sizeof(vector));
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) values[i] = to_compute(vector.at[i]);
  }
}

// Loads 16 bytes from any element's address. Where they straddle two aligned vectors, it loads both and shifts; it never
// reads an aligned vector that holds none of the 16 bytes.
template <bool kAligned, typename T>
__device__ __forceinline__ uint4 load_word(const T* x) {
  if constexpr (kAligned) return __ldcs(reinterpret_cast<const uint4*>(x));
  const uintptr_t address = reinterpret_cast<uintptr_t>(x);
  const unsigned int shift = static_cast<unsigned int>(address % 16);
  const uint4* word = reinterpret_cast<const uint4*>(address - shift);
  const uint4 low = __ldcs(word), high = __ldcs(word + (shift != 0));
  unsigned int parts[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) parts[i] = shift & 8 ? parts[i + 2] : parts[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) parts[i] = shift & 4 ? parts[i + 1] : parts[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    parts[i] = static_cast<unsigned int>((static_cast<uint64_t>(parts[i + 1]) << 32 | parts[i]) >> (shift % 4 * 8));
  }
  return make_uint4(parts[0], parts[1], parts[2], parts[3]);
}

template <typename T>
struct Rows {
  const T* data;
  int64_t count, columns, first, inner, outer_stride, inner_stride;
  __device__ __forceinline__ const T* row(int64_t i) const {
    return i < inner ? data + i * inner_stride : data + i / inner * outer_stride + i % inner * inner_stride;
  }
};

// The parts of a row, of equal length, one block in y of the grid each. A row that would need more than kMostParts gets
// longer parts.
inline int64_t parts_of(int64_t words) {
  const int64_t parts = words > kPart ? (words + kPart - 1) / kPart : 1;
  return parts < kMostParts ? parts : kMostParts;
}
struct Part {
  int64_t begin;
  int count;
};
__device__ __forceinline__ Part part_of_block(int64_t words) {
  const int64_t length = (words + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * length;
  const int64_t left = words > begin ? words - begin : 0;
  return {begin, static_cast<int>(left < length ? left : length)};
}

// The 16-byte vectors of a row, counted from its first element. The last elements, up to two vectors of them, are left out:
// they go one to a thread, so that no load reads beyond the row's end, whatever its address.
template <typename T>
__host__ __device__ __forceinline__ int64_t words_of(int64_t columns) {
  const int64_t words = columns / kVector<T>;
  return words > 0 ? words - 1 : 0;
}

// Calls f with a null pointer of the element type.
template <typename F>
cudaError_t with_type(Element type, const F& f) {
  switch (type) {
    case Element::kFloat: return f(static_cast<float*>(nullptr));
    case Element::kBfloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case Element::kHalf: return f(static_cast<__half*>(nullptr));
    default: return f(static_cast<double*>(nullptr));
  }
}

template <typename T>
Rows<T> rows_of(const LogitRows& logits) {
  return {static_cast<const T*>(logits.data), logits.count,        logits.columns,     logits.first, logits.inner,
          logits.outer_stride,                logits.inner_stride};
}

// One warp takes a short row, and needs no barrier. A long row goes to blocks: one row in x of the grid, its parts in y.
template <typename T, typename F>
cudaError_t with_teams(const LogitRows& logits, const F& f) {
  const int64_t words = words_of<T>(logits.columns), rows = words > kWarpRow ? 1 : kThreads / kWarp;
  const Grid grid{(logits.count + rows - 1) / rows, parts_of(words)};
  return rows == 1 ? f(std::integral_constant<int, kThreads>(), grid) : f(std::integral_constant<int, kWarp>(), grid);
}

}  // namespace
}  // namespace rlhf_lightning
