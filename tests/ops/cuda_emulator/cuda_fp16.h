// A stand-in for CUDA's header of this name, with the compiler's own 16-bit float.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) { return static_cast<float>(emulated_bits<_Float16>(x.bits)); }
inline __half __float2half_rn(float x) { return {emulated_bits<uint16_t>(static_cast<_Float16>(x))}; }
