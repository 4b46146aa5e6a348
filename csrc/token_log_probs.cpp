// Log-probabilities of tokens and entropy on the CPU, forward and backward: splits the rows over threads.
#include "token_log_probs.h"

#include <ATen/Parallel.h>

#include "check.h"
#include "large_memory.h"
#include "softmax_rows.h"

namespace rlhf_lightning {

namespace {
constexpr const char* kName = "token_log_probs";

// Where row i of [..., V] starts, for any strides of the leading dimensions: so a slice such as logits[:, :-1] needs no copy.
struct RowOffsets {
  explicit RowOffsets(const at::Tensor& x) : sizes(x.sizes().vec()), strides(x.strides().vec()) {}
  int64_t operator()(int64_t row) const {
    int64_t offset = 0;
    for (int64_t d = static_cast<int64_t>(sizes.size()) - 2; d >= 0; --d) {
      offset += row % sizes[d] * strides[d];
      row /= sizes[d];
    }
    return offset;
  }
  std::vector<int64_t> sizes, strides;
};

at::Tensor with_dense_rows(const at::Tensor& logits) {
  return logits.stride(-1) == 1 ? logits : logits.contiguous();
}
}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> token_log_probs(
    const at::Tensor& logits, const at::Tensor& tokens, double temperature) {
  check_logits(kName, logits, tokens, temperature);
  const auto x = with_dense_rows(logits), t = tokens.contiguous();
  const int64_t rows = t.numel(), vocabulary = x.size(-1);
  check_token_range(kName, t, vocabulary);
  auto results = empty_results(t.sizes(), x.options().dtype(compute_type({x})));
  const RowOffsets offset(x);
  const int64_t* token = t.const_data_ptr<int64_t>();
  with_softmax_kernels(x.scalar_type(), [&](const auto& kernel, auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const T* data = static_cast<const T*>(x.const_data_ptr());
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* row = data + offset(i);
        SoftmaxState whole, at_token;  // at_token is of one element: its max is the token's logit, in double
        kernel.statistics(row + token[i], 1, 1.0, at_token);
        kernel.statistics(row, vocabulary, 1 / temperature, whole);
        finish_row(whole, at_token.max, temperature, i, results);
      }
    });
  });
  return {results.log_probs, results.entropy, results.shift, results.log_sum};
}

at::Tensor token_log_probs_backward(
    const at::Tensor& grad_log_probs, const at::Tensor& grad_entropy, const at::Tensor& logits,
    const at::Tensor& tokens, const at::Tensor& entropy, const at::Tensor& shift, const at::Tensor& log_sum,
    double temperature) {
  check_logits(kName, logits, tokens, temperature);
  const auto type = compute_type({logits});
  check_rows(kName, {grad_log_probs, grad_entropy, entropy, shift, log_sum}, tokens, logits, "logits");
  const auto flat = [&](const at::Tensor& x) { return x.to(type).contiguous(); };
  const RowGradients gradients{flat(grad_log_probs), flat(grad_entropy), flat(entropy),
                               flat(shift),          flat(log_sum),      1 / temperature};
  const auto x = with_dense_rows(logits), t = tokens.contiguous();
  const int64_t rows = t.numel(), vocabulary = x.size(-1);
  check_token_range(kName, t, vocabulary);
  const LargeResult out = empty_large(x.sizes(), x.options());
  const RowOffsets offset(x);
  const int64_t* token = t.const_data_ptr<int64_t>();
  with_softmax_kernels(x.scalar_type(), [&](const auto& kernel, auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const T* data = static_cast<const T*>(x.const_data_ptr());
    const bool past_caches = out.streaming;
    T* result = static_cast<T*>(out.tensor.mutable_data_ptr());
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kernel.gradient(data + offset(i), vocabulary, gradients.row(i, token[i]), past_caches, result + i * vocabulary);
      }
    });
  });
  return out.tensor;
}

}  // namespace rlhf_lightning
