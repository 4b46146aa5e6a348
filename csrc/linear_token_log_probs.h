// The LM head fused with token log-probabilities: the contract is in rlhf_lightning/ops/linear_token_log_probs.py.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace rlhf_lightning {

// Returns (log_probs, entropy, shift, log_sum). The last two are saved for the backward, see RowResults.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_token_log_probs(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, double temperature);

// The gradients of hidden and weight, in their shapes and dtypes; empty [0] where not needed.
std::tuple<at::Tensor, at::Tensor> linear_token_log_probs_backward(
    const at::Tensor& grad_log_probs, const at::Tensor& grad_entropy, const at::Tensor& hidden,
    const at::Tensor& weight, const at::Tensor& tokens, const at::Tensor& entropy, const at::Tensor& shift,
    const at::Tensor& log_sum, double temperature, bool hidden_needed, bool weight_needed);

}  // namespace rlhf_lightning
