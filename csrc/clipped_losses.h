// What clipped_policy_loss and clipped_value_loss share: three operands alike, three results, and the gradient.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <tuple>

namespace rlhf_lightning {

// (loss, clipped, slope); slope is d loss / d learned, elementwise, so that the backward is one product.
using ClippedLoss = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr int64_t kLossGrain = 32768;  // elements worth a thread

struct NamedTensor {
  const char* name;
  const at::Tensor& tensor;
};
void check_clipped_loss(const char* op, NamedTensor learned, NamedTensor old, NamedTensor target);

// The operands, checked, contiguous and in the dtype of the arithmetic; and the results, not yet written.
struct ClippedLossTensors {
  at::Tensor learned, old, target;
  at::Tensor loss, clipped, slope;
};
ClippedLossTensors clipped_loss_tensors(const char* op, NamedTensor learned, NamedTensor old, NamedTensor target);

// grad_loss * slope in this dtype: in one pass where a kernel has this pair of dtypes, else composed of two.
at::Tensor clipped_loss_backward(const at::Tensor& grad_loss, const at::Tensor& slope, at::ScalarType dtype);
at::Tensor clipped_loss_backward_composed(const at::Tensor& grad_loss, const at::Tensor& slope, at::ScalarType dtype);

// What the one pass reads, checked and dense, and what it writes.
struct ClippedLossBackward {
  at::Tensor grad;
  bool same;  // grad is one number, seen at every place: what a sum or a mean hands back
  at::Tensor slope;
  at::Tensor out;  // undefined where there is no such pass
};
ClippedLossBackward clipped_loss_backward_tensors(
    const at::Tensor& grad_loss, const at::Tensor& slope, at::ScalarType dtype);

// What `compute` returns, differentiable once in `learned`; to be called below autograd's dispatch key by `compute`.
ClippedLoss with_gradient(const char* op, const at::Tensor& learned, const std::function<ClippedLoss()>& compute);

}  // namespace rlhf_lightning
