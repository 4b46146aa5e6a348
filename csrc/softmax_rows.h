// What token_log_probs and linear_token_log_probs share: rows of logits, their softmax statistics and their gradients.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "kernels.h"

namespace rlhf_lightning {

// What is kept of each row for the backward, all of the outputs' shape and dtype. With p the softmax of x / temperature:
// log p = (x - shift) / temperature - log_sum. Kept apart because their sum would lose digits where the logits are large.
struct RowResults {
  at::Tensor log_probs;
  at::Tensor entropy;
  at::Tensor shift;
  at::Tensor log_sum;
};

// Calls f(kernels of this type, a null pointer of this type).
template <typename F>
void with_softmax_kernels(at::ScalarType type, const F& f) {
  const Kernels& k = kernels();
  switch (type) {
    case at::kFloat: return f(k.softmax_float, static_cast<float*>(nullptr));
    case at::kBFloat16: return f(k.softmax_bfloat16, static_cast<Bfloat16*>(nullptr));
    case at::kHalf: return f(k.softmax_float16, static_cast<Float16*>(nullptr));
    default: return f(k.softmax_double, static_cast<double*>(nullptr));
  }
}

// Memory for a large result. Its pages are touched for the first time by the kernel that writes them, which costs more than
// the arithmetic unless they are huge.
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

RowResults empty_results(at::IntArrayRef sizes, const at::TensorOptions& options);

// Writes the results of all rows from their states and the logits of their tokens.
void finish_rows(
    const std::vector<SoftmaxState>& states, const std::vector<double>& token_logits, double temperature,
    RowResults& results);

// One row's view of the saved results and incoming gradients, each 1-dimensional and of the compute dtype.
struct RowGradients {
  at::Tensor grad_log_probs, grad_entropy, entropy, shift, log_sum;  // [N]
  double inverse_temperature;
  RowGradient row(int64_t index, int64_t token) const;
};

void check_token_range(const char* op, const at::Tensor& tokens, int64_t vocabulary);

}  // namespace rlhf_lightning
