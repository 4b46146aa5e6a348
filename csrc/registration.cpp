// Registers the operators: their schemas, their CPU implementations, their autocast rules, and the gradients of the clipped
// losses, whose calls are too short for a backward in Python. rlhf_lightning/ops/ registers the fake kernels and the other
// gradients, and each *_cuda.cpp its CUDA implementations.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "clipped_policy_loss.h"
#include "clipped_value_loss.h"
#include "gae.h"
#include "linear_cross_entropy.h"
#include "linear_token_log_probs.h"
#include "operation.h"
#include "sample_tokens.h"
#include "token_log_probs.h"

namespace rlhf_lightning {
namespace {

// Advantages and returns are targets: they have no gradient, whatever the inputs require.
std::tuple<at::Tensor, at::Tensor> gae_without_gradient(
    const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& mask, double gamma, double lam) {
  static const auto op = operation<decltype(gae)>("rlhf_lightning::gae");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(rewards, values, mask, gamma, lam);
}

ClippedLoss clipped_policy_loss_with_gradient(
    const at::Tensor& log_probs, const at::Tensor& old_log_probs, const at::Tensor& advantages, double clip_low,
    double clip_high, std::optional<double> dual_clip) {
  static const auto op = operation<decltype(clipped_policy_loss)>("rlhf_lightning::clipped_policy_loss");
  return with_gradient("clipped_policy_loss", log_probs, [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(log_probs, old_log_probs, advantages, clip_low, clip_high, dual_clip);
  });
}

ClippedLoss clipped_value_loss_with_gradient(
    const at::Tensor& values, const at::Tensor& old_values, const at::Tensor& returns, std::optional<double> clip) {
  static const auto op = operation<decltype(clipped_value_loss)>("rlhf_lightning::clipped_value_loss");
  return with_gradient("clipped_value_loss", values, [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(values, old_values, returns, clip);
  });
}

// Under autocast the hidden states may be bf16 while the weight is float32: both are cast, as for a matrix product.
template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_token_log_probs_autocast(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, double temperature) {
  static const auto op = operation<decltype(linear_token_log_probs)>("rlhf_lightning::linear_token_log_probs");
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto type = at::autocast::get_autocast_dtype(device);
  return op.call(
      at::autocast::cached_cast(type, hidden, device), at::autocast::cached_cast(type, weight, device), tokens,
      temperature);
}

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_autocast(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, const at::Tensor& token_weights,
    double temperature, bool hidden_needed, bool weight_needed) {
  static const auto op = operation<decltype(linear_cross_entropy)>("rlhf_lightning::linear_cross_entropy");
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto type = at::autocast::get_autocast_dtype(device);
  return op.call(
      at::autocast::cached_cast(type, hidden, device), at::autocast::cached_cast(type, weight, device), tokens,
      token_weights, temperature, hidden_needed, weight_needed);
}

}  // namespace

TORCH_LIBRARY(rlhf_lightning, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam) -> (Tensor, Tensor)", tags);
  m.def(
      "token_log_probs(Tensor logits, Tensor tokens, float temperature) -> (Tensor, Tensor, Tensor, Tensor)", tags);
  m.def(
      "token_log_probs_backward(Tensor grad_log_probs, Tensor grad_entropy, Tensor logits, Tensor tokens, "
      "Tensor entropy, Tensor shift, Tensor log_sum, float temperature) -> Tensor", tags);
  m.def(
      "linear_token_log_probs(Tensor hidden, Tensor weight, Tensor tokens, float temperature) "
      "-> (Tensor, Tensor, Tensor, Tensor)", tags);
  m.def(
      "linear_token_log_probs_backward(Tensor grad_log_probs, Tensor grad_entropy, Tensor hidden, Tensor weight, "
      "Tensor tokens, Tensor entropy, Tensor shift, Tensor log_sum, float temperature, bool hidden_needed, "
      "bool weight_needed) -> (Tensor, Tensor)", tags);
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor tokens, Tensor token_weights, float temperature, "
      "bool hidden_needed, bool weight_needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", tags);
  m.def(
      "sample_tokens(Tensor logits, Tensor draws, float temperature, int top_k, float top_p) "
      "-> (Tensor, Tensor, Tensor)", tags);
  m.def(
      "clipped_policy_loss(Tensor log_probs, Tensor old_log_probs, Tensor advantages, float clip_low, float clip_high, "
      "float? dual_clip) -> (Tensor, Tensor, Tensor)", tags);
  m.def(
      "clipped_value_loss(Tensor values, Tensor old_values, Tensor returns, float? clip) -> (Tensor, Tensor, Tensor)",
      tags);
  m.def("clipped_loss_backward(Tensor grad_loss, Tensor slope, ScalarType dtype) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(rlhf_lightning, CPU, m) {
  m.impl("gae", &gae);
  m.impl("token_log_probs", &token_log_probs);
  m.impl("token_log_probs_backward", &token_log_probs_backward);
  m.impl("linear_token_log_probs", &linear_token_log_probs);
  m.impl("linear_token_log_probs_backward", &linear_token_log_probs_backward);
  m.impl("linear_cross_entropy", &linear_cross_entropy);
  m.impl("sample_tokens", &sample_tokens);
  m.impl("clipped_policy_loss", &clipped_policy_loss);
  m.impl("clipped_value_loss", &clipped_value_loss);
  m.impl("clipped_loss_backward", &clipped_loss_backward);
}

TORCH_LIBRARY_IMPL(rlhf_lightning, CompositeExplicitAutograd, m) {
  m.impl("clipped_loss_backward", &clipped_loss_backward_composed);
}

TORCH_LIBRARY_IMPL(rlhf_lightning, Autograd, m) {
  m.impl("gae", &gae_without_gradient);
  m.impl("clipped_policy_loss", &clipped_policy_loss_with_gradient);
  m.impl("clipped_value_loss", &clipped_value_loss_with_gradient);
}

TORCH_LIBRARY_IMPL(rlhf_lightning, AutocastCPU, m) {
  m.impl("linear_token_log_probs", &linear_token_log_probs_autocast<c10::DispatchKey::AutocastCPU, c10::kCPU>);
  m.impl("linear_cross_entropy", &linear_cross_entropy_autocast<c10::DispatchKey::AutocastCPU, c10::kCPU>);
}

TORCH_LIBRARY_IMPL(rlhf_lightning, AutocastCUDA, m) {
  m.impl("linear_token_log_probs", &linear_token_log_probs_autocast<c10::DispatchKey::Autocast, c10::kCUDA>);
  m.impl("linear_cross_entropy", &linear_cross_entropy_autocast<c10::DispatchKey::Autocast, c10::kCUDA>);
}

}  // namespace rlhf_lightning
