// Log-probabilities of tokens, and entropy: the contract is in rlhf_lightning/ops/token_log_probs.py.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace rlhf_lightning {

// Returns (log_probs, entropy, shift, log_sum). The last two are saved for the backward, see RowResults.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> token_log_probs(
    const at::Tensor& logits, const at::Tensor& tokens, double temperature);

// The gradient of logits, in their shape and dtype.
at::Tensor token_log_probs_backward(
    const at::Tensor& grad_log_probs, const at::Tensor& grad_entropy, const at::Tensor& logits,
    const at::Tensor& tokens, const at::Tensor& entropy, const at::Tensor& shift, const at::Tensor& log_sum,
    double temperature);

}  // namespace rlhf_lightning
