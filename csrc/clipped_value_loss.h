// PPO's clipped value loss per token: the contract is in rlhf_lightning/ops/clipped_value_loss.py.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace rlhf_lightning {

// (loss, clipped, slope); slope is d loss / d values, elementwise, so that the backward is one product.
std::tuple<at::Tensor, at::Tensor, at::Tensor> clipped_value_loss(
    const at::Tensor& values, const at::Tensor& old_values, const at::Tensor& returns, std::optional<double> clip);

}  // namespace rlhf_lightning
