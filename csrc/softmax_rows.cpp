#include "softmax_rows.h"

#include <cmath>

#include "check.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rlhf_lightning {

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  auto result = at::empty(sizes, options);
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  if (result.nbytes() >= 8 * kHugePage) {
    const auto start = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
    const uintptr_t first = (start + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t last = (start + result.nbytes()) & ~(kHugePage - 1);
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal changes nothing
  }
#endif
  return result;
}

RowResults empty_results(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return {at::empty(sizes, options), at::empty(sizes, options), at::empty(sizes, options), at::empty(sizes, options)};
}

namespace {
template <typename T>
void write_results(
    const std::vector<SoftmaxState>& states, const std::vector<double>& token_logits, double temperature,
    RowResults& results) {
  T* log_probs = results.log_probs.mutable_data_ptr<T>();
  T* entropy = results.entropy.mutable_data_ptr<T>();
  T* shift = results.shift.mutable_data_ptr<T>();
  T* log_sum = results.log_sum.mutable_data_ptr<T>();
  for (size_t i = 0; i < states.size(); ++i) {
    const double logarithm = std::log(states[i].sum);
    log_probs[i] = static_cast<T>((token_logits[i] - states[i].max) / temperature - logarithm);
    entropy[i] = static_cast<T>(logarithm - states[i].weighted / states[i].sum);
    shift[i] = static_cast<T>(states[i].max);
    log_sum[i] = static_cast<T>(logarithm);
  }
}

double at_index(const at::Tensor& x, int64_t index) {
  return x.scalar_type() == at::kDouble ? x.const_data_ptr<double>()[index] : x.const_data_ptr<float>()[index];
}
}  // namespace

void finish_rows(
    const std::vector<SoftmaxState>& states, const std::vector<double>& token_logits, double temperature,
    RowResults& results) {
  if (results.log_probs.scalar_type() == at::kDouble) {
    write_results<double>(states, token_logits, temperature, results);
  } else {
    write_results<float>(states, token_logits, temperature, results);
  }
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
