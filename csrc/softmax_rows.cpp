// How a row's softmax statistics become its results, and saved results its gradient, on the CPU.
#include "softmax_rows.h"

#include <cmath>

#include "check.h"

namespace rlhf_lightning {

RowResults empty_results(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return {at::empty(sizes, options), at::empty(sizes, options), at::empty(sizes, options), at::empty(sizes, options)};
}

namespace {
template <typename T>
void write(at::Tensor& x, int64_t index, double value) {
  x.mutable_data_ptr<T>()[index] = static_cast<T>(value);
}

}  // namespace

double at_index(const at::Tensor& x, int64_t index) {
  return x.scalar_type() == at::kDouble ? x.const_data_ptr<double>()[index] : x.const_data_ptr<float>()[index];
}

void finish_row(const SoftmaxState& state, double token_logit, double temperature, int64_t row, RowResults& results) {
  const auto put = results.log_probs.scalar_type() == at::kDouble ? &write<double> : &write<float>;
  const double logarithm = std::log(state.sum);
  put(results.log_probs, row, (token_logit - state.max) / temperature - logarithm);
  put(results.entropy, row, logarithm - state.weighted / state.sum);
  put(results.shift, row, state.max);
  put(results.log_sum, row, logarithm);
}

RowGradient RowGradients::row(int64_t index, int64_t token) const {
  return {inverse_temperature,          at_index(shift, index),          at_index(log_sum, index),
          at_index(entropy, index),     at_index(grad_log_probs, index), at_index(grad_entropy, index),
          token};
}

void check_token_range(const char* op, const at::Tensor& tokens, int64_t vocabulary) {
  const int64_t* t = tokens.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tokens.numel(); ++i) {
    TORCH_CHECK_VALUE(t[i] >= 0 && t[i] < vocabulary, op, ": tokens must be in [0, ", vocabulary, "), got ", t[i]);
  }
}

}  // namespace rlhf_lightning
