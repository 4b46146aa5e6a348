// What the CUDA kernels share: 16-bit floats, vector loads and stores, warp and block reductions in a fixed order, launches.
//
// Kernels include CUDA's own headers only, use no atomics, and access shared and global memory through plain C++ or the
// functions here. So tests/ops/cuda_emulator/ can compile the same files with a C++ compiler and run them on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace rlhf_lightning {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The type of the arithmetic on elements of type T.
template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

__device__ __forceinline__ float to_compute(float x) { return x; }
__device__ __forceinline__ double to_compute(double x) { return x; }
__device__ __forceinline__ float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_compute(__half x) { return __half2float(x); }

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T from_compute(Compute<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_compute<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_compute<__half>(float x) {
  return __float2half_rn(x);
}

__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

// A vector of n elements. One instruction moves it where it takes 1, 2, 4, 8 or 16 bytes.
template <typename T, int n>
struct alignas(sizeof(T) * n) Vector {
  T at[n];
};
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes

template <int bytes>
struct WordOf;
template <>
struct WordOf<1> {
  using type = unsigned char;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
template <typename T, int n>
using Word = typename WordOf<static_cast<int>(sizeof(T)) * n>::type;

// Loads and stores of n elements at an address that is a multiple of their size in bytes. load is for memory that no
// thread of the kernel writes. The streaming ones are for data that is not used again soon: they leave the cache to the rest.
template <int n, typename T>
__device__ __forceinline__ Vector<T, n> load(const T* x) {
  const auto word = __ldg(reinterpret_cast<const Word<T, n>*>(x));
  Vector<T, n> vector;
  __builtin_memcpy(&vector, &word, sizeof(vector));
  return vector;
}
template <int n, typename T>
__device__ __forceinline__ Vector<T, n> load_streaming(const T* x) {
  const auto word = __ldcs(reinterpret_cast<const Word<T, n>*>(x));
  Vector<T, n> vector;
  __builtin_memcpy(&vector, &word, sizeof(vector));
  return vector;
}
template <int n, typename T>
__device__ __forceinline__ void store(T* x, const Vector<T, n>& vector) {
  Word<T, n> word;
  __builtin_memcpy(&word, &vector, sizeof(vector));
  __stwb(reinterpret_cast<Word<T, n>*>(x), word);  // the default store; the compiler may split a plain assignment into elements
}
template <int n, typename T>
__device__ __forceinline__ void store_streaming(T* x, const Vector<T, n>& vector) {
  Word<T, n> word;
  __builtin_memcpy(&word, &vector, sizeof(vector));
  __stcs(reinterpret_cast<Word<T, n>*>(x), word);
}

// Whether 16-byte accesses may start at x.
inline bool aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; }

// The block's dynamic shared memory, of the size that the launch asks for; 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return dynamic_shared_bytes;
}

// __shfl_xor_sync for any struct whose size is a multiple of 4 bytes.
template <typename T>
__device__ __forceinline__ T shuffle_xor(const T& x, int mask) {
  static_assert(sizeof(T) % 4 == 0, "shuffles move 4-byte words");
  constexpr int words = static_cast<int>(sizeof(T)) / 4;
  unsigned int word[words];
  __builtin_memcpy(word, &x, sizeof(T));
#pragma unroll
  for (int i = 0; i < words; ++i) word[i] = __shfl_xor_sync(kAllLanes, word[i], mask);
  T other;
  __builtin_memcpy(&other, word, sizeof(T));
  return other;
}

// Reduces x over the 32 lanes of a full warp by combine(a, b), as a tree. Every lane gets the same bits if combine(a, b)
// equals combine(b, a).
template <typename T, typename F>
__device__ __forceinline__ T warp_reduce(T x, const F& combine) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = combine(x, shuffle_xor(x, mask));
  return x;
}

// Reduces x over a block of kThreads threads, a multiple of 32: all of them must call it, and all get the result. `shared`
// holds kThreads / 32 elements, and may be used again at once. The order is fixed.
template <int kThreads, typename T, typename F>
__device__ __forceinline__ T block_reduce(T x, T* shared, const F& combine) {
  static_assert(kThreads % kWarp == 0, "whole warps only");
  x = warp_reduce(x, combine);
  if constexpr (kThreads > kWarp) {
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = shared[0];
#pragma unroll
    for (int i = 1; i < kThreads / kWarp; ++i) x = combine(x, shared[i]);
    __syncthreads();
  }
  return x;
}

// The blocks of a launch, in 64 bits: a dim3 would drop all but the last 32.
struct Grid {
  int64_t x, y = 1;
};
constexpr int64_t kMostBlocks = 2147483647;  // in x
constexpr int64_t kMostParts = 65535;        // in y

// kernel<<<grid, threads, shared bytes, stream>>>(arguments...) in plain C++, with `cluster` blocks in a cluster; more than
// one needs compute capability 9.0. Returns cudaErrorInvalidConfiguration for more blocks than a grid can have.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(
    void (*kernel)(Parameters...), Grid grid, int threads, size_t shared, unsigned cluster, cudaStream_t stream,
    const Arguments&... arguments) {
  if (grid.x > kMostBlocks || grid.y > kMostParts) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}
template <typename... Parameters, typename... Arguments>
cudaError_t launch(
    void (*kernel)(Parameters...), Grid grid, int threads, size_t shared, cudaStream_t stream,
    const Arguments&... arguments) {
  return launch_clusters(kernel, grid, threads, shared, 1, stream, arguments...);
}

}  // namespace rlhf_lightning
