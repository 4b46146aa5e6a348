#include "linear_cross_entropy.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "check.h"
#include "linear_token_log_probs.h"
#include "softmax_rows.h"

namespace rlhf_lightning {

namespace {
constexpr const char* kName = "linear_cross_entropy";

template <typename Signature>
auto operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, const at::Tensor& token_weights,
    double temperature, bool hidden_needed, bool weight_needed) {
  check_language_model_head(kName, hidden, weight, tokens, temperature);
  check_float(kName, "token_weights", token_weights);
  check_shape(kName, "token_weights", token_weights, tokens.sizes(), "tokens");
  check_device(kName, "token_weights", token_weights, hidden, "hidden");
  if (tokens.is_cpu()) check_token_range(kName, tokens.contiguous(), weight.size(0));
  static const auto forward = operation<decltype(linear_token_log_probs)>("rlhf_lightning::linear_token_log_probs");
  static const auto backward =
      operation<decltype(linear_token_log_probs_backward)>("rlhf_lightning::linear_token_log_probs_backward");
  const auto [log_probs, entropy, shift, log_sum] = forward.call(hidden, weight, tokens, temperature);
  const auto weights = token_weights.to(log_probs.scalar_type());
  const auto loss = at::dot(weights, log_probs).neg();
  auto grad_hidden = at::empty({0}, hidden.options()), grad_weight = at::empty({0}, weight.options());
  if (hidden_needed || weight_needed) {
    std::tie(grad_hidden, grad_weight) = backward.call(
        weights.neg(), at::zeros_like(entropy), hidden, weight, tokens, entropy, shift, log_sum, temperature,
        hidden_needed, weight_needed);
  }
  return {loss, log_probs, entropy, grad_hidden, grad_weight};
}

}  // namespace rlhf_lightning
