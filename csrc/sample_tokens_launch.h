// Launches the CUDA kernel of sample_tokens, see sample_tokens.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "element.h"

namespace rlhf_lightning {

// Device memory. Rows are `stride` elements apart, and dense within; columns are in (0, 2^30).
struct SampleArrays {
  const void* logits;
  Element type;
  int64_t rows;
  int64_t columns;
  int64_t stride;
  const double* draws;  // [rows], as are the results
  int64_t* tokens;
  void* log_probs;  // double for double logits, else float
  void* entropy;
};

// Temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens. Launches nothing for no rows.
cudaError_t launch_sample_tokens(
    const SampleArrays& arrays, double temperature, int64_t top_k, double top_p, cudaStream_t stream);

}  // namespace rlhf_lightning
