// PPO's clipped value loss per token: the contract is in rlhf_lightning/ops/clipped_value_loss.py.
#pragma once

#include <optional>

#include "clipped_losses.h"

namespace rlhf_lightning {

ClippedLoss clipped_value_loss(
    const at::Tensor& values, const at::Tensor& old_values, const at::Tensor& returns, std::optional<double> clip);

}  // namespace rlhf_lightning
