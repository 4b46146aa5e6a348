// The LM head and a weighted cross-entropy, with the gradients computed in the forward: on the CPU by tiles of rows, on other
// devices by linear_token_log_probs and its backward.
#include "linear_cross_entropy.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "check.h"
#include "large_memory.h"
#include "linear_token_log_probs.h"
#include "operation.h"
#include "softmax_rows.h"

namespace rlhf_lightning {

namespace {
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kName = "linear_cross_entropy";

// The rows of a tile, whose logits are held at a time. Every tile reads the weight twice and adds to its whole gradient. As
// measured, the products are a quarter slower with 128 rows and two thirds slower with 48.
constexpr int64_t kTile = 256;

void check(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, const at::Tensor& token_weights,
    double temperature) {
  check_language_model_head(kName, hidden, weight, tokens, temperature);
  check_float(kName, "token_weights", token_weights);
  check_shape(kName, "token_weights", token_weights, tokens.sizes(), "tokens");
  check_device(kName, "token_weights", token_weights, hidden, "hidden");
}

// Overwrites rows of logits by the gradients of the loss, and writes the rows' results from row `first` on.
void logits_to_gradients(
    at::Tensor& logits, const int64_t* tokens, const at::Tensor& token_weights, double temperature, int64_t first,
    RowResults& results) {
  const int64_t vocabulary = logits.size(1);
  with_softmax_kernels(logits.scalar_type(), [&](const auto& kernel, auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    T* data = static_cast<T*>(logits.mutable_data_ptr());
    at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* row = data + i * vocabulary;
        const int64_t token = tokens[first + i];
        SoftmaxState whole, at_token;  // at_token is of one element: its max is the token's logit, in double
        kernel.statistics(row + token, 1, 1.0, at_token);
        kernel.statistics(row, vocabulary, 1 / temperature, whole);
        finish_row(whole, at_token.max, temperature, first + i, results);
        const double slope = -at_index(token_weights, first + i);
        kernel.gradient(row, vocabulary, {1 / temperature, whole.max, std::log(whole.sum), 0, slope, 0, token}, false, row);
      }
    });
  });
}

at::Tensor weighted_loss(const at::Tensor& token_weights, const at::Tensor& log_probs) {
  double sum = 0;
  for (int64_t i = 0; i < log_probs.numel(); ++i) sum -= at_index(token_weights, i) * at_index(log_probs, i);
  return at::scalar_tensor(sum, log_probs.options());
}

// By linear_token_log_probs and its backward, on any device that has them: four products, and little memory.
Results by_chunks(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, const at::Tensor& token_weights,
    double temperature, bool hidden_needed, bool weight_needed) {
  static const auto forward = operation<decltype(linear_token_log_probs)>("rlhf_lightning::linear_token_log_probs");
  static const auto backward =
      operation<decltype(linear_token_log_probs_backward)>("rlhf_lightning::linear_token_log_probs_backward");
  const auto [log_probs, entropy, shift, log_sum] = forward.call(hidden, weight, tokens, temperature);
  const auto weights = token_weights.to(log_probs.scalar_type());
  auto grad_hidden = at::empty({0}, hidden.options()), grad_weight = at::empty({0}, weight.options());
  if (hidden_needed || weight_needed) {
    std::tie(grad_hidden, grad_weight) = backward.call(
        weights.neg(), at::zeros_like(entropy), hidden, weight, tokens, entropy, shift, log_sum, temperature,
        hidden_needed, weight_needed);
  }
  return {at::dot(weights, log_probs).neg(), log_probs, entropy, grad_hidden, grad_weight};
}

}  // namespace

Results linear_cross_entropy(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, const at::Tensor& token_weights,
    double temperature, bool hidden_needed, bool weight_needed) {
  check(hidden, weight, tokens, token_weights, temperature);
  const auto t = tokens.contiguous();
  const int64_t rows = hidden.size(0), vocabulary = weight.size(0), tiles = (rows + kTile - 1) / kTile;
  if (t.is_cpu()) check_token_range(kName, t, vocabulary);
  // Sums over tiles would lose digits in 16 bits; in 32 bits they would cost more memory than the logits, and all the time
  // that tiles save.
  const bool by_tiles = t.is_cpu() && rows > 0 && (hidden_needed || weight_needed) &&
                        (tiles == 1 || hidden.element_size() > 2);
  if (!by_tiles) return by_chunks(hidden, weight, t, token_weights, temperature, hidden_needed, weight_needed);
  const auto type = compute_type({hidden});
  const auto weights = token_weights.to(type).contiguous();
  auto results = empty_results(t.sizes(), hidden.options().dtype(type));
  auto grad_hidden = at::empty(hidden_needed ? hidden.sizes() : at::IntArrayRef{0}, hidden.options());
  auto grad_weight = empty_large(weight_needed ? weight.sizes() : at::IntArrayRef{0}, weight.options()).tensor;
  const int64_t tile = (rows + tiles - 1) / tiles;
  const auto buffer = empty_large({tile, vocabulary}, hidden.options()).tensor;
  for (int64_t first = 0; first < rows; first += tile) {
    const int64_t count = std::min(tile, rows - first);
    const auto states = hidden.narrow(0, first, count);
    auto logits = buffer.narrow(0, 0, count);
    at::mm_out(logits, states, weight.t());
    logits_to_gradients(logits, t.const_data_ptr<int64_t>(), weights, temperature, first, results);
    if (hidden_needed) {
      auto out = grad_hidden.narrow(0, first, count);
      at::mm_out(out, logits, weight);
    }
    if (weight_needed && first == 0) at::mm_out(grad_weight, logits.t(), states);
    if (weight_needed && first > 0) grad_weight.addmm_(logits.t(), states);
  }
  return {weighted_loss(weights, results.log_probs), results.log_probs, results.entropy, grad_hidden, grad_weight};
}

}  // namespace rlhf_lightning
