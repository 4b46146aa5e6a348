// Launches the CUDA kernel of gae, see gae.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "element.h"

namespace rlhf_lightning {

// Device memory, all [rows, steps] and dense.
struct GaeArrays {
  const void* rewards;
  const void* values;
  Element type;  // of rewards and values
  const bool* mask;
  void* advantages;  // double for double inputs, else float; so are the returns
  void* returns;
  int64_t rows;
  int64_t steps;
};

// Launches nothing for empty arrays.
cudaError_t launch_gae(const GaeArrays& arrays, double gamma, double lam, cudaStream_t stream);

}  // namespace rlhf_lightning
