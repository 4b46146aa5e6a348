// What token_log_probs and linear_token_log_probs share on the CPU: from a row's statistics to its results and gradients.
#pragma once

#include <ATen/ATen.h>

#include "kernels.h"

namespace rlhf_lightning {

// The results of each row, and what the backward needs of it, all of the outputs' shape and dtype. With p the softmax of
// x / temperature: log p = (x - shift) / temperature - log_sum. Their sum would lose digits where the logits are large, so
// shift and log_sum are saved apart.
struct RowResults {
  at::Tensor log_probs;
  at::Tensor entropy;
  at::Tensor shift;
  at::Tensor log_sum;
};

// Calls f with the kernels of the type and a null pointer of the type.
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

RowResults empty_results(at::IntArrayRef sizes, const at::TensorOptions& options);

// One element of a dense tensor of float32 or float64.
double at_index(const at::Tensor& x, int64_t index);

// Computes and writes the results of one row from its state and its token's logit.
void finish_row(const SoftmaxState& state, double token_logit, double temperature, int64_t row, RowResults& results);

// The incoming gradients and saved results of all rows, in the compute dtype, and what one row needs of them.
struct RowGradients {
  at::Tensor grad_log_probs, grad_entropy, entropy, shift, log_sum;  // [N]
  double inverse_temperature;
  RowGradient row(int64_t index, int64_t token) const;
};

void check_token_range(const char* op, const at::Tensor& tokens, int64_t vocabulary);

}  // namespace rlhf_lightning
