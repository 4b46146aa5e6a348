#include "gae.h"

#include <ATen/Parallel.h>

#include "check.h"
#include "kernels.h"

namespace rlhf_lightning {

namespace {
constexpr const char* kName = "gae";

template <typename T>
void run(
    const LossKernels<T>& kernel, const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& mask,
    double gamma, double lam, at::Tensor& advantages, at::Tensor& returns) {
  const int64_t steps = rewards.size(1);
  const int64_t blocks = (rewards.size(0) + 15) / 16;  // the kernel takes sixteen rows side by side
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * 16, last = std::min(end * 16, rewards.size(0)), offset = first * steps;
    kernel.gae({rewards.const_data_ptr<T>() + offset, values.const_data_ptr<T>() + offset,
                mask.const_data_ptr<bool>() + offset, advantages.mutable_data_ptr<T>() + offset,
                returns.mutable_data_ptr<T>() + offset, last - first, steps, static_cast<T>(gamma),
                static_cast<T>(gamma * lam)});
  });
}
}  // namespace

std::tuple<at::Tensor, at::Tensor> gae(
    const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& mask, double gamma, double lam) {
  check_float(kName, "rewards", rewards);
  check_float(kName, "values", values);
  check_dtype(kName, "mask", mask, at::kBool);
  check_dimensions(kName, "rewards", rewards, "[B, T]", 2);
  check_shape(kName, "values", values, rewards.sizes(), "rewards");
  check_device(kName, "values", values, rewards, "rewards");
  check_shape(kName, "mask", mask, rewards.sizes(), "rewards");
  check_device(kName, "mask", mask, rewards, "rewards");

  const auto type = compute_type({rewards, values});
  const auto r = rewards.to(type).contiguous(), v = values.to(type).contiguous(), m = mask.contiguous();
  auto advantages = at::empty(r.sizes(), r.options()), returns = at::empty(r.sizes(), r.options());
  if (r.numel() == 0) return {advantages, returns};
  if (type == at::kDouble) {
    run<double>(kernels().loss_double, r, v, m, gamma, lam, advantages, returns);
  } else {
    run<float>(kernels().loss_float, r, v, m, gamma, lam, advantages, returns);
  }
  return {advantages, returns};
}

}  // namespace rlhf_lightning
