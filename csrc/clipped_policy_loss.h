// PPO's clipped surrogate loss per token: the contract is in rlhf_lightning/ops/clipped_policy_loss.py.
#pragma once

#include <optional>

#include "clipped_losses.h"

namespace rlhf_lightning {

ClippedLoss clipped_policy_loss(
    const at::Tensor& log_probs, const at::Tensor& old_log_probs, const at::Tensor& advantages, double clip_low,
    double clip_high, std::optional<double> dual_clip);

}  // namespace rlhf_lightning
