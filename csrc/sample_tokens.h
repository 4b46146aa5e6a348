// Sampling a token from each row of logits: the contract is in rlhf_lightning/ops/sample_tokens.py.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace rlhf_lightning {

// (tokens, log_probs, entropy)
std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_tokens(
    const at::Tensor& logits, const at::Tensor& draws, double temperature, int64_t top_k, double top_p);

// What every device's implementation asks of its arguments.
void check_sample_tokens(
    const at::Tensor& logits, const at::Tensor& draws, double temperature, int64_t top_k, double top_p);

}  // namespace rlhf_lightning
