#include "clipped_value_loss.h"

#include <ATen/Parallel.h>

#include <limits>

#include "check.h"
#include "kernels.h"

namespace rlhf_lightning {

namespace {
constexpr const char* kName = "clipped_value_loss";
constexpr int64_t kGrain = 32768;  // elements worth a thread

template <typename T>
void run(
    const LossKernels<T>& kernel, const at::Tensor& values, const at::Tensor& old_values, const at::Tensor& returns,
    double clip, at::Tensor& loss, at::Tensor& clipped, at::Tensor& slope) {
  const ValueLoss<T> arguments{
      values.const_data_ptr<T>(), old_values.const_data_ptr<T>(), returns.const_data_ptr<T>(),
      loss.mutable_data_ptr<T>(), clipped.mutable_data_ptr<bool>(), slope.mutable_data_ptr<T>(), static_cast<T>(clip)};
  at::parallel_for(0, loss.numel(), kGrain, [&](int64_t begin, int64_t end) { kernel.value(arguments, begin, end); });
}
}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> clipped_value_loss(
    const at::Tensor& values, const at::Tensor& old_values, const at::Tensor& returns, std::optional<double> clip) {
  check_float(kName, "values", values);
  check_float(kName, "old_values", old_values);
  check_shape(kName, "old_values", old_values, values.sizes(), "values");
  check_device(kName, "old_values", old_values, values, "values");
  check_float(kName, "returns", returns);
  check_shape(kName, "returns", returns, values.sizes(), "values");
  check_device(kName, "returns", returns, values, "values");

  const auto type = compute_type({values, old_values, returns});
  const auto v = values.to(type).contiguous(), o = old_values.to(type).contiguous(), r = returns.to(type).contiguous();
  auto loss = at::empty(v.sizes(), v.options()), slope = at::empty(v.sizes(), v.options());
  auto clipped = at::empty(v.sizes(), v.options().dtype(at::kBool));
  const double limit = clip.value_or(std::numeric_limits<double>::infinity());
  if (type == at::kDouble) {
    run<double>(kernels().loss_double, v, o, r, limit, loss, clipped, slope);
  } else {
    run<float>(kernels().loss_float, v, o, r, limit, loss, clipped, slope);
  }
  return {loss, clipped, slope};
}

}  // namespace rlhf_lightning
