// The LM head fused with a weighted cross-entropy: the contract is in rlhf_lightning/ops/linear_cross_entropy.py.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace rlhf_lightning {

// Returns (loss, log_probs, entropy, grad_hidden, grad_weight). The last two are the gradients of the loss, in the shapes and
// dtypes of hidden and weight, empty [0] where not needed. Runs on any device that has linear_token_log_probs.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& tokens, const at::Tensor& token_weights,
    double temperature, bool hidden_needed, bool weight_needed);

}  // namespace rlhf_lightning
