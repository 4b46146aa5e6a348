// The LM head and token log-probabilities on the CPU, forward and backward: one chunk of the vocabulary's logits at a time.
#include "linear_token_log_probs.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "add_product.h"
#include "check.h"
#include "large_memory.h"
#include "softmax_rows.h"

namespace rlhf_lightning {

namespace {
constexpr const char* kName = "linear_token_log_probs";
constexpr int64_t kNarrowest = 256;  // the fewest columns of a chunk, whatever the number of rows

// The columns of a chunk of the vocabulary. A chunk takes all rows: the gradient of its part of the weight is then one product,
// and only the gradient of hidden is a sum over chunks. A chunk of logits takes 4 MiB, of 16-bit ones 1 MiB. As measured, the
// products are then as fast as for the whole vocabulary, and the caches still hold the logits when their statistics are taken.
int64_t chunk_width(int64_t rows, const at::Tensor& weight) {
  const int64_t held = (weight.element_size() == 2 ? int64_t{1} << 20 : int64_t{1} << 22) / weight.element_size();
  return std::min(weight.size(0), std::max(kNarrowest, held / std::max<int64_t>(rows, 1)));
}

// The start of the buffer as a dense [rows, width].
at::Tensor chunk_of(const at::Tensor& buffer, int64_t rows, int64_t width) {
  return buffer.narrow(0, 0, rows * width).view({rows, width});
}
}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_token_log_probs(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, double temperature) {
  check_language_model_head(kName, hidden, weight, tokens, temperature);
  const auto t = tokens.contiguous();
  const int64_t rows = hidden.size(0), vocabulary = weight.size(0), width = chunk_width(rows, weight);
  check_token_range(kName, t, vocabulary);
  auto results = empty_results(t.sizes(), hidden.options().dtype(compute_type({hidden})));
  std::vector<SoftmaxState> states(rows);
  std::vector<double> token_logits(rows);
  const int64_t* token = t.const_data_ptr<int64_t>();
  const auto buffer = at::empty({rows * width}, hidden.options());
  for (int64_t first = 0; first < vocabulary && rows > 0; first += width) {
    const int64_t columns = std::min(width, vocabulary - first);
    auto logits = chunk_of(buffer, rows, columns);
    at::mm_out(logits, hidden, weight.narrow(0, first, columns).t());
    with_softmax_kernels(logits.scalar_type(), [&](const auto& kernel, auto* null) {
      using T = std::remove_pointer_t<decltype(null)>;
      const T* data = static_cast<const T*>(logits.const_data_ptr());
      at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t column = token[i] - first;
          if (column >= 0 && column < columns) {
            SoftmaxState at_token;  // of one element: its max is the token's logit, in double
            kernel.statistics(data + i * columns + column, 1, 1.0, at_token);
            token_logits[i] = at_token.max;
          }
          kernel.statistics(data + i * columns, columns, 1 / temperature, states[i]);
        }
      });
    });
  }
  for (int64_t i = 0; i < rows; ++i) finish_row(states[i], token_logits[i], temperature, i, results);
  return {results.log_probs, results.entropy, results.shift, results.log_sum};
}

std::tuple<at::Tensor, at::Tensor> linear_token_log_probs_backward(
    const at::Tensor& grad_log_probs, const at::Tensor& grad_entropy, const at::Tensor& hidden,
    const at::Tensor& weight, const at::Tensor& tokens, const at::Tensor& entropy, const at::Tensor& shift,
    const at::Tensor& log_sum, double temperature, bool hidden_needed, bool weight_needed) {
  check_language_model_head(kName, hidden, weight, tokens, temperature);
  const auto type = compute_type({hidden});
  check_rows(kName, {grad_log_probs, grad_entropy, entropy, shift, log_sum}, tokens, hidden, "hidden");
  const auto flat = [&](const at::Tensor& x) { return x.to(type).contiguous(); };
  const RowGradients gradients{flat(grad_log_probs), flat(grad_entropy), flat(entropy),
                               flat(shift),          flat(log_sum),      1 / temperature};
  const auto t = tokens.contiguous();
  const int64_t rows = hidden.size(0), vocabulary = weight.size(0), width = chunk_width(rows, weight);
  check_token_range(kName, t, vocabulary);
  const int64_t* token = t.const_data_ptr<int64_t>();
  // A sum over chunks: in float32 where the operands have 16 bits.
  auto grad_hidden = at::zeros(hidden_needed ? hidden.sizes() : at::IntArrayRef{0}, hidden.options().dtype(type));
  auto grad_weight = empty_large(weight_needed ? weight.sizes() : at::IntArrayRef{0}, weight.options()).tensor;
  if (rows == 0) return {grad_hidden.to(hidden.scalar_type()), grad_weight.zero_()};
  const auto buffer = at::empty({rows * width}, hidden.options());
  for (int64_t first = 0; first < vocabulary; first += width) {
    const int64_t columns = std::min(width, vocabulary - first);
    auto chunk = chunk_of(buffer, rows, columns);  // the logits, then their gradients
    const auto weights = weight.narrow(0, first, columns);
    at::mm_out(chunk, hidden, weights.t());
    with_softmax_kernels(chunk.scalar_type(), [&](const auto& kernel, auto* null) {
      using T = std::remove_pointer_t<decltype(null)>;
      T* data = static_cast<T*>(chunk.mutable_data_ptr());
      at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          T* row = data + i * columns;
          kernel.gradient(row, columns, gradients.row(i, token[i] - first), false, row);
        }
      });
    });
    if (hidden_needed && columns == vocabulary) grad_hidden = at::mm(chunk, weights);
    if (hidden_needed && columns < vocabulary) add_product(grad_hidden, chunk, weights);
    if (weight_needed) {
      auto out = grad_weight.narrow(0, first, columns);
      at::mm_out(out, chunk.t(), hidden);
    }
  }
  return {grad_hidden.to(hidden.scalar_type()), grad_weight};
}

}  // namespace rlhf_lightning
