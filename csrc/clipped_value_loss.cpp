// PPO's clipped value loss on the CPU: checks the arguments and splits the elements over threads.
#include "clipped_value_loss.h"

#include <ATen/Parallel.h>

#include <limits>

#include "kernels.h"

namespace rlhf_lightning {

namespace {
template <typename T>
void run(const LossKernels<T>& kernel, ClippedLossTensors& t, double clip) {
  const ValueLoss<T> arguments{
      t.learned.const_data_ptr<T>(), t.old.const_data_ptr<T>(), t.target.const_data_ptr<T>(),
      t.loss.mutable_data_ptr<T>(), t.clipped.mutable_data_ptr<bool>(), t.slope.mutable_data_ptr<T>(),
      static_cast<T>(clip)};
  at::parallel_for(
      0, t.loss.numel(), kLossGrain, [&](int64_t begin, int64_t end) { kernel.value(arguments, begin, end); });
}
}  // namespace

ClippedLoss clipped_value_loss(
    const at::Tensor& values, const at::Tensor& old_values, const at::Tensor& returns, std::optional<double> clip) {
  auto t = clipped_loss_tensors(
      "clipped_value_loss", {"values", values}, {"old_values", old_values}, {"returns", returns});
  const double limit = clip.value_or(std::numeric_limits<double>::infinity());
  if (t.loss.scalar_type() == at::kDouble) {
    run<double>(kernels().loss_double, t, limit);
  } else {
    run<float>(kernels().loss_float, t, limit);
  }
  return {t.loss, t.clipped, t.slope};
}

}  // namespace rlhf_lightning
