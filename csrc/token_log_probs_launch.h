// Launches the CUDA kernels of token_log_probs and linear_token_log_probs: the softmax statistics of rows of logits, for one
// part of the columns at a time; the results from all parts; and the gradient of one part of the columns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "element.h"

namespace rlhf_lightning {

// Device memory. Row i starts at data + (i / inner) * outer_stride + (i % inner) * inner_stride, in elements; within a
// row the elements are dense.
struct LogitRows {
  const void* data;
  Element type;
  int64_t count;
  int64_t columns;  // of this part
  int64_t first;    // the token that this part's first column stands for
  int64_t inner;
  int64_t outer_stride;
  int64_t inner_stride;
};

// Device memory, [count] each, double for double logits, else float.
struct RowOutputs {
  void* log_probs;
  void* entropy;
  void* shift;
  void* log_sum;
};
struct RowInputs {
  const void* grad_log_probs;
  const void* grad_entropy;
  const void* entropy;
  const void* shift;
  const void* log_sum;
};

// The number of states that softmax_statistics writes for each row of `columns` columns, and the bytes of one state.
int64_t softmax_states(Element type, int64_t columns);
int64_t softmax_state_bytes(Element type);

// Writes the states of this part of all rows to `states`, [softmax_states, count]. Where this part has a row's token, it writes
// the token's logit to token_logits [count], double for double logits, else float.
cudaError_t softmax_statistics(
    const LogitRows& logits, const int64_t* tokens, double temperature, void* states, void* token_logits,
    cudaStream_t stream);

// Computes the results from the states of all parts, [states_count, count] in the order of the vocabulary. A token outside
// [0, vocabulary) fails a device-side assertion.
cudaError_t softmax_results(
    Element type, const void* states, int64_t states_count, const void* token_logits, const int64_t* tokens,
    int64_t vocabulary, int64_t count, double temperature, const RowOutputs& results, cudaStream_t stream);

// Writes the gradient of grad_log_probs . log_probs + grad_entropy . entropy with respect to this part of the logits: row i to
// out + i * out_stride, in the logits' type. out may be the logits' own memory.
cudaError_t softmax_gradient(
    const LogitRows& logits, const int64_t* tokens, double temperature, const RowInputs& rows, void* out,
    int64_t out_stride, cudaStream_t stream);

}  // namespace rlhf_lightning
