// The clipped losses on CUDA tensors: checks, allocates, sets the device, and launches the kernels of the .cu files.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>

#include "check.h"
#include "clipped_losses.h"
#include "clipped_losses_launch.h"
#include "cuda_tensors.h"

namespace rlhf_lightning {
namespace {

// Checks, allocates, and calls launch(arrays, stream). Operands of different types are first converted to the compute type.
template <typename Launch>
ClippedLoss run(
    const char* op, NamedTensor learned, NamedTensor old, NamedTensor target, const Launch& launch) {
  check_clipped_loss(op, learned, old, target);
  const c10::cuda::CUDAGuard guard(learned.tensor.device());
  const auto results = compute_type({learned.tensor, old.tensor, target.tensor});
  const auto own = learned.tensor.scalar_type();
  const auto type = own == old.tensor.scalar_type() && own == target.tensor.scalar_type() ? own : results;
  const auto ready = [type](const at::Tensor& x) { return x.to(type).contiguous(); };
  const at::Tensor x = ready(learned.tensor), o = ready(old.tensor), t = ready(target.tensor);
  const at::TensorOptions options = x.options().dtype(results);
  at::Tensor loss = at::empty(x.sizes(), options), slope = at::empty(x.sizes(), options);
  at::Tensor clipped = at::empty(x.sizes(), options.dtype(at::kBool));
  const ClippedLossArrays arrays{x.const_data_ptr(), o.const_data_ptr(), t.const_data_ptr(),
                                 element_type(type), loss.mutable_data_ptr(), clipped.mutable_data_ptr<bool>(),
                                 slope.mutable_data_ptr(), x.numel()};
  check_launch(op, launch(arrays, c10::cuda::getCurrentCUDAStream()));
  return {loss, clipped, slope};
}

ClippedLoss clipped_policy_loss_cuda(
    const at::Tensor& log_probs, const at::Tensor& old_log_probs, const at::Tensor& advantages, double clip_low,
    double clip_high, std::optional<double> dual_clip) {
  const double dual = dual_clip.value_or(std::numeric_limits<double>::infinity());
  return run(
      "clipped_policy_loss", {"log_probs", log_probs}, {"old_log_probs", old_log_probs}, {"advantages", advantages},
      [&](const ClippedLossArrays& arrays, cudaStream_t stream) {
        return launch_clipped_policy_loss(arrays, clip_low, clip_high, dual, stream);
      });
}

ClippedLoss clipped_value_loss_cuda(
    const at::Tensor& values, const at::Tensor& old_values, const at::Tensor& returns, std::optional<double> clip) {
  const double limit = clip.value_or(std::numeric_limits<double>::infinity());
  return run(
      "clipped_value_loss", {"values", values}, {"old_values", old_values}, {"returns", returns},
      [&](const ClippedLossArrays& arrays, cudaStream_t stream) {
        return launch_clipped_value_loss(arrays, limit, stream);
      });
}

at::Tensor clipped_loss_backward_cuda(const at::Tensor& grad_loss, const at::Tensor& slope, at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(slope.device());
  auto t = clipped_loss_backward_tensors(grad_loss, slope, dtype);
  if (!t.out.defined()) return clipped_loss_backward_composed(grad_loss, slope, dtype);
  check_launch(
      "clipped_loss_backward",
      launch_clipped_loss_gradient(
          t.grad.const_data_ptr(), t.same, t.slope.const_data_ptr(), element_type(dtype), t.out.mutable_data_ptr(),
          t.out.numel(), c10::cuda::getCurrentCUDAStream()));
  return t.out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rlhf_lightning, CUDA, m) {
  m.impl("clipped_policy_loss", &clipped_policy_loss_cuda);
  m.impl("clipped_value_loss", &clipped_value_loss_cuda);
  m.impl("clipped_loss_backward", &clipped_loss_backward_cuda);
}

}  // namespace rlhf_lightning
