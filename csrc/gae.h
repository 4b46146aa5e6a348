// Generalised advantage estimation: the contract is in rlhf_lightning/ops/gae.py.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace rlhf_lightning {

void check_gae(const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& mask);

std::tuple<at::Tensor, at::Tensor> gae(
    const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& mask, double gamma, double lam);

}  // namespace rlhf_lightning
