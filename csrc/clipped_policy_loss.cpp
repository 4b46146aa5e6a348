// PPO's clipped surrogate loss on the CPU: checks the arguments and splits the elements over threads.
#include "clipped_policy_loss.h"

#include <ATen/Parallel.h>

#include <limits>

#include "kernels.h"

namespace rlhf_lightning {

namespace {
template <typename T>
void run(
    const LossKernels<T>& kernel, ClippedLossTensors& t, double clip_low, double clip_high, double dual_clip) {
  const PolicyLoss<T> arguments{
      t.learned.const_data_ptr<T>(), t.old.const_data_ptr<T>(), t.target.const_data_ptr<T>(),
      t.loss.mutable_data_ptr<T>(), t.clipped.mutable_data_ptr<bool>(), t.slope.mutable_data_ptr<T>(),
      static_cast<T>(1 - clip_low), static_cast<T>(1 + clip_high), static_cast<T>(dual_clip)};
  at::parallel_for(
      0, t.loss.numel(), kLossGrain, [&](int64_t begin, int64_t end) { kernel.policy(arguments, begin, end); });
}
}  // namespace

ClippedLoss clipped_policy_loss(
    const at::Tensor& log_probs, const at::Tensor& old_log_probs, const at::Tensor& advantages, double clip_low,
    double clip_high, std::optional<double> dual_clip) {
  auto t = clipped_loss_tensors(
      "clipped_policy_loss", {"log_probs", log_probs}, {"old_log_probs", old_log_probs}, {"advantages", advantages});
  const double dual = dual_clip.value_or(std::numeric_limits<double>::infinity());
  if (t.loss.scalar_type() == at::kDouble) {
    run<double>(kernels().loss_double, t, clip_low, clip_high, dual);
  } else {
    run<float>(kernels().loss_float, t, clip_low, clip_high, dual);
  }
  return {t.loss, t.clipped, t.slope};
}

}  // namespace rlhf_lightning
