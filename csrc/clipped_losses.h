// What clipped_policy_loss and clipped_value_loss share: three operands of one shape, three results, and the gradient.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <tuple>

namespace rlhf_lightning {

// (loss, clipped, slope); slope is d loss / d learned, elementwise, so that the backward is one product.
using ClippedLoss = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr int64_t kLossGrain = 32768;  // elements that are worth another thread

struct NamedTensor {
  const char* name;
  const at::Tensor& tensor;
};
void check_clipped_loss(const char* op, NamedTensor learned, NamedTensor old, NamedTensor target);

// The operands, checked, contiguous and in the compute dtype; and the results, not yet written.
struct ClippedLossTensors {
  at::Tensor learned, old, target;
  at::Tensor loss, clipped, slope;
};
ClippedLossTensors clipped_loss_tensors(const char* op, NamedTensor learned, NamedTensor old, NamedTensor target);

// grad_loss * slope in `dtype`: in one pass where a kernel has this pair of dtypes, else by torch's product and cast.
at::Tensor clipped_loss_backward(const at::Tensor& grad_loss, const at::Tensor& slope, at::ScalarType dtype);
at::Tensor clipped_loss_backward_composed(const at::Tensor& grad_loss, const at::Tensor& slope, at::ScalarType dtype);

// What that one pass reads, checked and dense, and what it writes.
struct ClippedLossBackward {
  at::Tensor grad;
  bool same;  // grad is one number for all elements, as the backward of a sum or a mean gives it
  at::Tensor slope;
  at::Tensor out;  // undefined where no kernel has this pair of dtypes
};
ClippedLossBackward clipped_loss_backward_tensors(
    const at::Tensor& grad_loss, const at::Tensor& slope, at::ScalarType dtype);

// Returns what `compute` returns, differentiable once in `learned`. `compute` runs below autograd's dispatch key.
ClippedLoss with_gradient(const char* op, const at::Tensor& learned, const std::function<ClippedLoss()>& compute);

}  // namespace rlhf_lightning
