// Sampling a token from each row of logits: the contract is in rlhf_lightning/ops/sample_tokens.py.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace rlhf_lightning {

// Returns (tokens, log_probs, entropy).
std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_tokens(
    const at::Tensor& logits, const at::Tensor& draws, double temperature, int64_t top_k, double top_p);

// The checks of the arguments that the implementations of all devices share.
void check_sample_tokens(
    const at::Tensor& logits, const at::Tensor& draws, double temperature, int64_t top_k, double top_p);

}  // namespace rlhf_lightning
