// A stand-in for CUDA's header of this name: what the kernels in csrc/*.cu use of it, run on a CPU by machine.h.
//
// With this folder in place of the toolkit's, a C++ compiler turns a .cu file into a shared object whose launchers run
// their kernels before they return. Nothing here tells how fast a kernel is, nor how a GPU rounds expf; it tells
// whether the indices, the barriers and the arithmetic are right.
#pragma once

#include <math.h>  // which has fma, exp and the like for float and double without std::

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// Shared memory belongs to a block. Blocks run one after another, so one copy will do, and thread_local says `static`
// where that is due, allows `extern __shared__ T name[]`, and keeps all of it in one place, which the machine fills
// with 0xff before each block: a NaN in every float type.
#define __shared__ thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

#include "machine.h"

// Global memory: whatever goes through these must be aligned and, whole, inside an array that the caller has named.
#define EMULATED_LOAD(name) \
  template <typename T>     \
  T name(const T* x) {      \
    emulator::check(x, sizeof(T), alignof(T), #name); \
    return *x;              \
  }
#define EMULATED_STORE(name)      \
  template <typename T>           \
  void name(T* x, const T& word) { \
    emulator::check(x, sizeof(T), alignof(T), #name); \
    *x = word;                    \
  }
EMULATED_LOAD(__ldg)
EMULATED_LOAD(__ldca)
EMULATED_LOAD(__ldcg)
EMULATED_LOAD(__ldcs)
EMULATED_STORE(__stwb)
EMULATED_STORE(__stcg)
EMULATED_STORE(__stcs)

// Barriers and lanes. The line number tells one call from another: threads that wait in two places are an error.
#define __syncthreads() emulator::wait(emulator::kBlock, 0, __LINE__)
#define __syncwarp(...) emulator::sync_warp(__LINE__, ##__VA_ARGS__)
#define __shfl_sync(...) emulator::shuffle(emulator::kIndex, __LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) emulator::shuffle(emulator::kUp, __LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) emulator::shuffle(emulator::kDown, __LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) emulator::shuffle(emulator::kXor, __LINE__, __VA_ARGS__)
#define __ballot_sync(mask, predicate) emulator::ballot(__LINE__, mask, predicate)
#define __any_sync(mask, predicate) (emulator::ballot(__LINE__, mask, predicate) != 0)
#define __all_sync(mask, predicate) (emulator::ballot(__LINE__, mask, !(predicate)) == 0)

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <typename T>
T min(T a, T b) { return b < a ? b : a; }
template <typename T>
T max(T a, T b) { return a < b ? b : a; }

// Arithmetic. C's own headers declare __expf and __logf, hence the macros.
template <typename To, typename From>
To emulated_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }
inline long long __double_as_longlong(double x) { return emulated_bits<long long>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
#define __expf(x) std::exp(static_cast<float>(x))
#define __logf(x) std::log(static_cast<float>(x))
#define __log2f(x) std::log2(static_cast<float>(x))
#define __fdividef(a, b) (static_cast<float>(a) / static_cast<float>(b))
using std::isfinite;
using std::isinf;
using std::isnan;

// The host's side.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    uint3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::multiprocessors : emulator::capability_major;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = emulator::capability_major * 10;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > kMaxDynamicShared) return cudaErrorInvalidValue;
  emulator::allowed_shared[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* x, int byte, size_t count, cudaStream_t) {
  std::memset(x, byte, count);
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  emulator::Launch launch;
  launch.grid = config->gridDim;
  launch.block = config->blockDim;
  launch.cluster = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  launch.shared = config->dynamicSmemBytes;
  const auto allowed = emulator::allowed_shared.find(reinterpret_cast<const void*>(kernel));
  launch.shared_limit = allowed == emulator::allowed_shared.end() ? 48 * 1024 : allowed->second;
  launch.body = [=] { kernel(static_cast<Parameters>(arguments)...); };
  if (emulator::run(launch)) return cudaSuccess;
  return emulator::refused ? cudaErrorInvalidConfiguration : cudaErrorLaunchFailure;
}
