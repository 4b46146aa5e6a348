// From torch's dtypes to the launchers' element types, and from CUDA errors to exceptions.
#pragma once

#include <ATen/ATen.h>
#include <cuda_runtime_api.h>

#include "element.h"

namespace rlhf_lightning {

// `type` has passed check_float.
inline Element element_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Element::kFloat;
    case at::kBFloat16: return Element::kBfloat16;
    case at::kHalf: return Element::kHalf;
    default: return Element::kDouble;
  }
}

inline void check_launch(const char* op, cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();  // clear it, or the next operator would report it again
  TORCH_CHECK_VALUE(
      error != cudaErrorInvalidConfiguration, op, ": one launch cannot hold so many rows or elements, for it has at most ",
      "2^31 - 1 blocks: split them");
  TORCH_CHECK(error == cudaSuccess, op, ": a CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

}  // namespace rlhf_lightning
