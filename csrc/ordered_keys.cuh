// Floats as unsigned integers of the same order, for radix selection, and a filter by such keys.
#pragma once

#include "device.cuh"

namespace rlhf_lightning {

__device__ __forceinline__ unsigned int ordered_key(float x) {
  const unsigned int bits = __float_as_uint(x + 0.0f);  // -0 is 0
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ unsigned long long ordered_key(double x) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(x + 0.0));
  return bits ^ (bits >> 63 != 0 ? ~0ull : 1ull << 63);
}
__device__ __forceinline__ float number_of(unsigned int key) {
  return __uint_as_float(key ^ (key >> 31 != 0 ? 0x80000000u : 0xffffffffu));
}
__device__ __forceinline__ double number_of(unsigned long long key) {
  return __longlong_as_double(static_cast<long long>(key ^ (key >> 63 != 0 ? 1ull << 63 : ~0ull)));
}

// Keys above `key` pass, and those that equal it up to index `last`.
template <typename A>
struct Filter {
  decltype(ordered_key(A())) key = 0;
  int last = 0x7fffffff;
  __device__ __forceinline__ bool operator()(A x, int index) const {
    const auto own = ordered_key(x);
    return own > key || (own == key && index <= last);
  }
};

}  // namespace rlhf_lightning
