// PPO's clipped surrogate loss per token: the contract is in rlhf_lightning/ops/clipped_policy_loss.py.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace rlhf_lightning {

// (loss, clipped, slope); slope is d loss / d log_probs, elementwise, so that the backward is one product.
std::tuple<at::Tensor, at::Tensor, at::Tensor> clipped_policy_loss(
    const at::Tensor& log_probs, const at::Tensor& old_log_probs, const at::Tensor& advantages, double clip_low,
    double clip_high, std::optional<double> dual_clip);

}  // namespace rlhf_lightning
