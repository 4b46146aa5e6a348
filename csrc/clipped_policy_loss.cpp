#include "clipped_policy_loss.h"

#include <ATen/Parallel.h>

#include <limits>

#include "check.h"
#include "kernels.h"

namespace rlhf_lightning {

namespace {
constexpr const char* kName = "clipped_policy_loss";
constexpr int64_t kGrain = 8192;  // elements worth a thread

template <typename T>
void run(
    const LossKernels<T>& kernel, const at::Tensor& log_probs, const at::Tensor& old_log_probs,
    const at::Tensor& advantages, double clip_low, double clip_high, double dual_clip, at::Tensor& loss,
    at::Tensor& clipped, at::Tensor& slope) {
  const PolicyLoss<T> arguments{
      log_probs.const_data_ptr<T>(), old_log_probs.const_data_ptr<T>(), advantages.const_data_ptr<T>(),
      loss.mutable_data_ptr<T>(), clipped.mutable_data_ptr<bool>(), slope.mutable_data_ptr<T>(),
      static_cast<T>(1 - clip_low), static_cast<T>(1 + clip_high), static_cast<T>(dual_clip)};
  at::parallel_for(0, loss.numel(), kGrain, [&](int64_t begin, int64_t end) { kernel.policy(arguments, begin, end); });
}
}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> clipped_policy_loss(
    const at::Tensor& log_probs, const at::Tensor& old_log_probs, const at::Tensor& advantages, double clip_low,
    double clip_high, std::optional<double> dual_clip) {
  check_float(kName, "log_probs", log_probs);
  check_float(kName, "old_log_probs", old_log_probs);
  check_shape(kName, "old_log_probs", old_log_probs, log_probs.sizes(), "log_probs");
  check_device(kName, "old_log_probs", old_log_probs, log_probs, "log_probs");
  check_float(kName, "advantages", advantages);
  check_shape(kName, "advantages", advantages, log_probs.sizes(), "log_probs");
  check_device(kName, "advantages", advantages, log_probs, "log_probs");

  const auto type = compute_type({log_probs, old_log_probs, advantages});
  const auto l = log_probs.to(type).contiguous(), o = old_log_probs.to(type).contiguous();
  const auto a = advantages.to(type).contiguous();
  auto loss = at::empty(l.sizes(), l.options()), slope = at::empty(l.sizes(), l.options());
  auto clipped = at::empty(l.sizes(), l.options().dtype(at::kBool));
  const double dual = dual_clip.value_or(std::numeric_limits<double>::infinity());
  if (type == at::kDouble) {
    run<double>(kernels().loss_double, l, o, a, clip_low, clip_high, dual, loss, clipped, slope);
  } else {
    run<float>(kernels().loss_float, l, o, a, clip_low, clip_high, dual, loss, clipped, slope);
  }
  return {loss, clipped, slope};
}

}  // namespace rlhf_lightning
