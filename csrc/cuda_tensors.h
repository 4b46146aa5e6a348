// From tensors to the CUDA launchers, and from their errors to exceptions.
#pragma once

#include <ATen/ATen.h>
#include <cuda_runtime_api.h>

#include "element.h"

namespace rlhf_lightning {

// Of one of the types that check_float lets through.
inline Element element_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Element::kFloat;
    case at::kBFloat16: return Element::kBfloat16;
    case at::kHalf: return Element::kHalf;
    default: return Element::kDouble;
  }
}

inline void check_launch(const char* op, cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();  // or the next operator would report it again
  TORCH_CHECK_VALUE(
      error != cudaErrorInvalidConfiguration, op, ": one launch cannot hold so many rows or elements, for it has at most ",
      "2^31 - 1 blocks: split them");
  TORCH_CHECK(error == cudaSuccess, op, ": a CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

}  // namespace rlhf_lightning
